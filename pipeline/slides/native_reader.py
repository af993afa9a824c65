"""TIFF, SVS and OME-TIFF, decoded tile by tile by imagecodecs: each level's own pixels.

Several times as fast as OpenSlide for JPEG and JPEG 2000. The pixels are OpenSlide's where that
shows the same image: `scan` compares 16 native tiles of each slide before it chooses this reader
(see `compare`).
"""

import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import numpy.typing as npt
import tifffile

from common.files import open_descriptor
from pipeline.slides.declared_size import require_size
from pipeline.slides.metadata import read_description
from pipeline.slides.reader import Level, ResolutionTags, SlideOpenError, over_white
from pipeline.slides.tiff_images import JPEG, choose_image, describe_layout, is_own_format
from pipeline.slides.tiled_reader import TiledReader

_UNCOMPRESSED, _JPEG_2000_YCBCR, _JPEG_2000_RGB = 1, 33003, 33005
_STATE_THEIR_SIZE = frozenset(
    {6, 7, 33003, 33004, 33005, 33007, 34712, 34892, 34927, 34933, 34934, 50001}
)
"""Compressions of whole pictures with heads of their own: JPEG, JPEG 2000, PNG and WebP."""
_COLORSPACE = {2: "RGB", 6: "YCBCR"}
_UNIT_IN_UM = {2: 25_400.0, 3: 10_000.0}
_APERIO_MPP = re.compile(r"\bMPP\s*=\s*([0-9.]+)")
_SOI, _EOI = b"\xff\xd8", b"\xff\xd9"
_EOI_TAIL = 16
_UNASSOCIATED_ALPHA = 2
_GREY = 128
_MCU = 8
_EDGE_SLACK = 8
"""Level-0 pixels by which tiles' edges may differ from level to level."""
_STRIP_ROWS = 256
"""Rows of a decoded strip, where a longer strip can be read in parts."""


@dataclass(frozen=True)
class NativePart:
    """Where the segments of some of a level's channels are: offsets, sizes int64 [rows * columns].

    `decode` turns the bytes of segment `first + index` into pixels [h, w, channels].
    """

    offsets: npt.NDArray[np.int64]
    sizes: npt.NDArray[np.int64]
    decode: Callable[[bytes, int], npt.NDArray[Any]]


@dataclass(frozen=True)
class NativeLevel:
    """A level's native tiles (or strips): sizes int64 [rows * columns], 0 where one is missing.

    All channels are in one part, but where planes or pages have a channel each. `alpha` is the
    kind of the fourth sample (TIFF ExtraSamples).
    """

    codec: str
    tile_width: int
    tile_height: int
    columns: int
    rows: int
    sizes: npt.NDArray[np.int64]
    parts: tuple[NativePart, ...]
    alpha: int = 0

    @property
    def offsets(self) -> npt.NDArray[np.int64]:
        """Offsets of the first part's segments in the file, int64 [rows * columns]."""
        return self.parts[0].offsets

    @property
    def missing(self) -> npt.NDArray[np.bool_]:
        """Which native tiles the file leaves out, [rows, columns]."""
        return (self.sizes == 0).reshape(self.rows, self.columns)


class NativeReader(TiledReader):
    """A slide whose native tiles are decoded by imagecodecs, each kept while it is wanted.

    Reads 8- and 16-bit RGB (see `describe_layout`) in tiles or strips of every compression that
    imagecodecs knows. Raises `SlideOpenError` for anything else, and for formats with rules of
    their own. A tile that level 0 leaves out is white, as OpenSlide shows it. A lower level that
    leaves out a tile which level 0 has is not used; of Aperio files it is refused, since
    OpenSlide fills it from the level below.
    """

    name = "native"
    native: tuple[NativeLevel, ...]

    def __init__(self, path: Path, series: str = "") -> None:
        super().__init__(path)
        self._file = -1
        try:
            # Pages in other files are not looked for: a slide is one file.
            with tifffile.TiffFile(path, _multifile=False) as tiff:
                self._describe_levels(tiff, series)
            self._file = open_descriptor(path)
        except SlideOpenError as error:
            raise SlideOpenError(f"native: {error}") from error
        except Exception as error:
            # tifffile raises many kinds for damaged headers; all mean the same to the user.
            raise SlideOpenError(f"native: {error}") from error

    def _describe_levels(self, tiff: tifffile.TiffFile, series: str) -> None:
        other = is_own_format(tiff)
        if other:
            raise SlideOpenError(f"{other} files are read by other readers")
        choice = choose_image(tiff, series)
        if choice.image.unfit:
            raise SlideOpenError(f"pixels are not RGB: {choice.image.unfit}")
        self.vendor = "aperio" if tiff.is_svs else "generic-tiff"
        self.series, self.is_first = choice.series, not choice.only_native
        pages = choice.levels
        native = [_native_level(level) for level in pages]
        sizes = [(p[0].keyframe.imagewidth, p[0].keyframe.imagelength) for p in pages]
        # OpenSlide fills the gaps of Aperio's levels from the finer one.
        kept, notes = _complete_levels(native, sizes, not (tiff.is_svs and self.is_first))
        self.notes = (*choice.notes, *notes)
        self.native = tuple(native[level] for level in kept)
        self.levels = tuple(_level(sizes[level], sizes[0]) for level in kept)
        unused = [(page.imagewidth, page.imagelength) for page in choice.left_out]
        self.unused_sizes = unused + [s for level, s in enumerate(sizes) if level not in kept]
        self.codec = self.native[0].codec
        self.native_tiles = tuple((n.tile_width, n.tile_height) for n in self.native)
        base = choice.image.layout
        # OME-XML is of the whole file, and already read for each of its images.
        self.resolution = read_description(
            _resolution_tags(base, self.vendor, choice.image.mpp),
            str(tiff.ome_metadata or base.description),
            self.vendor,
            *sizes[0],
        )
        self.icc_profile = _tag_value(base, 34675)
        # What this reader has always read; of the rest only what others do not read rightly.
        self.is_ome = bool(tiff.is_ome)
        usual = self.is_first and all(n.codec in ("jpeg", "jpeg2000") for n in self.native)
        self.unusual = "ome files are read by other readers" if self.is_ome else ""
        for number, level in enumerate(self.native[1:], 1):
            if usual and not self.unusual and level.missing.any():
                self.unusual = f"level {number} leaves tiles out"
        if not usual and not self.unusual:
            self.unusual = (
                f"TIFF compression {int(base.compression)}, photometric {int(base.photometric)}"
            )

    def decode_native(self, level: int, row: int, column: int) -> npt.NDArray[np.uint8]:
        """Read and decode one native tile, uint8 [tile_height, tile_width, 3].

        Raises ValueError where its bytes are damaged.
        """
        native = self.native[level]
        index = row * native.columns + column
        shape = (native.tile_height, native.tile_width, 3)
        if native.sizes[index] == 0:  # left out of the file, which OpenSlide shows as white
            return np.full(shape, 255, np.uint8)
        channels = [self._read_part(part, index) for part in native.parts]
        self.decoded += 1
        tile = channels[0] if len(channels) == 1 else np.concatenate(channels, -1)
        if native.codec not in ("jpeg", "jpeg2000"):
            tile = _rgb_of_samples(tile, native)
        if tile.shape != shape or tile.dtype != np.uint8:
            raise ValueError(f"a native tile is {tile.dtype} {tile.shape}, expected uint8 {shape}")
        if native.codec == "jpeg" and (tile[-_MCU:, -_MCU:] == _GREY).all():
            self._confirm_tile(level, row, column, tile)
        return np.asarray(tile)

    def _read_part(self, part: NativePart, index: int) -> npt.NDArray[Any]:
        size = int(part.sizes[index])
        data = os.pread(self._file, size, int(part.offsets[index]))
        if len(data) != size:
            raise ValueError("the file ends inside a native tile")
        return part.decode(data, index)

    def _confirm_tile(self, level: int, row: int, column: int, tile: npt.NDArray[np.uint8]) -> None:
        """Ask OpenSlide about a tile that ends in the grey which libjpeg leaves where data ended.

        imagecodecs passes over libjpeg's warnings; OpenSlide takes them for the errors they are.
        """
        from pipeline.slides.openslide_reader import OpenSlideReader

        x, y = column * tile.shape[1], row * tile.shape[0]
        width = min(tile.shape[1], self.levels[level].width - x)
        height = min(tile.shape[0], self.levels[level].height - y)
        if not self.is_first or self.unusual:
            # OpenSlide does not show this image: the grey is looked for within the picture.
            if (tile[:height, :width][-_MCU:, -_MCU:] == _GREY).all():
                raise ValueError("a native tile ends in grey, as one that ends early")
            return
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


def _level(size: tuple[int, int], base: tuple[int, int]) -> Level:
    return Level(*size, (base[0] / size[0] + base[1] / size[1]) / 2)


def _complete_levels(
    levels: Sequence[NativeLevel], sizes: Sequence[tuple[int, int]], may_drop: bool
) -> tuple[list[int], list[str]]:
    """The levels that have every tile which level 0 has, and what a person should know."""
    base, kept, notes = levels[0].missing, [0], []
    if base.any():
        notes.append(f"{base.sum():,} of {base.size:,} tiles are not in the file: shown as white")
    for number, native in enumerate(levels[1:], 1):
        gone = native.missing
        if gone.any() and not may_drop:
            raise SlideOpenError(f"level {number} leaves tiles out")
        scale = (sizes[0][0] / sizes[number][0], sizes[0][1] / sizes[number][1])
        if gone.any() and not _is_missing_at_base(native, levels[0], scale):
            notes.append(
                f"level {number} is not used: {gone.sum():,} of its {gone.size:,} tiles are not in "
                "the file"
            )
        else:
            kept.append(number)
    return kept, notes


def _is_missing_at_base(native: NativeLevel, base: NativeLevel, scale: tuple[float, float]) -> bool:
    """Whether level 0 has no tile wherever the level, smaller by `scale` (x, y), has none."""
    # The base's gaps, looked at on the coarser level's grid: all of a tile's area must be one.
    bounds = []
    for count, base_count, side, base_side in (
        (native.rows, base.rows, native.tile_height * scale[1], base.tile_height),
        (native.columns, base.columns, native.tile_width * scale[0], base.tile_width),
    ):
        edges = np.arange(count + 1) * side / base_side
        # Rounding of level sizes may reach a pixel into the next tile.
        first = np.minimum((edges[:-1] + _EDGE_SLACK / base_side).astype(int), base_count - 1)
        last = np.clip(np.ceil(edges[1:] - _EDGE_SLACK / base_side).astype(int), 1, base_count)
        bounds.append((first, np.maximum(last, first + 1)))
    (top, bottom), (left, right) = bounds
    return all(
        base.missing[top[row] : bottom[row], left[column] : right[column]].all()
        for row, column in zip(*np.nonzero(native.missing), strict=True)
    )


def _decode_jpeg(data: bytes, tables: bytes | None, colorspace: str) -> npt.NDArray[np.uint8]:
    if not data.startswith(_SOI) or _EOI not in data[-_EOI_TAIL:]:
        raise ValueError("a native tile is not a whole JPEG")
    # The tables of abbreviated JPEG are in the TIFF's own tag, once per level.
    tile = imagecodecs.jpeg8_decode(data, tables=tables, colorspace=colorspace, outcolorspace="RGB")
    return np.asarray(tile)


def _decode_aperio_ycbcr(data: bytes) -> npt.NDArray[np.uint8]:
    """RGB [h, w, 3] of Aperio's JPEG 2000 in YCbCr (33003), rounded as OpenSlide rounds.

    Y, Cb and Cr are 8 bits each; chroma is not interpolated.
    """
    pixels = imagecodecs.jpeg2k_decode(data, numthreads=1).astype(np.int32)
    luma, blue, red = pixels[..., 0], pixels[..., 1] - 128, pixels[..., 2] - 128
    # JFIF's weights in 16-bit fixed point, each product rounded by itself.
    green = np.rint(-0.34414 * 65536 * blue).astype(np.int32)
    green += np.rint(-0.71414 * 65536 * red).astype(np.int32)
    rgb = (
        luma + np.rint(1.402 * red).astype(np.int32),
        luma + ((green + 32768) >> 16),
        luma + np.rint(1.772 * blue).astype(np.int32),
    )
    return np.clip(np.stack(rgb, -1), 0, 255).astype(np.uint8)


def _rgb_of_samples(tile: npt.NDArray[Any], native: NativeLevel) -> npt.NDArray[np.uint8]:
    """RGB uint8 of 3 or 4 samples of 8 or 16 bits [h, w, n]; clear pixels are white.

    16 bits are scaled by 1/257 and rounded, as libtiff does it: 65535 becomes 255.
    """
    if tile.dtype == np.uint16:
        tile = ((tile.astype(np.uint32) + 128) // 257).astype(np.uint8)
    if tile.shape[-1] == 4:
        if native.alpha == _UNASSOCIATED_ALPHA:
            tile = over_white(tile)
        else:  # colours are multiplied by alpha already
            clear = 255 - tile[..., 3:].astype(np.uint16)
            tile = np.minimum(tile[..., :3] + clear, 255).astype(np.uint8)
    return np.ascontiguousarray(tile)


def _native_level(pages: Sequence[Any]) -> NativeLevel:
    """The native tiles of a level, from its page, or from three with a channel each."""
    page = pages[0].keyframe
    unfit = describe_layout(tuple(pages))
    if unfit:
        raise SlideOpenError(f"pixels are not RGB: {unfit}")
    if len({_geometry(other.keyframe) for other in pages}) > 1:
        raise SlideOpenError("channels are stored in unlike ways")
    width, height, rows, columns = _segment_grid(page)
    parts = [part for other in pages for part in _page_parts(other, rows * columns, height)]
    present = np.logical_and.reduce([(p.sizes > 0) & (p.offsets > 0) for p in parts])
    sizes = np.where(present, np.sum([part.sizes for part in parts], 0), 0)
    extra = page.extrasamples
    return NativeLevel(
        _codec_name(page), width, height, columns, rows, sizes, tuple(parts),
        int(extra[0]) if extra else 0,
    )  # fmt: skip


def _geometry(page: Any) -> tuple[Any, ...]:
    return (page.shape, page.dtype, page.is_tiled, int(page.compression), page.chunks)


def _codec_name(page: Any) -> str:
    """`jpeg` and `jpeg2000` for tiles of interleaved 8-bit RGB, '' for all else."""
    if not page.is_tiled or page.dtype != np.uint8 or page.samplesperpixel != 3:
        return ""
    if int(page.planarconfig) != 1 or int(page.photometric) not in _COLORSPACE:
        return ""
    return {JPEG: "jpeg", _JPEG_2000_RGB: "jpeg2000"}.get(int(page.compression), "")


def _segment_grid(page: Any) -> tuple[int, int, int, int]:
    """Width and height of a page's tiles or strips, and how many rows and columns of them."""
    if page.is_tiled:
        width, height = page.tilewidth, page.tilelength
    else:
        width, height = page.imagewidth, min(page.rowsperstrip, page.imagelength)
        if _can_split_strips(page):
            height = min(height, _STRIP_ROWS)
    return width, height, -(-page.imagelength // height), -(-page.imagewidth // width)


def _can_split_strips(page: Any) -> bool:
    """Whether one strip is the whole picture, uncompressed, so that any of its rows can be read."""
    return (
        int(page.compression) == _UNCOMPRESSED
        and int(page.planarconfig) == 1
        and int(page.predictor) == 1
        and int(page.fillorder) == 1
        and page.rowsperstrip >= page.imagelength
    )


def _page_parts(page: Any, count: int, height: int) -> Iterator[NativePart]:
    """The segments of a page, a part for each of its planes."""
    layout = page.keyframe
    offsets = np.asarray(page.dataoffsets, np.int64)
    sizes = np.asarray(page.databytecounts, np.int64)
    if not layout.is_tiled and _can_split_strips(layout):
        offsets, sizes = _split_strip(layout, int(offsets[0]), count, height)
    planes = layout.samplesperpixel if int(layout.planarconfig) == 2 else 1
    if len(offsets) != count * planes or len(sizes) != count * planes:
        raise SlideOpenError(f"{len(offsets)} tiles, expected {count * planes}")
    for plane in range(planes):
        first = plane * count
        yield NativePart(
            offsets[first : first + count],
            sizes[first : first + count],
            _segment_decoder(page, first, height),
        )


def _split_strip(
    page: Any, offset: int, count: int, height: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Offsets and sizes of parts of `height` rows of a picture that is one strip."""
    row_bytes = page.imagewidth * page.samplesperpixel * np.dtype(page.dtype).itemsize
    first = np.arange(count, dtype=np.int64) * height
    rows = np.minimum(first + height, page.imagelength) - first
    return offset + first * row_bytes, rows * row_bytes


def _segment_decoder(
    page: Any, first: int, height: int
) -> Callable[[bytes, int], npt.NDArray[Any]]:
    """What turns the bytes of a segment into pixels [height, width, channels]."""
    layout = page.keyframe
    decode = _unbounded_decoder(page, first, height)
    if int(layout.compression) not in _STATE_THEIR_SIZE:
        return decode
    width, rows = _segment_grid(layout)[:2]

    def decode_bounded(data: bytes, index: int) -> npt.NDArray[Any]:
        require_size(data, width, rows)
        return decode(data, index)

    return decode_bounded


def _unbounded_decoder(
    page: Any, first: int, height: int
) -> Callable[[bytes, int], npt.NDArray[Any]]:
    """The same by the size that the bytes themselves may state."""
    layout = page.keyframe
    tables, codec = layout.jpegtables, _codec_name(layout)
    if codec == "jpeg":
        colorspace = _COLORSPACE[int(layout.photometric)]
        return lambda data, _: _decode_jpeg(data, tables, colorspace)
    if codec == "jpeg2000":
        return lambda data, _: np.asarray(imagecodecs.jpeg2k_decode(data, numthreads=1))
    if int(layout.compression) == _JPEG_2000_YCBCR:
        return lambda data, _: _decode_aperio_ycbcr(data)
    if not layout.is_tiled and _can_split_strips(layout):
        dtype = np.dtype(layout.dtype).newbyteorder(layout.parent.byteorder)
        row = (layout.imagewidth, layout.samplesperpixel)
        return lambda data, _: _pad_rows(
            np.frombuffer(data, dtype).astype(layout.dtype).reshape(-1, *row), height
        )
    decode = layout.decode

    def decode_segment(data: bytes, index: int) -> npt.NDArray[Any]:
        pixels = decode(data, first + index, jpegtables=tables, _fullsize=layout.is_tiled)[0]
        if pixels is None:
            raise ValueError("a native tile is empty")
        return _pad_rows(pixels[0], height)

    return decode_segment


def _pad_rows(pixels: npt.NDArray[Any], height: int) -> npt.NDArray[Any]:
    """Pixels [h, w, n] with rows added below, which are outside of the picture."""
    short = height - len(pixels)
    return np.pad(pixels, ((0, short), (0, 0), (0, 0))) if short > 0 else pixels


def _resolution_tags(page: Any, vendor: str, mpp: tuple[float, float] | None) -> ResolutionTags:
    # Inches where the tag is missing; tifffile's value for "no unit" counts as false.
    unit_tag = _tag_value(page, 296)
    unit = _UNIT_IN_UM.get(2 if unit_tag is None else int(unit_tag))
    x, y = (_to_float(_tag_value(page, code)) for code in (282, 283))
    tiff = (unit / x, unit / y) if unit and x and y else None
    if vendor != "aperio":
        return ResolutionTags(tiff=tiff, ome=mpp)
    match = _APERIO_MPP.search(str(page.description))
    value = float(match[1]) if match else 0.0
    return ResolutionTags(vendor=(value, value) if value > 0 else None, tiff=tiff)


def _tag_value(page: Any, code: int) -> Any:
    tag = page.tags.get(code)
    return None if tag is None else tag.value


def _to_float(value: Any) -> float:
    return value[0] / value[1] if isinstance(value, tuple) and value[1] else 0.0
