"""Whether a TIFF file has all that its directories point to.

A cut-off copy often opens, and so does one that has its full size and is still being written.
"""

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from common.files import open_regular

_OFFSETS_AND_COUNTS = ((324, 325), (273, 279))
"""TileOffsets and TileByteCounts; StripOffsets and StripByteCounts."""
_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4}
_BYTES |= {16: 8, 17: 8, 18: 8}
"""Size of a value by field type, TIFF 6.0 section 2 and BigTIFF."""
_UINT = {3: "u2", 4: "u4", 13: "u4", 16: "u8", 18: "u8"}
_MAX_PAGES = 10_000
_QUIRKY = frozenset({".ndpi"})
"""Formats that keep 64-bit offsets in 32-bit fields."""


_UNCOMPRESSED = 1
_NEVER_ZEROS = frozenset(
    {5, 7, 8, 32773, 32946, 33003, 33005, 34712, 34925, 50000, 50001, 50002, 52546}
)
"""Compressions whose data never begin with 64 zero bytes."""
_HEAD_BYTES = 64
_PLACES_LOOKED_AT = 64
_MOST_SEGMENT_BYTES = 256 << 20
_PART_ROWS = 64
_FULL_SHARE = 0.99
"""Share of pixels that are not zero where glass and tissue are."""


def what_is_missing(path: Path) -> str:
    """Which part of the file is beyond its end, or '' (also for what is no TIFF).

    Reads directories and tables of offsets, no pixels. TIFF 6.0 and BigTIFF, either byte order.
    """
    with _open_tiff(path) as walk:
        return "" if walk is None else walk.find_missing()


def what_is_unwritten(path: Path) -> str:
    """Where a file of full size has zeros in place of pixels, or '' (also for what is no TIFF).

    So it is while a copy runs into space that was reserved. Looks at the last native tile and at
    63 more, spread over the file. Compressed data never begin with 64 zeros. Uncompressed ones may
    be zeros, where the picture is black: what counts is that pixels end within a row, the rows
    before are full, and nothing follows.
    """
    with _open_tiff(path) as walk:
        return "" if walk is None else walk.find_unwritten()


@contextmanager
def _open_tiff(path: Path) -> Iterator["_DirectoryWalk | None"]:
    """The directories of a file, None for what is no TIFF."""
    if path.is_dir() or path.suffix.lower() in _QUIRKY:
        yield None
        return
    with open_regular(path) as file:
        header = file.read(16)
        order = {b"II": "<", b"MM": ">"}.get(header[:2])
        kind = struct.unpack(order + "H", header[2:4])[0] if order and len(header) == 16 else 0
        if order is None or kind not in (42, 43):
            yield None
            return
        big = kind == 43
        start = header[8:16] if big else header[4:8]
        first = int(struct.unpack(order + ("Q" if big else "I"), start)[0])
        yield _DirectoryWalk(file, order, big, path.stat().st_size, first)


@dataclass(frozen=True)
class _Segments:
    """A page's tiles or strips: offsets and bytes int64 [n], in the order of the page."""

    page: int
    compression: int
    starts: npt.NDArray[np.int64]
    counts: npt.NDArray[np.int64]
    width: int
    rows: int
    columns: int
    picture_width: int
    picture_height: int
    sample_bytes: int

    def valid_part(self, index: int) -> tuple[int, int]:
        """Rows and columns of a segment that are within the picture."""
        per_plane = self.columns * -(-self.picture_height // self.rows)
        row, column = divmod(index % per_plane, self.columns)
        return (
            min(self.rows, self.picture_height - row * self.rows),
            min(self.width, self.picture_width - column * self.width),
        )


_Place = tuple[int, int, int]
"""Offset in the file, number of the page in a list, index of the segment in the page."""


def _sorted_places(pages: list[_Segments]) -> list[_Place]:
    """The segments that are in the file, in its order."""
    return sorted(
        (int(start), number, index)
        for number, page in enumerate(pages)
        for index, start in enumerate(page.starts.tolist())
        if start > 0 and page.counts[index] >= _HEAD_BYTES
    )


def _spread_places(count: int) -> list[int]:
    """Indices to look at, the last one first.

    >>> _spread_places(3)
    [2, 1, 0]
    """
    spread = np.linspace(0, count - 1, min(count, _PLACES_LOOKED_AT)).astype(int)
    return [int(index) for index in spread[::-1]]


class _DirectoryWalk:
    """One pass over the chain of directories."""

    def __init__(self, file: BinaryIO, order: str, big: bool, size: int, first: int) -> None:
        self._file, self._order, self._big, self._size = file, order, big, size
        self._word = "Q" if big else "I"
        self._first = first

    def find_missing(self) -> str:
        offset = self._first
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

    def find_unwritten(self) -> str:
        """See `what_is_unwritten`."""
        pages = list(self._list_segments())
        raw = [page for page in pages if page.compression == _UNCOMPRESSED]
        for chosen, find_zeros in (
            ([page for page in pages if page.compression in _NEVER_ZEROS], self._find_zero_head),
            (raw, self._find_raw_end),
        ):
            place = find_zeros(chosen, _sorted_places(chosen))
            if place is not None:
                start, number, _ = place
                return (
                    f"pixels of page {chosen[number].page} are zeros at byte {start:,} of "
                    f"{self._size:,}"
                )
        return ""

    def _find_zero_head(self, pages: list[_Segments], places: list[_Place]) -> _Place | None:
        """A compressed segment that begins with zeros, among those looked at."""
        for index in _spread_places(len(places)):
            if not any(self._read_at(places[index][0], _HEAD_BYTES)):
                return places[index]
        return None

    def _find_raw_end(self, pages: list[_Segments], places: list[_Place]) -> _Place | None:
        """The uncompressed segment in which the pixels end as only a copy ends."""
        passed = len(places)
        for start in _spread_places(len(places)):
            if start >= passed:
                continue  # within zeros that were passed already
            at, data = start, self._read_segment(pages, places[start])
            while data is not None and not data.any() and at > 0:
                at -= 1
                data = self._read_segment(pages, places[at])
            passed = at
            if data is None:
                continue
            if start == len(places) - 1 and (
                not data.any() or (at < start and places[at][1] != places[at + 1][1])
            ):
                return places[at]  # all of the last page is zeros, or all of the file
            if (at < start or at == len(places) - 1) and self._ends_at(pages, places, at):
                return places[at]
        return None

    def _ends_at(self, pages: list[_Segments], places: list[_Place], at: int) -> bool:
        """Whether the pixels of a segment, with zeros after it, end as a copy does.

        Black parts of a picture end at an edge of the picture's, which neighbours share. A copy
        ends within one row of one segment, and all before that is full.
        """
        full = self._read_full(pages, places[at])
        if full is None or not full.any():
            return False
        rows, columns = full.shape
        last = int(np.flatnonzero(np.any(full, 1))[-1])
        prefix = int(np.flatnonzero(full[last])[-1]) + 1
        pixels = np.concatenate([full[:last].ravel(), full[last, :prefix]])
        if pixels.mean() < _FULL_SHARE:
            return False
        tiles_a_row = pages[places[at][1]].columns
        if prefix == columns and last == rows - 1:
            # Between two tiles: only where nothing else in the file is black.
            earlier = [index for index in _spread_places(len(places)) if index < at]
            return (
                at < len(places) - 1
                and tiles_a_row > 1
                and all(self._is_full(pages, places[index]) for index in earlier)
            )
        if prefix == columns and places[at][2] % tiles_a_row == 0:
            return False  # below a whole row a black part may begin, in strips as a rule
        return at == 0 or self._is_full(pages, places[at - 1])

    def _is_full(self, pages: list[_Segments], place: _Place) -> bool:
        full = self._read_full(pages, place)
        return full is not None and bool(full.mean() >= _FULL_SHARE)

    def _read_full(self, pages: list[_Segments], place: _Place) -> npt.NDArray[np.bool_] | None:
        """Which pixels of a segment are not zero, [rows, columns] within the picture."""
        data = self._read_segment(pages, place)
        rows, columns = pages[place[1]].valid_part(place[2])
        return None if data is None else np.any(data[:rows, :columns], -1)

    def _read_segment(self, pages: list[_Segments], place: _Place) -> npt.NDArray[np.uint8] | None:
        """Bytes [rows, width, bytes of a pixel] of a segment; None where they are too many."""
        start, number, index = place
        page, size = pages[number], int(pages[number].counts[index])
        row_bytes = page.width * page.sample_bytes
        if size > _MOST_SEGMENT_BYTES or size % row_bytes:
            return None
        data = np.frombuffer(self._read_at(start, size), np.uint8)
        return data.reshape(-1, page.width, page.sample_bytes) if len(data) == size else None

    def _read_at(self, offset: int, size: int) -> bytes:
        self._file.seek(offset)
        return self._file.read(size)

    def _list_segments(self) -> Iterator[_Segments]:
        """The tiles and strips of every page, of which all is within the file."""
        offset = self._first
        for page in range(_MAX_PAGES):
            directory = self._read_directory(offset) if offset else None
            if directory is None:
                return
            entries, offset = directory
            fields = self._parse_fields(entries)
            for offset_tag, count_tag in _OFFSETS_AND_COUNTS:
                if offset_tag not in fields or count_tag not in fields:
                    continue
                starts = self._field_values(fields[offset_tag])
                counts = self._field_values(fields[count_tag])
                if starts is not None and counts is not None and len(starts) == len(counts):
                    segments = self._describe_segments(page, fields, starts, counts)
                    if segments is not None:
                        yield segments

    def _describe_segments(
        self,
        page: int,
        fields: dict[int, tuple[int, int, bytes]],
        starts: npt.NDArray[np.int64],
        counts: npt.NDArray[np.int64],
    ) -> _Segments | None:
        def first(tag: int, default: int) -> int:
            values = self._field_values(fields[tag]) if tag in fields else None
            return int(values[0]) if values is not None and len(values) else default

        width, height = first(256, 0), first(257, 0)
        tile_width, rows = first(322, width), first(323, first(278, height))
        samples = first(277, 1) if first(284, 1) == 1 else 1
        bits = first(258, 1)
        if min(width, height, tile_width, rows) <= 0 or bits % 8:
            return None
        pixel = samples * bits // 8
        if len(starts) == 1 and 322 not in fields and first(259, 1) == _UNCOMPRESSED:
            # One strip is all of the picture: looked at in parts, as if there were several.
            rows = min(rows, _PART_ROWS)
            tops = np.arange(0, height, rows, dtype=np.int64)
            counts = np.minimum(rows, height - tops) * width * pixel
            starts = starts + tops * width * pixel
        return _Segments(
            page, first(259, 1), starts, counts, tile_width, rows,
            -(-width // tile_width), width, height, pixel,
        )  # fmt: skip

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
