"""Dask distributed: a task is a slide, or a bundle of short ones; pixels never travel.

At most one task a worker is in flight, so that a slide that kills its worker takes no innocent
with it; after three such deaths alone the slide is failed and the rest goes on. A worker whose
whole job ended (walltime, preemption, a lost node) is no slide's fault, but nothing is tried for
ever: jobs lost without a warning are counted, and the time that walltimes cost a slide is summed.
"""

import hashlib
import itertools
import logging
import os
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol, TypeAlias

from common.console import Meter, say
from common.errors import UserError
from common.redact import redact
from common.text import format_seconds
from pipeline.dataset import Entry
from pipeline.dataset.journal import decode_line, encode_line
from pipeline.run.cluster import ClusterConfig, make_scaler, open_cluster

MAX_WORKER_DEATHS = 3
MAX_JOB_LOSSES = 10
"""How often a slide is begun again after its worker's whole job was lost without a warning."""
MAX_LIVES = 5.0
"""So many whole lives of workers a slide may lose to workers that leave in good order."""
_WHOLE_LIFE = 0.9
_STARTS = 3
_LOOK_AROUND_S = 0.5
"""How often new and lost workers are looked for while no task ends."""
_RETURNS_WITHIN_S = 60.0
"""A nanny that is alive has its worker back by then; else the job itself is gone."""
_HEARD_WITHIN_S = 2.0
_CONNECT_WITHIN_S = 10.0
_HEARTBEAT_S = 30.0
"""How often a run that goes on says so in its log."""
_TOPIC = "histogen"

BundleFunction: TypeAlias = Callable[[list[tuple[Any, ...]]], Iterable[list[Entry]]]
"""From the arguments of several slides to the entries of each, in their order."""


class UnfitWorkerError(Exception):
    """Raised in a task: this worker can do no slide at all, and no slide is to blame.

    It ends the stage with its message: a worker that failed slide after slide at once would take
    the queue from those that can.
    """


class Observer(Protocol):
    """Who is told what happens beside results: a run's log."""

    def begun(self, slide_id: str, worker: str) -> None:
        """A slide was given to a worker."""

    def event(self, name: str, **fields: Any) -> None:
        """Something else: a heartbeat, a worker that died or left."""


class _Nobody:
    """Nobody is told."""

    def begun(self, slide_id: str, worker: str) -> None:
        """Tell nobody."""

    def event(self, name: str, **fields: Any) -> None:
        """Tell nobody."""


@dataclass(frozen=True)
class SlideTask:
    """One slide's work: arguments for the stage's function, a cost to order by, its size.

    `units` is what the progress bar counts (slides or tiles); `values` and `scopes` are those of
    the lines that are journalled where the task itself could not write any.
    """

    slide_id: str
    fingerprint: str
    arguments: tuple[Any, ...]
    cost: float = 0.0
    units: int = 1
    values: Mapping[str, Any] = field(default_factory=dict)
    scopes: tuple[str, ...] = ("",)


@dataclass(frozen=True)
class EngineConfig:
    """Where tasks run: local processes, batch jobs (`cluster`), or a running Dask scheduler.

    `threads` is what numerical libraries may use inside a local worker: 1 where slides are cut,
    more where a network runs on a CPU. `array` is (i, n): of all slides, the i-th of n parts.
    """

    workers: int | None = None
    scheduler: str = ""
    threads: int = 1
    cluster: ClusterConfig | None = None
    array: tuple[int, int] = (0, 1)

    @property
    def is_part(self) -> bool:
        """Whether other elements of a job array do the rest."""
        return self.array[1] > 1

    @property
    def described(self) -> str:
        """In a few words, for the log."""
        if self.cluster:
            return f"{self.cluster.system}: up to {self.cluster.max_jobs} jobs"
        if self.scheduler:
            return f"scheduler {self.scheduler}"
        part = f", part {self.array[0]} of {self.array[1]}" if self.is_part else ""
        return f"local, {self.workers or 'all'} workers{part}"

    def takes(self, slide_id: str) -> bool:
        """Whether a slide is this array element's; it never depends on what is done already."""
        element, elements = self.array
        digest = hashlib.blake2b(slide_id.encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big") % elements == element

    def job_environment(self) -> dict[str, str]:
        """The same for a worker in a batch job, which reads Dask's settings from there too."""
        threads = self.cluster.cores // self.cluster.workers if self.cluster else self.threads
        own = replace(self, threads=threads if self.threads > 1 else 1).environment()
        return own | {
            "PYTHONSAFEPATH": "1",
            "DASK_DISTRIBUTED__WORKER__DAEMON": "False",
            "DASK_DISTRIBUTED__WORKER__PROFILE__ENABLED": "False",
        }

    def worker_count(self, tasks: int) -> int:
        """Local workers: as asked, else one a core, never more than tasks."""
        cores = len(os.sched_getaffinity(0))
        return max(1, min(self.workers or cores, tasks))

    def environment(self) -> dict[str, str]:
        """What must stand in a worker's environment before it starts.

        Freed memory goes back to the system above 64 KiB, or a worker keeps its peak for ever.
        """
        names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
        return {"MALLOC_TRIM_THRESHOLD_": "65536"} | dict.fromkeys(names, str(self.threads))


@contextmanager
def dask_client(config: EngineConfig, tasks: int) -> Iterator[Any]:
    """A Dask client; a local cluster lives as long as the context."""
    import dask
    from distributed import Client

    # Dask's profiler looks at every worker's stack a hundred times a second and keeps an hour.
    options = {
        "distributed.scheduler.allowed-failures": 0,
        "distributed.worker.daemon": False,
        "distributed.worker.profile.enabled": False,
        "distributed.comm.timeouts.connect": "10s",
        "distributed.admin.low-level-log-length": 1000,
        "distributed.deploy.lost-worker-timeout": f"{_RETURNS_WITHIN_S}s",
        "distributed.nanny.pre-spawn-environ": config.environment(),
    }
    with dask.config.set(options):
        if config.cluster:
            with (
                open_cluster(config.cluster, config.job_environment()) as cluster,
                Client(cluster) as client,
            ):
                yield client
            return
        if config.scheduler:
            try:
                client = Client(config.scheduler, timeout=_CONNECT_WITHIN_S)
            except (OSError, TimeoutError, ValueError) as error:
                raise UserError(
                    f"--scheduler {config.scheduler}: no Dask scheduler answers there"
                ) from error
            with client:
                _check_scheduler(client, config.scheduler)
                yield client
            return
        with _local_cluster(config, tasks) as cluster, Client(cluster) as client:
            yield client


def _check_scheduler(client: Any, address: str) -> None:
    """Refuse a scheduler that would itself wait for a task's dead worker.

    A task is bound to its worker's address, which never comes back: only where no failure is
    allowed does the engine hear of the death, and can count it.
    """
    start = "start it with DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES=0 in its environment"
    try:
        # By value: the scheduler need not have this package.
        allowed = client.run_on_scheduler(lambda dask_scheduler: dask_scheduler.allowed_failures)
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"--scheduler {address}: does not say its allowed-failures ({reason}); {start}, and "
            "let it run functions"
        ) from error
    if allowed != 0:
        raise UserError(
            f"--scheduler {address}: its allowed-failures is {allowed}, expected 0, or a slide "
            f"that kills its worker is begun again for ever; {start}"
        )


def _local_cluster(config: EngineConfig, tasks: int) -> Any:
    """A local cluster; a worker that is killed while it starts costs another try, not the stage."""
    from distributed import LocalCluster

    for _ in range(_STARTS):
        try:
            return LocalCluster(
                n_workers=config.worker_count(tasks),
                threads_per_worker=1,
                processes=True,
                dashboard_address="127.0.0.1:0",
                memory_limit=0,
                env=config.environment(),
                silence_logs=logging.CRITICAL,
            )
        except RuntimeError as error:
            reason = " ".join(str(error).split())
    raise UserError(
        f"the local workers did not start, {_STARTS} times ({reason}): is memory short? "
        "Try fewer with --workers"
    )


def count_workers(config: EngineConfig) -> int:
    """Workers that a running scheduler has now, at least one that is to come.

    Raises `UserError` where no scheduler answers.
    """
    with dask_client(config, 0) as client:
        return max(1, len(client.scheduler_info(n_workers=-1)["workers"]))


def report_progress(slide_id: str, units: int) -> None:
    """Called inside a task: that many more units of the slide are done."""
    _log_event({"slide_id": slide_id, "units": units})


def report_note(text: str) -> None:
    """Called inside a task: one line for the person at the terminal."""
    _log_event({"note": text})


def _log_event(message: dict[str, Any]) -> None:
    from distributed import get_worker

    try:
        worker = get_worker()
    except ValueError:
        return
    worker.log_event(_TOPIC, message)


def run_tasks(
    function: Callable[..., list[Entry]],
    tasks: Sequence[SlideTask],
    config: EngineConfig,
    on_entries: Callable[[list[Entry]], None],
    meter: Meter,
    observer: Observer | None = None,
) -> None:
    """Run `function(*task.arguments)` for every task, dearest first.

    `on_entries` is called here, in the coordinator, as each slide ends. A task that kills its
    worker is tried again; the third death makes it a failed entry.
    """
    run_bundles(_OneByOne(function), [[task] for task in dearest_first(tasks)], config,
                on_entries, meter, observer)  # fmt: skip


def run_bundles(
    function: BundleFunction,
    bundles: Sequence[list[SlideTask]],
    config: EngineConfig,
    on_entries: Callable[[list[Entry]], None],
    meter: Meter,
    observer: Observer | None = None,
) -> None:
    """Run `function([task.arguments of a bundle])` for every bundle, in their order.

    The function yields the entries of one slide after another, in the bundle's order;
    `on_entries` is called as each comes, so that a death costs no slide that was finished. What
    a killed bundle left undone is tried slide by slide; only a slide that is alone is charged.
    """
    if not bundles:
        return
    with dask_client(config, len(bundles)) as client:
        external = bool(config.scheduler or config.cluster)
        progress = _Progress(meter, sum(len(bundle) for bundle in bundles))
        drain = _Drain(
            client, function, on_entries, progress, observer or _Nobody(), external=external,
            lifetime_s=config.cluster.lifetime_s if config.cluster else 0.0,
        )  # fmt: skip
        check = None
        if config.cluster:
            say(
                f"{config.cluster.system}: jobs: up to {config.cluster.max_jobs}, workers in "
                f"each: {config.cluster.workers}, logs in {config.cluster.log_dir}"
            )
            check = make_scaler(
                client.cluster, config.cluster, drain.demand, drain.busy, drain.take_seen
            ).check
        drain.run(bundles, check)


def dearest_first(tasks: Sequence[SlideTask]) -> list[SlideTask]:
    """The order in which tasks are begun: the longest first, so that none is left for the end."""
    return sorted(tasks, key=lambda task: (-task.cost, task.slide_id))


def bundled(tasks: Sequence[SlideTask], units: int) -> list[list[SlideTask]]:
    """Tasks in their order, in bundles of at most `units` (or of one larger task)."""
    bundles: list[list[SlideTask]] = []
    held = 0
    for task in tasks:
        if not bundles or held + task.units > units:
            bundles.append([])
            held = 0
        bundles[-1].append(task)
        held += task.units
    return bundles


@dataclass(frozen=True)
class _OneByOne:
    """A function of one slide as a function of a bundle."""

    function: Callable[..., list[Entry]]

    def __call__(self, bundle: list[tuple[Any, ...]]) -> Iterator[list[Entry]]:
        for arguments in bundle:
            yield self.function(*arguments)


def _run_bundle(
    function: BundleFunction, bundle: list[tuple[Any, ...]], number: int
) -> list[list[Entry]]:
    """On the worker: every slide's entries are sent as they come, and returned at the end."""
    done = []
    began = time.monotonic()
    for index, entries in enumerate(function(bundle)):
        now = time.monotonic()
        entries, began = _timed(entries, now - began), now
        done.append(entries)
        if index + 1 < len(bundle):
            lines = [encode_line(entry, {}) for entry in entries]
            _log_event({"bundle": number, "index": index, "lines": lines})
    return done


def _timed(entries: list[Entry], seconds: float) -> list[Entry]:
    """A slide's only entry bears how long it took, where its stage did not say."""
    if len(entries) == 1 and entries[0].seconds == 0.0:
        return [replace(entries[0], seconds=round(seconds, 6))]
    return entries


class _Progress:
    """Advances the meter by what workers report, and to the task's size when it ends."""

    def __init__(self, meter: Meter, slides: int) -> None:
        self._meter, self._slides, self._ended = meter, slides, 0
        self._reported: dict[str, int] = {}
        self._lock = threading.Lock()

    def report(self, slide_id: str, units: int) -> None:
        with self._lock:
            if slide_id in self._reported:
                self._reported[slide_id] += units
                self._meter.advance(units, note=self._note(slide_id))

    def _note(self, slide_id: str) -> str:
        """How many slides have ended, where the meter counts something else, and the last one."""
        if self._meter.unit == "slides":
            return slide_id
        return f"{self._ended}/{self._slides} slides  {slide_id}"

    def state(self) -> dict[str, Any]:
        """How far the stage is: done, total, units a second."""
        meter = self._meter
        rate = meter.done / meter.seconds if meter.seconds > 0 else 0.0
        return {
            "done": meter.done,
            "total": meter.total,
            "unit": meter.unit,
            "rate": round(rate, 4),
        }

    def begin(self, task: SlideTask) -> None:
        """A first or further try: what an earlier one reported is taken back."""
        with self._lock:
            taken_back = self._reported.pop(task.slide_id, 0)
            self._meter.advance(-taken_back, note=self._note(task.slide_id))
            self._reported[task.slide_id] = 0

    def end(self, task: SlideTask) -> None:
        with self._lock:
            reported = self._reported.pop(task.slide_id, 0)
            self._ended += 1
            self._meter.advance(task.units - reported, note=self._note(task.slide_id))


@dataclass
class _Flight:
    """A bundle on a worker; `taken` counts the slides whose entries were received.

    `seen` is when its worker was first seen, `began` when the slide now in progress was begun.
    """

    future: Any
    tasks: list[SlideTask]
    number: int
    nanny: str = ""
    worker: str = ""
    seen: float = 0.0
    began: float = 0.0
    taken: int = 0

    @property
    def slide_id(self) -> str:
        """The first slide whose entries were not received yet."""
        return self.tasks[self.taken].slide_id if self.taken < len(self.tasks) else ""


@dataclass
class _Lost:
    """What workers that left in good order cost a slide.

    `lives` sums the parts of their lives that it had in vain, `longest` is the longest in seconds.
    """

    times: int = 0
    lives: float = 0.0
    longest: float = 0.0

    def add(self, seconds: float, life: float) -> None:
        """It ran for that long on a worker that lives, or lived, so long."""
        self.times += 1
        self.lives += min(1.0, seconds / max(life, 1e-3))
        self.longest = max(self.longest, seconds)


class _Drain:
    """Keeps one bundle on every worker that is there, until none is left.

    A bundle is bound to its worker: left to itself, Dask may give two to one while another
    restarts, and a death would be charged to both.
    """

    def __init__(
        self,
        client: Any,
        function: BundleFunction,
        on_entries: Callable[[list[Entry]], None],
        progress: _Progress,
        observer: Observer,
        *,
        external: bool = False,
        lifetime_s: float = 0.0,
    ) -> None:
        """`lifetime_s`: after how long workers leave, 0 where nobody knows."""
        self._client, self._function, self._external = client, function, external
        self._on_entries, self._progress, self._observer = on_entries, progress, observer
        self._heartbeat = time.monotonic()
        self._waiting: deque[list[SlideTask]] = deque()
        self._flights: dict[str, _Flight] = {}
        self._dead: list[tuple[float, _Flight]] = []
        self._deaths: dict[str, int] = {}
        self._losses: dict[str, int] = {}
        self._lifetime_s, self._lost = lifetime_s, dict[str, _Lost]()
        self._warned = False
        self._seen_since: dict[str, float] = {}
        self._gone_since: dict[str, float] = {}
        self._names_seen: set[str] = set()
        self._numbers = itertools.count()
        self._heard: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        client.subscribe_topic(_TOPIC, self._hear)

    def demand(self) -> int:
        """How many workers would have something to do."""
        return len(self._waiting) + len(self._flights) + len(self._dead)

    def busy(self) -> set[str]:
        """Addresses of the workers that have."""
        return set(self._flights)

    def take_seen(self) -> set[str]:
        """Names of the workers that were there since the last call."""
        seen, self._names_seen = self._names_seen, set()
        return seen

    def run(
        self, bundles: Sequence[list[SlideTask]], check: Callable[[], None] | None = None
    ) -> None:
        """Run all bundles, in their order as workers come free; `check` may raise meanwhile."""
        self._waiting.extend(bundles)
        while self._waiting or self._flights or self._dead:
            self._fill()
            self._say_alive()
            if check is not None:
                check()
            try:
                act = self._heard.get(timeout=_LOOK_AROUND_S)
            except queue.Empty:
                continue
            act()

    def _say_alive(self) -> None:
        if time.monotonic() - self._heartbeat >= _HEARTBEAT_S:
            self._heartbeat = time.monotonic()
            self._observer.event(
                "progress", **self._progress.state(), workers=len(self._flights),
                waiting=len(self._waiting),
            )  # fmt: skip

    def _hear(self, event: tuple[float, dict[str, Any]]) -> None:
        """Called in the client's thread: progress at once, all else in the coordinator's own."""
        message = event[1]
        if "units" in message:
            self._progress.report(message["slide_id"], message["units"])
        elif "note" in message:
            self._heard.put(partial(say, message["note"]))
        else:
            self._heard.put(partial(self._take_early, message))

    def _take_early(self, message: dict[str, Any]) -> None:
        """One slide of a bundle that goes on; of a bundle that has ended it is taken already."""
        for flight in self._flights.values():
            if flight.number == message["bundle"] and flight.taken == message["index"]:
                self._take_next(
                    flight, [e for line in message["lines"] if (e := decode_line(line))]
                )

    def _take_next(self, flight: _Flight, entries: list[Entry]) -> None:
        self._on_entries(entries)
        self._progress.end(flight.tasks[flight.taken])
        flight.taken += 1
        flight.began = time.monotonic()

    def _fill(self) -> None:
        """Give every free worker a bundle; take back those of workers that left."""
        there = self._client.scheduler_info(n_workers=-1)["workers"]
        self._names_seen |= {str(worker["name"]) for worker in there.values()}
        now = time.monotonic()
        self._seen_since = {one: self._seen_since.get(one, now) for one in there}
        for address in self._left_in_good_order(set(there)):
            self._take_back(self._flights.pop(address), self._gone_since[address])
        self._judge_deaths({str(worker.get("nanny")) for worker in there.values()})
        # The youngest first: it has the most time left for what waits longest.
        free = set(there) - set(self._flights)
        for address in sorted(free, key=lambda one: (-self._seen_since[one], one)):
            if self._waiting:
                self._submit(address, there[address], self._waiting.popleft())

    def _left_in_good_order(self, there: set[str]) -> list[str]:
        """Workers that are gone though nothing failed (their walltime): no slide is to blame.

        That a worker died is heard a moment after it is seen to be gone.
        """
        now = time.monotonic()
        gone = {one for one in set(self._flights) - there if not self._flights[one].future.done()}
        self._gone_since = {one: self._gone_since.get(one, now) for one in gone}
        return [one for one, since in self._gone_since.items() if now - since > _HEARD_WITHIN_S]

    def _take_back(self, flight: _Flight, gone: float) -> None:
        """What a worker left unfinished goes back; a slide that no walltime is enough for fails.

        Time is summed, not walltimes: as the workers of one hour end one by one, a short slide
        may go from one to the next. What a walltime costs is small beside a whole life then.
        """
        flight.future.cancel()
        task = flight.tasks[flight.taken]
        self._observer.event("worker left", worker=flight.worker, slide=task.slide_id)
        lost = self._lost.setdefault(task.slide_id, _Lost())
        lost.add(gone - flight.began, self._lifetime_s or gone - flight.seen)
        self._warn_of(task.slide_id, lost)
        if lost.lives < MAX_LIVES:
            self._waiting.appendleft(flight.tasks[flight.taken :])
            return
        if rest := flight.tasks[flight.taken + 1 :]:
            self._waiting.appendleft(rest)
        longest = format_seconds(lost.longest)
        self._fail(
            flight,
            f"its workers' time was up {lost.times} times before it ended, up to {longest} after "
            "it began: give them a longer walltime (lifetime) and run the stage again",
        )

    def _warn_of(self, slide_id: str, lost: _Lost) -> None:
        """Once a run: what one slide loses, others may lose too."""
        if not self._warned and lost.lives >= _WHOLE_LIFE:
            self._warned = True
            say(
                f"{slide_id}: workers ended before it did, up to {format_seconds(lost.longest)} "
                "after it began: is the walltime long enough?"
            )

    def _judge_deaths(self, nannies: set[str]) -> None:
        """A worker that died and came back was killed by its slide; a job that ended was not."""
        for death in self._dead[:]:
            deadline, flight = death
            if flight.nanny in nannies:
                self._charge(flight)
            elif time.monotonic() > deadline:
                self._excuse(flight)
            else:
                continue
            self._dead.remove(death)

    def _submit(self, address: str, worker: dict[str, Any], tasks: list[SlideTask]) -> None:
        name = f"{worker.get('name', '')} {address}"
        for task in tasks:
            self._progress.begin(task)
            self._observer.begun(task.slide_id, name)
        number = next(self._numbers)
        future = self._client.submit(
            _run_bundle, self._function, [task.arguments for task in tasks], number, pure=False,
            retries=0, workers=[address], allow_other_workers=False,
        )  # fmt: skip
        self._flights[address] = _Flight(
            future, tasks, number, str(worker.get("nanny")), name,
            self._seen_since[address], time.monotonic(),
        )  # fmt: skip
        future.add_done_callback(lambda _: self._heard.put(partial(self._land, address, number)))

    def _land(self, address: str, number: int) -> None:
        flight = self._flights.get(address)
        if flight is None or flight.number != number:
            return
        del self._flights[address]
        error = flight.future.exception()
        if error is None:
            for entries in flight.future.result()[flight.taken :]:
                self._take_next(flight, entries)
            return
        if isinstance(error, UnfitWorkerError):
            raise UserError(str(error))
        if _is_death(error):
            self._observer.event("worker died", worker=flight.worker, slide=flight.slide_id)
        if self._external and _is_death(error):
            self._dead.append((time.monotonic() + _RETURNS_WITHIN_S, flight))
        elif len(flight.tasks) - flight.taken > 1:
            self._try_apart(flight)
        elif _is_death(error):
            self._charge(flight)
        else:
            text = redact(" ".join(str(error).split()))[:200]
            self._fail(flight, f"internal error: {type(error).__name__}: {text}")

    def _try_apart(self, flight: _Flight) -> None:
        """Any slide of the bundle may be to blame: each is tried alone."""
        for task in reversed(flight.tasks[flight.taken :]):
            self._waiting.appendleft([task])

    def _charge(self, flight: _Flight) -> None:
        """The worker died and its job goes on: a slide that was alone with it is counted."""
        if len(flight.tasks) - flight.taken > 1:
            self._try_apart(flight)
            return
        task = flight.tasks[-1]
        alone = len(flight.tasks) == 1
        self._deaths[task.slide_id] = self._deaths.get(task.slide_id, 0) + alone
        if self._deaths[task.slide_id] < MAX_WORKER_DEATHS:
            self._waiting.appendleft([task])
            return
        times = MAX_WORKER_DEATHS
        self._fail(flight, f"killed its worker {times} times (out of memory, or a crash)")

    def _excuse(self, flight: _Flight) -> None:
        """The job is gone: what it had begun goes back, but not for ever."""
        task = flight.tasks[flight.taken]
        self._losses[task.slide_id] = self._losses.get(task.slide_id, 0) + 1
        if self._losses[task.slide_id] < MAX_JOB_LOSSES:
            self._waiting.appendleft(flight.tasks[flight.taken :])
            return
        if rest := flight.tasks[flight.taken + 1 :]:
            self._waiting.appendleft(rest)
        times = MAX_JOB_LOSSES
        self._fail(flight, f"its job ended {times} times meanwhile (out of memory? too short?)")

    def _fail(self, flight: _Flight, reason: str) -> None:
        task = flight.tasks[flight.taken]
        mark, values = task.fingerprint, dict(task.values)
        entries = [
            Entry(task.slide_id, "failed", mark, reason, scope=scope, values=values)
            for scope in task.scopes
        ]
        self._take_next(flight, entries)


def _is_death(error: BaseException) -> bool:
    from distributed.scheduler import KilledWorker

    return isinstance(error, KilledWorker)
