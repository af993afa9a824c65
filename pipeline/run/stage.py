"""The stage driver: what every stage of the pipeline does the same way.

A stage is an object that knows its slides: their fingerprints, which of them it must refuse, what
each lacks, and the task that makes it. The driver does the rest: it claims the identity, reads the
ledger, skips what is done, journals refusals and withdrawn files, bundles tasks and sends them to
workers, journals what comes back, and sums up. Whether a run resumes is decided in `_plan_stage`.

A new stage is one file with a subclass of `Stage`, and a command that calls `run_stage`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from typing import Any, Generic, Protocol, TypeVar

from common.console import open_meter
from common.terms import Terms
from pipeline.dataset import (
    Dataset,
    DatasetKind,
    Entry,
    Ledger,
    Missing,
    Run,
    claim_identity,
    software_versions,
)
from pipeline.dataset.journal import Outcome
from pipeline.run.drain import run_bundles
from pipeline.run.summary import Summary, report_summary
from pipeline.run.tasks import OneByOne, SlideTask, sort_dearest_first
from pipeline.run.withdraw import withdraw_lost
from pipeline.run.workers import EngineConfig

_PACKAGES = ("numpy", "opencv-python-headless", "openslide-python", "openslide-bin", "tiffslide")


class HasSlideId(Protocol):
    """Anything that a stage works on: a slide, a row of a table, a folder of pictures."""

    @property
    def slide_id(self) -> str:
        """The slide that journal lines about it name."""


Item = TypeVar("Item", bound=HasSlideId)


def stage_versions(*more: str) -> dict[str, str]:
    """Software versions that a stage records: never a reason to refuse."""
    return software_versions(*_PACKAGES, *more)


class Stage(ABC, Generic[Item]):
    """One stage on one dataset. Its constructor checks what can be wrong before anything is done.

    `name` is that of its journal; `label` is the first word of what it prints, `unit` what the
    progress bar counts (slides or tiles), `rate_of` the count that is stated per second, and
    `packages` those whose versions are recorded, `device` where networks run, `kind` the kind of
    dataset it writes (`UNKNOWN` for any), `scopes` the parts of the stage that are tracked apart.
    `work` is the worker's function: of one task's arguments, or of a list of them (see
    `make_bundles`). `identity` is what `identity_claims` claimed, {} for nothing. The driver calls
    `claim_items` and `list_items` first, then the other methods item by item.
    """

    name: str
    label: str
    work: Callable[..., Any]
    unit = "slides"
    rate_of = ""
    packages: tuple[str, ...] = ()
    device = ""
    kind = DatasetKind.UNKNOWN
    scopes: tuple[str, ...] = ("",)

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset
        self.identity: dict[str, Any] = {}

    @property
    def journals(self) -> tuple[str, ...]:
        """The stages whose journals it writes: one, or several whose work it does at once."""
        return (self.name,)

    def identity_claims(self) -> dict[str, object]:
        """Identity values that every stage must agree with; {} for none."""
        return {}

    def stated_terms(self) -> tuple[Terms, ...] | None:
        """The terms of what the stage brings; None where it states none."""
        return None

    def claim_items(self) -> None:
        """Called once the identity is claimed: what no other run may decide at the same time."""

    @abstractmethod
    def list_items(self) -> Iterable[Item]:
        """What the stage works on."""

    @abstractmethod
    def item_fingerprint(self, item: Item) -> str:
        """The hash of everything that determines the item's output."""

    def reason_to_refuse(
        self, item: Item, fingerprint: str, ledger: Ledger
    ) -> tuple[Outcome, str] | None:
        """Why an item cannot be worked on: `failed` or `rejected`, and the reason; else None."""
        return None

    def find_missing(self, item: Item, fingerprint: str, ledger: Ledger) -> Missing:
        """What the item lacks: all or nothing, unless a stage asks the ledger for blocks."""
        return Missing.of_slide(ledger[self.scopes[0]].done(item.slide_id, fingerprint))

    @abstractmethod
    def make_task(self, item: Item, fingerprint: str, missing: Missing, run_id: str) -> SlideTask:
        """The task that makes what is missing."""

    def make_bundles(
        self, tasks: Sequence[SlideTask], engine: EngineConfig
    ) -> list[list[SlideTask]] | None:
        """Tasks in bundles, in the order in which they begin; None where each goes alone."""
        return None

    def before_tasks(self, run: Run, tasks: Sequence[SlideTask]) -> None:
        """Called before the first task begins."""

    def journal_entries(self, runs: Sequence[Run], entries: list[Entry]) -> None:
        """Journal entries; `runs` are those of `journals`, in that order."""
        runs[0].append(entries)

    def after_tasks(self, runs: Sequence[Run], summary: Summary, engine: EngineConfig) -> None:
        """Called after the last task has ended, with the journals still open."""

    @property
    @abstractmethod
    def output_path(self) -> object:
        """What the summary names as written to."""


def run_stage(stage: Stage[Any], engine: EngineConfig) -> int:
    """Make what a stage lacks; returns the exit status, 1 if any slide failed."""
    dataset, versions = stage.dataset, stage_versions(*stage.packages)
    if claims := stage.identity_claims():
        stage.identity = claim_identity(
            dataset, claims, stage=stage.name, versions=versions, kind=stage.kind,
            terms=stage.stated_terms(),
        )  # fmt: skip
    stage.claim_items()
    summary = Summary(stage.label)
    with ExitStack() as stack:
        runs = [
            stack.enter_context(Run(dataset, name, versions, device=stage.device))
            for name in stage.journals
        ]
        tasks, lines = _plan_stage(stage, runs[0], summary)
        if tasks:
            # Before hours of work that could not be written.
            for name in stage.journals:
                dataset.refuse_linked_stage(name)
        # The elements of a job array plan alike, and each does and journals its part.
        tasks = [task for task in tasks if engine.includes_slide(task.slide_id)]
        _record_lines(stage, runs, [e for e in lines if engine.includes_slide(e.slide_id)], summary)
        stage.before_tasks(runs[0], tasks)
        _run_tasks(stage, runs, tasks, engine, summary)
        stage.after_tasks(runs, summary, engine)
    return report_summary(summary, stage.output_path, stage.rate_of)


def _plan_stage(
    stage: Stage[Item], run: Run, summary: Summary
) -> tuple[list[SlideTask], list[Entry]]:
    """The tasks, and the lines to journal first: refusals, and lines that are taken back."""
    ledger = Ledger.read(stage.dataset, stage.name)
    tasks: list[SlideTask] = []
    lines: list[Entry] = []
    # A pass over all slides before any work: what must be refused is reported at once.
    for item in stage.list_items():
        fingerprint = stage.item_fingerprint(item)
        if refusal := stage.reason_to_refuse(item, fingerprint, ledger):
            outcome, reason = refusal
            lines += [
                Entry(item.slide_id, outcome, fingerprint, reason, scope=scope)
                for scope in stage.scopes
            ]
            continue
        # Withdrawn first: a lost file's line would hide the new file from readers.
        missing = stage.find_missing(item, fingerprint, ledger)
        lines += missing.withdrawn
        if missing:
            # The id is claimed here, after the ledger was read: the run is later than all in it.
            tasks.append(stage.make_task(item, fingerprint, missing, run.run_id))
            continue
        summary.skipped += 1
        if missing.done is not None and missing.done.outcome == "rejected":
            summary.rejected.append((item.slide_id, missing.done.reason))
    return tasks, lines


def _record_lines(
    stage: Stage[Any], runs: Sequence[Run], lines: list[Entry], summary: Summary
) -> None:
    if lines:
        stage.journal_entries(runs, lines)
    for entry in lines:
        # A withdrawn file is no result of this run.
        if entry.outcome != "pruned":
            summary.add_entry(entry)


def _run_tasks(
    stage: Stage[Any],
    runs: Sequence[Run],
    tasks: list[SlideTask],
    engine: EngineConfig,
    summary: Summary,
) -> None:
    """Send the tasks to workers; journal and count every slide as it ends."""
    total = sum(task.units for task in tasks)
    if tasks:
        runs[0].log_event("tasks", slides=len(tasks), total=total, unit=stage.unit,
                      engine=engine.description)  # fmt: skip
    bundles, work = stage.make_bundles(tasks, engine), stage.work
    if bundles is None:
        bundles, work = [[task] for task in sort_dearest_first(tasks)], OneByOne(work)

    def on_entries(entries: list[Entry]) -> None:
        stage.journal_entries(runs, entries)
        withdraw_lost(stage.dataset, entries)
        for entry in entries:
            summary.add_entry(entry)

    with open_meter(summary.stage, total, stage.unit) as progress:
        run_bundles(work, bundles, engine, on_entries, progress, runs[0])
        summary.seconds = progress.seconds
