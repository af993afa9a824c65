"""`pipeline run`: the steps of a recipe one after another, or their plan."""

import os
import subprocess
from dataclasses import replace
from pathlib import Path

from rich.table import Table

from common.console import EXIT_OK, EXIT_USAGE, say, stdout
from common.errors import UserError
from common.text import format_bytes
from pipeline.dataset import Dataset, Run, software_versions
from pipeline.recipe.cost import Cost, total
from pipeline.recipe.plan import recipe_costs
from pipeline.recipe.steps import Recipe, Step


def run_recipe(recipe: Recipe, *, max_bytes: int | None = None, dry_run: bool = False) -> int:
    """Run the steps, or only say what they would do; returns the worst exit status.

    A step that leaves some slides failed does not stop the next ones, which take the others.
    `max_bytes` refuses a plan that would write more, before anything runs.
    """
    if dry_run or max_bytes is not None:
        costs = recipe_costs(recipe)
        _say_plan(recipe, costs)
        _refuse_larger(costs, max_bytes)
        if dry_run:
            return EXIT_OK
    worst = EXIT_OK
    with _log(recipe) as log:
        for number, step in enumerate(recipe.steps, 1):
            say(f"run: step {number} of {len(recipe.steps)}: {step}")
            log.event("step begun", number=number, command=str(step))
            status = _run_step(step)
            log.event("step ended", number=number, status=status)
            worst = max(worst, status)
            if status >= EXIT_USAGE:
                say(f"run: step {number} ({step.name}) ended with status {status}: stopped there")
                return worst
    tail = "" if worst == EXIT_OK else "; some slides failed, see `pipeline status`"
    say(f"run: all {len(recipe.steps)} steps of {recipe.path} are done{tail}")
    return worst


def _log(recipe: Recipe) -> Run:
    """The log of the whole, in the first step's dataset."""
    root = next((step.dataset for step in recipe.steps if step.dataset is not None), Path("."))
    return Run(Dataset(root), "run", software_versions())


def _run_step(step: Step) -> int:
    """A step of this room in this process, of another in one of its own."""
    if step.room == "pipeline":
        from pipeline.__main__ import main

        return main(list(step.arguments))
    return subprocess.run(step.command(), stdin=subprocess.DEVNULL, check=False).returncode


def _refuse_larger(costs: list[tuple[Step, Cost]], max_bytes: int | None) -> None:
    need = total([cost for _, cost in costs])
    if max_bytes is not None and need.bytes > max_bytes:
        largest = max(costs, key=lambda one: one[1].bytes)[1]
        raise UserError(
            f"the plan would write {format_bytes(need.bytes)} and --max-bytes is "
            f"{format_bytes(max_bytes)}: `{largest.stage}` takes {format_bytes(largest.bytes)} of "
            "it; select fewer tiles, or store less of their features (--tokens int8 or none)"
        )


def _say_plan(recipe: Recipe, costs: list[tuple[Step, Cost]]) -> None:
    table = Table("step", "bytes", "inodes", "core-hours", "GPU-hours", "from",
                  title=f"{recipe.path}: would do")  # fmt: skip
    rows = [cost for _, cost in costs]
    for cost in [*rows, replace(total(rows), known="")]:
        table.add_row(
            cost.stage, format_bytes(cost.bytes), f"{cost.files:,}", _hours(cost.core_s),
            _hours(cost.gpu_s), cost.known,
        )  # fmt: skip
    stdout.print(table)
    for step, cost in costs:
        if cost.known == "not planned":
            say(f"run: what `{step.name}` takes is not in the plan")
    _say_room(costs)


def _hours(seconds: float | None) -> str:
    if seconds is None:
        return "unknown"
    return f"{seconds / 3600:,.3g}" if seconds else ""


def _say_room(costs: list[tuple[Step, Cost]]) -> None:
    """What is free where the datasets will be, and whether the plan fits."""
    need: dict[Path, list[Cost]] = {}
    for step, cost in costs:
        if step.dataset is not None:
            need.setdefault(step.dataset, []).append(cost)
    for root, own in need.items():
        there = next(path for path in (root.absolute(), *root.absolute().parents) if path.exists())
        size, free = total(own), os.statvfs(there)
        room, inodes = free.f_frsize * free.f_bavail, free.f_favail or size.files
        fits = "fits" if size.bytes <= room and size.files <= inodes else "DOES NOT FIT"
        say(
            f"run: {root}: {format_bytes(size.bytes)} in {size.files:,} files (inodes) to write, "
            f"{format_bytes(room)} and {inodes:,} inodes free: {fits}"
        )
