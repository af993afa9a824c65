"""`pipeline status`: what is done, running and missing, its bytes, and how long the rest takes.

Read from the journals, logs and selections alone: no file of tiles or features is opened.
"""

import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from rich.table import Table

from common.console import say, stdout
from common.redact import redact
from common.text import format_bytes, format_seconds
from pipeline.dataset import Dataset, Entry, Selection, read_journal, read_selection
from pipeline.dataset.ledger import current_entries
from pipeline.upkeep.activity import Running, running

_STAGES = ("scan", "import", "tissue", "select", "generate", "tile", "cache", "curate")
_REASONS_SHOWN = 8
_BY_SELECTION = ("tile", "cache")
"""Stages that work for selections; a scope of theirs is a tile size, or a kind of features."""


@dataclass(frozen=True)
class StageStatus:
    """A stage and scope: slides by the outcome of their latest line, bytes of standing files."""

    stage: str
    scope: str
    done: int
    rejected: int
    failed: int
    bytes: int
    tiles_per_s: float | None


@dataclass(frozen=True)
class Coverage:
    """How much of a selection a scope holds, and how long one worker takes for the rest."""

    stage: str
    scope: str
    selection: str
    tiles: int
    stored: int
    seconds_left: float | None


@dataclass(frozen=True)
class Failure:
    """A slide that failed, in which stage, and why."""

    stage: str
    scope: str
    slide: str
    reason: str


@dataclass(frozen=True)
class Status:
    """All that the command says; `bytes` is by kind: a folder of the dataset."""

    stages: list[StageStatus]
    selections: list[Coverage]
    running: list[Running]
    failures: list[Failure]
    bytes: dict[str, int]


def read_status(dataset: Dataset) -> Status:
    """The dataset's status."""
    stages: list[StageStatus] = []
    failures: list[Failure] = []
    kinds: Counter[str] = Counter({"status": _folder_bytes(dataset.root / "status")})
    holdings: dict[tuple[str, str], dict[str, list[Entry]]] = {}
    for stage in _STAGES:
        entries = read_journal(dataset, stage)
        for scope in sorted({entry.scope for entry in entries}):
            held = current_entries(entries, scope)
            _count_bytes(held, kinds)
            if not held or is_bookkeeping(scope):
                continue
            failures += _failures(stage, scope, held)
            stages.append(_stage_status(stage, scope, held))
            if stage in _BY_SELECTION:
                holdings[stage, scope] = held
    rates = {(one.stage, one.scope): one.tiles_per_s for one in stages}
    selections = [read_selection(dataset, name) for name in dataset.selection_names()]
    coverages = [
        _coverage(stage, scope, selection, held, rates[stage, scope])
        for (stage, scope), held in holdings.items()
        for selection in selections
    ]
    return Status(stages, coverages, running(dataset), failures, dict(sorted(kinds.items())))


def _count_bytes(held: Mapping[str, list[Entry]], kinds: Counter[str]) -> None:
    for entries in held.values():
        for entry in entries:
            if entry.outcome == "done":
                for record in entry.files:
                    kinds[file_kind(record.path)] += record.bytes


def file_kind(path: str) -> str:
    """The folder that says what a file is: `tiles/224`, `features/224/h0-mini/cls`, `tissue`."""
    parts = path.split("/")
    depth = {"tiles": 2, "features": 4}.get(parts[0], 1)
    return "/".join(parts[:depth])


def _folder_bytes(folder: Path) -> int:
    """Bytes of the files below a folder."""
    sizes = (
        os.path.getsize(os.path.join(place, name))
        for place, _, names in os.walk(folder)
        for name in names
    )
    return sum(sizes)


def _failures(stage: str, scope: str, held: Mapping[str, list[Entry]]) -> list[Failure]:
    return [
        Failure(stage, scope, entry.slide_id, redact(entry.reason))
        for entries in held.values()
        for entry in entries
        if entry.outcome == "failed"
    ]


def is_bookkeeping(scope: str) -> bool:
    """Lines that name a table or an encoder.json, not a slide's work."""
    return scope == "table" or scope.endswith("encoder.json")


def _stage_status(stage: str, scope: str, held: Mapping[str, list[Entry]]) -> StageStatus:
    outcomes = Counter(_outcome(entries) for entries in held.values())
    done = [entry for entries in held.values() for entry in entries if entry.outcome == "done"]
    stored = sum(record.bytes for entry in done for record in entry.files)
    return StageStatus(
        stage, scope, outcomes["done"], outcomes["rejected"], outcomes["failed"], stored,
        _rate(done),
    )  # fmt: skip


def _outcome(entries: list[Entry]) -> str:
    """A slide has failed in a scope where any line that stands says so."""
    outcomes = {entry.outcome for entry in entries}
    return next((one for one in ("failed", "rejected", "done") if one in outcomes), "pruned")


def _rate(done: Iterable[Entry]) -> float | None:
    """Tiles a second of one worker, over lines that state both."""
    timed = [entry for entry in done if entry.seconds > 0 and entry.stop > entry.start >= 0]
    seconds = sum(entry.seconds for entry in timed)
    return sum(entry.stop - entry.start for entry in timed) / seconds if seconds else None


def _coverage(
    stage: str, scope: str, selection: Selection, held: Mapping[str, list[Entry]],
    rate: float | None,
) -> Coverage:  # fmt: skip
    stored = sum(
        count_covered(
            ranks, [(e.start, e.stop) for e in held.get(slide, ()) if e.outcome == "done"]
        )
        for slide, ranks in selection.items()
    )
    missing = selection.rows - stored
    return Coverage(
        stage, scope, selection.name, selection.rows, stored, missing / rate if rate else None
    )


def count_covered(ranks: npt.NDArray[np.int32], spans: Iterable[tuple[int, int]]) -> int:
    """How many of the ascending ranks lie in any of the half-open spans."""
    total, reached = 0, 0
    for start, stop in sorted(spans):
        first = max(start, reached)
        if stop > first:
            low, high = np.searchsorted(ranks, [first, stop])
            total += int(high - low)
            reached = stop
    return total


def print_status(dataset: Dataset, *, as_json: bool = False) -> int:
    """Say it as tables, or as one JSON object on stdout; returns the exit status."""
    status = read_status(dataset)
    if as_json:
        print(json.dumps(asdict(status), indent=2))
        return 0
    _say_running(status.running)
    if not status.stages:
        say(f"status: nothing has been done in {dataset.root} yet; begin with `pipeline scan`")
        return 0
    stdout.print(_stage_table(status))
    if status.selections:
        stdout.print(_coverage_table(status))
    _say_failures(status.failures)
    total = sum(status.bytes.values())
    kinds = ", ".join(f"{kind} {format_bytes(size)}" for kind, size in status.bytes.items())
    say(f"status: {format_bytes(total)} in {dataset.root}: {kinds}")
    return 0


def _say_running(runs: list[Running]) -> None:
    for run in runs:
        job = f", job {run.slurm_job}" if run.slurm_job else ""
        part = f" (element {run.array_task})" if run.array_task else ""
        where = f"{run.stage}{part} on {run.host}{job}, since {run.since}"
        if not run.alive:
            say(f"ended without a word: {where}, last heard {run.last}; run it again to go on")
            continue
        rate = f", {run.rate:.3g} {run.unit}/s" if run.rate else ""
        left = f", {format_seconds(run.seconds_left)} left" if run.seconds_left is not None else ""
        progress = f"{run.done:,}/{run.total:,} {run.unit}{rate}{left}"
        say(f"running: {where}: {progress}; slides in progress: {run.in_progress}")


def _say_failures(failures: list[Failure]) -> None:
    """The commonest reasons with a slide of each; all of them are in --json and the report."""
    # One slide has a line for each kind of features.
    failed = {(one.stage, one.reason, one.slide) for one in failures}
    reasons = Counter((stage, reason) for stage, reason, _ in sorted(failed))
    example = {(one.stage, one.reason): one.slide for one in reversed(failures)}
    for (stage, reason), count in reasons.most_common(_REASONS_SHOWN):
        more = f" and {count - 1:,} more" if count > 1 else ""
        say(f"failed in {stage}: {example[stage, reason]}{more}: {reason}")
    if len(reasons) > _REASONS_SHOWN:
        say(f"... and {len(reasons) - _REASONS_SHOWN:,} other reasons: `status --json` names all")


def _stage_table(status: Status) -> Table:
    table = Table("stage", "scope", "done", "rejected", "failed", "bytes", "tiles/s a worker")
    for one in status.stages:
        rate = f"{one.tiles_per_s:.3g}" if one.tiles_per_s else ""
        numbers = (f"{one.done:,}", f"{one.rejected:,}", f"{one.failed:,}")
        table.add_row(one.stage, one.scope, *numbers, format_bytes(one.bytes), rate)
    return table


def _coverage_table(status: Status) -> Table:
    table = Table("stage", "scope", "selection", "tiles", "stored", "left for one worker")
    for one in status.selections:
        share = 100 * one.stored / one.tiles if one.tiles else 100
        # Rounded down: 100 % is said of nothing but all.
        stored = f"{one.stored:,} ({int(share * 10) / 10:g} %)"
        left = "" if one.stored == one.tiles else "unknown"
        if one.seconds_left:
            left = format_seconds(one.seconds_left)
        table.add_row(one.stage, one.scope, one.selection, f"{one.tiles:,}", stored, left)
    return table
