"""Small pictures of the tissue overlays, made only where they are missing or out of date."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt

from pipeline.dataset import Dataset, Slide, commit_bytes

Bgr = npt.NDArray[np.uint8]

_SIDE_PX, _QUALITIES, _MAX_BYTES = 288, (82, 72, 60, 45), 20_000
_LEGEND_WIDTH_PX = 640
"""Overlays are widened to this for their legend; wider ones are as wide as their slide."""


@dataclass(frozen=True)
class Thumb:
    """A slide, its overlay, and where its small picture belongs."""

    slide: Slide
    overlay: Path
    final: Path

    @property
    def is_fresh(self) -> bool:
        """Whether the small picture is there and no older than the overlay."""
        try:
            return self.final.stat().st_mtime_ns >= self.overlay.stat().st_mtime_ns
        except OSError:
            return False


def make_thumbs(
    target: Dataset, run_id: str, thumbs: Sequence[Thumb], workers: int, on_done: Callable[[], None]
) -> dict[str, str]:
    """Write the small pictures with that many threads; returns why some could not be made.

    Decoding releases the interpreter's lock, so threads are as good as processes here. A picture
    that cannot be read affects no other; an interrupt drops what has not begun.
    """
    # Not `with`: that would wait for all pictures after an interrupt.
    errors: dict[str, str] = {}
    pool = ThreadPoolExecutor(max(1, workers))
    try:
        made = pool.map(partial(_make_thumb, target, run_id), thumbs)
        for thumb, error in zip(thumbs, made, strict=True):
            if error:
                errors[thumb.slide.slide_id] = error
            on_done()
    finally:
        pool.shutdown(cancel_futures=True)
    return errors


def _make_thumb(target: Dataset, run_id: str, thumb: Thumb) -> str:
    try:
        data = np.frombuffer(thumb.overlay.read_bytes(), np.uint8)
        picture, factor = _decode_picture(data)
    except (OSError, cv2.error) as error:
        return f"{thumb.overlay} cannot be read: {error}"
    if picture is None:
        return f"{thumb.overlay} is not a picture; run `pipeline verify --repair`, then `tissue`"
    without_legend = crop_legend(picture, thumb.slide, _LEGEND_WIDTH_PX / factor)
    commit_bytes(target, run_id, thumb.final, encode_small(without_legend))
    return ""


def _decode_picture(data: npt.NDArray[np.uint8]) -> tuple[Bgr | None, int]:
    """The picture at a quarter of its size, or whole where that is too little; the factor."""
    if not data.size:
        return None, 1
    quarter = cv2.imdecode(data, cv2.IMREAD_REDUCED_COLOR_4)
    if quarter is not None and max(quarter.shape) >= _SIDE_PX:
        return np.asarray(quarter, np.uint8), 4
    whole = cv2.imdecode(data, cv2.IMREAD_COLOR)
    return (None if whole is None else np.asarray(whole, np.uint8)), 1


def crop_legend(picture: Bgr, slide: Slide, legend_width: float) -> Bgr:
    """The overlay [h, w, 3] without the legend below the slide.

    The slide's own shape says where it ends. An overlay no wider than its legend is left whole:
    it does not say how wide the slide is.
    """
    height, width = picture.shape[:2]
    if not slide.width or width <= legend_width:
        return picture
    return picture[: min(height, max(1, round(width * slide.height / slide.width)))]


def encode_small(picture: Bgr) -> bytes:
    """JPEG of at most 288 px a side, at the best of a few qualities within 20 kB (or the last)."""
    scale = min(1.0, _SIDE_PX / max(picture.shape[:2]))
    size = tuple(max(1, round(length * scale)) for length in picture.shape[1::-1])
    small = cv2.resize(picture, size, interpolation=cv2.INTER_AREA)
    data = b""
    for quality in _QUALITIES:
        data = cv2.imencode(".jpg", small, [cv2.IMWRITE_JPEG_QUALITY, quality])[1].tobytes()
        if len(data) <= _MAX_BYTES:
            break
    return data
