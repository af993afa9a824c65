"""What `select` and `plan-cohort` print of a selection, and the list of slides left out."""

from collections.abc import Sequence
from dataclasses import dataclass

from rich.table import Table

from common.console import print_line, stdout
from common.escape import csv_text
from pipeline.dataset import Selection
from pipeline.selection.cohort import FEW_CANDIDATES, FROZEN, SAMPLE_TYPE, Exclusion
from pipeline.selection.draw import Division
from pipeline.selection.plan import count_exclusions, plan_of

_ROWS_SHOWN = 10


@dataclass(frozen=True)
class SelectionOutcome:
    """A selection's line in a table: counts, divergences in bits, deviation in percent points."""

    name: str
    tiles: int
    slides: int
    patients: int
    sites: int
    of_sites: int
    projects: int
    of_projects: int
    jsd_site: float
    jsd_project: float
    jsd_site_slides: float
    deviation_pp: float
    below: int


def outcome_of(selection: Selection) -> SelectionOutcome:
    """The outcome of a selection that was made just now."""
    plan = plan_of(selection)
    site, project = plan["distribution"]["site"], plan["distribution"]["project"]
    return SelectionOutcome(
        name=selection.name,
        tiles=plan["selected"]["tiles"],
        slides=plan["selected"]["slides"],
        patients=plan["selected"]["patients"],
        sites=site["covered"],
        of_sites=site["of"],
        projects=project["covered"],
        of_projects=project["of"],
        jsd_site=site["jsd_bits_tiles"] or 0.0,
        jsd_project=project["jsd_bits_tiles"] or 0.0,
        jsd_site_slides=site["jsd_bits_slides"] or 0.0,
        deviation_pp=100 * plan["largest_share_deviation"],
        below=plan["strata_below_quota"],
    )


def excluded_csv(excluded: Sequence[Exclusion]) -> bytes:
    """The list of slides left out, sorted: slide_id, reason, detail, candidates."""
    by_slide = sorted(excluded, key=lambda exclusion: exclusion.slide_id)
    rows = [(row.slide_id, row.reason, row.detail, row.candidates) for row in by_slide]
    return csv_text([("slide_id", "reason", "detail", "candidates"), *rows]).encode()


def name_option(reason: str) -> str:
    """A reason for leaving slides out, with the option that decides it.

    >>> name_option("frozen section")
    'frozen section (--frozen takes them)'
    """
    options = {
        FROZEN: "--frozen takes them",
        SAMPLE_TYPE: "--sample-types decides",
        FEW_CANDIDATES: "--min-candidates decides",
    }
    return f"{reason} ({options[reason]})" if reason in options else reason


def print_exclusions(title: str, excluded: Sequence[Exclusion]) -> None:
    """A table of what was left out, by reason."""
    if not excluded:
        return
    table = Table("left out", "slides", "candidates", title=f"{title}: slides left out")
    for row in count_exclusions(excluded):
        table.add_row(name_option(row["reason"]), f"{row['slides']:,}", f"{row['candidates']:,}")
    stdout.print(table)


def print_outcomes(outcomes: Sequence[SelectionOutcome]) -> None:
    """A table of several selections."""
    table = Table(
        "selection", "tiles", "slides", "projects", "sites", "JSD by project, bits",
        "JSD by site, bits", "largest deviation, pp", "below quota",
    )  # fmt: skip
    for row in outcomes:
        table.add_row(
            row.name, f"{row.tiles:,}", f"{row.slides:,}", str(row.projects), str(row.sites),
            f"{row.jsd_project:.2g}", f"{row.jsd_site:.2g}", f"{row.deviation_pp:.2g}",
            str(row.below),
        )  # fmt: skip
    stdout.print(table)


def print_selection(selection: Selection, path: object) -> None:
    """A new selection in three lines."""
    plan = plan_of(selection)
    for column, spread in plan["distribution"].items():
        print_line(
            f"{selection.name}: {spread['covered']} of {spread['of']} {column}s, Jensen-Shannon "
            f"divergence of tiles from the cohort {spread['jsd_bits_tiles'] or 0.0:.2g} bits"
        )
    print_line(
        f"select: {selection.rows:,} tiles of {len(selection.slide_ids):,} slides in "
        f"{len(plan['strata'])} strata ({plan['parameters']['stratify']}), wrote {path}"
    )


def print_below_quota(division: Division) -> None:
    """A table of the strata that give less than their share, the furthest below first."""
    below = sorted(division.below_quota, key=lambda s: (s.selected - s.quota, s.name))
    if not below:
        return
    lost = sum(stratum.quota - stratum.selected for stratum in below)
    table = Table("stratum", "slides", "wanted", "got", title="strata below their share")
    for row in below[:_ROWS_SHOWN]:
        table.add_row(row.name, f"{row.slides:,}", f"{row.quota:,.1f}", f"{row.selected:,}")
    stdout.print(table)
    print_line(
        f"select: {len(below)} strata give less than their share for want of candidates; their "
        f"{lost:,.0f} tiles went to the others (all are listed in the plan)"
    )
