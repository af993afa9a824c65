"""What every stage shares: what stands already, journalling, the summary at the end."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.table import Table
from rich.text import Text

from common.console import EXIT_FAILURES, EXIT_OK, meter, say, stdout
from common.redact import redact
from common.text import format_bytes, format_seconds
from pipeline.dataset import Dataset, Entry, Run, files_present, software_versions
from pipeline.run.engine import BundleFunction, EngineConfig, SlideTask, run_bundles, run_tasks

_ROWS_SHOWN = 40
_PACKAGES = ("numpy", "opencv-python-headless", "openslide-python", "openslide-bin", "tiffslide")


def stage_versions(*more: str) -> dict[str, str]:
    """Software versions that a stage records: never a reason to refuse."""
    return software_versions(*_PACKAGES, *more)


@dataclass
class Summary:
    """How a stage ended, slide by slide."""

    stage: str
    done_slides: set[str] = field(default_factory=set)
    skipped: int = 0
    rejected: list[tuple[str, str]] = field(default_factory=list)
    failed: list[tuple[str, str]] = field(default_factory=list)
    files: int = 0
    bytes: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0

    def add(self, entry: Entry) -> None:
        """Count one entry."""
        if entry.outcome == "rejected":
            self.rejected.append((entry.slide_id, entry.reason))
        elif entry.outcome == "failed":
            row = (entry.slide_id, entry.reason)
            if self.failed[-1:] != [row]:  # a slide's lines, one a scope, come together
                self.failed.append(row)
        else:
            self.done_slides.add(entry.slide_id)
        self.files += len(entry.files)
        self.bytes += sum(record.bytes for record in entry.files)
        for name, count in entry.counts.items():
            self.counts[name] = self.counts.get(name, 0) + count

    @property
    def status(self) -> int:
        """Exit status: 1 if any slide failed."""
        return EXIT_FAILURES if self.failed else EXIT_OK


def stands(dataset: Dataset, entries: Iterable[Entry], fingerprint: str) -> Entry | None:
    """The entry that makes the work needless: done or rejected, with the files that it names."""
    for entry in entries:
        judged = entry.fingerprint == fingerprint and entry.outcome in ("done", "rejected")
        if judged and files_present(dataset, entry):
            return entry
    return None


def run_stage(
    run: Run,
    function: Callable[..., list[Entry]],
    tasks: Sequence[SlideTask],
    engine: EngineConfig,
    summary: Summary,
    unit: str = "slides",
) -> Summary:
    """Run the tasks, journal every entry as it comes, and fill the summary."""
    tasks = [task for task in tasks if engine.takes(task.slide_id)]
    _log_tasks(run, tasks, engine, unit)
    with meter(summary.stage, sum(task.units for task in tasks), unit) as progress:
        run_tasks(function, tasks, engine, _journal(run, summary), progress, run)
        summary.seconds = progress.seconds
    return summary


def run_bundled_stage(
    run: Run,
    function: BundleFunction,
    bundles: Sequence[list[SlideTask]],
    engine: EngineConfig,
    summary: Summary,
    unit: str = "slides",
) -> Summary:
    """`run_stage` for a function of several slides: every slide is journalled as it ends."""
    tasks = [task for bundle in bundles for task in bundle]
    _log_tasks(run, tasks, engine, unit)
    with meter(summary.stage, sum(task.units for task in tasks), unit) as progress:
        run_bundles(function, bundles, engine, _journal(run, summary), progress, run)
        summary.seconds = progress.seconds
    return summary


def _log_tasks(run: Run, tasks: Sequence[SlideTask], engine: EngineConfig, unit: str) -> None:
    """The first event of a run that has something to do."""
    if tasks:
        total = sum(task.units for task in tasks)
        run.event("tasks", slides=len(tasks), total=total, unit=unit, engine=engine.described)


def _journal(run: Run, summary: Summary) -> Callable[[list[Entry]], None]:
    def journal(entries: list[Entry]) -> None:
        run.append(entries)
        for entry in entries:
            summary.add(entry)

    return journal


def report_summary(summary: Summary, where: Any, rate_of: str = "") -> int:
    """Print refused slides with their reasons and the final line; returns the exit status."""
    _print_reasons(summary)
    parts = [f"{len(summary.done_slides)} done"]
    if summary.skipped:
        parts.append(f"{summary.skipped} already done, nothing to redo")
    if summary.rejected:
        parts.append(f"{len(summary.rejected)} rejected")
    if summary.failed:
        parts.append(f"{len(summary.failed)} failed")
    counts = ", ".join(f"{count:,} {name}" for name, count in summary.counts.items())
    line = f"{summary.stage}: slides: {', '.join(parts)}"
    if counts:
        line += f"; {counts}"
    if summary.files:
        line += f"; wrote {summary.files} files, {format_bytes(summary.bytes)} to {where}"
    line += f" in {format_seconds(summary.seconds)}"
    total = summary.counts.get(rate_of, 0)
    if total and summary.seconds > 0:
        line += f" ({total / summary.seconds:.1f} {rate_of}/s)"
    say(line)
    return summary.status


def _print_reasons(summary: Summary) -> None:
    rows = [("failed", *row) for row in summary.failed]
    rows += [("rejected", *row) for row in summary.rejected]
    if not rows:
        return
    table = Table("slide", "outcome", "reason", title=f"{summary.stage}: slides not taken")
    for outcome, slide_id, reason in rows[:_ROWS_SHOWN]:
        # As plain text: a reason quotes what others wrote, and may hold rich's brackets.
        table.add_row(Text(slide_id), outcome, Text(redact(reason)))
    stdout.print(table)
    if len(rows) > _ROWS_SHOWN:
        say(f"... and {len(rows) - _ROWS_SHOWN} more, in the stage's journal")
