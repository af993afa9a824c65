"""What a Parquet file becomes in memory, found by the heads of its pages before any is read.

Runs of equal values, dictionaries and compression make gigabytes of a kilobyte, and what a footer
says of sizes is whatever its author wrote. The head of each page states how many values follow and
how large the page is once it is decompressed; pyarrow allocates by the same numbers. Layout: Apache
Parquet, PageHeader in Thrift's compact protocol.
"""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from common.files import open_regular
from pipeline.dataset.thrift import read_number, read_varint

MOST_TABLE_BYTES = 1 << 30
"""Of what is read at once: 2^24 candidates have 0.7 GB."""
_SMALL_BYTES = 256 << 20
_WIDTHS = {"BOOLEAN": 1, "INT32": 4, "INT64": 8, "INT96": 12, "FLOAT": 4, "DOUBLE": 8}
_INDEX, _LEVELS = 4, 4
"""Bytes of a row that points into a dictionary; of the levels of a value that may be missing."""
_MOST_DICTIONARY = 64 << 20
_HEAD_BYTES, _LONGEST_HEAD = 1 << 10, 1 << 20
_PAGE = 1 << 10
"""Bytes that each page counts besides: a million empty ones take time, if no memory."""
_DATA, _DICTIONARY, _DATA_V2 = 0, 2, 3
_HEAD_OF_KIND = {_DATA: 5, _DICTIONARY: 7, _DATA_V2: 8}
"""The field with the numbers of values and the encoding, for each kind of page."""
_ENCODING_FIELD = {_DATA: 2, _DICTIONARY: 2, _DATA_V2: 4}
_DELTA_BYTE_ARRAY = 7


def most_bytes_from(size: int, factor: int = 1000) -> int:
    """The bytes that a table in a file of `size` bytes may become in memory.

    Runs and dictionaries of a grid of positions save a factor of up to a few hundred.

    >>> most_bytes_from(75_000) >> 20, most_bytes_from(10**6) >> 20
    (256, 953)
    """
    return max(_SMALL_BYTES, factor * size)


def require_bounded(
    path: Path,
    metadata: pq.FileMetaData,
    names: Sequence[str],
    groups: Iterable[int] | None = None,
    most_bytes: int = MOST_TABLE_BYTES,
) -> list[str]:
    """Refuse columns that become more than `most_bytes` in memory.

    `groups` are the row groups that are read together, by default all. Returns the paths of the
    columns of texts that must be read as dictionaries, so that no text is repeated in memory.
    Raises `ValueError` with the column, `OSError` where the file cannot be read.
    """
    total = 0
    texts = set()
    leaves = _leaf_columns(metadata, names)
    with open_regular(path) as file:
        for group in range(metadata.num_row_groups) if groups is None else groups:
            row_group = metadata.row_group(group)
            for index in leaves:
                chunk, column = row_group.column(index), metadata.schema.column(index)
                try:
                    size, has_dictionary = _chunk_bytes(file, chunk, column, row_group.num_rows)
                except (IndexError, RecursionError) as error:
                    raise ValueError(f"a page of column {column.path} has no head") from error
                total += size
                if has_dictionary and _is_text(column) and not _is_nested(column):
                    texts.add(column.path)
                if total > most_bytes:
                    raise ValueError(
                        f"with column {column.path} its pages become over {most_bytes:,} bytes, "
                        "more than a table of this kind has"
                    )
    return sorted(texts)


def _leaf_columns(metadata: pq.FileMetaData, names: Sequence[str]) -> list[int]:
    """Which of the file's columns of values belong to the columns of these names."""
    wanted = set(names)
    found = []
    for index in range(metadata.num_columns):
        parts = metadata.schema.column(index).path.split(".")
        # A name may have dots itself: whatever could be meant is counted.
        if any(".".join(parts[:end]) in wanted for end in range(1, len(parts) + 1)):
            found.append(index)
    return found


def _is_text(column: Any) -> bool:
    return bool(column.physical_type == "BYTE_ARRAY")


def _is_nested(column: Any) -> bool:
    """Whether its values are in lists or structs, which pyarrow seldom reads as dictionaries."""
    return "." in column.path


def _chunk_bytes(file: BinaryIO, chunk: Any, column: Any, rows: int) -> tuple[int, bool]:
    """Bytes in memory of a column in a row group, and whether any page is a dictionary."""
    is_text = _is_text(column)
    width = _INDEX if is_text else _WIDTHS.get(column.physical_type, column.length)
    width += _LEVELS if column.max_definition_level or column.max_repetition_level else 0
    start, values, body, longest, has_dictionary = chunk.data_page_offset, 0, 0, 0, False
    if chunk.has_dictionary_page and 0 < (chunk.dictionary_page_offset or 0) < start:
        start = chunk.dictionary_page_offset
    # Without values no page is read; writers leave the offset of such a column at 0.
    stop = start + (chunk.total_compressed_size if chunk.num_values else 0)
    while start < stop:
        page = _read_head(file, start)
        body += page.size + _PAGE
        if page.kind == _DICTIONARY:
            has_dictionary = True
            if is_text and _is_nested(column):
                longest = max(longest, _longest_entry(file, page, chunk.compression))
        else:
            values += page.count
        # An entry may repeat all of the one before it, in no bytes.
        if is_text and page.encoding == _DELTA_BYTE_ARRAY:
            body += page.count * page.size
        start = page.body + page.stored
    # Memory is reserved by the footer's numbers, too.
    values = max(values, chunk.num_values, rows)
    size = values * (width + longest) + body if is_text else max(values * width, body)
    return size, has_dictionary


def _longest_entry(file: BinaryIO, page: "_Page", compression: str) -> int:
    """Bytes of the longest text of a dictionary; those of the page where it is too large to see."""
    if page.size > _MOST_DICTIONARY or page.stored > _MOST_DICTIONARY:
        return page.size
    data = os.pread(file.fileno(), page.stored, page.body)
    if compression != "UNCOMPRESSED":
        try:
            data = pa.Codec(compression.lower()).decompress(data, page.size, asbytes=True)
        except (OSError, ValueError, pa.ArrowException):
            return page.size
    at = longest = 0
    while at + 4 <= len(data):
        length = int.from_bytes(data[at : at + 4], "little")
        longest, at = max(longest, length), at + 4 + length
    return min(longest, page.size)


@dataclass(frozen=True)
class _Page:
    """What a page's head says; `size` and `stored` bytes with and without compression.

    `body` is where its bytes begin.
    """

    kind: int
    count: int
    encoding: int
    size: int
    stored: int
    body: int


def _read_head(file: BinaryIO, at: int) -> _Page:
    """The head of the page at a place of the file; IndexError where it ends there."""
    length = _HEAD_BYTES
    while True:
        data = os.pread(file.fileno(), length, at)
        try:
            fields, end = _read_struct(data, 0)
            break
        except IndexError:
            # Statistics in a head have any length.
            if len(data) < length or length >= _LONGEST_HEAD:
                raise
            length = _LONGEST_HEAD
    kind, size, stored = (fields.get(number) for number in (1, 2, 3))
    if not isinstance(kind, int) or not isinstance(size, int) or not isinstance(stored, int):
        raise ValueError("a page's head has no kind or size")
    head = fields.get(_HEAD_OF_KIND.get(kind, 0), {})
    count = head.get(1, 0) if isinstance(head, dict) else 0
    encoding = head.get(_ENCODING_FIELD.get(kind, 0), 0) if isinstance(head, dict) else 0
    if not isinstance(count, int) or min(count, size, stored) < 0:
        raise ValueError(f"a page of {count} values in {size} bytes")
    return _Page(kind, count, encoding, size, stored, at + end)


_TRUE, _FALSE, _BYTE, _DOUBLE, _BINARY, _STRUCT = 1, 2, 3, 7, 8, 12
_NUMBERS = (4, 5, 6)
_DEEPEST = 8


def _read_struct(data: bytes, at: int, depth: int = 0) -> tuple[dict[int, Any], int]:
    """The numbers and structs in a Thrift struct by field, and its end; IndexError beyond data."""
    if depth > _DEEPEST:
        raise ValueError("a page's head is nested")
    fields: dict[int, Any] = {}
    number = 0
    while (head := data[at]) != 0:
        at += 1
        kind = head & 15
        if head >> 4:
            number += head >> 4
        else:
            number, at = read_number(data, at)
        if kind in _NUMBERS:
            fields[number], at = read_number(data, at)
        elif kind == _STRUCT:
            fields[number], at = _read_struct(data, at, depth + 1)
        elif kind == _BINARY:
            length, at = read_varint(data, at)
            at += length
        elif kind in (_BYTE, _DOUBLE):
            at += 1 if kind == _BYTE else 8
        elif kind not in (_TRUE, _FALSE):
            raise ValueError("a page's head has a list")
    return fields, at + 1
