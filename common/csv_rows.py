"""Tables that people write as CSV: each row has a value for each column, or is refused by its line.

The standard reader takes the last of two columns of one name, fills up rows that are too short,
puts aside what is too much, and reads to the end of the file where a quote is not closed. Nor does
it end at a row or header that no table has.
"""

import csv
import errno
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

from common.errors import UserError
from common.text import list_some, one_line

MOST_COLUMNS = 10_000
_MOST_ROW = 1 << 20
"""Characters of a row, however many lines its quoted fields have."""
_BYTE_ORDER_MARK = "\ufeff"


class CsvRows:
    """The rows of an open CSV file as (line, values by column); empty lines are passed over.

    `columns` are the header's names in their order. Raises `UserError` naming file and line, also
    while it is iterated over, `OSError` for a row or header that no table has and for more than
    `most_rows`, and `csv.Error` for quotes out of place.
    """

    def __init__(
        self, path: Path, file: IO[str], delimiter: str = ",", most_rows: int | None = None
    ) -> None:
        self._path, self._most_rows = path, most_rows
        self._lines = _RowLines(file)
        self._reader = csv.reader(self._lines, delimiter=delimiter, strict=True)
        self._line = 1
        self.columns = next(self._reader, [])
        if len(self.columns) > MOST_COLUMNS:
            what = (
                f"its header has {len(self.columns):,} columns, expected at most {MOST_COLUMNS:,}"
            )
            raise OSError(errno.EFBIG, what)
        # Columns without a name are those of a spreadsheet's empty cells.
        twice = [name for name, count in Counter(self.columns).items() if name and count > 1]
        if twice:
            raise UserError(
                f"{path}, line 1: {list_some(twice)}: two columns of one name; leave one of them"
            )
        self._refuse_marks(self.columns)

    def __iter__(self) -> Iterator[tuple[int, dict[str, str]]]:
        count = 0
        while True:
            # A row's first line: one with line breaks in quotes has several.
            self._line = self._reader.line_num + 1
            self._lines.used = 0
            values = next(self._reader, None)
            if values is None:
                return
            if not values:
                continue
            if len(values) != len(self.columns):
                raise UserError(
                    f"{self._path}, line {self._line}: {len(values)} values, expected "
                    f"{len(self.columns)} as in the header: a comma too many or too few, or text "
                    "with a comma that is not in quotes"
                )
            self._refuse_marks(values)
            count += 1
            if self._most_rows is not None and count > self._most_rows:
                raise OSError(errno.EFBIG, f"it has more than {self._most_rows:,} rows")
            yield self._line, dict(zip(self.columns, values, strict=True))

    def _refuse_marks(self, values: list[str]) -> None:
        """One at the file's beginning says how it is encoded, and is not read; others are text."""
        if any(value.startswith(_BYTE_ORDER_MARK) for value in values):
            raise UserError(
                f"{self._path}, line {self._line}: a byte order mark (U+FEFF), which "
                "may only begin a file: were several tables joined? remove it"
            )


def describe_columns(columns: Sequence[str]) -> str:
    """The names of the columns that are there, for a message."""
    return one_line(list_some(columns), 400) or "none"


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
