"""The places of tiles on a figure. Pure: arrays in, one array and places of titles out."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Tile = npt.NDArray[np.uint8]
GAP = 0.05
"""Between tiles, as a share of a tile's side; three times that where real and generated meet."""


@dataclass(frozen=True)
class Sheet:
    """Rows of equally many tiles [px, px, 3]; one title per column.

    `set_apart` are the columns that a wider gap separates from the others: those of real tiles.
    """

    rows: Sequence[Sequence[Tile]]
    titles: Sequence[str]
    set_apart: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Canvas:
    """The sheet as one RGB image [H, W, 3]; each column's left edge and the tile's side in it."""

    pixels: Tile
    lefts: tuple[int, ...]
    tile_px: int


def compose_sheet(sheet: Sheet) -> Canvas:
    """Lay out a sheet on white, uint8 [H, W, 3]."""
    side = sheet.rows[0][0].shape[0]
    gap = max(round(GAP * side), 1)
    lefts = column_lefts(len(sheet.titles), side, gap, sheet.set_apart)
    height = len(sheet.rows) * (side + gap) - gap
    pixels = np.full((height, lefts[-1] + side, 3), 255, np.uint8)
    for row, tiles in enumerate(sheet.rows):
        top = row * (side + gap)
        for left, tile in zip(lefts, tiles, strict=True):
            pixels[top : top + side, left : left + side] = tile
    return Canvas(pixels, lefts, side)


def column_lefts(columns: int, side: int, gap: int, set_apart: frozenset[int]) -> tuple[int, ...]:
    """Left edges of the columns in px; the gap around those set apart is 3 times as wide."""
    lefts = [0]
    for column in range(1, columns):
        wide = (column in set_apart) != (column - 1 in set_apart)
        lefts.append(lefts[-1] + side + (3 * gap if wide else gap))
    return tuple(lefts)
