"""Cells laid out in the paper's tables: one per quantity, encoders and sets as columns."""

from collections.abc import Mapping, Sequence

import numpy as np

from common.record import Record
from evaluate.metrics.metric import TableQuantity
from evaluate.metrics.registry import table_quantities
from evaluate.protocols.config import Protocol
from evaluate.protocols.layout import (
    PublishedNumber,
    Table,
    TableBuilder,
    TableNumber,
    protocol_columns,
)
from evaluate.protocols.published_values import cell_deviations, find_published, published_name

Cell = Mapping[str, object]
"""A measured cell of results.json."""


def build_tables(protocol: Protocol, cells: Sequence[Cell]) -> list[Table]:
    """The protocol's tables, of those that any cell has numbers for."""
    special = {"variability": variability_table, "fd_relative": relative_table}
    tables = [
        special[name](protocol, cells) if name in special else quantity_table(protocol, name, cells)
        for name in protocol.tables
    ]
    return [table for table in tables if table["rows"]]


def quantity_table(protocol: Protocol, name: str, cells: Sequence[Cell]) -> Table:
    """A row for each label and point, a column for each encoder and set."""
    metric, quantity = table_quantities()[name]
    builder = TableBuilder(protocol_columns(protocol))
    records = [Record(cell, "cells") for cell in cells]
    contexts = [_cell_context(quantity, cell, metric.name) for cell in records]
    repeated = _differing_labels(records, contexts)
    for cell, context in zip(records, contexts, strict=True):
        result = _metric_result(cell, metric.name)
        value = quantity.value(result) if result else None
        if value is None or (cell.text("kind") == "control" and not quantity.in_controls):
            continue
        label = row_label(cell)
        counts = {key: _read_integer(result, key) for key in ("n_real", "n_generated", "n")
                  if key in result}  # fmt: skip
        counts = counts or {"n": _read_integer(cell.part("basis"), "n_generated")}
        number = _table_number(value, counts, quantity.spread(result))
        if published := published_number(protocol, name, cell, value):
            number["published"] = published
        _add_number(builder, cell, label, number)
        if context is not None:
            # One row for all where their number is the same, else a row for each.
            context_label = f"{context[0]}: {label}" if context[0] in repeated else context[0]
            _add_number(builder, cell, context_label, context[1], kind="control")
    table = builder.build_table(name, quantity.title, quantity.better, share=quantity.share)
    order = {"model": 0, "reference": 1, "control": 2}
    table["rows"].sort(key=lambda row: order[row["kind"]])
    return table


def _cell_context(
    quantity: TableQuantity, cell: Record, metric: str
) -> tuple[str, TableNumber] | None:
    """The control row that a model's result brings along: a null of cosines, a distance's floor."""
    result = _metric_result(cell, metric)
    is_single_model = cell.text("kind") == "model" and not cell.part("point")
    if quantity.context is None or not is_single_model or not result:
        return None
    entry = quantity.context(result)
    return entry.label, _table_number(entry.value, entry.counts)


def _differing_labels(
    cells: Sequence[Record], contexts: Sequence[tuple[str, TableNumber] | None]
) -> set[str]:
    """Context rows that are another number for each cell: one would hide the others."""
    first: dict[tuple[str, str], TableNumber] = {}
    differing = set()
    for cell, context in zip(cells, contexts, strict=True):
        if context and first.setdefault((context[0], _column_of(cell)), context[1]) != context[1]:
            differing.add(context[0])
    return differing


def row_label(cell: Cell, *, without: str = "") -> str:
    """What a row is called: its label and the point of the grid, `without` one of its keys.

    >>> row_label({"label": "Model", "point": {"steps": 20, "solver": "ode"}})
    'Model, 20 steps, ODE'
    """
    record = Record(cell)
    texts = {"solver": "{}", "steps": "{} steps", "seed": "seed {}"}
    point = [
        texts[key].format(str(value).upper() if key == "solver" else value)
        for key, value in record.part("point").items()
        if key != without
    ]
    return ", ".join([record.text("label"), *point])


def relative_table(protocol: Protocol, cells: Sequence[Cell]) -> Table:
    """FD less its closed-form floor, over that of the reference row: alike for every encoder."""
    builder = TableBuilder(protocol_columns(protocol))
    distances = [
        (cell, _metric_result(cell, "frechet_distance"))
        for cell in (Record(cell, "cells") for cell in cells)
        if _metric_result(cell, "frechet_distance")
    ]
    # Fréchet distances of encoders have no common scale; that of the reference row makes one.
    unit = {
        _column_of(cell): _above_floor(result)
        for cell, result in distances
        if cell.text("label") == protocol.relative_to
    }
    for cell, result in distances:
        divisor = unit.get(_column_of(cell), 0)
        if cell.text("kind") == "model" and divisor > 0:
            sizes = {key: _read_integer(result, key) for key in ("n_real", "n_generated")}
            number = _table_number(_above_floor(result) / divisor, sizes)
            _add_number(builder, cell, row_label(cell), number)
    title = f"Fréchet distance above its noise floor, in units of that of “{protocol.relative_to}”"
    return builder.build_table("fd_relative", title, "lower")


_WIDTHS = (
    ("subsample", "std", "{size:,} of {n_generated:,} images without replacement, as published"),
    ("subsample", "corrected_std", "… corrected for the finite set"),
    ("slide", "std", "cluster bootstrap by slide"),
    ("patient", "std", "cluster bootstrap by patient"),
)


def variability_table(protocol: Protocol, cells: Sequence[Cell]) -> Table:
    """Means and standard deviations of the Fréchet distance by each way of drawing again.

    Only seeds are drawn again: every row, and every point of its grid but for the seed, has its
    own spread, and its own label where there are several.
    """
    builder = TableBuilder(protocol_columns(protocol))
    groups: dict[str, list[Record]] = {}
    for cell in (Record(cell, "cells") for cell in cells):
        if cell.text("kind") == "model" and _metric_result(cell, "frechet_distance"):
            groups.setdefault(row_label(cell, without="seed"), []).append(cell)
    # A single group needs no prefix on its labels.
    for name, models in groups.items():
        prefix = f"{name}: " if len(groups) > 1 else ""
        _add_widths(protocol, builder, prefix, models)
        _add_seeds(builder, prefix, models)
    return builder.build_table("variability", "Fréchet distance, mean ± standard deviation")


def _add_widths(
    protocol: Protocol, builder: TableBuilder, prefix: str, models: Sequence[Record]
) -> None:
    """The widths of a group's first seed."""
    first = dict(models[0].part("point"))
    for cell in models:
        widths = _metric_result(cell, "frechet_distance").part("widths")
        for kind, key, text in _WIDTHS:
            width = widths.part(kind)
            if width and dict(cell.part("point")) == first:
                draws = {"draws": _read_integer(width, "draws")}
                number = _table_number(width.optional("value"), draws, width.optional(key))
                # The report's way of drawing is the first.
                if (kind, key) == ("subsample", "std") and (
                    published := published_number(
                        protocol, "variability", cell, width.optional("value")
                    )
                ):
                    number["published"] = published
                _add_number(builder, cell, prefix + text.format(**width), number)


def _add_seeds(builder: TableBuilder, prefix: str, models: Sequence[Record]) -> None:
    """Mean and standard deviation over a group's seeds, where there are several."""
    by_column: dict[str, dict[object, Record]] = {}
    for cell in models:
        seed = cell.part("point").get("seed")
        by_column.setdefault(_column_of(cell), {})[seed] = cell
    for by_seed in by_column.values():
        cells = list(by_seed.values())
        if len(cells) > 1:
            values = [_metric_result(cell, "frechet_distance").number("value") for cell in cells]
            spread = float(np.std(values, ddof=1))
            number = _table_number(float(np.mean(values)), {"seeds": len(values)}, spread)
            _add_number(builder, cells[0], f"{prefix}seeds of the sampler", number)


def published_number(
    protocol: Protocol, quantity: str, cell: Record, value: float | None
) -> PublishedNumber | None:
    """What the report has for a cell's quantity, with the difference where nothing deviates."""
    encoder, column = cell.text("encoder"), cell.text("column")
    name = published_name(protocol, cell.text("published", ""))
    found = find_published(protocol, quantity, name, encoder, column)
    if found is None or value is None:
        return None
    source = cell.part("generated").text("source")
    deviations = cell_deviations(protocol, quantity, encoder, source, column)
    # A difference of what was made otherwise would pass for a finding.
    return PublishedNumber(
        row=found.row, value=found.value, spread=found.spread, approximate=found.approximate,
        difference=None if deviations else value - found.value, deviations=deviations,
    )  # fmt: skip


def _metric_result(cell: Record, metric: str) -> Record:
    return cell.part("results").part(metric)


def _column_of(cell: Record) -> str:
    return f"{cell.text('encoder')}/{cell.text('column')}"


def _add_number(
    builder: TableBuilder, cell: Record, label: str, number: TableNumber, kind: str = ""
) -> None:
    """A cell's number, in the row of that label and in the cell's own column."""
    kind = kind or cell.text("kind")
    builder.add_number(kind, label, _column_of(cell), number, cell.text("note", ""))


def _table_number(
    value: float | None, n: Mapping[str, int | None], spread: float | None = None
) -> TableNumber:
    return TableNumber(value=value, spread=spread, n=n)


def _read_integer(result: Record, key: str) -> int | None:
    value = result.optional(key)
    return None if value is None else int(value)


def _above_floor(result: Record) -> float:
    return result.number("value") - result.number("noise_floor")
