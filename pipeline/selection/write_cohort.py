"""`plan-cohort`: write a cohort's planned selections and the page that shows them."""

from contextlib import suppress
from pathlib import Path

from common.console import open_meter, print_line
from common.errors import UserError
from common.text import format_bytes, format_seconds
from pipeline.dataset import Dataset, commit_bytes, new_run_id, write_selection, write_slides
from pipeline.dataset.commit import clean_staging
from pipeline.dataset.lock import hold_lock
from pipeline.selection.cohort_report import render_cohort
from pipeline.selection.cohort_table import read_cohort_csv
from pipeline.selection.config import PlanConfig
from pipeline.selection.outcome import excluded_csv, outcome_of, print_exclusions, print_outcomes
from pipeline.selection.plan_cohort import plan_selections


def plan_cohort(table_file: Path, out: Path, config: PlanConfig) -> int:
    """Write slides.parquet, selections/*.parquet, excluded.csv and report.html under `out`."""
    target, run_id = Dataset(out), new_run_id()
    if target.identity_file.exists():
        raise UserError(
            f"{out} is a dataset, whose slides a plan would replace: give another --out"
        )
    table = read_cohort_csv(table_file, config.candidates)
    with (
        # Not in .tmp, which is removed: two plans into one folder would be a mixture.
        hold_lock(out / ".plan-cohort.lock"),
        open_meter("plan-cohort", len(config.train) + 3, "selections") as progress,
    ):
        slides = write_slides(target, run_id, table.slides)
        planned = plan_selections(table, config, slides.sha256)
        size = slides.bytes
        for name, selection in planned.selections.items():
            size += write_selection(target, run_id, selection).bytes
            progress.advance(1, name)
        commit_bytes(target, run_id, out / "excluded.csv", excluded_csv(planned.excluded))
        page = render_cohort(table_file.name, table.model, config, planned)
        size += commit_bytes(target, run_id, out / "report.html", page.encode()).bytes
        # A plan is no dataset: nothing but its results is left in the folder.
        clean_staging(target, run_id)
        with suppress(OSError):
            (out / ".tmp").rmdir()
        seconds = progress.seconds
    print_exclusions("plan-cohort", planned.excluded)
    print_outcomes([outcome_of(selection) for selection in planned.selections.values()])
    print_line(
        f"plan-cohort: {len(table.slides):,} slides planned in {format_seconds(seconds)}; wrote "
        f"{format_bytes(size)}: {out / 'report.html'} and {out / 'selections'}"
    )
    return 0
