"""Whether a TIFF file can be read in bounded time and memory, by its directories alone.

Libraries follow a chain of directories as far as it goes, also in circles, and take memory for
what a header claims. Nothing here follows an offset twice or reads a table of values but that of
SubIFDs.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path

from common.files import open_regular
from pipeline.slides.reader import SlideOpenError, refuse_extent

MOST_SEGMENT_BYTES = 1 << 30
"""Of a decoded tile or strip, the least that any library decodes at once."""
_MOST_DIRECTORIES = 10_000
_MOST_TAGS = 4096
_MOST_SEGMENTS = 1 << 23
"""Tiles of a level: 5 * 10^11 px in tiles of 256 px."""
_MOST_VALUE_BYTES = 512 << 20
"""Of all values that directories point to: tables of offsets, colour profiles, XML."""
_SWELLS_FROM_BYTES, _MOST_SWELLING = 64 << 20, 1000
"""Deflate makes 1032 bytes of one at most: above this, a tile is not in so small a file."""
_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4,
          16: 8, 17: 8, 18: 8}  # fmt: skip
_KINDS = {1: "B", 3: "H", 4: "I", 13: "I", 16: "Q", 18: "Q"}
_WIDTH, _LENGTH, _BITS, _COMPRESSION, _STRIPS = 256, 257, 258, 259, 273
_SAMPLES, _ROWS_PER_STRIP, _PLANAR, _TILE_WIDTH, _TILE_LENGTH = 277, 278, 284, 322, 323
_TILES, _SUB_IFDS, _NDPI = 324, 330, 65420
_UNCOMPRESSED, _APART = 1, 2


def refuse_unbounded(path: Path) -> None:
    """Refuse a TIFF file of endless directories, or of sizes that no slide has.

    Other files pass. Raises `SlideOpenError`, and `OSError` where the file cannot be read.
    """
    with open_regular(path) as file:
        head = file.read(16)
        order = {b"II": "<", b"MM": ">"}.get(head[:2])
        if order is None or len(head) < 16:
            return
        kind = struct.unpack(order + "H", head[2:4])[0]
        if kind not in (42, 43):
            return
        _Walk(file, order, kind == 43, path.stat().st_size).check(head)


@dataclass(frozen=True)
class _Field:
    kind: int
    count: int
    value: bytes

    @property
    def bytes(self) -> int:
        return self.count * _BYTES.get(self.kind, 1)


class _Walk:
    """One pass over all directories of an open file."""

    def __init__(self, file: BufferedReader, order: str, big: bool, size: int) -> None:
        self._file, self._order, self._big, self._size = file, order, big, size
        self._word, self._entry = ("Q", "HHQ8s") if big else ("I", "HHI4s")
        self._directories = self._value_bytes = 0

    def check(self, head: bytes) -> None:
        first = self._unpack(self._word, head[8:16] if self._big else head[4:8])
        is_ndpi = self._check_chain(first, self._word)
        # Hamamatsu's next offset has 64 bits; who does not know that follows the lower half.
        if is_ndpi and not self._big:
            self._directories = self._value_bytes = 0
            self._check_chain(first, "Q")

    def _check_chain(self, first: int, word: str) -> bool:
        """Check the directories from an offset on; whether they are Hamamatsu's."""
        offset, seen, is_ndpi = first, set[int](), False
        while offset:
            if offset in seen:
                raise SlideOpenError(
                    f"its directories form a loop: number {len(seen) + 1} is one before it; the "
                    "file is damaged"
                )
            seen.add(offset)
            directory = self._read_directory(offset, word)
            if directory is None:
                break
            fields, offset = directory
            is_ndpi |= _NDPI in fields
            self._check_fields(fields, is_ndpi)
            self._check_below(fields, (*seen,) if _SUB_IFDS in fields else ())
        return is_ndpi

    def _check_below(self, fields: dict[int, _Field], above: tuple[int, ...]) -> None:
        """Check the tree of SubIFDs of a directory."""
        waiting = [(offset, above) for offset in self._sub_offsets(fields)]
        seen: set[int] = set()
        while waiting:
            offset, path = waiting.pop()
            if offset in path:
                raise SlideOpenError("its SubIFDs form a loop; the file is damaged")
            directory = None if offset in seen else self._read_directory(offset, self._word)
            seen.add(offset)
            if directory is not None:
                self._check_fields(directory[0], is_ndpi=False)
                below = (*path, offset)
                waiting += [(deeper, below) for deeper in self._sub_offsets(directory[0])]

    def _sub_offsets(self, fields: dict[int, _Field]) -> Iterator[int]:
        field = fields.get(_SUB_IFDS)
        if field is None:
            return
        if field.count > _MOST_DIRECTORIES:
            raise _too_many_directories()
        yield from (offset for offset in self._values(field) if offset)

    def _read_directory(self, offset: int, word: str) -> tuple[dict[int, _Field], int] | None:
        """Fields by tag, and the next directory's offset; None where the file ends before."""
        self._directories += 1
        if self._directories > _MOST_DIRECTORIES:
            raise _too_many_directories()
        if offset >= self._size:
            return None
        self._file.seek(offset)
        head = self._file.read(8 if self._big else 2)
        if len(head) < (8 if self._big else 2):
            return None
        count = self._unpack("Q" if self._big else "H", head)
        if count > _MOST_TAGS:
            raise SlideOpenError(f"a directory has {count:,} tags, expected at most {_MOST_TAGS:,}")
        form = self._order + self._entry
        step = struct.calcsize(form)
        body = self._file.read(count * step + struct.calcsize(word))
        if len(body) < count * step:
            return None
        fields = {
            tag: _Field(kind, number, value)
            for tag, kind, number, value in struct.iter_unpack(form, body[: count * step])
        }
        tail = body[count * step :]
        # An older Hamamatsu file may end within the upper half of the last offset.
        word = word if len(tail) >= struct.calcsize(word) else self._word
        return fields, self._unpack(word, tail) if len(tail) >= struct.calcsize(word) else 0

    def _check_fields(self, fields: dict[int, _Field], is_ndpi: bool) -> None:
        apart = (field for field in fields.values() if field.bytes > len(field.value))
        self._value_bytes += sum(field.bytes for field in apart)
        if self._value_bytes > _MOST_VALUE_BYTES:
            raise SlideOpenError(
                f"its directories point to {self._value_bytes:,} bytes of values, expected at most "
                f"{_MOST_VALUE_BYTES:,}"
            )
        width, height = self._first(fields, _WIDTH, 0), self._first(fields, _LENGTH, 0)
        if not width or not height:
            return
        refuse_extent(width, height, self._size)
        is_tiled = _TILE_WIDTH in fields or _TILES in fields
        across = self._first(fields, _TILE_WIDTH, width) if is_tiled else width
        down = self._first(fields, _TILE_LENGTH if is_tiled else _ROWS_PER_STRIP, height)
        # Hamamatsu's levels are one JPEG each, which is read in parts.
        if across and down and not is_ndpi:
            down = down if is_tiled else min(down, height)
            self._check_segments(fields, (width, height), (across, down), is_tiled)

    def _check_segments(
        self, fields: dict[int, _Field], size: tuple[int, int], segment: tuple[int, int],
        is_tiled: bool,
    ) -> None:  # fmt: skip
        """Check how many tiles or strips a picture has, and how large one is when decoded."""
        (width, height), (across, down) = size, segment
        samples = self._first(fields, _SAMPLES, 1)
        is_apart = self._first(fields, _PLANAR, 1) == _APART
        count = -(-width // across) * -(-height // down) * (samples if is_apart else 1)
        stated = max((fields[tag].count for tag in (_TILES, _STRIPS) if tag in fields), default=0)
        kind = "tiles" if is_tiled else "strips"
        if max(count, stated) > _MOST_SEGMENTS:
            raise SlideOpenError(
                f"a picture of {width}x{height} px has {max(count, stated):,} {kind}, expected at "
                f"most {_MOST_SEGMENTS:,}"
            )
        is_raw = self._first(fields, _COMPRESSION, 1) == _UNCOMPRESSED
        if is_raw and not is_tiled and down >= height:
            return  # any of its rows can be read by themselves
        bits = max(8, self._first(fields, _BITS, 8))
        decoded = across * down * (1 if is_apart else samples) * bits // 8
        swells = decoded > _SWELLS_FROM_BYTES and decoded > _MOST_SWELLING * self._size
        if decoded > MOST_SEGMENT_BYTES or swells:
            raise SlideOpenError(
                f"its {kind} of {across}x{down} px are {decoded:,} bytes each when decoded, more "
                f"than {MOST_SEGMENT_BYTES:,} or {_MOST_SWELLING:,} times the file; convert it to "
                "a TIFF of small tiles"
            )

    def _first(self, fields: dict[int, _Field], tag: int, default: int) -> int:
        return next(iter(self._values(fields[tag], 1)), default) if tag in fields else default

    def _values(self, field: _Field, most: int = _MOST_DIRECTORIES) -> tuple[int, ...]:
        """The first values of a field of whole numbers; () where they are not in the file."""
        kind, count = _KINDS.get(field.kind), min(field.count, most)
        if kind is None:
            return ()
        form = f"{self._order}{count}{kind}"
        value = field.value
        if field.bytes > len(value):
            offset = self._unpack(self._word, value)
            if offset >= self._size:
                return ()
            self._file.seek(offset)
            value = self._file.read(struct.calcsize(form))
        if len(value) < struct.calcsize(form):
            return ()
        return struct.unpack_from(form, value)

    def _unpack(self, kind: str, data: bytes) -> int:
        return int(struct.unpack_from(self._order + kind, data)[0])


def _too_many_directories() -> SlideOpenError:
    return SlideOpenError(f"it has more than {_MOST_DIRECTORIES:,} directories")
