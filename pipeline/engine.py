"""Dask distributed: one slide is one task, coordinates and paths travel, never pixels.

At most one task a worker is in flight, so that a slide that kills its worker takes no innocent
with it; after three such deaths the slide is failed and the rest goes on.
"""

import logging
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from model.errors import UserError
from pipeline.console import Meter
from pipeline.dataset import Entry

MAX_WORKER_DEATHS = 3
_PROGRESS_TOPIC = "histogen-progress"


@dataclass(frozen=True)
class SlideTask:
    """One slide's work: arguments for the stage's function, a cost to order by, its size.

    `units` is what the progress bar counts (slides or tiles).
    """

    slide_id: str
    fingerprint: str
    arguments: tuple[Any, ...]
    cost: float = 0.0
    units: int = 1


@dataclass(frozen=True)
class EngineConfig:
    """Where tasks run: a local cluster of `workers` processes, or a running Dask scheduler."""

    workers: int | None = None
    scheduler: str = ""

    def worker_count(self, tasks: int) -> int:
        """Local workers: as asked, else one a core, never more than tasks."""
        cores = len(os.sched_getaffinity(0))
        return max(1, min(self.workers or cores, tasks))


@contextmanager
def dask_client(config: EngineConfig, tasks: int) -> Iterator[Any]:
    """A Dask client; a local cluster lives as long as the context."""
    import dask
    from distributed import Client, LocalCluster

    options = {
        "distributed.scheduler.allowed-failures": 0,
        "distributed.worker.daemon": False,
        "distributed.comm.timeouts.connect": "10s",
        "distributed.admin.low-level-log-length": 1000,
    }
    with dask.config.set(options):
        if config.scheduler:
            try:
                client = Client(config.scheduler, timeout=10)
            except (OSError, TimeoutError, ValueError) as error:
                raise UserError(
                    f"--scheduler {config.scheduler}: no Dask scheduler answers there"
                ) from error
            with client:
                yield client
            return
        with (
            LocalCluster(
                n_workers=config.worker_count(tasks),
                threads_per_worker=1,
                processes=True,
                dashboard_address="127.0.0.1:0",
                memory_limit=0,
                silence_logs=logging.CRITICAL,
            ) as cluster,
            Client(cluster) as client,
        ):
            yield client


def report_progress(slide_id: str, units: int) -> None:
    """Called inside a task: that many more units of the slide are done."""
    from distributed import get_worker

    try:
        worker = get_worker()
    except ValueError:
        return
    worker.log_event(_PROGRESS_TOPIC, {"slide_id": slide_id, "units": units})


def run_tasks(
    function: Callable[..., list[Entry]],
    tasks: Sequence[SlideTask],
    config: EngineConfig,
    on_entries: Callable[[list[Entry]], None],
    meter: Meter,
) -> None:
    """Run `function(*task.arguments)` for every task, dearest first.

    `on_entries` is called here, in the coordinator, as each slide ends. A task that kills its
    worker is tried again; the third death makes it a failed entry.
    """
    if not tasks:
        return
    queue = sorted(tasks, key=lambda t: (-t.cost, t.slide_id))
    with dask_client(config, len(tasks)) as client:
        progress = _Progress(meter)
        client.subscribe_topic(_PROGRESS_TOPIC, progress.on_event)
        _Drain(client, function, on_entries, progress).run(queue)


class _Progress:
    """Advances the meter by what workers report, and to the task's size when it ends."""

    def __init__(self, meter: Meter) -> None:
        self._meter = meter
        self._reported: dict[str, int] = {}
        self._lock = threading.Lock()

    def on_event(self, event: tuple[float, dict[str, Any]]) -> None:
        slide_id, units = event[1]["slide_id"], event[1]["units"]
        with self._lock:
            if slide_id in self._reported:
                self._reported[slide_id] += units
                self._meter.advance(units, note=slide_id)

    def begin(self, task: SlideTask) -> None:
        with self._lock:
            self._reported[task.slide_id] = 0

    def end(self, task: SlideTask) -> None:
        with self._lock:
            reported = self._reported.pop(task.slide_id, 0)
            self._meter.advance(task.units - reported, note=task.slide_id)


class _Drain:
    """Keeps one task a worker in flight until the queue is empty."""

    def __init__(
        self,
        client: Any,
        function: Callable[..., list[Entry]],
        on_entries: Callable[[list[Entry]], None],
        progress: _Progress,
    ) -> None:
        from distributed import as_completed

        self._client, self._function = client, function
        self._on_entries, self._progress = on_entries, progress
        self._running: dict[Any, SlideTask] = {}
        self._deaths: dict[str, int] = {}
        self._completed = as_completed(loop=client.loop)

    def run(self, queue: Sequence[SlideTask]) -> None:
        """Run all tasks of the queue, in its order."""
        waiting = iter(queue)
        slots = max(1, len(self._client.scheduler_info(n_workers=-1)["workers"]))
        for _, task in zip(range(slots), waiting, strict=False):
            self._submit(task)
        for future in self._completed:
            task = self._running.pop(future)
            entries = self._entries(task, future)
            if entries is None:
                self._submit(task)
                continue
            self._on_entries(entries)
            self._progress.end(task)
            following = next(waiting, None)
            if following is not None:
                self._submit(following)

    def _submit(self, task: SlideTask) -> None:
        self._progress.begin(task)
        future = self._client.submit(self._function, *task.arguments, pure=False, retries=0)
        self._running[future] = task
        self._completed.add(future)

    def _entries(self, task: SlideTask, future: Any) -> list[Entry] | None:
        """What became of the task; None asks for another try."""
        from distributed.scheduler import KilledWorker

        error = future.exception()
        if error is None:
            return list(future.result())
        if isinstance(error, KilledWorker):
            self._deaths[task.slide_id] = self._deaths.get(task.slide_id, 0) + 1
            if self._deaths[task.slide_id] < MAX_WORKER_DEATHS:
                return None
            reason = f"killed its worker {MAX_WORKER_DEATHS} times (out of memory, or a crash)"
        else:
            text = " ".join(str(error).split())[:200]
            reason = f"internal error: {type(error).__name__}: {text}"
        return [Entry(task.slide_id, "failed", task.fingerprint, reason)]
