"""Cells laid out in the paper's tables: one table a quantity, encoders and sets as columns.

A table is plain data, the same for the page, Markdown and LaTeX.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from common.record import Record
from evaluate.metrics.metric import TableQuantity
from evaluate.metrics.registry import table_quantities
from evaluate.protocols.config import Protocol

Results = Mapping[str, Any]


def build_tables(protocol: Protocol, cells: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The protocol's tables, of those that any cell has numbers for."""
    found = []
    for name in protocol.tables:
        if name == "variability":
            found.append(variability(protocol, cells))
        elif name == "fd_relative":
            found.append(relative(protocol, cells))
        else:
            found.append(quantity_table(protocol, name, cells))
    return [table for table in found if table["rows"]]


def quantity_table(
    protocol: Protocol, name: str, cells: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """A row for each label and point, a column for each encoder and set."""
    metric, quantity = table_quantities()[name]
    columns = _columns(protocol)
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    several = _several(metric.name, quantity, cells)
    for cell in cells:
        result = Record(cell["results"]).part(metric.name)
        if not result or (cell["kind"] == "control" and not quantity.in_controls):
            continue
        entry = _entry(quantity, result, cell)
        if entry["value"] is None:
            continue
        _row(rows, cell["kind"], row_label(cell), columns, cell)[_column(cell)] = entry
        for label, extra in _context(quantity, result, cell):
            full = f"{label}: {row_label(cell)}" if label in several else label
            _row(rows, "control", full, columns, cell)[_column(cell)] = extra
    order = {"model": 0, "reference": 1, "control": 2}
    listed = sorted(rows.values(), key=lambda row: order[row["kind"]])
    table = {"name": name, "title": quantity.title, "better": quantity.better,
             "share": quantity.share, "columns": columns, "rows": listed}  # fmt: skip
    return _with_published(protocol, table)


def row_label(cell: Mapping[str, Any]) -> str:
    """What a row is called: its label and the point of the grid that it stands for."""
    point = ", ".join(_point_text(key, value) for key, value in cell["point"].items())
    return f"{cell['label']}, {point}" if point else str(cell["label"])


def _point_text(key: str, value: Any) -> str:
    if key == "solver":
        return str(value).upper()
    return f"{value} steps" if key == "steps" else f"seed {value}"


def _columns(protocol: Protocol) -> list[dict[str, str]]:
    return [
        {"encoder": encoder, "set": column}
        for encoder in protocol.encoders
        for column in protocol.columns
    ]


def _column(cell: Mapping[str, Any]) -> str:
    return f"{cell['encoder']}/{cell['column']}"


def _row(
    rows: dict[tuple[str, str], dict[str, Any]],
    kind: str,
    label: str,
    columns: list[dict[str, str]],
    cell: Mapping[str, Any],
) -> dict[str, Any]:
    empty: dict[str, Any] = {f"{one['encoder']}/{one['set']}": None for one in columns}
    row = {"label": label, "kind": kind, "note": cell.get("note", ""), "cells": empty}
    cells: dict[str, Any] = rows.setdefault((kind, label), row)["cells"]
    return cells


def _entry(quantity: TableQuantity, result: Record, cell: Mapping[str, Any]) -> dict[str, Any]:
    n = {key: result[key] for key in ("n_real", "n_generated", "n") if key in result}
    return {
        "value": quantity.value(result),
        "spread": quantity.spread(result),
        "n": n or {"n": cell["basis"]["n_generated"]},
    }


def _context(
    quantity: TableQuantity, result: Record, cell: Mapping[str, Any]
) -> list[tuple[str, dict[str, Any]]]:
    """The control row that a model's result brings along: the null of cosines, the floor of FD."""
    if quantity.context is None or cell["kind"] != "model" or cell["point"] or not result:
        return []
    entry = quantity.context(result)
    return [(entry.label, {"value": entry.value, "spread": None, "n": entry.counts})]


def _several(metric: str, quantity: TableQuantity, cells: Sequence[dict[str, Any]]) -> set[str]:
    """Labels of `_context` whose number differs between rows: one would hide the others."""
    first: dict[tuple[str, str], dict[str, Any]] = {}
    several = set()
    for cell in cells:
        for label, entry in _context(quantity, Record(cell["results"]).part(metric), cell):
            if first.setdefault((label, _column(cell)), entry) != entry:
                several.add(label)
    return several


def relative(protocol: Protocol, cells: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """FD less its closed-form floor, over that of the reference row: alike for every encoder."""
    columns = _columns(protocol)
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    unit = {
        _column(cell): _above_floor(cell["results"]["frechet_distance"])
        for cell in cells
        if cell["label"] == protocol.relative_to and "frechet_distance" in cell["results"]
    }
    for cell in cells:
        result = cell["results"].get("frechet_distance")
        divisor = unit.get(_column(cell))
        if cell["kind"] != "model" or not result or not divisor or divisor <= 0:
            continue
        entry = {"value": _above_floor(result) / divisor, "spread": None,
                 "n": {key: result[key] for key in ("n_real", "n_generated")}}  # fmt: skip
        _row(rows, "model", row_label(cell), columns, cell)[_column(cell)] = entry
    title = f"Fréchet distance above its noise floor, in units of that of “{protocol.relative_to}”"
    return {"name": "fd_relative", "title": title, "better": "lower", "share": False,
            "columns": columns, "rows": list(rows.values())}  # fmt: skip


def _above_floor(result: Mapping[str, Any]) -> float:
    return float(result["value"] - result["noise_floor"])


_WIDTHS = (
    ("subsample", "std", "{size:,} of {n_generated:,} images without replacement, as published"),
    ("subsample", "corrected_std", "… corrected for the finite set"),
    ("slide", "std", "cluster bootstrap by slide"),
    ("patient", "std", "cluster bootstrap by patient"),
)


def variability(protocol: Protocol, cells: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means and standard deviations of the Fréchet distance by each way of drawing again.

    Only seeds are drawn again: every row, and every point of its grid but for the seed, has its
    own spread, and its own label where there are several.
    """
    columns = _columns(protocol)
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    groups: dict[str, list[dict[str, Any]]] = {}
    for cell in cells:
        if cell["kind"] == "model" and "frechet_distance" in cell["results"]:
            groups.setdefault(row_label(_without_seed(cell)), []).append(cell)
    for name, models in groups.items():
        start = f"{name}: " if len(groups) > 1 else ""
        _add_widths(rows, columns, start, models)
        _add_seeds(rows, columns, start, models)
    return {"name": "variability", "title": "Fréchet distance, mean ± standard deviation",
            "better": "", "share": False, "columns": columns,
            "rows": list(rows.values())}  # fmt: skip


def _without_seed(cell: Mapping[str, Any]) -> dict[str, Any]:
    return {**cell, "point": {k: v for k, v in cell["point"].items() if k != "seed"}}


def _add_widths(
    rows: dict[tuple[str, str], dict[str, Any]],
    columns: list[dict[str, str]],
    start: str,
    models: Sequence[dict[str, Any]],
) -> None:
    """The widths of a group's first seed."""
    for cell in (one for one in models if one["point"] == models[0]["point"]):
        widths = cell["results"]["frechet_distance"].get("widths") or {}
        for kind, key, text in _WIDTHS:
            found = widths.get(kind)
            if found:
                entry = {"value": found["value"], "spread": found[key],
                         "n": {"draws": found["draws"]}}  # fmt: skip
                label = start + text.format(**found)
                _row(rows, "model", label, columns, cell)[_column(cell)] = entry


def _add_seeds(
    rows: dict[tuple[str, str], dict[str, Any]],
    columns: list[dict[str, str]],
    start: str,
    models: Sequence[dict[str, Any]],
) -> None:
    """Mean and standard deviation over a group's seeds, where there are several."""
    for column, same in _by_column(models).items():
        by_seed = {
            one["point"].get("seed"): one["results"]["frechet_distance"]["value"] for one in same
        }
        values = list(by_seed.values())
        if len(values) > 1:
            entry = {"value": float(np.mean(values)), "spread": float(np.std(values, ddof=1)),
                     "n": {"seeds": len(values)}}  # fmt: skip
            _row(rows, "model", f"{start}seeds of the sampler", columns, same[0])[column] = entry


def _by_column(cells: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for cell in cells:
        found.setdefault(_column(cell), []).append(cell)
    return found


def _with_published(protocol: Protocol, table: dict[str, Any]) -> dict[str, Any]:
    """The published values as a row beside ours, only where the protocol is the shipped one.

    `published` of the configuration holds `source` and `values`: table name, then row label,
    then "encoder/set", then the number.
    """
    values = (protocol.published.get("values") or {}).get(table["name"]) or {}
    if protocol.deviations or not values:
        return table
    rows = []
    for row in table["rows"]:
        rows.append(row)
        if row["label"] in values:
            known = values[row["label"]]
            cells = {
                column: {"value": known[column], "spread": None, "n": {}}
                if column in known
                else None
                for column in row["cells"]
            }
            source = str(protocol.published.get("source", "published"))
            rows.append({"label": f"{row['label']}, published", "kind": "published",
                         "note": source, "cells": cells})  # fmt: skip
    return {**table, "rows": rows}
