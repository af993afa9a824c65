"""The picture to look at: the slide, its mask, the tiles kept and refused by reason."""

import cv2
import numpy as np
import numpy.typing as npt

from pipeline.tissue.classes import TissueClass
from pipeline.tissue.verdict import VERDICT_NAMES, Verdict

Rgb = npt.NDArray[np.uint8]
Colour = tuple[int, int, int]

CLASS_COLOURS: dict[TissueClass, Colour] = {
    TissueClass.BACKGROUND: (255, 255, 255),
    TissueClass.TISSUE: (46, 125, 50),
    TissueClass.PEN: (21, 101, 192),
    TissueClass.OUT_OF_FOCUS: (239, 108, 0),
    TissueClass.FOLD: (123, 31, 162),
    TissueClass.OTHER: (84, 84, 84),
}
VERDICT_COLOURS: dict[Verdict, Colour] = {
    Verdict.NO_TISSUE: (205, 205, 205),
    Verdict.KEPT: CLASS_COLOURS[TissueClass.TISSUE],
    Verdict.LITTLE_TISSUE: (197, 160, 40),
    **{Verdict(value): CLASS_COLOURS[value] for value in TissueClass if value > TissueClass.TISSUE},
}
_ORDER = (Verdict.NO_TISSUE, *(v for v in Verdict if v > Verdict.KEPT), Verdict.KEPT)
_OUTLINE: Colour = (20, 20, 20)
_MAX_SIDE_PX, _MIN_WIDTH_PX = 1600, 640
_LINE_PX, _SWATCH_PX, _FONT = 22, 12, cv2.FONT_HERSHEY_SIMPLEX
_FONT_SCALE = 0.45
_MIN_BOX_PX = 9.0
_QUALITIES = (88, 80, 72, 64, 56, 48, 40, 30, 20)


def draw_overlay(
    rgb: Rgb,
    mask: npt.NDArray[np.uint8],
    x: npt.NDArray[np.float64],
    y: npt.NDArray[np.float64],
    size: float,
    verdict: npt.NDArray[np.uint8],
    title: str,
) -> Rgb:
    """RGB picture uint8 [h, w, 3] of the slide, with a legend and the numbers below.

    The tissue is outlined, artifacts are tinted, every tile of the grid is boxed in the colour
    of its verdict (where tiles are smaller than a box can be drawn, they are tinted instead).
    `x`, `y` and `size` are in pixels of `rgb`; `mask` may be of another size and is stretched.
    """
    scale = min(1.0, _MAX_SIDE_PX / max(rgb.shape[:2]))
    canvas = _resize_image(rgb, rgb.shape[1] * scale, rgb.shape[0] * scale, cv2.INTER_AREA)
    large = _resize_image(mask, canvas.shape[1], canvas.shape[0], cv2.INTER_NEAREST)
    tint_artifacts(canvas, large, 0.45)
    # Pen is on the glass, not of the slide: its outline would be taken for tissue's.
    tissue = (large > TissueClass.BACKGROUND) & (large != TissueClass.PEN)
    outlines, _ = cv2.findContours(tissue.astype(np.uint8), cv2.RETR_LIST, cv2.CHAIN_APPROX_SIMPLE)
    cv2.drawContours(canvas, outlines, -1, _OUTLINE, 1, cv2.LINE_AA)
    _draw_tiles(canvas, x * scale, y * scale, size * scale, verdict)
    # Kept tiles are in the legend even where there are none: that is what is looked for.
    counts = np.bincount(verdict, minlength=len(Verdict))
    entries = [
        (VERDICT_COLOURS[value], f"{VERDICT_NAMES[value]} {counts[value]}")
        for value in reversed(_ORDER)
        if counts[value] or value == Verdict.KEPT
    ]
    return _add_legend(canvas, title, entries)


def draw_refused(rgb: Rgb, title: str) -> Rgb:
    """Picture uint8 [h, w, 3] of a slide that was refused as a whole: only the title is added."""
    scale = min(1.0, _MAX_SIDE_PX / max(rgb.shape[:2]))
    picture = _resize_image(rgb, rgb.shape[1] * scale, rgb.shape[0] * scale, cv2.INTER_AREA)
    return _add_legend(picture, title, [])


def tint_artifacts(canvas: Rgb, mask: npt.NDArray[np.uint8], strength: float) -> None:
    """Colour the artifacts of a mask [h, w] into the canvas [h, w, 3], in place.

    `strength` is from 0 (not at all) to 1 (the artifact's colour alone).
    """
    for value, colour in CLASS_COLOURS.items():
        where = mask == value
        if value > TissueClass.TISSUE and where.any():
            mixed = (1 - strength) * canvas[where] + strength * np.array(colour)
            canvas[where] = mixed.astype(np.uint8)


def _add_legend(picture: Rgb, title: str, entries: list[tuple[Colour, str]]) -> Rgb:
    """The picture over a white strip with a title, of one or more lines, and the swatches."""
    width = max(picture.shape[1], _MIN_WIDTH_PX)
    lines, titles = _legend_lines(entries, width), title.splitlines()
    height = picture.shape[0] + _LINE_PX * (len(titles) + len(lines)) + 8
    canvas = np.full((height, width, 3), 255, np.uint8)
    canvas[: picture.shape[0], : picture.shape[1]] = picture
    baseline = picture.shape[0] - 4
    for text in titles:
        baseline += _LINE_PX
        _write_text(canvas, text, 6, baseline)
    for line in lines:
        baseline += _LINE_PX
        for left, colour, text in line:
            corner = (left + _SWATCH_PX, baseline - _SWATCH_PX)
            cv2.rectangle(canvas, (left, baseline), corner, colour, cv2.FILLED)
            _write_text(canvas, text, left + _SWATCH_PX + 5, baseline)
    return canvas


def encode_jpeg(rgb: Rgb, max_bytes: int) -> bytes:
    """JPEG at the best of a few qualities that stays within `max_bytes` (or at the last)."""
    bgr = cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR)
    data = b""
    for quality in _QUALITIES:
        data = cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, quality])[1].tobytes()
        if len(data) <= max_bytes:
            break
    return data


def _legend_lines(
    entries: list[tuple[Colour, str]], width: int
) -> list[list[tuple[int, Colour, str]]]:
    lines: list[list[tuple[int, Colour, str]]] = [[]]
    left = 6
    for colour, text in entries:
        needed = _SWATCH_PX + 5 + cv2.getTextSize(text, _FONT, _FONT_SCALE, 1)[0][0] + 16
        if lines[-1] and left + needed > width:
            lines.append([])
            left = 6
        lines[-1].append((left, colour, text))
        left += needed
    return lines


def _write_text(canvas: Rgb, text: str, left: int, baseline: int) -> None:
    # OpenCV's built-in font has ASCII only; a slide's name may have anything in it.
    plain = text.replace("µ", "u").encode("ascii", "replace").decode()
    cv2.putText(canvas, plain, (left, baseline), _FONT, _FONT_SCALE, _OUTLINE, 1, cv2.LINE_AA)


def _draw_tiles(
    canvas: Rgb,
    x: npt.NDArray[np.float64],
    y: npt.NDArray[np.float64],
    size: float,
    verdict: npt.NDArray[np.uint8],
) -> None:
    """Boxes of all tiles, kept ones last and on top; sizes in pixels of the canvas."""
    # On a very large slide tiles are a few pixels: boxes would cover all of them.
    boxed = size >= _MIN_BOX_PX
    target = canvas if boxed else canvas.copy()
    for value in _ORDER:
        if not boxed and value == Verdict.NO_TISSUE:
            continue
        thin = 1 if value == Verdict.NO_TISSUE or size < 24 else 2
        inset = 0 if value == Verdict.NO_TISSUE or not boxed else thin
        for index in np.flatnonzero(verdict == value):
            corner = (round(x[index]) + inset, round(y[index]) + inset)
            other = (round(x[index] + size) - 1 - inset, round(y[index] + size) - 1 - inset)
            thickness = thin if boxed else cv2.FILLED
            cv2.rectangle(target, corner, other, VERDICT_COLOURS[value], thickness)
    if not boxed:
        canvas[:] = cv2.addWeighted(canvas, 0.65, target, 0.35, 0)


def _resize_image(image: Rgb, width: float, height: float, interpolation: int) -> Rgb:
    whole = (max(1, round(width)), max(1, round(height)))
    return np.array(cv2.resize(image, whole, interpolation=interpolation), np.uint8)
