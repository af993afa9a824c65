"""Values of plain Parquet pages as views of the bytes read.

Our feature files have one uncompressed, plainly encoded page per column and row group, so that what
is on disk is the array itself. pyarrow copies it and takes the checksum with zlib: 0.2 of the
speed of reading the bytes (docs/performance/features.md). The file is read and not mapped: what
touches a mapped page of a file that was cut short is killed without a word (SIGBUS). Layout: Apache
Parquet, PageHeader in Thrift's compact protocol.
"""

import os
import threading
import weakref
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq

from common.files import open_descriptor
from pipeline.dataset.thrift import read_number

_INT32_FIELD = 0x15
"""Thrift compact: the next field, of type int32."""
_MOST_HEADER_BYTES = 64
"""Of a page's header up to its CRC: four numbers of at most five bytes, and their fields."""


class PlainPages:
    """The pages of a file, as arrays [rows, ...]; its checksums are verified on every read.

    Raises ValueError where the file is not laid out as our writer does it, or is damaged, and
    OSError where it cannot be read. Once opened, a file that is replaced is read as it was.
    """

    def __init__(self, path: Path, metadata: pq.FileMetaData) -> None:
        self._metadata = metadata
        # The column of a list is called `element`; its path begins with the list's own name.
        paths = [metadata.schema.column(i).path for i in range(metadata.num_columns)]
        self._columns = {path.partition(".")[0]: i for i, path in enumerate(paths)}
        self._file = open_descriptor(path)
        weakref.finalize(self, os.close, self._file)
        self._lock = threading.Lock()

    def read_values(
        self,
        group: int,
        column: str,
        dtype: np.dtype[Any],
        shape: tuple[int, ...],
        *,
        is_list: bool = False,
    ) -> npt.NDArray[Any]:
        """The column's values in a row group, [rows, *shape], read-only.

        The values are fixed_size_binary of that shape, or with `is_list` lists of its numbers.
        """
        if not 0 <= group < self._metadata.num_row_groups:
            raise IndexError(f"row group {group} of {self._metadata.num_row_groups}")
        # Threads share the metadata, which pyarrow does not call safe for that.
        with self._lock:
            row_group = self._metadata.row_group(group)
            chunk, rows = row_group.column(self._columns[column]), row_group.num_rows
            start, length = chunk.data_page_offset, chunk.total_compressed_size
            count, compression = chunk.num_values, chunk.compression
        if compression != "UNCOMPRESSED":
            raise ValueError(f"column {column} is compressed ({compression})")
        data = self._read_bytes(start, length)
        page_bytes, crc = _page_header(data, 0)
        body = length - page_bytes
        values_bytes = rows * int(np.prod(shape)) * dtype.itemsize
        if not 0 < body <= length or values_bytes > page_bytes:
            raise ValueError(f"column {column} is not one plain page")
        if crc is not None and crc != _checksum_crc32(data[body:]):
            raise ValueError(f"checksum of column {column}")
        # Levels come first in a page, so that the values are its last bytes.
        first = body + page_bytes - values_bytes
        # A null among the rows is one value to the count and none in the page.
        whole = count == rows * (int(np.prod(shape)) if is_list else 1)
        if not whole or (is_list and _after_levels(data, body) != first):
            raise ValueError(f"column {column} has nulls or lists of another length")
        flat = np.frombuffer(data, dtype, values_bytes // dtype.itemsize, first)
        return flat.reshape(rows, *shape)

    def first_crc(self, column: str) -> int | None:
        """The CRC-32 that the column's first page states; None without one. Not verified."""
        with self._lock:
            chunk = self._metadata.row_group(0).column(self._columns[column])
            start, length = chunk.data_page_offset, chunk.total_compressed_size
        return _page_header(self._read_bytes(start, min(length, _MOST_HEADER_BYTES)), 0)[1]

    def _read_bytes(self, start: int, length: int) -> memoryview:
        """The bytes of the file at [start, start + length), read-only."""
        # Before memory is taken for what a damaged footer may claim.
        if not 0 <= start <= start + length <= os.fstat(self._file).st_size:
            raise ValueError("the file is cut short")
        # NumPy asks the kernel for large pages, which are ten times as fast to come by.
        buffer, done = np.empty(length, np.uint8).data, 0
        while done < length:
            count = os.preadv(self._file, [buffer[done:]], start + done)
            if count == 0:
                raise ValueError("the file is cut short")
            done += count
        return buffer.toreadonly()


def _after_levels(data: memoryview, at: int) -> int:
    """Where the values of a list's page begin: behind its repetition and definition levels.

    Both are stored as their length, four bytes, and that many bytes. A list with a null or of
    another length has fewer values than the levels' count, so they begin elsewhere.
    """
    for _ in range(2):
        at += 4 + int.from_bytes(data[at : at + 4], "little")
    return at


def _page_header(data: memoryview, at: int) -> tuple[int, int | None]:
    """Bytes of the page and its CRC-32 (None where the writer took none)."""
    numbers: list[int] = []
    while len(numbers) < 4 and data[at] == _INT32_FIELD:
        number, at = read_number(data, at + 1)
        numbers.append(number)
    if len(numbers) < 3 or numbers[0] != 0 or numbers[1] != numbers[2]:
        raise ValueError("not the header of a plain data page")
    return numbers[2], numbers[3] & 0xFFFFFFFF if len(numbers) == 4 else None


def _checksum_crc32(data: memoryview) -> int:
    """CRC-32 of the bytes; ISA-L's, four times as fast, where it is installed."""
    try:
        from isal import isal_zlib
    except ImportError:
        return zlib.crc32(data)
    return int(isal_zlib.crc32(data))
