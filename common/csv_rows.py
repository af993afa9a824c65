"""Tables that people write as CSV: each row has a value for each column, or is refused by its line.

The standard reader takes the last of two columns of one name, fills up rows that are too short,
puts aside what is too much, and reads to the end of the file where a quote is not closed.
"""

import csv
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from common.errors import UserError
from common.files import table_lines
from common.text import list_some

_BYTE_ORDER_MARK = "\ufeff"


class CsvRows:
    """The rows of an open CSV file as (line, values by column); empty lines are passed over.

    `columns` are the header's names in their order. Raises `UserError` naming file and line, also
    while it is iterated over, `OSError` for endless lines and `csv.Error` for quotes out of place.
    """

    def __init__(self, path: Path, file: IO[str], delimiter: str = ",") -> None:
        self._path = path
        self._reader = csv.reader(table_lines(file), delimiter=delimiter, strict=True)
        self._line = 1
        self.columns = next(self._reader, [])
        # Columns without a name are those of a spreadsheet's empty cells.
        twice = [name for name, count in Counter(self.columns).items() if name and count > 1]
        if twice:
            raise UserError(
                f"{path}, line 1: {list_some(twice)}: two columns of one name; leave one of them"
            )
        self._refuse_marks(self.columns)

    def __iter__(self) -> Iterator[tuple[int, dict[str, str]]]:
        while True:
            # A row's first line: one with line breaks in quotes has several.
            self._line = self._reader.line_num + 1
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
            yield self._line, dict(zip(self.columns, values, strict=True))

    def _refuse_marks(self, values: list[str]) -> None:
        """One at the file's beginning says how it is encoded, and is not read; others are text."""
        if any(value.startswith(_BYTE_ORDER_MARK) for value in values):
            raise UserError(
                f"{self._path}, line {self._line}: a byte order mark (U+FEFF), which "
                "may only begin a file: were several tables joined? remove it"
            )
