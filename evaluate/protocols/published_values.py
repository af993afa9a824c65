"""The published values of the CytoSyn report (arXiv 2603.18089, tables 2 to 5), as typed records.

`published/cytosyn.yaml` has them by table, quantity and the report's name of the row. A row of a
protocol names the row of the report that it repeats (`published`).
"""

from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

from common.config import read_yaml
from common.errors import UserError
from common.record import Record
from evaluate.protocols.config import SWEPT_KEYS, Deviation, Protocol
from evaluate.protocols.plan import Cell, Images, all_images, guiding_set

FILE = Path(__file__).parent / "published" / "cytosyn.yaml"
_ONE_MODEL = ("CytoSyn-108M-EMA", "CytoSyn-v2")
"""Table 2 and tables 3 and 4 print one model under two names."""
_CHANGE_NO_NUMBER = frozenset(
    {"encoders", "columns", "tables", "plots", "controls", "groups", "group_tiles", "relative_to",
     "title", "source", "varies"}
)  # fmt: skip
"""Keys that choose what is measured beside a number, or how it is shown."""
_QUANTITIES_OF = {
    "draws": ("variability",),
    "subsample": ("variability",),
    "k": ("precision", "recall"),
    "fld": ("fld",),
    "kid": (),
}
"""Settings, by their name or its first word, that change only these published quantities."""


class PublishedValue(NamedTuple):
    """One number of the report: where it is printed, its value, its standard deviation if given.

    `approximate` says that the report itself read it off another paper's figure.
    """

    table: str
    quantity: str
    row: str
    encoder: str
    column: str
    value: float
    spread: float | None = None
    approximate: bool = False


@cache
def published_values(table: str) -> tuple[PublishedValue, ...]:
    """All values of one table, in the file's order; empty for a protocol without any.

    >>> len(published_values("table5"))
    8
    """
    quantities = Record(read_yaml(FILE), FILE.name).part(table)
    return tuple(
        value
        for quantity in quantities
        for value in _quantity_values(table, quantity, quantities.part(quantity))
    )


def _quantity_values(table: str, quantity: str, part: Record) -> Iterator[PublishedValue]:
    """A quantity's `rows` are name: for each encoder a list with a number for each column."""
    encoders, columns = part.texts("encoders"), part.texts("columns")
    rows: dict[str, list[list[float | str | None]]] = dict(part.part("rows"))  # type: ignore[arg-type]
    for row, by_encoder in rows.items():
        for encoder, entry in zip(encoders, by_encoder, strict=True):
            for column, number in zip(columns, entry, strict=True):
                if number is not None:
                    value, spread, approximate = _read_number(number)
                    yield PublishedValue(
                        table, quantity, row, encoder, column, value, spread, approximate
                    )


def _read_number(number: float | str) -> tuple[float, float | None, bool]:
    """A number as it is printed: `58.4`, `72.17 ± 0.18` or `~140`.

    >>> _read_number("~140"), _read_number("72.17 ± 0.18")
    ((140.0, None, True), (72.17, 0.18, False))
    """
    text = str(number)
    value, _, spread = text.removeprefix("~").partition("±")
    return float(value), float(spread) if spread else None, text.startswith("~")


def find_published(
    protocol: Protocol, quantity: str, row: str, encoder: str, column: str
) -> PublishedValue | None:
    """The value that a cell of the protocol repeats, by the report's name of its row."""
    wanted = (quantity, row, encoder, column)
    for value in published_values(protocol.published_table or protocol.name):
        if (value.quantity, value.row, value.encoder, value.column) == wanted:
            return value
    return None


def published_name(protocol: Protocol, row: str) -> str:
    """What the report calls a row: `{model}` in it is `published_model`, as this table names it."""
    model = protocol.published_model
    if model in _ONE_MODEL:
        rows = published_rows(protocol)
        model = next((name for name in _ONE_MODEL if name in rows), model)
    return row.replace("{model}", model)


def check_published_model(protocol: Protocol) -> None:
    """Refuse a `published_model` that no row of the table is of: nothing would be compared."""
    rows = published_rows(protocol)
    if rows and published_name(protocol, "{model}") not in rows:
        raise UserError(
            f"published_model is '{protocol.published_model}'; the table has {', '.join(rows)}"
        )


def published_rows(protocol: Protocol) -> list[str]:
    """The report's names of all rows of the protocol's table."""
    values = published_values(protocol.published_table or protocol.name)
    return list(dict.fromkeys(value.row for value in values))


def describe_rows(protocol: Protocol, cells: Sequence[Cell]) -> list[str]:
    """What the rows measure and which published rows they repeat, a line each.

    Published rows that no row repeats are named at the end.
    """
    lines: dict[str, None] = {}
    repeated = set()
    for cell in cells:
        if cell.kind == "control":
            continue
        name = published_name(protocol, cell.published)
        repeated.add(name)
        point = "".join(f", {key} {value}" for key, value in cell.point.items())
        paper = f"; published as '{name}'" if name in published_rows(protocol) else ""
        lines[f"'{cell.label}{point}' in {cell.column}{paper}"] = None
    rest = [name for name in published_rows(protocol) if name not in repeated]
    return [*lines, *(f"published row '{name}' is not repeated here" for name in rest)]


def cell_deviations(
    protocol: Protocol, quantity: str, encoder: str, source: str, column: str
) -> list[str]:
    """The deviations that a quantity of images (or a set) against a column rests on, as texts.

    Those of other generations, sets and models, and of settings of other quantities, do not
    concern it; all others concern every number. So does an encoder with random weights, which
    the configuration of places chooses.
    """
    weights = protocol.weights_of(encoder)
    random = [f"{encoder} has random weights ({weights})"] if weights.startswith("random:") else []
    images = next((one for one in all_images(protocol) if one.key == source), None)
    named = {
        "generations": {images.generation if images else ""},
        "models": {images.spec.model if images else ""},
        "sets": {source, column, guiding_set(protocol, source)},
    }
    return random + [
        describe_deviation(key, pair)
        for key, pair in protocol.deviations.items()
        if _concerns(key.split("."), quantity, named) and not _is_shipped_point(key, pair, images)
    ]


def _concerns(key: list[str], quantity: str, named: dict[str, set[str]]) -> bool:
    section, *names = key
    if section in _CHANGE_NO_NUMBER:
        return False
    if section == "settings":
        known = _QUANTITIES_OF.get(names[0], _QUANTITIES_OF.get(names[0].partition("_")[0]))
        return known is None or quantity in known
    return section not in named or not names or names[0] in named[section]


def _is_shipped_point(key: str, pair: Deviation, images: Images | None) -> bool:
    """Whether a list of steps, solvers or seeds was changed, but these images' value is of both.

    Of images that were given, `pair` has the recorded value, which must be the configured one too.
    """
    name, (shipped, used) = key.rpartition(".")[2], pair
    if images is None or not key.startswith("generations.") or name not in SWEPT_KEYS:
        return False
    if not (isinstance(shipped, list) and isinstance(used, list)):
        return False
    value = getattr(images.spec, name)
    return len(value) == 1 and value[0] in used and value[0] in shipped


def describe_deviation(key: str, pair: tuple[object, object]) -> str:
    """A deviation in words.

    >>> describe_deviation("count", (100_000, 1000))
    'count is 1000, not 100000'
    """
    if key == "rows":
        return "rows are not the shipped ones"  # lists of many keys, which nobody reads in a note
    shipped, used = (_show_value(value) for value in pair)
    return f"{key} is {used}, not {shipped}"


def _show_value(value: object) -> str:
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    return "unset" if value in (None, "", []) else str(value)
