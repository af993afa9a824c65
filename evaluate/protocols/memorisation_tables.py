"""The memorisation protocol's numbers as tables, every encoder a column."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from common.record import Record
from evaluate.protocols.layout import Table, TableBuilder, TableColumn, column_key

_ALL_SETS = ("generated", "val_in", "val_out")


@dataclass(frozen=True)
class SearchQuantity:
    """A number of a search, read for each of the sets in `of` ("" for the search as a whole).

    `against` marks a number of the images compared with that set, whose row names both.
    """

    name: str
    title: str
    better: str
    read: Callable[[Record, str], float | None]
    of: tuple[str, ...] = ("",)
    against: bool = False


def _read_quantile(key: str, quantile: str) -> Callable[[Record, str], float | None]:
    return lambda search, name: search.part("sets").part(name).part(key).number(quantile)


QUANTITIES = (
    SearchQuantity("ratio_median", "d₁/d₂ to the training tiles, median", "higher",
                   _read_quantile("ratio", "median"), _ALL_SETS),
    SearchQuantity("ratio_q01", "d₁/d₂ to the training tiles, first percentile", "higher",
                   _read_quantile("ratio", "q01"), _ALL_SETS),
    SearchQuantity("score_q99", "FLD’s memorisation score, 99th percentile", "lower",
                   _read_quantile("score", "q99"), _ALL_SETS),
    SearchQuantity("fld_gap", "FLD gap (clearly negative is copying)", "",
                   lambda search, name: search.part("sets").part(name).optional("gap"),
                   ("generated", "val_in")),
    SearchQuantity("authenticity", "Authenticity", "higher",
                   lambda search, name: search.number("authenticity")),
    SearchQuantity("suspicious", "Share of images with a smaller d₁/d₂ than 99 % of the set",
                   "lower", lambda search, name: search.part("suspicious_share").number(name),
                   ("val_in", "val_out"), against=True),
    SearchQuantity("copying_test", "C_T against the set (below −3 is copying)", "",
                   lambda search, name: search.part("copying_test").part(name).optional("value"),
                   ("val_in", "val_out"), against=True),
)  # fmt: skip


def memorisation_tables(searches: Sequence[Mapping[str, object]]) -> list[Table]:
    """Tables of the searches, in the layout of every protocol's tables."""
    records = [Record(search, "memorisation") for search in searches]
    encoders = dict.fromkeys(search.text("encoder") for search in records)
    train = records[0].part("train").text("set")
    columns = [TableColumn(encoder=encoder, set=train) for encoder in encoders]
    return [_lay_out(quantity, records, columns) for quantity in QUANTITIES]


def _lay_out(
    quantity: SearchQuantity, searches: Sequence[Record], columns: Sequence[TableColumn]
) -> Table:
    builder = TableBuilder(columns)
    for name in quantity.of:
        for search in searches:
            train, names = search.part("train"), search.part("names")
            # Validation sets are real tiles, which tables set apart as references.
            label, kind = search.text("source"), "model"
            if quantity.against:
                label = f"{label} against {names.text(name)}"
            elif name:
                label = names.text(name)
                kind = "model" if name == "generated" else "reference"
            value = quantity.read(search, name)
            n = {"n": search.part("sets").part("generated").count("n"),
                 "training": train.count("rows")}  # fmt: skip
            column = TableColumn(encoder=search.text("encoder"), set=train.text("set"))
            builder.add_number(
                kind, label, column_key(column),
                None if value is None else {"value": float(value), "spread": None, "n": n},
            )  # fmt: skip
    return builder.build_table(quantity.name, quantity.title, quantity.better)
