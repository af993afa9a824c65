"""Many small pictures with their masks on one sheet, to judge a detector at a glance."""

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt

from pipeline.tissue.classes import CLASS_NAMES, TissueClass
from pipeline.tissue.overlay import CLASS_COLOURS, with_legend

Rgb = npt.NDArray[np.uint8]
_GAP_PX = 6
_TITLE_PX = 18


@dataclass(frozen=True)
class SheetCell:
    """A picture uint8 [h, w, 3], its mask uint8 [h, w] of `TissueClass` values, its name."""

    title: str
    rgb: Rgb
    mask: npt.NDArray[np.uint8]


def contact_sheet(cells: Sequence[SheetCell], columns: int = 4, cell_px: int = 200) -> Rgb:
    """One RGB sheet: each picture and, right of it, the same with its classes in colour.

    Every cell is `2 * cell_px` wide; pictures keep their shape. A legend stands below.
    """
    rows = [cells[i : i + columns] for i in range(0, len(cells), columns)]
    width = columns * (2 * cell_px + _GAP_PX)
    sheet = np.full((len(rows) * (cell_px + _TITLE_PX + _GAP_PX), width, 3), 255, np.uint8)
    for row, line in enumerate(rows):
        for column, cell in enumerate(line):
            top, left = row * (cell_px + _TITLE_PX + _GAP_PX), column * (2 * cell_px + _GAP_PX)
            _draw_cell(sheet[top:, left : left + 2 * cell_px], cell, cell_px)
    legend = [(CLASS_COLOURS[one], CLASS_NAMES[one]) for one in TissueClass if one]
    return with_legend(sheet, f"{len(cells)} pictures", legend)


def _draw_cell(canvas: Rgb, cell: SheetCell, cell_px: int) -> None:
    text = cell.title.encode("ascii", "replace").decode()
    cv2.putText(
        np.asarray(canvas), text, (2, _TITLE_PX - 5), cv2.FONT_HERSHEY_SIMPLEX, 0.38, (0, 0, 0), 1,
        cv2.LINE_AA,
    )  # fmt: skip
    scale = cell_px / max(cell.rgb.shape[:2])
    size = tuple(max(1, round(length * scale)) for length in cell.rgb.shape[1::-1])
    kind = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    picture = np.asarray(cv2.resize(cell.rgb, size, interpolation=kind), np.uint8)
    mask = cv2.resize(cell.mask, size, interpolation=cv2.INTER_NEAREST)
    palette = np.array([CLASS_COLOURS[one] for one in TissueClass], np.float32)
    coloured = (0.5 * picture + 0.5 * palette[mask]).astype(np.uint8)
    coloured[mask == TissueClass.BACKGROUND] = picture[mask == TissueClass.BACKGROUND]
    for left, image in ((0, picture), (cell_px, coloured)):
        canvas[_TITLE_PX : _TITLE_PX + size[1], left : left + size[0]] = image
