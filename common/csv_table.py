"""CSV tables of users, row by row: none has more columns, or longer rows, than tables have."""

import csv
import errno
from collections.abc import Iterator, Sequence
from typing import IO

from common.text import list_some, one_line

MOST_COLUMNS = 10_000
_MOST_ROW = 1 << 20
"""Characters of a row, however many lines its quoted fields have."""


def read_rows(
    file: IO[str], delimiter: str = ",", most_rows: int | None = None
) -> tuple[list[str], Iterator[dict[str, str]]]:
    """The columns of an open table, and its rows as texts by column; empty lines are no rows.

    A row that is too short lacks its last columns, so that a row costs what is written of it.
    Raises `OSError` for a row or header that no table has and beyond `most_rows`, `csv.Error` and
    `UnicodeDecodeError` for what is no CSV; the rows do so while they are read.
    """
    lines = _RowLines(file)
    reader = csv.reader(lines, delimiter=delimiter)
    columns = next(reader, [])
    if len(columns) > MOST_COLUMNS:
        what = f"its header has {len(columns):,} columns, expected at most {MOST_COLUMNS:,}"
        raise OSError(errno.EFBIG, what)
    return columns, _named_rows(reader, lines, columns, most_rows)


def describe_columns(columns: Sequence[str]) -> str:
    """The names of the columns that are there, for a message."""
    return one_line(list_some(columns), 400)


class _RowLines:
    """The lines of a text; `used` are the characters since the row began."""

    def __init__(self, file: IO[str]) -> None:
        self._file, self.used = file, 0

    def __iter__(self) -> "_RowLines":
        return self

    def __next__(self) -> str:
        # Not whole lines, of which one may be as long as the file.
        line = self._file.readline(_MOST_ROW + 1 - self.used)
        if not line:
            raise StopIteration
        self.used += len(line)
        if self.used > _MOST_ROW:
            raise OSError(errno.EFBIG, f"a row has more than {_MOST_ROW:,} characters")
        return line


def _named_rows(
    reader: Iterator[list[str]], lines: _RowLines, columns: list[str], most_rows: int | None
) -> Iterator[dict[str, str]]:
    count = 0
    lines.used = 0
    for row in reader:
        lines.used = 0
        if row:
            count += 1
            if most_rows is not None and count > most_rows:
                raise OSError(errno.EFBIG, f"it has more than {most_rows:,} rows")
            yield dict(zip(columns, row, strict=False))
