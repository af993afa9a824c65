"""All selections of a cohort planned from a list of slides, before any slide is opened."""

from dataclasses import dataclass

import numpy as np

from pipeline.dataset import Selection
from pipeline.selection.cohort import Cohort, Exclusion, keep_eligible, without_patients
from pipeline.selection.cohort_table import CohortTable
from pipeline.selection.config import PlanConfig, SelectConfig
from pipeline.selection.draw import RangePool, SelectionPool, pool_bounds
from pipeline.selection.hold_out import choose_hold_out, parse_cover
from pipeline.selection.plan import GUIDANCE, TRAIN, VAL_IN, VAL_OUT, Ties, hash_patients
from pipeline.selection.select import Drawing, family_patients, make_selections
from pipeline.selection.slides import cohort_of_slides


@dataclass(frozen=True)
class Planned:
    """The selections by name, what they were planned from, and every slide left out."""

    cohort: Cohort
    excluded: list[Exclusion]
    selections: dict[str, Selection]


def plan_selections(table: CohortTable, config: PlanConfig, slides_sha256: str) -> Planned:
    """All selections of the cohort, smallest training selection first; no file is touched."""
    whole = cohort_of_slides(table.slides, table.candidates)
    cohort, excluded = keep_eligible(whole, config.rules)
    mask = choose_hold_out(cohort, config.hold_out, parse_cover(config.cover), config.seed)
    held = cohort.take(mask)
    patients = family_patients(whole, held)
    free, others = without_patients(cohort, {VAL_OUT: frozenset(patients)})
    left_out = excluded + others
    honours = {VAL_OUT: hash_patients(patients)}
    selections: dict[str, Selection] = {}

    def add(
        selected: SelectConfig, chosen: Cohort, ties: Ties, rows: SelectionPool | None = None
    ) -> Selection:
        places = np.searchsorted(cohort.slide_id, chosen.slide_id)
        # Only the hold-out takes the held-out slides: for the others they are left out.
        reasons = excluded if ties.patients else left_out
        pool = rows or RangePool(*pool_bounds(chosen.candidates, selected.pool), {})
        drawing = Drawing(cohort, reasons, places, pool, ties)
        _, (selection,) = make_selections(selected, drawing, config.seed, slides_sha256)
        selections[selection.name] = selection
        return selection

    # The smallest first: each is contained in the next, and guidance is drawn from the smallest.
    trains = [
        add(config.select(f"train-{short_count(tiles)}", tiles), free, Ties(TRAIN, (), honours))
        for tiles in sorted(config.train)
    ]
    val_in = config.select(VAL_IN, config.val_tiles, pool="reserve")
    add(val_in, free, Ties(VAL_IN, (), honours))
    val_out = config.select(
        VAL_OUT, config.val_tiles, pool="all", hold_out=config.hold_out, cover=config.cover
    )
    add(val_out, held, Ties(VAL_OUT, patients))
    parent = trains[0]
    guidance = config.select(GUIDANCE, config.guidance, parent=parent.name)
    members = cohort.take(np.isin(cohort.slide_id, parent.slide_ids))
    rows = SelectionPool(parent.offsets, parent.ranks, {})
    add(guidance, members, Ties(TRAIN, (), honours, parent.name), rows)
    return Planned(cohort, left_out, selections)


def short_count(count: int) -> str:
    """A round number as it is written in a name.

    >>> short_count(40_000_000), short_count(4000), short_count(1234)
    ('40m', '4k', '1234')
    """
    for size, letter in ((1_000_000, "m"), (1000, "k")):
        if count >= size and count % size == 0:
            return f"{count // size}{letter}"
    return str(count)
