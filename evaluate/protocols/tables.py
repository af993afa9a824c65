"""Cells laid out in the paper's tables: one table a quantity, encoders and sets as columns.

A table is plain data, the same for the page, Markdown and LaTeX.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from evaluate.protocols.config import Protocol

Results = Mapping[str, Any]


@dataclass(frozen=True)
class Quantity:
    """One number of a metric's results: its title, which way is better, how it is read."""

    title: str
    better: str
    metric: str
    read: Callable[[Results], Any]
    spread: Callable[[Results], Any] = lambda result: None
    share: bool = False


def _value(key: str) -> Callable[[Results], Any]:
    return lambda result: result.get(key)


def _interval(result: Results) -> Any:
    """Half the 95% interval of the cluster bootstrap by slide, else of the subsampling."""
    widths = result.get("widths") or {}
    one = widths.get("slide") or widths.get("subsample")
    return None if one is None else (one["high"] - one["low"]) / 2


QUANTITIES = {
    "fd": Quantity(
        "Fréchet distance", "lower", "frechet_distance", _value("value"), _interval
    ),
    "fd_infinity": Quantity(
        "Fréchet distance at infinitely many images", "lower", "frechet_distance",
        lambda result: (result.get("infinity") or {}).get("value"),
    ),
    "fld": Quantity(
        "Feature likelihood divergence", "lower", "feature_likelihood", _value("value"),
        _value("std"),
    ),
    "precision": Quantity(
        "Precision", "higher", "precision_recall", _value("precision"), share=True
    ),
    "recall": Quantity("Recall", "higher", "precision_recall", _value("recall"), share=True),
    "density": Quantity("Density", "higher", "precision_recall", _value("density"), share=True),
    "coverage": Quantity("Coverage", "higher", "precision_recall", _value("coverage"), share=True),
    "cosine": Quantity(
        "Cosine to the source tile", "higher", "cosine_similarity", _value("mean"),
        _value("std"), share=True,
    ),
    "cosine_centred": Quantity(
        "Cosine to the source tile, centred", "higher", "cosine_similarity",
        _value("centred_mean"), share=True,
    ),
    "retrieval": Quantity(
        "Source found first", "higher", "cosine_similarity", _value("retrieval_at_1"), share=True
    ),
    "kid": Quantity("Kernel distance (KID)", "lower", "kernel_distance", _value("value")),
    "mind": Quantity("Sliced distance (MIND)", "lower", "sliced_distance", _value("value")),
}  # fmt: skip

_NULL = "Sources shuffled"
_CHANCE = "Chance"
_FLOOR = "Noise floor of these sizes (closed form)"


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
    quantity = QUANTITIES[name]
    columns = _columns(protocol)
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    several = _several(name, quantity, cells)
    for cell in cells:
        result = cell["results"].get(quantity.metric)
        if not result:
            continue
        entry = _entry(quantity, result, cell)
        if entry["value"] is None or (name == "fd_infinity" and cell["kind"] == "control"):
            continue  # near zero the line through a reconstruction's distances says nothing
        _row(rows, cell["kind"], row_label(cell), columns, cell)[_column(cell)] = entry
        for label, extra in _beside(name, result, cell):
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


def _entry(quantity: Quantity, result: Results, cell: Mapping[str, Any]) -> dict[str, Any]:
    n = {key: result[key] for key in ("n_real", "n_generated", "n") if key in result}
    return {
        "value": quantity.read(result),
        "spread": quantity.spread(result),
        "n": n or {"n": cell["basis"]["n_generated"]},
    }


def _beside(
    name: str, result: Results, cell: Mapping[str, Any]
) -> list[tuple[str, dict[str, Any]]]:
    """Control rows that a result brings with itself: the null of cosines, the floor of FD."""
    if cell["kind"] != "model" or cell["point"] or not result:
        return []
    n = {"n": result.get("n", result.get("n_generated"))}
    if name == "cosine":
        return [(_NULL, {"value": result["null_mean"], "spread": None, "n": n})]
    if name == "cosine_centred":
        return [(_NULL, {"value": 0.0, "spread": None, "n": n})]
    if name == "retrieval":
        chance = 1 / result["retrieval_pool"]
        return [(_CHANCE, {"value": chance, "spread": None, "n": {"n": result["retrieval_pool"]}})]
    if name == "fd":
        sizes = {key: result[key] for key in ("n_real", "n_generated")}
        return [(_FLOOR, {"value": result["noise_floor"], "spread": None, "n": sizes})]
    return []


def _several(name: str, quantity: Quantity, cells: Sequence[dict[str, Any]]) -> set[str]:
    """Control rows of `_beside` that are another number for each row: one would hide the others."""
    first: dict[tuple[str, str], dict[str, Any]] = {}
    found = set()
    for cell in cells:
        for label, extra in _beside(name, cell["results"].get(quantity.metric) or {}, cell):
            if first.setdefault((label, _column(cell)), extra) != extra:
                found.add(label)
    return found


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


def _above_floor(result: Results) -> float:
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
