"""The page of `protocol all`, and its reproduction sheet as JSON and CSV."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from urllib.parse import quote

from common.escape import csv_text
from common.text import format_number, format_share
from evaluate.metrics.registry import table_quantities
from evaluate.protocols.reproduction import SheetRow
from evaluate.report.protocol_text import signed_text
from evaluate.report.template import render_template


@dataclass(frozen=True)
class Outcome:
    """How a protocol ended, in words; `has_page`: its page is of the results that are shown."""

    name: str
    title: str
    state: str
    has_page: bool = False


def reproduction_files(
    outcomes: Sequence[Outcome], sheet: Sequence[SheetRow], folder: Path
) -> dict[Path, bytes]:
    """report.html, reproduction.json and reproduction.csv of a folder: the bytes by path."""
    rows = [asdict(row) for row in sheet]
    table = [list(rows[0]), *(["" if v is None else v for v in row.values()] for row in rows)]
    return {
        folder / "report.html": render_reproduction(outcomes, sheet).encode(),
        folder / "reproduction.json": (json.dumps({"rows": rows}, indent=1) + "\n").encode(),
        folder / "reproduction.csv": csv_text(table).encode(),
    }


def render_reproduction(outcomes: Sequence[Outcome], sheet: Sequence[SheetRow]) -> str:
    """One page: links to each protocol's page, and the sheet, table by table."""
    titles = {name: quantity.title for name, (_, quantity) in table_quantities().items()}
    titles["variability"] = "Fréchet distance, mean of 50 draws"
    groups: dict[tuple[str, str], list[SheetRow]] = {}
    for row in sheet:
        groups.setdefault((row.table, row.quantity), []).append(row)
    verdicts = [row.verdict.partition(":")[0] for row in sheet]
    return render_template(
        "reproduction.html.j2",
        outcomes=outcomes,
        groups=[(f"{table}: {titles[name]}", rows) for (table, name), rows in groups.items()],
        counts={verdict: verdicts.count(verdict) for verdict in dict.fromkeys(verdicts)},
        show=_show_value,
        link=lambda name: f"{quote(name)}/report.html",
    )


def _show_value(row: SheetRow, value: float | None, *, signed: bool = False) -> str:
    if value is None:
        return "–"
    quantities = table_quantities()
    is_share = row.quantity in quantities and quantities[row.quantity][1].share
    show = format_share if is_share else format_number
    return signed_text(value, show) if signed else show(value)
