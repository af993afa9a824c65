"""`pipeline status`: what is done, running and missing, its bytes, and how long the rest takes.

Read from the journals, logs and selections alone: no file of tiles or features is opened.
"""

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass

import numpy as np
import numpy.typing as npt
from rich.table import Table

from common.console import print_line, stdout
from common.redact import redact_secrets
from common.text import format_bytes, format_seconds
from pipeline.dataset import (
    Dataset,
    Entry,
    Ledger,
    Selection,
    begun_stages,
    read_selection_rows,
)
from pipeline.dataset.layout import DAMAGED_DIR
from pipeline.upkeep.activity import Running, list_running

_REASONS_SHOWN = 8
_BY_SELECTION = ("tile", "cache")
"""Stages that work for selections; a scope of theirs is a tile size, or a kind of features."""


@dataclass(frozen=True)
class StageStatus:
    """A stage and scope: slides by the outcome of their latest line, bytes of current files.

    `tiles_per_s` is the rate of one worker, None where the lines state none.
    """

    stage: str
    scope: str
    done: int
    rejected: int
    failed: int
    bytes: int
    tiles_per_s: float | None


@dataclass(frozen=True)
class Coverage:
    """How much of a selection a scope has, in tiles, and seconds of one worker for the rest."""

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
    """All that the command prints; `bytes` is by kind: a folder of the dataset."""

    stages: list[StageStatus]
    selections: list[Coverage]
    running: list[Running]
    failures: list[Failure]
    bytes: dict[str, int]


def read_status(dataset: Dataset) -> Status:
    """The dataset's status."""
    stages: list[StageStatus] = []
    failures: list[Failure] = []
    coverages: list[Coverage] = []
    logs = [path for path in (dataset.root / "status").rglob("*") if not path.is_dir()]
    kinds = Counter({"status": sum(path.stat().st_size for path in logs)})
    selections = [read_selection_rows(dataset, name) for name in dataset.selection_names()]
    for stage in begun_stages(dataset):
        ledger = Ledger.read(dataset, stage)
        for scope in ledger.scopes:
            current = ledger[scope].by_slide
            done = [entry for rows in ledger[scope].written.values() for entry in rows]
            for entry in done:
                for record in entry.files:
                    kinds[file_kind(record.path)] += record.bytes
            # Their bytes count, their lines are not a slide's work.
            if not current or is_bookkeeping(scope):
                continue
            status = _stage_status(stage, scope, current, done)
            stages.append(status)
            failures += [
                Failure(stage, scope, entry.slide_id, redact_secrets(entry.reason))
                for rows in current.values()
                for entry in rows
                if entry.outcome == "failed"
            ]
            if stage in _BY_SELECTION:
                coverages += [
                    _count_coverage(status, selection, current) for selection in selections
                ]
    return Status(stages, coverages, list_running(dataset), failures, dict(sorted(kinds.items())))


def file_kind(path: str) -> str:
    """The folder that says what a file is.

    >>> file_kind("features/224/h0-mini/cls/S.parquet"), file_kind("tissue/S.png")
    ('features/224/h0-mini/cls', 'tissue')
    """
    parts = path.split("/")
    depth = {"tiles": 2, "features": 4}.get(parts[0], 1)
    return "/".join(parts[:depth])


def is_bookkeeping(scope: str) -> bool:
    """Whether lines of this scope name a table, an encoder.json or what `verify` moved away.

    Such lines are no slide's work.
    """
    return scope == "table" or scope.endswith("encoder.json") or scope.startswith(DAMAGED_DIR)


def _stage_status(
    stage: str, scope: str, current: Mapping[str, list[Entry]], done: list[Entry]
) -> StageStatus:
    outcomes: Counter[str] = Counter()
    for entries in current.values():
        # A slide has failed in a scope where any of its lines says so.
        seen = {entry.outcome for entry in entries}
        worst = [outcome for outcome in ("failed", "rejected", "done") if outcome in seen]
        outcomes[worst[0] if worst else "pruned"] += 1
    # Imported lines have no time, and would make the rate look higher than it is.
    timed = [entry for entry in done if entry.seconds > 0 and entry.stop > entry.start >= 0]
    seconds = sum(entry.seconds for entry in timed)
    tiles = sum(entry.stop - entry.start for entry in timed)
    return StageStatus(
        stage, scope, outcomes["done"], outcomes["rejected"], outcomes["failed"],
        sum(record.bytes for entry in done for record in entry.files),
        tiles / seconds if seconds else None,
    )  # fmt: skip


def _count_coverage(
    status: StageStatus, selection: Selection, current: Mapping[str, list[Entry]]
) -> Coverage:
    stored = 0
    for slide, ranks in selection.items():
        done = [entry for entry in current.get(slide, ()) if entry.outcome == "done"]
        stored += count_covered(ranks, [(entry.start, entry.stop) for entry in done])
    # At the measured rate of one worker: how many will work is not known here.
    missing, rate = selection.rows - stored, status.tiles_per_s
    seconds = missing / rate if rate else None
    return Coverage(status.stage, status.scope, selection.name, selection.rows, stored, seconds)


def count_covered(ranks: npt.NDArray[np.int32], spans: Iterable[tuple[int, int]]) -> int:
    """How many of the ascending ranks are in any of the half-open spans.

    >>> count_covered(np.array([1, 5, 9], np.int32), [(4, 9), (0, 6)])
    2
    """
    total, reached = 0, 0
    for start, stop in sorted(spans):
        first = max(start, reached)
        if stop > first:
            low, high = np.searchsorted(ranks, [first, stop])
            total += int(high - low)
            reached = stop
    return total


def print_status(dataset: Dataset, *, as_json: bool = False) -> int:
    """Print it as tables, or as one JSON object on stdout; returns the exit status."""
    status = read_status(dataset)
    if as_json:
        print(json.dumps(asdict(status), indent=2))
        return 0
    for run in status.running:
        _say_running(run)
    if not status.stages:
        print_line(
            f"status: nothing has been done in {dataset.root} yet; begin with `pipeline scan`"
        )
        return 0
    table = Table("stage", "scope", "done", "rejected", "failed", "bytes", "tiles/s per worker")
    for row in status.stages:
        rate = f"{row.tiles_per_s:.3g}" if row.tiles_per_s else ""
        numbers = (f"{row.done:,}", f"{row.rejected:,}", f"{row.failed:,}")
        table.add_row(row.stage, row.scope, *numbers, format_bytes(row.bytes), rate)
    stdout.print(table)
    if status.selections:
        stdout.print(_coverage_table(status.selections))
    _say_failures(status.failures)
    total = sum(status.bytes.values())
    kinds = ", ".join(f"{kind} {format_bytes(size)}" for kind, size in status.bytes.items())
    print_line(f"status: {format_bytes(total)} in {dataset.root}: {kinds}")
    return 0


def _say_running(run: Running) -> None:
    job = f", job {run.slurm_job}" if run.slurm_job else ""
    part = f" (element {run.array_task})" if run.array_task else ""
    where = f"{run.stage}{part} on {run.host}{job}, since {run.since}"
    if not run.alive:
        print_line(f"killed: {where}, last log line {run.last}; run it again to go on")
        return
    rate = f", {run.rate:.3g} {run.unit}/s" if run.rate else ""
    left = f", {format_seconds(run.seconds_left)} left" if run.seconds_left is not None else ""
    progress = f"{run.done:,}/{run.total:,} {run.unit}{rate}{left}"
    print_line(f"running: {where}: {progress}; slides in progress: {run.in_progress}")


def _say_failures(failures: list[Failure]) -> None:
    """The commonest reasons with a slide of each; all of them are in --json and the report."""
    # One slide has a line for each kind of features.
    failed = {(failure.stage, failure.reason, failure.slide) for failure in failures}
    reasons = Counter((stage, reason) for stage, reason, _ in sorted(failed))
    example = {(failure.stage, failure.reason): failure.slide for failure in reversed(failures)}
    for (stage, reason), count in reasons.most_common(_REASONS_SHOWN):
        more = f" and {count - 1:,} more" if count > 1 else ""
        print_line(f"failed in {stage}: {example[stage, reason]}{more}: {reason}")
    if len(reasons) > _REASONS_SHOWN:
        print_line(
            f"... and {len(reasons) - _REASONS_SHOWN:,} other reasons: `status --json` lists all"
        )


def _coverage_table(coverages: list[Coverage]) -> Table:
    table = Table("stage", "scope", "selection", "tiles", "stored", "left for one worker")
    for row in coverages:
        share = 100 * row.stored / row.tiles if row.tiles else 100
        # Rounded down: 100 % is for all tiles, and for no fewer.
        stored = f"{row.stored:,} ({int(share * 10) / 10:g} %)"
        left = "" if row.stored == row.tiles else "unknown"
        if row.seconds_left:
            left = format_seconds(row.seconds_left)
        table.add_row(row.stage, row.scope, row.selection, f"{row.tiles:,}", stored, left)
    return table
