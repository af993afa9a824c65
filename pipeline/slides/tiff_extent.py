"""Whether a TIFF file has all that its directories point to: a cut-off copy often opens."""

import struct
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

_OFFSETS_AND_COUNTS = ((324, 325), (273, 279))
"""TileOffsets and TileByteCounts; StripOffsets and StripByteCounts."""
_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4}
_BYTES |= {16: 8, 17: 8, 18: 8}
"""Size of a value by field type, TIFF 6.0 section 2 and BigTIFF."""
_UINT = {3: "u2", 4: "u4", 13: "u4", 16: "u8", 18: "u8"}
_MAX_PAGES = 10_000
_QUIRKY = frozenset({".ndpi"})
"""Formats that keep 64-bit offsets in 32-bit fields."""


def what_is_missing(path: Path) -> str:
    """Which part of the file is beyond its end, or '' (also for what is no TIFF).

    Reads directories and tables of offsets, no pixels. TIFF 6.0 and BigTIFF, either byte order.
    """
    if path.is_dir() or path.suffix.lower() in _QUIRKY:
        return ""
    with path.open("rb") as file:
        header = file.read(16)
        order = {b"II": "<", b"MM": ">"}.get(header[:2])
        if order is None or len(header) < 16:
            return ""
        kind = struct.unpack(order + "H", header[2:4])[0]
        if kind not in (42, 43):
            return ""
        size = path.stat().st_size
        return _DirectoryWalk(file, order, kind == 43, size).find_missing(header)


class _DirectoryWalk:
    """One pass over the chain of directories."""

    def __init__(self, file: BinaryIO, order: str, big: bool, size: int) -> None:
        self._file, self._order, self._big, self._size = file, order, big, size
        self._word = "Q" if big else "I"

    def find_missing(self, header: bytes) -> str:
        start = header[8:16] if self._big else header[4:8]
        offset = self._unpack_number(self._word, start)
        for page in range(_MAX_PAGES):
            if offset == 0:
                return ""
            directory = self._read_directory(offset)
            if directory is None:
                return f"page {page} is beyond the end of the file ({self._size:,} bytes)"
            entries, offset = directory
            # The next directory may be in place and this one's pixels cut off, and the reverse.
            if self._data_end(entries) > self._size:
                return (
                    f"pixels of page {page} are beyond the end of the file ({self._size:,} bytes)"
                )
        return ""

    def _unpack_number(self, kind: str, data: bytes) -> int:
        return int(struct.unpack(self._order + kind, data)[0])

    def _read_directory(self, offset: int) -> tuple[bytes, int] | None:
        """The entries of the directory there and the next one's offset; None if cut off."""
        count_kind, count_bytes, entry_bytes = ("Q", 8, 20) if self._big else ("H", 2, 12)
        self._file.seek(offset)
        head = self._file.read(count_bytes)
        if offset + count_bytes > self._size or len(head) < count_bytes:
            return None
        length = self._unpack_number(count_kind, head) * entry_bytes
        word = struct.calcsize(self._word)
        if offset + count_bytes + length + word > self._size:
            return None
        body = self._file.read(length + word)
        return body[:length], self._unpack_number(self._word, body[length:])

    def _data_end(self, entries: bytes) -> int:
        """First byte behind the values and pixels that the directory points to."""
        fields = self._parse_fields(entries)
        values = 0
        for kind, count, value in fields.values():
            length = count * _BYTES.get(kind, 0)
            if length > len(value):  # else the values are in the entry itself
                values = max(values, self._unpack_number(self._word, value) + length)
        for offset_tag, count_tag in _OFFSETS_AND_COUNTS:
            if offset_tag in fields and count_tag in fields:
                starts, counts = (
                    self._field_values(fields[offset_tag]),
                    self._field_values(fields[count_tag]),
                )
                if starts is None or counts is None:
                    return self._size + 1
                if len(starts) == len(counts) and len(starts):
                    # A tile of no bytes is one that the file leaves out; its offset means nothing.
                    return max(values, int(np.where(counts > 0, starts + counts, 0).max()))
        return values

    def _parse_fields(self, entries: bytes) -> dict[int, tuple[int, int, bytes]]:
        """(type, count, value field) by tag."""
        form, step = (self._order + "HHQ8s", 20) if self._big else (self._order + "HHI4s", 12)
        fields = {}
        for at in range(0, len(entries), step):
            tag, kind, count, value = struct.unpack_from(form, entries, at)
            fields[tag] = (kind, count, value)
        return fields

    def _field_values(self, field: tuple[int, int, bytes]) -> npt.NDArray[np.int64] | None:
        """The field's numbers; None where they are beyond the end of the file."""
        kind, count, value = field
        if kind not in _UINT:
            return np.zeros(0, np.int64)
        dtype = np.dtype(self._order + _UINT[kind])
        length = count * dtype.itemsize
        if length > len(value):
            offset = self._unpack_number(self._word, value)
            if offset + length > self._size:
                return None
            self._file.seek(offset)
            value = self._file.read(length)
        return np.frombuffer(value, dtype, count).astype(np.int64)
