"""`pipeline run`: the steps of a recipe one after another, or their plan."""

import os
import subprocess
from collections.abc import Iterable
from pathlib import Path

from rich.table import Table

from common.console import EXIT_OK, EXIT_USAGE, print_line, stdout
from common.errors import UserError
from common.following import tied_children
from common.text import format_bytes
from pipeline.dataset import Dataset, Run, software_versions
from pipeline.recipe.plan import StepPlan, plan_recipe
from pipeline.recipe.steps import Recipe, Step


def run_recipe(recipe: Recipe, *, max_bytes: int | None = None, dry_run: bool = False) -> int:
    """Run the steps, or only print what they would do; returns the worst exit status.

    A step that leaves some slides failed does not stop the next ones, which take the others.
    A plan that would write more than `max_bytes` is refused before anything runs.
    """
    if dry_run or max_bytes is not None:
        plans = plan_recipe(recipe)
        _print_plans(recipe, plans)
        _refuse_larger([plan for _, plan in plans], max_bytes)
        if dry_run:
            return EXIT_OK
    worst = EXIT_OK
    # The log of the whole recipe is in the first step's dataset.
    root = next((step.dataset for step in recipe.steps if step.dataset is not None), Path("."))
    with Run(Dataset(root), "run", software_versions()) as log:
        for number, step in enumerate(recipe.steps, 1):
            print_line(f"run: step {number} of {len(recipe.steps)}: {step}")
            log.log_event("step begun", number=number, command=str(step))
            status = _run_step(step)
            log.log_event("step ended", number=number, status=status)
            worst = max(worst, status)
            if status >= EXIT_USAGE:
                print_line(
                    f"run: step {number} ({step.name}) ended with status {status}: stopped there"
                )
                return worst
    tail = "" if worst == EXIT_OK else "; some slides failed, see `pipeline status`"
    print_line(f"run: all {len(recipe.steps)} steps of {recipe.path} are done{tail}")
    return worst


def _run_step(step: Step) -> int:
    """Run a step of the pipeline in this process, another one in a process of its own."""
    if step.room == "pipeline":
        from pipeline.__main__ import main

        return main(list(step.arguments))
    with tied_children() as tie:
        done = subprocess.run(
            step.command(), stdin=subprocess.DEVNULL, check=False, **tie.options()
        )
    return done.returncode


def _refuse_larger(plans: list[StepPlan], max_bytes: int | None) -> None:
    size = sum(plan.bytes for plan in plans)
    if max_bytes is not None and size > max_bytes:
        largest = max(plans, key=lambda plan: plan.bytes)
        raise UserError(
            f"the plan would write {format_bytes(size)} and --max-bytes is "
            f"{format_bytes(max_bytes)}: `{largest.name}` takes {format_bytes(largest.bytes)} of "
            "it; select fewer tiles, or store less of their features (--tokens int8 or none)"
        )


def _print_plans(recipe: Recipe, plans: Iterable[tuple[Step, StepPlan]]) -> None:
    """A table of the steps, and whether what they write fits onto the disks."""
    columns = ("step", "bytes", "inodes", "hours of one worker", "from")
    table = Table(*columns, title=f"{recipe.path}: would do")
    by_root: dict[Path, list[StepPlan]] = {}
    for step, plan in plans:
        hours = "unknown" if plan.worker_s is None else f"{plan.worker_s / 3600:,.3g}"
        cells = (format_bytes(plan.bytes), f"{plan.files:,}", hours if plan.worker_s != 0 else "")
        table.add_row(plan.name, *cells, plan.basis)
        if step.dataset is not None:
            by_root.setdefault(step.dataset, []).append(plan)
    stdout.print(table)
    for _, plan in plans:
        if not plan.is_known:
            print_line(f"run: what `{plan.name}` takes is not in the plan")
    for root, written in by_root.items():
        there = next(path for path in (root.absolute(), *root.absolute().parents) if path.exists())
        size, files = sum(plan.bytes for plan in written), sum(plan.files for plan in written)
        disk = os.statvfs(there)
        # A file system without a fixed number of inodes states 0 of them.
        room, inodes = disk.f_frsize * disk.f_bavail, disk.f_favail or files
        fits = "fits" if size <= room and files <= inodes else "DOES NOT FIT"
        print_line(
            f"run: {root}: {format_bytes(size)} in {files:,} files (inodes) to write, "
            f"{format_bytes(room)} and {inodes:,} inodes free: {fits}"
        )
