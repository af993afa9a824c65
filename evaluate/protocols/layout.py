"""A table of a protocol as plain data, the same for the page, Markdown and LaTeX."""

from collections.abc import Iterable, Mapping
from typing import NotRequired, TypedDict

from evaluate.protocols.config import Protocol


class PublishedNumber(TypedDict):
    """What the report has in the same place, and why the two cannot be compared (empty: they can).

    `difference` is ours less the published one, None where they cannot be compared.
    """

    row: str
    value: float
    spread: float | None
    approximate: bool
    difference: float | None
    deviations: list[str]


class TableNumber(TypedDict):
    """A number with what it is given after "±", and the sample counts that it is of."""

    value: float | None
    spread: float | None
    n: Mapping[str, int | None]
    published: NotRequired[PublishedNumber]


class TableColumn(TypedDict):
    """A column: an encoder, and the set that is compared."""

    encoder: str
    set: str


class LabelledRow(TypedDict):
    """A row; `cells` has a number, or None, for every "encoder/set"."""

    label: str
    kind: str
    note: str
    cells: dict[str, TableNumber | None]


class Table(TypedDict):
    """A table; `better` is "lower", "higher" or "", and a `share` is shown with 3 decimals."""

    name: str
    title: str
    better: str
    share: bool
    columns: list[TableColumn]
    rows: list[LabelledRow]


class TableBuilder:
    """Collects numbers in rows by kind and label, in the order in which they first come."""

    def __init__(self, columns: Iterable[TableColumn]) -> None:
        self._columns = list(columns)
        self._rows: dict[tuple[str, str], LabelledRow] = {}

    def add_number(
        self, kind: str, label: str, column: str, number: TableNumber | None, note: str = ""
    ) -> None:
        """Put a number in the column "encoder/set" of a row; None makes the row alone."""
        empty: dict[str, TableNumber | None] = dict.fromkeys(map(column_key, self._columns))
        new = LabelledRow(label=label, kind=kind, note=note, cells=empty)
        row = self._rows.setdefault((kind, label), new)
        if number is not None:
            row["cells"][column] = number

    def build_table(self, name: str, title: str, better: str = "", *, share: bool = False) -> Table:
        """The table of all rows so far, without the columns in which no row has a number."""
        rows = list(self._rows.values())
        columns = [
            column
            for column in self._columns
            if any(row["cells"][column_key(column)] is not None for row in rows)
        ]
        for row in rows:
            row["cells"] = {column_key(one): row["cells"][column_key(one)] for one in columns}
        return Table(name=name, title=title, better=better, share=share, columns=columns, rows=rows)


def column_key(column: TableColumn) -> str:
    """The name of a column among a row's cells.

    >>> column_key({"encoder": "uni2-h", "set": "val-in"})
    'uni2-h/val-in'
    """
    return f"{column['encoder']}/{column['set']}"


def protocol_columns(protocol: Protocol) -> list[TableColumn]:
    """A column for each encoder and set of a protocol."""
    return [
        TableColumn(encoder=encoder, set=column)
        for encoder in protocol.encoders
        for column in protocol.columns
    ]
