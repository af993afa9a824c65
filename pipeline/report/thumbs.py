"""Small pictures of the tissue overlays, made only where they are missing or of another overlay."""

import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt

from common.files import open_regular, read_regular
from common.pictures import PictureSizeError, check_data
from pipeline.dataset import Dataset, Slide, commit_bytes

Bgr = npt.NDArray[np.uint8]

_SIDE_PX, _QUALITIES, _MAX_BYTES = 288, (82, 72, 60, 45), 19_900
_VERSION = 1
"""Raised where pictures of the same overlays are drawn in another way."""
_JPEG_BEGINS, _JPEG_COMMENT = b"\xff\xd8", b"\xff\xfe"
_LEGEND_WIDTH_PX = 640
"""Overlays are widened to this for their legend; wider ones are as wide as their slide."""


@dataclass(frozen=True)
class Thumb:
    """A slide, its overlay with the sum that its journal line states, where its picture belongs."""

    slide: Slide
    overlay: Path
    overlay_sha256: str
    final: Path

    @property
    def is_fresh(self) -> bool:
        """Whether the small picture is there and was made from this overlay.

        It says itself what it was made from: the times of files are anything where a dataset was
        copied or a clock was wrong.
        """
        comment = self.comment(self.overlay_sha256)
        try:
            with open_regular(self.final) as file:
                return file.read(len(comment)) == comment
        except OSError:
            return False

    def comment(self, overlay_sha256: str) -> bytes:
        """The first bytes of a JPEG of which a comment says all that it is made from."""
        made_from = ascii((_VERSION, overlay_sha256, self.slide.width, self.slide.height))
        words = f"histogen {hashlib.sha256(made_from.encode()).hexdigest()}".encode()
        return _JPEG_BEGINS + _JPEG_COMMENT + (len(words) + 2).to_bytes(2, "big") + words


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
        overlay = read_regular(thumb.overlay)
        check_data(overlay, ("JPEG",))
        picture, factor = _decode_picture(np.frombuffer(overlay, np.uint8))
    except (OSError, PictureSizeError, cv2.error) as error:
        return f"{thumb.overlay} cannot be read: {error}"
    if picture is None:
        return f"{thumb.overlay} is not a picture; run `pipeline verify --repair`, then `tissue`"
    without_legend = crop_legend(picture, thumb.slide, _LEGEND_WIDTH_PX / factor)
    # Of what was read, not what the journal says, so that no other picture is taken for it.
    comment = thumb.comment(hashlib.sha256(overlay).hexdigest())
    small = encode_small(without_legend).removeprefix(_JPEG_BEGINS)
    commit_bytes(target, run_id, thumb.final, comment + small)
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
    """JPEG of at most 288 px a side, at the best of a few qualities of 19.9 kB (or the last)."""
    scale = min(1.0, _SIDE_PX / max(picture.shape[:2]))
    size = tuple(max(1, round(length * scale)) for length in picture.shape[1::-1])
    small = cv2.resize(picture, size, interpolation=cv2.INTER_AREA)
    data = b""
    for quality in _QUALITIES:
        data = cv2.imencode(".jpg", small, [cv2.IMWRITE_JPEG_QUALITY, quality])[1].tobytes()
        if len(data) <= _MAX_BYTES:
            break
    return data
