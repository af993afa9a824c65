"""Tiled JPEG and JPEG 2000 TIFF/SVS, decoded tile by tile: several times as fast as OpenSlide.

The pixels are OpenSlide's: `scan` compares 16 native tiles of each slide before it chooses this
reader (see `compare`).
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import numpy.typing as npt
import tifffile

from pipeline.slides.reader import Level, ResolutionTags, SlideOpenError
from pipeline.slides.tiled_reader import TiledReader

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


class NativeReader(TiledReader):
    """A slide whose native tiles are decoded by imagecodecs, each kept while it is wanted.

    Raises `SlideOpenError` for anything but Aperio or plain TIFF of tiled 8-bit RGB in JPEG or
    JPEG 2000 (Aperio 33005). A tile that the file leaves out is white at the finest level, as
    OpenSlide shows it; files that leave out others are refused, since OpenSlide fills them from
    the level below.
    """

    name = "native"
    native: tuple[NativeLevel, ...]

    def __init__(self, path: Path, series: str = "") -> None:
        super().__init__(path)
        self._file = -1
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
        self.resolution = _resolution_tags(base, self.vendor)
        self.icc_profile = _tag_value(base, 34675)

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
        super().close()
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
    if vendor == "aperio":
        match = _APERIO_MPP.search(str(page.description))
        value = float(match[1]) if match else 0.0
        return ResolutionTags(vendor=(value, value)) if value > 0 else ResolutionTags()
    unit = _UNIT_IN_UM.get(int(_tag_value(page, 296) or 2))
    x, y = (_to_float(_tag_value(page, code)) for code in (282, 283))
    if unit is None or not x or not y:
        return ResolutionTags()
    return ResolutionTags(tiff=(unit / x, unit / y))


def _tag_value(page: Any, code: int) -> Any:
    tag = page.tags.get(code)
    return None if tag is None else tag.value


def _to_float(value: Any) -> float:
    return value[0] / value[1] if isinstance(value, tuple) and value[1] else 0.0
