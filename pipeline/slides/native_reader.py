"""Tiled JPEG and JPEG 2000 TIFF/SVS, decoded tile by tile: several times as fast as OpenSlide.

The pixels are OpenSlide's: `scan` compares 16 native tiles of each slide before it chooses this
reader (see `compare`).
"""

import os
import re
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import numpy.typing as npt
import tifffile

from pipeline.slides.metadata import read_description
from pipeline.slides.reader import Level, ResolutionTags, SlideOpenError, SlideReader

CACHE_BYTES = 192 << 20
"""Most memory for the decoded native tiles of one open slide."""

_JPEG, _JPEG_2000_RGB = 7, 33005
_COLORSPACE = {2: "RGB", 6: "YCBCR"}
_UNIT_IN_UM = {2: 25_400.0, 3: 10_000.0}
_APERIO_MPP = re.compile(r"\bMPP\s*=\s*([0-9.]+)")
_OTHER_VENDORS = ("ndpi", "philips", "scn", "bif", "ome", "qpi", "stk", "lsm", "ventana")
_SOI, _EOI = b"\xff\xd8", b"\xff\xd9"
_EOI_TAIL = 16
_GREY = 128
_MCU = 8


@dataclass(frozen=True)
class NativeLevel:
    """Where a level's native tiles are in the file: offsets and sizes int64 [rows * columns]."""

    codec: str
    colorspace: str
    tile_width: int
    tile_height: int
    columns: int
    rows: int
    offsets: npt.NDArray[np.int64]
    sizes: npt.NDArray[np.int64]
    tables: bytes | None


class NativeReader(SlideReader):
    """A slide whose native tiles are decoded by imagecodecs, each kept while it is wanted.

    Raises `SlideOpenError` for anything but Aperio or plain TIFF of tiled 8-bit RGB in JPEG or
    JPEG 2000 (Aperio 33005). A tile that the file leaves out is white at the finest level, as
    OpenSlide shows it; files that leave out others are refused, since OpenSlide fills them from
    the level below.
    """

    name = "native"
    cache_bytes = CACHE_BYTES

    def __init__(self, path: Path, series: str = "") -> None:
        self.path = path
        self._file = -1
        self._cache: OrderedDict[tuple[int, int, int], npt.NDArray[np.uint8]] = OrderedDict()
        self._cached_bytes = 0
        self._uses: dict[int, npt.NDArray[np.int32]] = {}
        self.decoded = 0
        try:
            with tifffile.TiffFile(path) as tiff:
                self._describe_levels(tiff)
            self._file = os.open(path, os.O_RDONLY)
        except SlideOpenError:
            raise
        except Exception as error:
            # tifffile raises many kinds for damaged headers; all mean the same to the user.
            raise SlideOpenError(f"native: {error}") from error

    def _describe_levels(self, tiff: tifffile.TiffFile) -> None:
        # Those vendors have their own rules for levels and gaps, which OpenSlide knows.
        other = [name for name in _OTHER_VENDORS if getattr(tiff, f"is_{name}", False)]
        if other:
            raise SlideOpenError(f"native: {other[0]} files are read by other readers")
        self.vendor = "aperio" if tiff.is_svs else "generic-tiff"
        pages = _level_pages(tiff, self.vendor)
        self.native = tuple(_native_level(page) for page in pages)
        base = pages[0]
        self.levels = tuple(
            Level(
                page.imagewidth,
                page.imagelength,
                (base.imagewidth / page.imagewidth + base.imagelength / page.imagelength) / 2,
            )
            for page in pages
        )
        for number, native in enumerate(self.native):
            if number and (native.sizes == 0).any():
                raise SlideOpenError(f"native: level {number} leaves tiles out")
        self.codec = self.native[0].codec
        self.native_tiles = tuple((n.tile_width, n.tile_height) for n in self.native)
        self.resolution = read_description(
            _resolution_tags(base, self.vendor),
            str(base.description),
            self.vendor,
            base.imagewidth,
            base.imagelength,
        )
        self.icc_profile = _tag_value(base, 34675)

    def expect_windows(self, level: int, windows: npt.NDArray[np.int64]) -> None:
        """Keep each native tile of the level until the last of these windows has been read."""
        native = self.native[level]
        uses = np.zeros((native.rows, native.columns), np.int32)
        left, top, right, bottom = self._tile_spans(level, windows)
        for row, column, row_end, column_end in zip(top, left, bottom, right, strict=True):
            uses[row:row_end, column:column_end] += 1
        self._uses[level] = uses

    def _tile_spans(
        self, level: int, windows: npt.NDArray[np.int64]
    ) -> tuple[npt.NDArray[Any], ...]:
        """Half-open columns and rows of native tiles that windows [n, 4] (x, y, w, h) touch."""
        # Cut at the level's edge: windows may reach over it, native tiles there do not exist.
        native, size = self.native[level], self.levels[level]
        x, y, width, height = windows.T
        right, bottom = np.minimum(x + width, size.width), np.minimum(y + height, size.height)
        return (
            np.maximum(x, 0) // native.tile_width,
            np.maximum(y, 0) // native.tile_height,
            -(-right // native.tile_width),
            -(-bottom // native.tile_height),
        )

    def _read_window(
        self, level: int, x: int, y: int, width: int, height: int
    ) -> npt.NDArray[np.uint8]:
        native = self.native[level]
        # The window is inside the level, so that native tiles cover all of the canvas.
        canvas = np.empty((height, width, 3), np.uint8)
        for row in range(y // native.tile_height, -(-(y + height) // native.tile_height)):
            at_y = row * native.tile_height
            top, bottom = max(y, at_y), min(y + height, at_y + native.tile_height)
            for column in range(x // native.tile_width, -(-(x + width) // native.tile_width)):
                at_x = column * native.tile_width
                left, right = max(x, at_x), min(x + width, at_x + native.tile_width)
                tile = self._native_tile(level, row, column)
                part = tile[top - at_y : bottom - at_y, left - at_x : right - at_x]
                canvas[top - y : bottom - y, left - x : right - x] = part
        return canvas

    def _native_tile(self, level: int, row: int, column: int) -> npt.NDArray[np.uint8]:
        """A decoded native tile [tile_height, tile_width, 3], from the cache where it is there."""
        key = (level, row, column)
        tile = self._cache.pop(key, None)
        if tile is None:
            tile = self.decode_native(level, row, column)
            self._cached_bytes += tile.nbytes
        # A tile that no expected window needs again is not kept.
        uses = self._uses.get(level)
        if uses is not None:
            uses[row, column] -= 1
            if uses[row, column] == 0:
                self._cached_bytes -= tile.nbytes
                return tile
        self._cache[key] = tile
        while self._cached_bytes > self.cache_bytes:
            self._cached_bytes -= self._cache.popitem(last=False)[1].nbytes
        return tile

    def decode_native(self, level: int, row: int, column: int) -> npt.NDArray[np.uint8]:
        """Read and decode one native tile, uint8 [tile_height, tile_width, 3].

        Raises ValueError where its bytes are damaged.
        """
        native = self.native[level]
        index = row * native.columns + column
        offset, size = int(native.offsets[index]), int(native.sizes[index])
        shape = (native.tile_height, native.tile_width, 3)
        if size == 0:  # left out of the file, which OpenSlide shows as white
            return np.full(shape, 255, np.uint8)
        data = os.pread(self._file, size, offset)
        if len(data) != size:
            raise ValueError("the file ends inside a native tile")
        self.decoded += 1
        if native.codec == "jpeg":
            tile = _decode_jpeg(data, native)
        else:
            tile = imagecodecs.jpeg2k_decode(data, numthreads=1)
        if tile.shape != shape or tile.dtype != np.uint8:
            raise ValueError(f"a native tile is {tile.dtype} {tile.shape}, expected uint8 {shape}")
        if native.codec == "jpeg" and (tile[-_MCU:, -_MCU:] == _GREY).all():
            self._confirm_tile(level, row, column, tile)
        return np.asarray(tile)

    def _confirm_tile(self, level: int, row: int, column: int, tile: npt.NDArray[np.uint8]) -> None:
        """Ask OpenSlide about a tile that ends in the grey which libjpeg leaves where data ended.

        imagecodecs passes over libjpeg's warnings; OpenSlide takes them for the errors they are.
        """
        from pipeline.slides.openslide_reader import OpenSlideReader

        x, y = column * tile.shape[1], row * tile.shape[0]
        width = min(tile.shape[1], self.levels[level].width - x)
        height = min(tile.shape[0], self.levels[level].height - y)
        with OpenSlideReader(self.path) as other:
            same = other.read(level, x, y, width, height)
        if not np.array_equal(same, tile[:height, :width]):
            raise ValueError("a native tile ends early")

    def close(self) -> None:
        """Release the file and the decoded tiles."""
        self._cache.clear()
        self._cached_bytes = 0
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def _decode_jpeg(data: bytes, native: NativeLevel) -> npt.NDArray[np.uint8]:
    if not data.startswith(_SOI) or _EOI not in data[-_EOI_TAIL:]:
        raise ValueError("a native tile is not a whole JPEG")
    # The tables of abbreviated JPEG are in the TIFF's own tag, once per level.
    tile = imagecodecs.jpeg8_decode(
        data, tables=native.tables, colorspace=native.colorspace, outcolorspace="RGB"
    )
    return np.asarray(tile)


def _level_pages(tiff: tifffile.TiffFile, vendor: str) -> list[Any]:
    """The pages that are pyramid levels, finest first: by the rules that OpenSlide follows."""
    every: list[Any] = list(tiff.pages)
    tiled = [page for page in every if page.is_tiled]
    # Other pages of a generic TIFF may be a label or a macro picture.
    if vendor != "aperio":
        tiled = [page for page in tiled if page.index == 0 or page.subfiletype & 1]
    pages = sorted(tiled, key=lambda page: -page.imagewidth)
    if not pages:
        raise SlideOpenError("native: no tiled image in the file")
    return pages


def _native_level(page: Any) -> NativeLevel:
    compression, photometric = int(page.compression), int(page.photometric)
    codec = {_JPEG: "jpeg", _JPEG_2000_RGB: "jpeg2000"}.get(compression)
    if codec is None or photometric not in _COLORSPACE:
        raise SlideOpenError(f"native: TIFF compression {compression}, photometric {photometric}")
    if page.dtype != np.uint8 or page.samplesperpixel != 3 or int(page.planarconfig) != 1:
        raise SlideOpenError("native: pixels are not interleaved 8-bit RGB")
    columns = -(-page.imagewidth // page.tilewidth)
    rows = -(-page.imagelength // page.tilelength)
    offsets = np.asarray(page.dataoffsets, np.int64)
    sizes = np.asarray(page.databytecounts, np.int64)
    if len(offsets) != rows * columns or len(sizes) != rows * columns:
        raise SlideOpenError(f"native: {len(offsets)} tiles, expected {rows} x {columns}")
    return NativeLevel(
        codec, _COLORSPACE[photometric], page.tilewidth, page.tilelength, columns, rows,
        offsets, sizes, page.jpegtables,
    )  # fmt: skip


def _resolution_tags(page: Any, vendor: str) -> ResolutionTags:
    # Inches where the tag is missing; tifffile's value for "no unit" counts as false.
    unit_tag = _tag_value(page, 296)
    unit = _UNIT_IN_UM.get(2 if unit_tag is None else int(unit_tag))
    x, y = (_to_float(_tag_value(page, code)) for code in (282, 283))
    tiff = (unit / x, unit / y) if unit and x and y else None
    if vendor != "aperio":
        return ResolutionTags(tiff=tiff)
    match = _APERIO_MPP.search(str(page.description))
    value = float(match[1]) if match else 0.0
    return ResolutionTags(vendor=(value, value) if value > 0 else None, tiff=tiff)


def _tag_value(page: Any, code: int) -> Any:
    tag = page.tags.get(code)
    return None if tag is None else tag.value


def _to_float(value: Any) -> float:
    return value[0] / value[1] if isinstance(value, tuple) and value[1] else 0.0
