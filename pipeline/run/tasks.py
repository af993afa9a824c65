"""A slide as a task: what the coordinator sends to a worker and what the worker reports back."""

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

from common.errors import UserError
from pipeline.dataset import Entry
from pipeline.dataset.journal import encode_line

_BATCHED_S = 0.003
TOPIC = "histogen"
"""Dask's topic for what a task reports while it goes on."""

BundleFunction: TypeAlias = Callable[[list[tuple[Any, ...]]], Iterable[list[Entry]]]
"""From the arguments of several slides to the entries of each, in their order."""


class UnfitWorkerError(Exception):
    """Raised in a task: this worker can do no slide at all, and no slide is to blame.

    It ends the stage with its message: a worker that failed slide after slide at once would take
    the queue from those that can.
    """


@dataclass(frozen=True)
class SlideTask:
    """One slide's work for a stage.

    `arguments` are those of the stage's function; tasks with the highest `cost` begin first;
    `units` is what the progress bar counts (slides or tiles). `values` and `scopes` are those of
    the lines that are journalled where the task itself could not write any.
    """

    slide_id: str
    fingerprint: str
    arguments: tuple[Any, ...]
    cost: float = 0.0
    units: int = 1
    values: Mapping[str, object] = field(default_factory=dict)
    scopes: tuple[str, ...] = ("",)

    def failed_entries(self, reason: str) -> list[Entry]:
        """The lines that say why the slide failed, one per scope."""
        return [
            Entry(self.slide_id, "failed", self.fingerprint, reason, scope=scope,
                  values=dict(self.values))
            for scope in self.scopes
        ]  # fmt: skip


def sort_dearest_first(tasks: Sequence[SlideTask]) -> list[SlideTask]:
    """The order in which tasks begin: the longest first, so that none is left for the end."""
    return sorted(tasks, key=lambda task: (-task.cost, task.slide_id))


def bundle_tasks(tasks: Sequence[SlideTask], most_units: int) -> list[list[SlideTask]]:
    """Tasks in their order, in bundles of at most `most_units` >= 1 (or of one larger task)."""
    bundles: list[list[SlideTask]] = []
    units = 0
    for task in tasks:
        if not bundles or units + task.units > most_units:
            bundles.append([])
            units = 0
        bundles[-1].append(task)
        units += task.units
    return bundles


def report_progress(slide_id: str, units: int) -> None:
    """Called inside a task: that many more units of the slide are done."""
    _send_to_coordinator({"slide_id": slide_id, "units": units})


def report_note(text: str) -> None:
    """Called inside a task: one line for the terminal of the coordinator."""
    _send_to_coordinator({"note": text})


def _send_to_coordinator(message: Mapping[str, object]) -> None:
    from distributed import get_worker

    try:
        worker = get_worker()
    except ValueError:  # not on a worker: a test, or a benchmark
        return
    worker.log_event(TOPIC, message)


def _wait_until_sent() -> None:
    """Let what was sent leave this process: the next slide may take it down, or its lock.

    It takes some milliseconds, at most a second.
    """
    from distributed import get_worker

    try:
        worker = get_worker()
    except ValueError:
        return
    # Behind the message in the loop's queue; then it waits in a batch to be written.
    is_queued = threading.Event()
    worker.loop.add_callback(is_queued.set)
    is_queued.wait(1.0)
    deadline = time.monotonic() + 1.0
    while getattr(worker.batched_stream, "buffer", ()) and time.monotonic() < deadline:
        time.sleep(_BATCHED_S)
    time.sleep(_BATCHED_S)


@dataclass(frozen=True)
class OneByOne:
    """A function of one slide as a function of a bundle of slides."""

    function: Callable[..., Iterable[Entry]]

    def __call__(self, bundle: list[tuple[Any, ...]]) -> Iterator[list[Entry]]:
        """The entries of each slide, in the bundle's order."""
        for arguments in bundle:
            yield list(self.function(*arguments))


def collect_entries(
    entries: Iterable[Entry], slide_id: str, fingerprint: str, scope: str = ""
) -> list[Entry]:
    """A slide's entries as a worker makes them; a `UserError` on the way becomes a failed one.

    Entries that were made before the error are kept: their files are written.
    """
    # One by one, since `entries` writes files as it goes on.
    made: list[Entry] = []
    try:
        made.extend(entries)
    except UserError as error:
        # An error may know what else it makes void, see `withdraw_lost`.
        values = dict(getattr(error, "values", {}))
        made.append(Entry(slide_id, "failed", fingerprint, str(error), scope=scope, values=values))
    return made


def run_bundle(
    function: BundleFunction, bundle: list[tuple[Any, ...]], number: int
) -> list[list[Entry]]:
    """On the worker: every slide's entries are sent as they come, and returned at the end.

    `number` tells the coordinator which of its bundles the entries belong to.
    """
    done = []
    began = time.monotonic()
    for index, entries in enumerate(function(bundle)):
        now = time.monotonic()
        entries, began = _with_seconds(entries, now - began), now
        done.append(entries)
        # The last slide's entries come with the result; sending them early would save nothing.
        if index + 1 < len(bundle):
            lines = [encode_line(entry, {}) for entry in entries]
            _send_to_coordinator({"bundle": number, "index": index, "lines": lines})
            _wait_until_sent()
    return done


def _with_seconds(entries: list[Entry], seconds: float) -> list[Entry]:
    """State how long a slide took in its only entry, where its stage did not."""
    if len(entries) == 1 and entries[0].seconds == 0.0:
        return [replace(entries[0], seconds=round(seconds, 6))]
    return entries
