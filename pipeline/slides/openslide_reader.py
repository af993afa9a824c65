"""Slides through OpenSlide: Aperio, Hamamatsu, MIRAX, DICOM, Leica, generic tiled TIFF."""

import re
from collections import OrderedDict
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
import openslide

from pipeline.slides.dicom_series import read_head, series_files
from pipeline.slides.level_blocks import block_edges, blocks_between
from pipeline.slides.metadata import read_description
from pipeline.slides.reader import (
    Level,
    ResolutionTags,
    SlideOpenError,
    SlideReader,
    over_white,
)
from pipeline.slides.resolution import level_downsamples

_GENERIC_VENDORS = {"generic-tiff"}
_UNIT_IN_UM = {"inch": 25_400.0, "centimeter": 10_000.0}
_MOST_REDUCTION = 4
_BLOCK_CACHE_BYTES = 256 << 20
"""Enough for the four largest blocks that meet in a corner."""
_STRIP_PIXELS = 4_000_000
_UNKNOWN_TILE = (256, 256)
_BOUNDS = (
    openslide.PROPERTY_NAME_BOUNDS_X,
    openslide.PROPERTY_NAME_BOUNDS_Y,
    openslide.PROPERTY_NAME_BOUNDS_WIDTH,
    openslide.PROPERTY_NAME_BOUNDS_HEIGHT,
)


class OpenSlideReader(SlideReader):
    """A slide opened by OpenSlide, with a small tile cache.

    OpenSlide takes positions of level 0. Where a level's downsample is not whole (2.0004) most
    fall between the level's pixels, and OpenSlide interpolates: by up to 61 grey levels. Such a
    level is read in blocks that begin where nothing is interpolated. If it is so large that parts
    are out of reach of any such position, it is reduced from level 0; above a downsample of 4,
    where a position is off by a ninth of a pixel at most, it is left to OpenSlide.
    """

    name = "openslide"

    def __init__(self, path: Path, series: str = "") -> None:
        self.path, self.series = path, series
        self._blocks: OrderedDict[tuple[int, int, int], npt.NDArray[np.uint8]] = OrderedDict()
        self._edges: dict[int, tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]] = {}
        try:
            self._slide = openslide.OpenSlide(_entry_file(path, series))
        except openslide.OpenSlideUnsupportedFormatError as error:
            raise SlideOpenError("not a format that OpenSlide knows") from error
        except (openslide.OpenSlideError, OSError) as error:
            raise SlideOpenError(f"OpenSlide: {error}") from error
        # One cache per handle: a shared one would let slides push out each other's tiles.
        self._slide.set_cache(openslide.OpenSlideCache(self.cache_bytes))
        properties = dict(self._slide.properties)
        self.vendor = properties.get(openslide.PROPERTY_NAME_VENDOR, "")
        self.levels = tuple(
            Level(width, height, float(downsample))
            for (width, height), downsample in zip(
                self._slide.level_dimensions, self._slide.level_downsamples, strict=True
            )
        )
        self.resolution = read_description(
            _resolution_tags(properties, self.vendor),
            properties.get("tiff.ImageDescription", ""),
            self.vendor,
            *self._slide.dimensions,
        )
        self.native_tiles = _native_tile_sizes(properties, len(self.levels))
        self.bounds = _scanned_area(properties, self.levels[0])
        profile = self._slide.color_profile
        self.icc_profile = None if profile is None else profile.tobytes()
        self._plan_blocks()

    def _plan_blocks(self) -> None:
        """Say that levels are read in blocks, so that tiles are cut in an order that suits them."""
        sizes = list(self.native_tiles) or [_UNKNOWN_TILE] * len(self.levels)
        for number, level in enumerate(self.levels):
            if not level.downsample % 1:
                continue
            columns = block_edges(level.width, level.downsample)
            rows = block_edges(level.height, level.downsample)
            if columns is not None and rows is not None:
                self._edges[number] = columns, rows
                sizes[number] = int(np.diff(columns).max()), int(np.diff(rows).max())
        self.native_tiles = tuple(sizes)

    def _read_window(
        self, level: int, x: int, y: int, width: int, height: int
    ) -> npt.NDArray[np.uint8]:
        if level in self._edges:
            return self._join_blocks(level, (x, y, x + width, y + height))
        scale = self.levels[level].downsample
        if scale % 1 and round(scale) <= _MOST_REDUCTION:
            return self._reduce_base(level, x, y, width, height)
        return self.read_interpolated(level, x, y, width, height)

    def read_interpolated(
        self, level: int, x: int, y: int, width: int, height: int
    ) -> npt.NDArray[np.uint8]:
        """A window as OpenSlide shows it: between pixels where the downsample is not whole."""
        # OpenSlide wants level-0 positions, at every level.
        scale = self.levels[level].downsample
        corner = (round(x * scale), round(y * scale))
        region = self._slide.read_region(corner, level, (width, height))
        return over_white(np.asarray(region))

    def _join_blocks(self, level: int, box: tuple[int, int, int, int]) -> npt.NDArray[np.uint8]:
        """The part of a level in `box` (left, top, right, bottom), out of its blocks."""
        left, top, right, bottom = box
        columns, rows = self._edges[level]
        canvas = np.empty((bottom - top, right - left, 3), np.uint8)
        for at_y, end_y in blocks_between(rows, top, bottom):
            for at_x, end_x in blocks_between(columns, left, right):
                block = self._take_block(level, at_x, at_y, end_x - at_x, end_y - at_y)
                x, x_end = max(left, at_x), min(right, end_x)
                y, y_end = max(top, at_y), min(bottom, end_y)
                part = block[y - at_y : y_end - at_y, x - at_x : x_end - at_x]
                canvas[y - top : y_end - top, x - left : x_end - left] = part
        return canvas

    def _take_block(
        self, level: int, x: int, y: int, width: int, height: int
    ) -> npt.NDArray[np.uint8]:
        """A block, from the cache where it is there."""
        key = (level, x, y)
        block = self._blocks.pop(key, None)
        if block is None:
            block = self.read_interpolated(level, x, y, width, height)
        self._blocks[key] = block
        while sum(b.nbytes for b in self._blocks.values()) > _BLOCK_CACHE_BYTES:
            self._blocks.popitem(last=False)
        return block

    def _reduce_base(
        self, level: int, x: int, y: int, width: int, height: int
    ) -> npt.NDArray[np.uint8]:
        """Means of whole pixels of level 0, in strips."""
        scale, base = level_downsamples(self.levels)[level], self.levels[0]
        factor = round(scale)
        # The last column and row of a level may be of less than its share of pixels, or of none.
        left, top = min(round(x * scale), base.width - 1), round(y * scale)
        across = min(width * factor, base.width - left)
        rows = max(1, _STRIP_PIXELS // (width * factor * factor))
        strips = []
        for row in range(0, height, rows):
            count = min(rows, height - row)
            start = min(top + row * factor, base.height - 1)
            down = min(count * factor, base.height - start)
            strip = self.read_interpolated(0, left, start, across, down)
            gaps = (0, count * factor - down, 0, width * factor - across)
            if any(gaps):
                strip = np.asarray(
                    cv2.copyMakeBorder(strip, *gaps, borderType=cv2.BORDER_REPLICATE), np.uint8
                )
            strips.append(cv2.resize(strip, (width, count), interpolation=cv2.INTER_AREA))
        return np.concatenate(strips).astype(np.uint8, copy=False)

    def close(self) -> None:
        """Release the file."""
        self._blocks.clear()
        self._slide.close()


def _entry_file(path: Path, series: str) -> Path:
    """A DICOM slide is a folder or one of its files; OpenSlide takes any and finds the others."""
    if path.is_dir() or (series and read_head(path)):
        return series_files(path, series)[0]
    return path


def _resolution_tags(properties: dict[str, str], vendor: str) -> ResolutionTags:
    x = _parse_number(properties.get(openslide.PROPERTY_NAME_MPP_X))
    y = _parse_number(properties.get(openslide.PROPERTY_NAME_MPP_Y))
    mpp = (x, y) if x and y else None
    if vendor in _GENERIC_VENDORS:
        # OpenSlide derives this one from the TIFF resolution tags: less to be trusted.
        return ResolutionTags(tiff=mpp)
    lens = _parse_number(properties.get(openslide.PROPERTY_NAME_OBJECTIVE_POWER))
    return ResolutionTags(vendor=mpp, tiff=_tiff_mpp(properties), lens=lens)


def _tiff_mpp(properties: dict[str, str]) -> tuple[float, float] | None:
    unit = _UNIT_IN_UM.get(properties.get("tiff.ResolutionUnit", ""))
    x, y = (_parse_number(properties.get(f"tiff.{axis}Resolution")) for axis in "XY")
    return (unit / x, unit / y) if unit and x and y else None


def _native_tile_sizes(properties: dict[str, str], levels: int) -> tuple[tuple[int, int], ...]:
    sizes = []
    for level in range(levels):
        width = _parse_number(properties.get(f"openslide.level[{level}].tile-width"))
        height = _parse_number(properties.get(f"openslide.level[{level}].tile-height"))
        if not width or not height:
            return ()
        sizes.append((int(width), int(height)))
    return tuple(sizes)


def _scanned_area(properties: dict[str, str], base: Level) -> tuple[int, int, int, int] | None:
    """The rectangle (x, y, width, height) of the slide that was scanned, where it is stated."""
    try:
        x, y, width, height = (int(float(properties[name])) for name in _BOUNDS)
    except (KeyError, ValueError, OverflowError):
        return None
    fits = x >= 0 and y >= 0 and x + width <= base.width and y + height <= base.height
    return (x, y, width, height) if fits and width > 0 and height > 0 else None


def _parse_number(text: str | None) -> float | None:
    if text is None or not re.fullmatch(r"\s*[0-9.]+(e[+-]?\d+)?\s*", text, re.IGNORECASE):
        return None
    value = float(text)
    return value if value > 0 else None
