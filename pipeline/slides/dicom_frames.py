"""Where the frames of a DICOM file are, and what their bytes show; no file is read whole."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, BinaryIO

import imagecodecs
import numpy as np
import numpy.typing as npt

from pipeline.slides.declared_size import require_size
from pipeline.slides.reader import SlideOpenError

_ITEM, _DELIMITER, _PIXELS = b"\xfe\xff\x00\xe0", b"\xfe\xff\xdd\xe0", b"\xe0\x7f\x10\x00"
_UNDEFINED = 0xFFFFFFFF
_CODESTREAM_STARTS = (
    b"\xff\xd8\xff", b"\xff\x4f\xff\x51", b"\0\0\0\x0cjP  ",
)  # fmt: skip
_SOI, _EOI = b"\xff\xd8", b"\xff\xd9"
_EOI_TAIL = 16
_ENDS_WITH_EOI = ("jpeg", "ljpeg", "jpegls", "jpeg2000", "htj2k")
_J2K_CODING, _J2K_TRANSFORM_AT = b"\xff\x52", 8
_JPEG_OWN_COLOUR = (b"\xff\xe0", b"\xff\xee")
"""Markers JFIF and Adobe: with one of them a JPEG says itself how its colours are stored."""

_JPEG = ("1.2.840.10008.1.2.4.50", "1.2.840.10008.1.2.4.51")
_NATIVE = ("1.2.840.10008.1.2", "1.2.840.10008.1.2.1")
_jpeg2k_decode = partial(imagecodecs.jpeg2k_decode, numthreads=1)
_DECODERS: dict[str, tuple[str, Callable[[bytes], Any]]] = {
    "1.2.840.10008.1.2.4.57": ("ljpeg", imagecodecs.ljpeg_decode),
    "1.2.840.10008.1.2.4.70": ("ljpeg", imagecodecs.ljpeg_decode),
    "1.2.840.10008.1.2.4.80": ("jpegls", imagecodecs.jpegls_decode),
    "1.2.840.10008.1.2.4.81": ("jpegls", imagecodecs.jpegls_decode),
    "1.2.840.10008.1.2.4.90": ("jpeg2000", _jpeg2k_decode),
    "1.2.840.10008.1.2.4.91": ("jpeg2000", _jpeg2k_decode),
    "1.2.840.10008.1.2.4.201": ("htj2k", _jpeg2k_decode),
    "1.2.840.10008.1.2.4.202": ("htj2k", _jpeg2k_decode),
    "1.2.840.10008.1.2.4.203": ("htj2k", _jpeg2k_decode),
}
"""High-throughput JPEG 2000 by OpenJPEG: imagecodecs' own decoder for it only prints its errors."""
_RLE = "1.2.840.10008.1.2.5"
_MOST_FRAMES = 1 << 23


@dataclass(frozen=True)
class FrameCoding:
    """How a file's frames are stored; width and height of a frame in px, always 8-bit colour."""

    syntax: str
    photometric: str
    is_planar: bool
    width: int
    height: int

    @property
    def codec(self) -> str:
        """`jpeg`, `jpeg2000` and the like; `raw` where frames are not compressed."""
        if self.syntax in _JPEG:
            return "jpeg"
        if self.syntax == _RLE:
            return "rle"
        return "raw" if self.syntax in _NATIVE else _DECODERS[self.syntax][0]

    @property
    def is_encapsulated(self) -> bool:
        """Whether frames are items of a sequence, as all compressed ones are."""
        return self.syntax not in _NATIVE

    def require_known(self) -> None:
        """Raise `SlideOpenError` for what cannot be decoded."""
        known = {*_JPEG, *_NATIVE, *_DECODERS, _RLE}
        if self.syntax not in known:
            raise SlideOpenError(f"dicom: transfer syntax {self.syntax} is not supported")
        if self.photometric == "YBR_FULL_422" and not self.is_encapsulated:
            raise SlideOpenError("dicom: uncompressed YBR_FULL_422 is not supported")


def find_frames(
    file: BinaryIO, dataset: Any, coding: FrameCoding, count: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Offsets and sizes in bytes, int64 [count] each, of the frames in an open file.

    The file is where pydicom stopped before the pixels. Offsets are taken from the extended or the
    basic offset table; without one the items are walked once. Encapsulated frames are one or
    several items, with their headers (see `unwrap_items`). Raises `SlideOpenError` where the file
    has fewer frames or ends early.
    """
    length = _enter_pixels(file, dataset.original_encoding[0])
    end = os.fstat(file.fileno()).st_size
    if not coding.is_encapsulated:
        size = coding.width * coding.height * 3
        found = min(length, end - file.tell()) // size
        # As many as there are, not as many as are claimed.
        offsets = file.tell() + np.arange(min(count, found), dtype=np.int64) * size
        sizes = np.full(len(offsets), size, np.int64)
    else:
        if length != _UNDEFINED:
            raise SlideOpenError("dicom: compressed frames are not in items")
        offsets, sizes = _encapsulated_frames(file, dataset, count, end)
        found = int((offsets + sizes <= end).sum())
    if found < count or len(offsets) != count:
        raise SlideOpenError(
            f"the file is cut off: {found:,} of {count:,} frames are there; fetch it again"
        )
    return offsets, sizes


def _enter_pixels(file: BinaryIO, is_implicit: bool) -> int:
    """Step over the head of the pixel element; its length."""
    head = file.read(8)
    if head[:4] != _PIXELS:
        raise SlideOpenError("dicom: no pixels in the file")
    value = head[4:8] if is_implicit else file.read(4)
    return int.from_bytes(value, "little")


def _encapsulated_frames(
    file: BinaryIO, dataset: Any, count: int, end: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    head = file.read(8)
    if head[:4] != _ITEM:
        raise SlideOpenError("dicom: compressed frames are not in items")
    size = int.from_bytes(head[4:], "little")
    table = np.frombuffer(file.read(min(size, end)), "<u4").astype(np.int64)
    base = file.tell()
    extended, lengths = (
        np.frombuffer(dataset.get(name) or b"", "<u8").astype(np.int64)
        for name in ("ExtendedOffsetTable", "ExtendedOffsetTableLengths")
    )
    if count and len(extended) == len(lengths) == count:
        return base + extended, 8 + lengths
    # 32-bit offsets start again at 0 beyond 4 GB.
    if count and len(table) == count and table[0] == 0 and (np.diff(table) > 0).all():
        starts = base + table
        file.seek(starts[-1])
        last = _walk_items(file, end)
        return starts, np.append(starts[1:], last[-1][1] if last else end + 1) - starts
    return _group_items(file, _walk_items(file, end), count)


def _walk_items(file: BinaryIO, end: int) -> list[tuple[int, int]]:
    """[start, end) of every item from here to the end of the sequence, with the items' heads."""
    items: list[tuple[int, int]] = []
    while (head := file.read(8))[:4] == _ITEM and len(head) == 8:
        if len(items) > _MOST_FRAMES:
            raise SlideOpenError(f"dicom: more than {_MOST_FRAMES:,} items")
        start, size = file.tell() - 8, int.from_bytes(head[4:], "little")
        items.append((start, start + 8 + size))
        if start + 8 + size > end:
            break
        file.seek(size, os.SEEK_CUR)
    return items


def _group_items(
    file: BinaryIO, items: list[tuple[int, int]], count: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Items to frames: one each, or where a codestream begins if frames have several."""
    firsts = list(range(len(items)))
    if count == 1:
        firsts = firsts[:1]
    elif len(items) > count:
        firsts = []
        for index, (start, _) in enumerate(items):
            file.seek(start + 8)
            if file.read(12).startswith(_CODESTREAM_STARTS):
                firsts.append(index)
    starts = np.array([items[i][0] for i in firsts], np.int64)
    lasts = [*(i - 1 for i in firsts[1:]), len(items) - 1][: len(firsts)]
    ends = np.array([items[i][1] for i in lasts], np.int64)
    return starts, ends - starts


def unwrap_items(data: bytes) -> bytes:
    """The bytes of a frame out of its items; raises ValueError where they are not items.

    >>> unwrap_items(b"\\xfe\\xff\\x00\\xe0\\x02\\0\\0\\0ab\\xfe\\xff\\x00\\xe0\\x02\\0\\0\\0cd")
    b'abcd'
    """
    parts, at = [], 0
    while at + 8 <= len(data) and data[at : at + 4] != _DELIMITER:
        size = int.from_bytes(data[at + 4 : at + 8], "little")
        if data[at : at + 4] != _ITEM or at + 8 + size > len(data):
            raise ValueError("a frame is not where the offset table says")
        parts.append(data[at + 8 : at + 8 + size])
        at += 8 + size
    return b"".join(parts)


def decode_frame(data: bytes, coding: FrameCoding) -> npt.NDArray[np.uint8]:
    """RGB uint8 [height, width, 3] of a frame's bytes (without items); ValueError where damaged."""
    shape = (coding.height, coding.width, 3)
    if coding.codec in _ENDS_WITH_EOI:
        require_size(data, coding.width, coding.height)
    if coding.codec in _ENDS_WITH_EOI and _EOI not in data[-_EOI_TAIL:]:
        raise ValueError(f"a frame is not a whole {coding.codec} picture")
    if coding.syntax in _JPEG:
        image = _decode_jpeg(data, coding)
    elif coding.syntax == _RLE:
        image = np.moveaxis(
            _decode_rle(data, coding.width * coding.height).reshape(3, *shape[:2]), 0, -1
        )
    elif coding.syntax in _NATIVE:
        image = np.frombuffer(data, np.uint8)
        if coding.is_planar:
            image = np.moveaxis(image.reshape(3, *shape[:2]), 0, -1)
        image = image.reshape(shape)
    else:
        image = np.asarray(_DECODERS[coding.syntax][1](data))
    if image.shape != shape or image.dtype != np.uint8:
        raise ValueError(f"a frame is {image.dtype} {image.shape}, expected uint8 {shape}")
    return np.ascontiguousarray(_to_rgb(image) if _is_ybr(data, coding) else image)


def _is_ybr(data: bytes, coding: FrameCoding) -> bool:
    """Whether the decoder leaves luma and chroma as they are.

    JPEG's own decoder converts them, and that of JPEG 2000 where the codestream says that it has
    a transform of its own.
    """
    if not coding.photometric.startswith("YBR_FULL") or coding.codec == "jpeg":
        return False
    if coding.codec not in ("jpeg2000", "htj2k"):
        return True
    at = data.find(_J2K_CODING)
    return at < 0 or data[at + _J2K_TRANSFORM_AT : at + _J2K_TRANSFORM_AT + 1] == b"\0"


def _decode_jpeg(data: bytes, coding: FrameCoding) -> npt.NDArray[np.uint8]:
    if not data.startswith(_SOI):
        raise ValueError("a frame is not a JPEG")
    stated = "RGB" if coding.photometric == "RGB" else "YCBCR"
    space = None if data[2:4] in _JPEG_OWN_COLOUR else stated
    return np.asarray(imagecodecs.jpeg8_decode(data, colorspace=space, outcolorspace="RGB"))


def _decode_rle(data: bytes, size: int) -> npt.NDArray[np.uint8]:
    """Three planes of `size` bytes in PackBits, one after the other (PS3.5 annex G)."""
    count, *starts = np.frombuffer(data[:64], "<u4").tolist()
    if count != 3:
        raise ValueError(f"a frame has {count} planes, expected 3")
    # PackBits adds a byte to 128 at most; what is longer would become 128 times as much.
    if len(data) > 64 + 4 * (size + 128):
        raise ValueError(f"a frame has {len(data):,} bytes of run lengths for {3 * size:,}")
    parts = zip(starts[:3], [*starts[1:3], len(data)], strict=True)
    planes = [imagecodecs.packbits_decode(data[start:stop]) for start, stop in parts]
    return np.concatenate([np.frombuffer(plane, np.uint8)[:size] for plane in planes])


def _to_rgb(ybr: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """RGB of full-range YCbCr (DICOM PS3.3 C.7.6.3.1.2)."""
    y, b, r = np.moveaxis(ybr.astype(np.float32), -1, 0)
    b, r = b - 128, r - 128
    rgb = np.stack([y + 1.402 * r, y - 0.344136 * b - 0.714136 * r, y + 1.772 * b], -1)
    return np.rint(rgb).clip(0, 255).astype(np.uint8)
