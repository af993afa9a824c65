"""A sheet of tiles as PNG and PDF, without a display and the same in bytes every time."""

import io
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

from common.errors import UserError
from evaluate.figures.layout import Canvas, Sheet, compose
from evaluate.report.plots import INK, STYLE

_DPI = 200
_WARNING = "#b3261e"
_MARGIN_PX, _TITLE_PX, _LINE_PX = 24, 44, 40
_SMALLEST_PX = 900
"""Small sheets are enlarged by whole factors to at least this width, so that titles fit."""


def draw(sheet: Sheet, banner: tuple[str, ...]) -> dict[str, bytes]:
    """The figure's bytes by suffix, ".png" and ".pdf"; `banner` lines stand in red above it.

    A tile's pixel is one pixel of the PNG, or n x n of them on a small sheet.
    """
    canvas = compose(sheet)
    zoom = max(1, -(-_SMALLEST_PX // canvas.pixels.shape[1]))
    height, width = (zoom * size for size in canvas.pixels.shape[:2])
    head = (_TITLE_PX if any(sheet.titles) else 0) + _LINE_PX * len(banner) + _MARGIN_PX
    total_w, total_h = width + 2 * _MARGIN_PX, height + head + _MARGIN_PX
    with mpl.rc_context({**STYLE, "pdf.fonttype": 42}):
        figure = Figure(figsize=(total_w / _DPI, total_h / _DPI), dpi=_DPI, facecolor="white")
        for line, text in enumerate(banner):
            y = 1 - (_MARGIN_PX / 2 + _LINE_PX * (line + 0.5)) / total_h
            figure.text(0.5, y, text, ha="center", va="center", color=_WARNING, weight="bold",
                        size=_text_size(text, total_w))  # fmt: skip
        left, bottom = _MARGIN_PX / total_w, _MARGIN_PX / total_h
        axes = figure.add_axes((left, bottom, width / total_w, height / total_h))
        axes.imshow(canvas.pixels, interpolation="nearest", aspect="auto")
        axes.set_axis_off()
        _titles(figure, sheet, canvas, zoom, (total_w, total_h), head)
        return {".png": _save(figure, "png"), ".pdf": _save(figure, "pdf")}


def _titles(
    figure: Figure, sheet: Sheet, canvas: Canvas, zoom: int, total: tuple[int, int], head: int
) -> None:
    y = 1 - (head - _TITLE_PX / 2) / total[1]
    for left, title in zip(canvas.lefts, sheet.titles, strict=True):
        x = (_MARGIN_PX + zoom * (left + canvas.tile_px / 2)) / total[0]
        figure.text(x, y, title, ha="center", va="center", color=INK, size=9)


def _text_size(text: str, width_px: int) -> float:
    """Points at which a line fits the width: a letter is about 0.62 as wide as high."""
    return min(9.0, 72 / _DPI * (width_px - _MARGIN_PX) / (0.62 * len(text)))


def _save(figure: Figure, kind: str) -> bytes:
    buffer = io.BytesIO()
    # No date and no software: the same tiles give the same bytes.
    without = {"CreationDate": None, "Producer": None, "Creator": None}
    figure.savefig(
        buffer, format=kind, dpi=_DPI, metadata=without if kind == "pdf" else {"Software": None}
    )
    return buffer.getvalue()


def write_figure(out: Path, files: dict[str, bytes]) -> list[Path]:
    """Write the files beside each other under `out`, whose own .png or .pdf is left off."""
    stem = out.with_suffix("") if out.suffix in files else out
    written = []
    for suffix, data in files.items():
        path = stem.with_name(stem.name + suffix)
        staged = path.with_name(f".{path.name}.part")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            staged.write_bytes(data)
            staged.replace(path)
        except OSError as error:
            raise UserError(
                f"cannot write {path}: {error.strerror}; choose another --out"
            ) from error
        written.append(path)
    return written
