"""`plan-cohort`: all selections of a cohort planned from a CSV list, before any slide is opened."""

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common.console import meter, say
from common.text import format_bytes, format_seconds
from pipeline.dataset import (
    Dataset,
    Selection,
    commit_bytes,
    new_run_id,
    write_selection,
    write_slides,
)
from pipeline.dataset.commit import clean_staging
from pipeline.selection.cohort import Cohort, Exclusion, eligible, without_patients
from pipeline.selection.cohort_table import CohortTable, read_cohort_csv
from pipeline.selection.config import PlanConfig, SelectConfig
from pipeline.selection.draw import PoolSource, RowSource, Source, pool_bounds
from pipeline.selection.hold_out import choose_hold_out
from pipeline.selection.outcome import excluded_csv, print_exclusions, print_outcomes
from pipeline.selection.plan import TRAIN, VAL_IN, VAL_OUT, Ties, patients_mark
from pipeline.selection.select import Drawing, family_patients, make_selections, parse_cover
from pipeline.selection.slides import cohort_of_slides


@dataclass(frozen=True)
class Planned:
    """The selections by name, what they were planned from, and every slide left out."""

    cohort: Cohort
    excluded: list[Exclusion]
    patients: tuple[str, ...]
    selections: dict[str, Selection]


def plan_cohort(table_file: Path, out: Path, config: PlanConfig) -> int:
    """Write slides.parquet, selections/*.parquet and report.html under `out`."""
    from pipeline.selection.cohort_report import cohort_report, outcome

    table = read_cohort_csv(table_file, config.candidates)
    target, run_id = Dataset(out), new_run_id()
    with meter("plan-cohort", len(config.train) + 3, "selections") as progress:
        slides = write_slides(target, run_id, table.slides)
        planned = plan_selections(table, config, slides.sha256)
        size = slides.bytes
        for name, selection in planned.selections.items():
            size += write_selection(target, run_id, selection).bytes
            progress.advance(1, name)
        left_out = excluded_csv(planned.excluded)
        commit_bytes(target, run_id, out / "excluded.csv", left_out)
        page = cohort_report(table_file.name, table.model, config, planned)
        size += commit_bytes(target, run_id, out / "report.html", page.encode()).bytes
        clean_staging(target, run_id)
        with suppress(OSError):
            (out / ".tmp").rmdir()
        seconds = progress.seconds
    print_exclusions("plan-cohort", planned.excluded)
    print_outcomes([outcome(name, one.plan) for name, one in planned.selections.items()])
    say(
        f"plan-cohort: {len(table.slides):,} slides planned in {format_seconds(seconds)}; wrote "
        f"{format_bytes(size)}: {out / 'report.html'} and {out / 'selections'}"
    )
    return 0


def plan_selections(table: CohortTable, config: PlanConfig, slides_sha256: str) -> Planned:
    """All selections of the cohort, smallest training selection first; no file is touched."""
    whole = cohort_of_slides(table.slides, table.candidates)
    cohort, excluded = eligible(whole, config.rules)
    mask = choose_hold_out(cohort, config.hold_out, parse_cover(config.cover), config.seed)
    held = cohort.take(mask)
    patients = family_patients(whole, held)
    free, barred = without_patients(cohort, {VAL_OUT: frozenset(patients)})
    honours = {VAL_OUT: patients_mark(patients)}
    planner = _Planner(config, cohort, slides_sha256)
    trains = [
        planner.pool(f"train-{short_count(tiles)}", tiles, free, "train", excluded + barred,
                     Ties(TRAIN, (), honours))
        for tiles in sorted(config.train)
    ]  # fmt: skip
    ties = Ties(VAL_IN, (), honours)
    val_in = planner.pool(VAL_IN, config.val_tiles, free, "reserve", excluded + barred, ties)
    ties = Ties(VAL_OUT, patients)
    more = {"hold_out": config.hold_out, "cover": config.cover}
    val_out = planner.pool(VAL_OUT, config.val_tiles, held, "all", excluded, ties, **more)
    guidance = planner.part("guidance", config.guidance, trains[0], excluded + barred, honours)
    made = [*trains, val_in, val_out, guidance]
    return Planned(cohort, excluded + barred, patients, {one.name: one for one in made})


@dataclass(frozen=True)
class _Planner:
    """Makes selections of one cohort."""

    config: PlanConfig
    cohort: Cohort
    slides_sha256: str

    def pool(
        self,
        name: str,
        tiles: int,
        chosen: Cohort,
        pool: str,
        excluded: list[Exclusion],
        ties: Ties,
        **more: Any,
    ) -> Selection:
        """Tiles of a pool of the chosen slides."""
        first, stop = pool_bounds(chosen.candidates, pool)
        one = self.config.select(name, tiles, pool=pool, **more)
        return self._made(one, chosen, PoolSource(first, stop, {}), excluded, ties)

    def part(
        self,
        name: str,
        tiles: int,
        parent: Selection,
        excluded: list[Exclusion],
        honours: dict[str, str],
    ) -> Selection:
        """Tiles of another selection."""
        chosen = self.cohort.take(np.isin(self.cohort.slide_id, parent.slide_ids))
        source = RowSource(parent.offsets, parent.ranks, {})
        one = self.config.select(name, tiles, parent=parent.name)
        return self._made(one, chosen, source, excluded, Ties(TRAIN, (), honours, parent.name))

    def _made(
        self,
        one: SelectConfig,
        chosen: Cohort,
        source: Source,
        excluded: list[Exclusion],
        ties: Ties,
    ) -> Selection:
        places = np.searchsorted(self.cohort.slide_id, chosen.slide_id)
        drawing = Drawing(self.cohort, excluded, places, source, ties)
        _, (made,) = make_selections(one, drawing, self.config.seed, self.slides_sha256)
        return made


def short_count(count: int) -> str:
    """A round number as it stands in a name: 40m, 4k, 1234."""
    for size, letter in ((1_000_000, "m"), (1000, "k")):
        if count >= size and count % size == 0:
            return f"{count // size}{letter}"
    return str(count)
