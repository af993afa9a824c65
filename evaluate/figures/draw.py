"""A sheet of tiles as PNG and PDF, without a display, with the same bytes every time."""

import io
from pathlib import Path

from matplotlib.figure import Figure

from common.escape import escape_plot
from common.files import write_files
from common.plain_plots import plain_plots
from evaluate.figures.layout import Sheet, compose_sheet
from evaluate.report.plots import INK, STYLE

_DPI = 200
_WARNING = "#b3261e"
_MARGIN_PX, _TITLE_PX, _LINE_PX = 24, 44, 40
_SMALLEST_PX = 900
"""Small sheets are enlarged by whole factors to at least this width, so that titles fit."""


def draw_sheet(sheet: Sheet, banner: tuple[str, ...]) -> dict[str, bytes]:
    """The figure's bytes by suffix, ".png" and ".pdf"; `banner` lines are red, above the tiles.

    A tile's pixel is one pixel of the PNG, or n x n of them on a small sheet.
    """
    canvas = compose_sheet(sheet)
    zoom = max(1, -(-_SMALLEST_PX // canvas.pixels.shape[1]))
    height, width = (zoom * size for size in canvas.pixels.shape[:2])
    head = (_TITLE_PX if any(sheet.titles) else 0) + _LINE_PX * len(banner) + _MARGIN_PX
    total_w, total_h = width + 2 * _MARGIN_PX, height + head + _MARGIN_PX
    # The figure's size in inches is chosen so that one pixel of a tile is one of the PNG.
    with plain_plots({**STYLE, "pdf.fonttype": 42}):
        figure = Figure(figsize=(total_w / _DPI, total_h / _DPI), dpi=_DPI, facecolor="white")
        for line, text in enumerate(banner):
            y = 1 - (_MARGIN_PX / 2 + _LINE_PX * (line + 0.5)) / total_h
            # A letter is about 0.62 as wide as high: points at which the line fits the width.
            points = min(9.0, 72 / _DPI * (total_w - _MARGIN_PX) / (0.62 * len(text)))
            figure.text(0.5, y, escape_plot(text), ha="center", va="center", color=_WARNING,
                        weight="bold", size=points)  # fmt: skip
        left, bottom = _MARGIN_PX / total_w, _MARGIN_PX / total_h
        axes = figure.add_axes((left, bottom, width / total_w, height / total_h))
        axes.imshow(canvas.pixels, interpolation="nearest", aspect="auto")
        axes.set_axis_off()
        y = 1 - (head - _TITLE_PX / 2) / total_h
        for left_px, title in zip(canvas.lefts, sheet.titles, strict=True):
            x = (_MARGIN_PX + zoom * (left_px + canvas.tile_px / 2)) / total_w
            figure.text(x, y, escape_plot(title), ha="center", va="center", color=INK, size=9)
        return {".png": _save_figure(figure, "png"), ".pdf": _save_figure(figure, "pdf")}


def _save_figure(figure: Figure, kind: str) -> bytes:
    buffer = io.BytesIO()
    # No date and no software: the same tiles give the same bytes.
    without = {"CreationDate": None, "Producer": None, "Creator": None}
    figure.savefig(
        buffer, format=kind, dpi=_DPI, metadata=without if kind == "pdf" else {"Software": None}
    )
    return buffer.getvalue()


def write_figure(out: Path, files: dict[str, bytes]) -> list[Path]:
    """Write one file per suffix under the name `out`, whose .png or .pdf suffix is left off."""
    stem = out.with_suffix("") if out.suffix in files else out
    paths = {stem.with_name(stem.name + suffix): data for suffix, data in files.items()}
    write_files(paths)
    return list(paths)
