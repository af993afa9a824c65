"""The picture a person looks at: the slide, its tissue outline, the tiles that were kept."""

import cv2
import numpy as np
import numpy.typing as npt

from pipeline.tissue.detect import TissueClass

_KEPT, _PEN, _OUTLINE = (46, 125, 50), (21, 101, 192), (20, 20, 20)
_MAX_SIDE_PX = 1800


def draw_overlay(
    rgb: npt.NDArray[np.uint8],
    mask: npt.NDArray[np.uint8],
    x: npt.NDArray[np.float64],
    y: npt.NDArray[np.float64],
    size: float,
) -> npt.NDArray[np.uint8]:
    """RGB picture of the slide: tissue outlined, pen tinted blue, kept tiles boxed in green.

    `x`, `y` and `size` are in pixels of `rgb`; `mask` may be of another size and is stretched.
    """
    scale = min(1.0, _MAX_SIDE_PX / max(rgb.shape[:2]))
    canvas = _resize(rgb, (rgb.shape[1] * scale, rgb.shape[0] * scale), cv2.INTER_AREA)
    big = _resize(mask, (canvas.shape[1], canvas.shape[0]), cv2.INTER_NEAREST)
    pen = big == TissueClass.PEN
    canvas[pen] = (0.4 * canvas[pen] + 0.6 * np.array(_PEN)).astype(np.uint8)
    tissue = (big == TissueClass.TISSUE).astype(np.uint8)
    contours, _ = cv2.findContours(tissue, cv2.RETR_LIST, cv2.CHAIN_APPROX_SIMPLE)
    cv2.drawContours(canvas, contours, -1, _OUTLINE, 1, cv2.LINE_AA)
    for left, top in zip(x * scale, y * scale, strict=True):
        corner = (round(left) + 1, round(top) + 1)
        other = (round(left + size * scale) - 2, round(top + size * scale) - 2)
        cv2.rectangle(canvas, corner, other, _KEPT, 2)
    return canvas


def _resize(
    image: npt.NDArray[np.uint8], size: tuple[float, float], interpolation: int
) -> npt.NDArray[np.uint8]:
    whole = (max(1, round(size[0])), max(1, round(size[1])))
    return np.array(cv2.resize(image, whole, interpolation=interpolation), np.uint8)
