"""What a person sees of a new selection, and the list of slides that it left out."""

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from common.console import say, stdout
from pipeline.dataset import Selection
from pipeline.selection.cohort import Exclusion
from pipeline.selection.draw import Division
from pipeline.selection.plan import count_exclusions

_ROWS_SHOWN = 10


def excluded_csv(excluded: Sequence[Exclusion]) -> bytes:
    """The list of slides left out, sorted: slide_id, reason, detail, candidates."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["slide_id", "reason", "detail", "candidates"])
    for one in sorted(excluded, key=lambda e: e.slide_id):
        writer.writerow([one.slide_id, one.reason, one.detail, one.candidates])
    return text.getvalue().encode()


def print_exclusions(title: str, excluded: Sequence[Exclusion]) -> None:
    """A table of what was left out, by reason."""
    if not excluded:
        return
    table = Table("left out", "slides", "candidates", title=f"{title}: slides left out")
    for row in count_exclusions(excluded):
        table.add_row(row["reason"], f"{row['slides']:,}", f"{row['candidates']:,}")
    stdout.print(table)


def print_outcomes(rows: Sequence[Mapping[str, Any]]) -> None:
    """A table of several selections (see `cohort_report.outcome`)."""
    table = Table(
        "selection", "tiles", "slides", "projects", "sites", "JSD by project, bits",
        "JSD by site, bits", "largest deviation, pp", "below quota",
    )  # fmt: skip
    for row in rows:
        table.add_row(
            row["name"], f"{row['tiles']:,}", f"{row['slides']:,}", str(row["projects"]),
            str(row["sites"]), f"{row['jsd_project']:.2g}", f"{row['jsd_site']:.2g}",
            f"{row['deviation_pp']:.2g}", str(row["below"]),
        )  # fmt: skip
    stdout.print(table)


def print_outcome(selection: Selection, path: object) -> None:
    """What a person wants to know of a new selection, in three lines."""
    plan = selection.plan
    for column, one in plan["distribution"].items():
        jsd = one["jsd_bits_tiles"]
        say(
            f"{selection.name}: {one['covered']} of {one['of']} {column}s, Jensen-Shannon "
            f"divergence of tiles from the cohort {0.0 if jsd is None else jsd:.2g} bits"
        )
    say(
        f"select: {selection.rows:,} tiles of {len(selection.slide_ids):,} slides in "
        f"{len(plan['strata'])} strata ({plan['parameters']['stratify']}), wrote {path}"
    )


def print_below_quota(division: Division) -> None:
    """A table of the strata that give less than their share, the furthest below first."""
    below = sorted(division.below_quota, key=lambda one: (one.selected - one.quota, one.name))
    if not below:
        return
    lost = sum(one.quota - one.selected for one in below)
    table = Table("stratum", "slides", "wanted", "got", title="strata below their share")
    for one in below[:_ROWS_SHOWN]:
        table.add_row(one.name, f"{one.slides:,}", f"{one.quota:,.1f}", f"{one.selected:,}")
    stdout.print(table)
    say(
        f"select: {len(below)} strata give less than their share for want of candidates; their "
        f"{lost:,.0f} tiles went to the others (all are listed in the plan)"
    )
