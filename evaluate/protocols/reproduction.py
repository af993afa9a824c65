"""The reproduction sheet: every published value beside ours, and whether they differ by chance."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from common.record import Record
from evaluate.protocols.published_values import PublishedValue, published_values

_TWO_SIDED_95 = 1.96
_TWO_DRAWS = math.sqrt(2)
"""Ours and the published number are each of a draw, so that their difference varies by both."""


@dataclass(frozen=True)
class SheetRow:
    """A published value, and ours where it was measured.

    `bound` is how far apart the two may be by chance, and `bound_of` what it comes from; None
    where nothing says. `verdict` is in words.
    """

    table: str
    quantity: str
    row: str
    encoder: str
    column: str
    published: float
    published_spread: float | None
    approximate: bool
    ours: float | None = None
    difference: float | None = None
    bound: float | None = None
    bound_of: str = ""
    verdict: str = "not measured"


def reproduction_sheet(results: Mapping[str, Mapping[str, object]]) -> list[SheetRow]:
    """A row for each published value of the tables, by results.json of each protocol's name.

    Protocols without results (not run, or failed) have rows without ours.
    """
    sheet = []
    for table in ("table2", "table3", "table4", "table5"):
        entries = _published_entries(Record(results.get(table, {}), table))
        for value in published_values(table):
            found = entries.get((value.quantity, value.row, value.encoder, value.column))
            sheet.append(_sheet_row(value, found))
    return sheet


_Place = tuple[str, str, str, str]


def _published_entries(results: Record) -> dict[_Place, Record]:
    """The numbers that have a published one beside them, by (quantity, row, encoder, column)."""
    entries: dict[_Place, Record] = {}
    for table in results.parts("tables"):
        for row in table.parts("rows"):
            cells = row.part("cells")
            for key in cells:
                entry, (encoder, _, column) = cells.part(key), key.partition("/")
                if published := entry.part("published"):
                    place = (table.text("name"), published.text("row"), encoder, column)
                    entries.setdefault(place, entry)
    return entries


def _sheet_row(value: PublishedValue, entry: Record | None) -> SheetRow:
    row = SheetRow(
        value.table, value.quantity, value.row, value.encoder, value.column,
        value.value, value.spread, value.approximate,
    )  # fmt: skip
    if entry is None:
        return row
    ours, deviations = entry.number("value"), entry.part("published").texts("deviations")
    bound, source = difference_bound(value, entry)
    known = {**asdict(row), "ours": ours, "bound": bound, "bound_of": source}
    if deviations:
        return SheetRow(**known | {"verdict": f"not comparable: {'; '.join(deviations)}"})
    difference = ours - value.value
    if bound is None:
        verdict = "no interval"
    else:
        verdict = "within chance" if abs(difference) <= bound else "beyond chance"
    return SheetRow(**known | {"difference": difference, "verdict": verdict})


def difference_bound(value: PublishedValue, entry: Record) -> tuple[float | None, str]:
    """How far ours may be from a published value by chance (95 %), and what says so.

    The difference of two draws varies by the root of two more than each, and the rounding of the
    printed value is added. Of Fréchet distances it is by the interval of ours, or table 5's spread
    of the same encoder and set; of FLD by twice the spread over seeds; of cosines by the standard
    error of their mean; of precision and recall by the binomial one. The last two take tiles as
    independent, which makes them too narrow where a slide has many.
    """
    width, source = _draw_width(value, entry)
    if width is None:
        return None, ""
    return _TWO_DRAWS * width + 0.5 * 10 ** -_decimals(value), source


def _draw_width(value: PublishedValue, entry: Record) -> tuple[float | None, str]:
    """How far one number may be from its expectation by chance (95 %), and what says so."""
    spread = entry.optional("spread")
    counts = [entry.part("n").count(key) for key in entry.part("n")]
    n = min(counts) if counts else 0
    if value.quantity == "fd" and spread is not None:
        return float(spread), "interval of ours"
    if value.quantity in ("fd", "variability"):
        published = value.spread or _table5_spread(value)
        if published is None or value.row == "guidance-vs-val":
            return None, ""  # table 5 is of images, that row of real tiles
        return _TWO_SIDED_95 * published, "spread of table 5"
    if value.quantity == "fld":
        return (None, "") if spread is None else (2 * float(spread), "spread of seeds")
    if value.quantity == "cosine" and spread is not None and n:
        return _TWO_SIDED_95 * float(spread) / math.sqrt(n), "standard error"
    if value.quantity in ("precision", "recall") and n:
        share = entry.number("value")
        return _TWO_SIDED_95 * math.sqrt(max(share * (1 - share), 0.0) / n), "binomial error"
    return None, ""


def _decimals(value: PublishedValue) -> int:
    """Digits that the report prints: 2 of table 5, cosines and shares, 1 of distances."""
    return 1 if value.quantity in ("fd", "fld") else 2


def _table5_spread(value: PublishedValue) -> float | None:
    for one in published_values("table5"):
        if (one.encoder, one.column) == (value.encoder, value.column):
            return one.spread
    return None
