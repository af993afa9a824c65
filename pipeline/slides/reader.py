"""What every slide reader offers: levels, resolution metadata, RGB windows of a level."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt

from common.errors import UserError
from common.text import one_line


class SlideOpenError(UserError):
    """The file is not a slide that the reader can open."""


class SlideReadError(UserError):
    """A region of an open slide could not be read; the message has its coordinates."""


MOST_EXTENT_PX = 1 << 38
"""Pixels of the largest level: a glass of 100 x 75 mm at 0.17 µm per px."""
_IMPLAUSIBLE_FROM_PX, _MOST_PX_PER_BYTE = 1 << 33, 10_000
"""White glass takes a byte for 64 px in JPEG, for 700 in JPEG 2000, for 8,000 in tiles left out."""


def refuse_extent(width: int, height: int, size: int) -> None:
    """Raise `SlideOpenError` for a picture, in px, that no file of `size` bytes has.

    Grids and masks are as large as a header says, whatever pixels there are.
    """
    area = width * height
    if area > MOST_EXTENT_PX:
        raise SlideOpenError(
            f"it claims {width}x{height} px, which is more than {MOST_EXTENT_PX:,}"
        )
    if area > max(_IMPLAUSIBLE_FROM_PX, _MOST_PX_PER_BYTE * size):
        raise SlideOpenError(
            f"it claims {width}x{height} px, more than {_MOST_PX_PER_BYTE:,} for each of its "
            f"{size:,} bytes; the file is damaged"
        )


@dataclass(frozen=True)
class Level:
    """A pyramid level: size in pixels, and level-0 pixels per pixel of this level (>= 1)."""

    width: int
    height: int
    downsample: float


@dataclass(frozen=True)
class ResolutionTags:
    """µm per pixel at level 0 as (x, y), by where they were found.

    `ome` is from OME-XML, `others` are what the vendor's metadata states in further places.
    `magnification` is the vendor's for the whole image (20 for about 0.5 µm), `lens` that of the
    objective alone, which cameras and adapters change.
    """

    vendor: tuple[float, float] | None = None
    tiff: tuple[float, float] | None = None
    ome: tuple[float, float] | None = None
    others: tuple[tuple[float, float], ...] = ()
    magnification: float | None = None
    lens: float | None = None


class SlideReader(ABC):
    """An open slide, read as RGB uint8 [h, w, 3]. Use as a context manager, so that it is closed.

    `levels` are (width, height) in px and level-0 px per px of the level, the finest first.
    """

    name: str
    path: Path
    vendor: str
    levels: tuple[Level, ...]
    resolution: ResolutionTags
    codec: str = ""
    """`jpeg`, `jpeg2000`, or '' where the reader does not say."""
    series: str = ""
    """The image of the file that is shown, '' where the file has one only."""
    notes: tuple[str, ...] = ()
    """What a person should know about how the file is read, a clause each."""
    bounds: tuple[int, int, int, int] | None = None
    """The scanned area (x, y, width, height) in level-0 px, None where the file states none."""
    icc_profile: bytes | None = None
    """The colour profile that the slide carries; readers never apply it."""
    native_tiles: tuple[tuple[int, int], ...] = ()
    """(width, height) of each level's native tiles; empty where the reader does not say."""
    cache_bytes: int = 64 << 20
    """Most memory that decoded native tiles take."""

    @abstractmethod
    def _read_window(
        self, level: int, x: int, y: int, width: int, height: int
    ) -> npt.NDArray[np.uint8]:
        """RGB uint8 [height, width, 3] of a window inside the level; raises where it cannot."""

    @abstractmethod
    def close(self) -> None:
        """Release the file."""

    def expect_windows(self, level: int, windows: npt.NDArray[np.int64]) -> None:  # noqa: B027
        """Receive the windows int64 [n, 4] (x, y, w, h) of a level that will be read, each once.

        A reader that can keeps what several of them share until the last is read; others do
        nothing here.
        """

    def read(self, level: int, x: int, y: int, width: int, height: int) -> npt.NDArray[np.uint8]:
        """RGB uint8 [height, width, 3] of a window in pixels of `level`; outside is white.

        Raises `SlideReadError` with slide and coordinates: a region that cannot be read is never
        replaced by white.
        """
        size = self.levels[level]
        left, top = max(x, 0), max(y, 0)
        right, bottom = min(x + width, size.width), min(y + height, size.height)
        # Libraries differ in what they show beyond the slide: it never gets to them.
        inside = right > left and bottom > top
        try:
            if inside and (right - left, bottom - top) == (width, height):
                return self._read_window(level, x, y, width, height)
            canvas = np.full((height, width, 3), 255, np.uint8)
            if inside:
                part = self._read_window(level, left, top, right - left, bottom - top)
                canvas[top - y : bottom - y, left - x : right - x] = part
            return canvas
        except Exception as error:
            reason = one_line(error, 160) or type(error).__name__
            raise SlideReadError(
                f"slide {self.path.name}: cannot read level {level} at x={x}, y={y}, "
                f"{width}x{height} px ({reason}); the file is damaged, fetch it again"
            ) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def over_white(rgba: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """RGB of RGBA uint8 [h, w, 4] over white: OpenSlide gives clear black beyond the scan.

    >>> over_white(np.array([[[0, 0, 0, 0], [9, 9, 9, 255]]], np.uint8)).tolist()
    [[[255, 255, 255], [9, 9, 9]]]
    """
    alpha = rgba[..., 3:]
    if alpha.min() == 255:
        return np.ascontiguousarray(rgba[..., :3])
    weight = alpha.astype(np.uint16)
    blended = rgba[..., :3] * weight + 255 * (255 - weight)
    return ((blended + 127) // 255).astype(np.uint8)
