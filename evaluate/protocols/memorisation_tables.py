"""The memorisation protocol's numbers as tables, every encoder a column."""

from collections.abc import Mapping, Sequence
from typing import Any

Found = Mapping[str, Any]

_OF_SETS = (
    ("ratio_median", "d₁/d₂ to the training tiles, median", "higher", "ratio", "median"),
    ("ratio_q01", "d₁/d₂ to the training tiles, first percentile", "higher", "ratio", "q01"),
    ("score_q99", "FLD’s memorisation score, 99th percentile", "lower", "score", "q99"),
)


def memorisation_tables(searches: Sequence[Found]) -> list[dict[str, Any]]:
    """Tables of the searches, in the layout of every protocol's tables."""
    columns = [
        {"encoder": encoder, "set": searches[0]["train"]["set"]}
        for encoder in dict.fromkeys(one["encoder"] for one in searches)
    ]
    tables = [_of_sets(searches, columns, *spec) for spec in _OF_SETS]
    tables.append(_gaps(searches, columns))
    tables.append(
        _table("authenticity", "Authenticity", "higher", columns, [
            (one["source"], "model", one, one["authenticity"]) for one in searches
        ])
    )  # fmt: skip
    for name, title, better, key in (
        ("suspicious", "Share of images with a smaller d₁/d₂ than 99 % of the set", "lower",
         "suspicious_share"),
        ("copying_test", "C_T against the set (below −3 is copying)", "", "copying_test"),
    ):  # fmt: skip
        rows = [
            (f"{one['source']} against {one['names'][against]}", "model", one,
             _number(one[key][against]))
            for against in ("val_in", "val_out")
            for one in searches
        ]  # fmt: skip
        tables.append(_table(name, title, better, columns, rows))
    return tables


def _number(found: Any) -> Any:
    return found["value"] if isinstance(found, Mapping) else found


def _of_sets(
    searches: Sequence[Found], columns: list[dict[str, str]], name: str, title: str, better: str,
    key: str, quantile: str,
) -> dict[str, Any]:  # fmt: skip
    rows = [
        (one["names"][of], _kind(of), one, one["sets"][of][key][quantile])
        for of in ("generated", "val_in", "val_out")
        for one in searches
    ]
    return _table(name, title, better, columns, rows)


def _gaps(searches: Sequence[Found], columns: list[dict[str, str]]) -> dict[str, Any]:
    rows = [
        (one["names"][of], _kind(of), one, one["sets"][of]["gap"])
        for of in ("generated", "val_in")
        for one in searches
    ]
    return _table("fld_gap", "FLD gap (clearly negative is copying)", "", columns, rows)


def _kind(of: str) -> str:
    return "model" if of == "generated" else "reference"


def _table(
    name: str,
    title: str,
    better: str,
    columns: list[dict[str, str]],
    values: Sequence[tuple[str, str, Found, Any]],
) -> dict[str, Any]:
    """Rows by label from (label, kind, search, value), in the order in which they first come."""
    rows: dict[str, dict[str, Any]] = {}
    empty = dict.fromkeys(f"{one['encoder']}/{one['set']}" for one in columns)
    for label, kind, search, value in values:
        row = rows.setdefault(
            label, {"label": label, "kind": kind, "note": "", "cells": dict(empty)}
        )
        if value is not None:
            counts = {"n": search["sets"]["generated"]["n"], "training": search["train"]["rows"]}
            column = f"{search['encoder']}/{search['train']['set']}"
            row["cells"][column] = {"value": float(value), "spread": None, "n": counts}
    return {"name": name, "title": title, "better": better, "share": False,
            "columns": columns, "rows": list(rows.values())}  # fmt: skip
