"""Work through bundles of slides: at most one on a worker, until none is left.

A bundle is bound to its worker, so that a slide that kills its worker takes no innocent with it:
left to itself, Dask may give two to one worker while another restarts, and a death would be
charged to both. When a slide is given up is decided in `give_up`.
"""

import itertools
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

from common.console import Meter, print_line
from common.errors import UserError, describe_machine_error
from common.redact import redact_secrets
from common.text import format_seconds, one_line
from pipeline.dataset import Entry
from pipeline.dataset.journal import decode_line
from pipeline.run.cluster import make_scaler
from pipeline.run.give_up import Attempts
from pipeline.run.progress import SlideProgress
from pipeline.run.tasks import (
    TOPIC,
    BundleFunction,
    OneByOne,
    SlideTask,
    UnfitWorkerError,
    run_bundle,
    sort_dearest_first,
)
from pipeline.run.workers import RETURNS_WITHIN_S, EngineConfig, dask_client, list_workers

_LOOK_AROUND_S = 0.5
"""How often new and lost workers are looked for while no task ends."""
_REPORTED_WITHIN_S = 2.0
"""That a worker died is reported a moment after it is seen to be gone."""
_HEARTBEAT_S = 30.0
"""How often a run that goes on says so in its log."""
_MOST_UNSEEN_S = 10.0
"""What counts of a time in which the coordinator was stopped: its workers may have finished."""
_KILLED_WITHIN_S = 30.0
"""A nanny waits some seconds for its worker, then kills it."""
_FETCHED_WITHIN_S = 5.0
"""The entries of a bundle are small: whoever holds them and is alive has sent them by then."""
_SENT_WITHIN_S = 300.0
"""A worker that is there, and has not sent what it holds by then, was stopped: it is killed."""
_RENEWED_EVERY_S = 30.0
_ABSENT_LOCAL_S, _ABSENT_S = 600.0, 1800.0
"""How long to wait for any worker: on this machine, and on a scheduler to which others send some.
Jobs of a cluster may wait in the queue for days; `JobWatch` sees those that fail."""


class Observer(Protocol):
    """What receives everything that happens besides results: a run's log."""

    def log_begun(self, slide_id: str, worker: str) -> None:
        """A slide was given to a worker."""

    def log_event(self, name: str, **fields: Any) -> None:
        """Something else: a heartbeat, a worker that died or left."""


class SilentObserver:
    """Logs nothing."""

    def log_begun(self, slide_id: str, worker: str) -> None:
        """Log nothing."""

    def log_event(self, name: str, **fields: Any) -> None:
        """Log nothing."""


def run_tasks(
    function: Callable[..., Iterable[Entry]],
    tasks: Sequence[SlideTask],
    config: EngineConfig,
    on_entries: Callable[[list[Entry]], None],
    meter: Meter,
    observer: Observer | None = None,
) -> None:
    """Run `function(*task.arguments)` for every task, the dearest first; see `run_bundles`."""
    bundles = [[task] for task in sort_dearest_first(tasks)]
    run_bundles(OneByOne(function), bundles, config, on_entries, meter, observer)


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
    `on_entries` is called here, in the coordinator, as each comes, so that a death costs no slide
    that was finished. What a killed bundle left undone is tried slide by slide; only a slide that
    is alone is charged.
    """
    if not bundles:
        return
    with dask_client(config, len(bundles)) as client:
        progress = SlideProgress(meter, sum(len(bundle) for bundle in bundles))
        drain = Drain(
            client, function, on_entries, progress, observer or SilentObserver(),
            external=bool(config.scheduler or config.cluster),
            lifetime_s=config.cluster.lifetime_s if config.cluster else 0.0,
            slide_timeout_s=config.slide_timeout_s,
            absent_s=_absent_limit(config),
        )  # fmt: skip
        check = None
        if config.cluster:
            print_line(
                f"{config.cluster.system}: jobs: up to {config.cluster.max_jobs}, workers in "
                f"each: {config.cluster.workers}, logs in {config.cluster.log_dir}"
            )
            check = make_scaler(
                client.cluster,
                config.cluster,
                drain.count_demand,
                drain.busy_addresses,
                drain.take_names_seen,
            ).check
        drain.run(bundles, check)


def _absent_limit(config: EngineConfig) -> float:
    """For how long a run waits while no worker is there, 0 for ever."""
    if config.cluster:
        return 0.0
    return _ABSENT_S if config.scheduler else _ABSENT_LOCAL_S


@dataclass
class _Flight:
    """A bundle on a worker; `received` counts the slides whose entries have arrived.

    `worker_since` is when its worker was first seen, `began` when the slide in progress began;
    `watched_from` is the latter in seconds for which the coordinator has watched, and `unsent_from`
    when the bundle had ended but its entries did not come.
    """

    future: Any
    tasks: list[SlideTask]
    number: int
    nanny: str = ""
    worker: str = ""
    worker_since: float = 0.0
    began: float = 0.0
    watched_from: float = 0.0
    unsent_from: float | None = None
    received: int = 0

    @property
    def slide(self) -> SlideTask:
        """The slide in progress."""
        return self.tasks[self.received]

    @property
    def rest(self) -> list[SlideTask]:
        """The slide in progress and those that wait behind it."""
        return self.tasks[self.received :]


@dataclass
class _Fleet:
    """Which workers are there and since when, as the scheduler has it."""

    client: Any
    since: dict[str, float] = field(default_factory=dict)
    names_seen: set[str] = field(default_factory=set)

    def look_around(self, now: float) -> dict[str, Any]:
        """The workers by address."""
        workers = list_workers(self.client)
        self.names_seen |= {str(worker["name"]) for worker in workers.values()}
        self.since = {address: self.since.get(address, now) for address in workers}
        return workers

    def youngest_first(self, addresses: Iterable[str]) -> list[str]:
        """The youngest has the most time left, for what has waited longest."""
        return sorted(addresses, key=lambda address: (-self.since[address], address))


class _LostResultsError(Exception):
    """A bundle ended, and its entries do not come: its worker died, or is stopped."""


class _CancelledError(Exception):
    """The scheduler forgot the bundle, as when the connection to it was lost for a moment."""


def _fetch_results(future: Any) -> tuple[list[list[Entry]], Exception | None]:
    """What a bundle that ended returned, or what it raised.

    Never without a limit: Dask would wait for a task that died with its worker until another
    worker of the same address has done it again, and there will be none.
    """
    try:
        error = future.exception(timeout=_FETCHED_WITHIN_S)
        return ([], error) if error else (future.result(timeout=_FETCHED_WITHIN_S), None)
    except Exception:
        # What the bundle itself raised was returned above: this is Dask's.
        return [], _CancelledError() if future.cancelled() else _LostResultsError()


class Drain:
    """Keeps at most one bundle on every worker that is there, until none is left."""

    def __init__(
        self,
        client: Any,
        function: BundleFunction,
        on_entries: Callable[[list[Entry]], None],
        progress: SlideProgress,
        observer: Observer,
        *,
        external: bool = False,
        lifetime_s: float = 0.0,
        slide_timeout_s: float = 0.0,
        absent_s: float = 0.0,
    ) -> None:
        """Args as of `run_bundles`.

        `external`: workers are not restarted here, so that a death may be a lost job;
        `lifetime_s`: after how long workers leave by themselves, 0 where that is unknown;
        `slide_timeout_s`: after how long a slide fails and its worker is killed, 0 for never;
        `absent_s`: after how long without any worker the stage ends, 0 for never.
        """
        self._client, self._function = client, function
        self._on_entries, self._progress, self._observer = on_entries, progress, observer
        self._external, self._lifetime_s = external, lifetime_s
        self._slide_timeout_s, self._absent_s = slide_timeout_s, absent_s
        self._absent_from: float | None = None
        self._renewed_at = time.monotonic()
        self._watched_s, self._watched_at = 0.0, time.monotonic()
        self._restarts: dict[str, threading.Thread] = {}
        self._waiting: deque[list[SlideTask]] = deque()
        self._flights: dict[str, _Flight] = {}
        self._dead: list[tuple[float, _Flight]] = []
        self._gone_since: dict[str, float] = {}
        self._attempts: dict[str, Attempts] = {}
        self._fleet = _Fleet(client)
        self._numbers = itertools.count()
        self._heartbeat, self._has_warned = time.monotonic(), False
        # Dask calls back in its own thread; what changes state is queued for the coordinator's.
        self._actions: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        client.subscribe_topic(TOPIC, self._receive_event)

    def count_demand(self) -> int:
        """How many workers would have something to do."""
        return len(self._waiting) + len(self._flights) + len(self._dead)

    def busy_addresses(self) -> set[str]:
        """Addresses of the workers that have something to do."""
        return set(self._flights)

    def take_names_seen(self) -> set[str]:
        """Names of the workers that were there since the last call."""
        seen, self._fleet.names_seen = self._fleet.names_seen, set()
        return seen

    def run(
        self, bundles: Sequence[list[SlideTask]], check: Callable[[], None] | None = None
    ) -> None:
        """Run all bundles, in their order as workers come free; `check` may raise meanwhile."""
        self._waiting.extend(bundles)
        while self._waiting or self._flights or self._dead:
            self._fill_workers()
            self._log_heartbeat()
            if check is not None:
                check()
            self._take_actions()
            self._end_overdue()
        for restart in self._restarts.values():
            restart.join(_KILLED_WITHIN_S)

    def _take_actions(self) -> None:
        """Do what was queued; wait a moment for the first."""
        with suppress(queue.Empty):
            action = self._actions.get(timeout=_LOOK_AROUND_S)
            while True:
                action()
                action = self._actions.get_nowait()

    def _end_overdue(self) -> None:
        """Fail the slides that have taken too long, each alone, and kill what works on them."""
        now = time.monotonic()
        self._watched_s += min(now - self._watched_at, _MOST_UNSEEN_S)
        self._watched_at = now
        for address, flight in list(self._flights.items()):
            if 0 < self._slide_timeout_s < self._watched_s - flight.watched_from:
                self._end_slide(address, self._flights.pop(address))

    def _end_slide(self, address: str, flight: _Flight) -> None:
        flight.future.cancel()
        slide_id = flight.slide.slide_id
        self._observer.log_event("worker killed", worker=flight.worker, slide=slide_id)
        if behind := flight.rest[1:]:
            self._waiting.appendleft(behind)
        limit = format_seconds(self._slide_timeout_s)
        self._take_entries(
            flight, flight.slide.failed_entries(f"took longer than {limit} (--slide-timeout)")
        )
        self._replace_worker(address)

    def _replace_worker(self, address: str) -> None:
        # In a thread, since it takes seconds. Code that hangs in a library hears no signal.
        restart = threading.Thread(target=self._kill_worker, args=(address,), daemon=True)
        self._restarts[address] = restart
        restart.start()

    def _kill_worker(self, address: str) -> None:
        try:
            self._client.restart_workers([address], timeout=_KILLED_WITHIN_S)
        except Exception as error:
            # It gets no other slide, since `_fill_workers` passes over it as long as it is there.
            note = f"worker {address} cannot be restarted and is left out: {one_line(error, 160)}"
            self._actions.put(partial(print_line, note))

    def _log_heartbeat(self) -> None:
        if time.monotonic() - self._heartbeat >= _HEARTBEAT_S:
            self._heartbeat = time.monotonic()
            self._observer.log_event(
                "progress", **self._progress.report_state(), workers=len(self._flights),
                waiting=len(self._waiting),
            )  # fmt: skip

    def _receive_event(self, event: tuple[float, dict[str, Any]]) -> None:
        """Called in the client's thread: progress counts at once, all else is queued."""
        message = event[1]
        if "units" in message:
            self._progress.report_units(message["slide_id"], message["units"])
        elif "note" in message:
            self._actions.put(partial(print_line, message["note"]))
        else:
            self._actions.put(partial(self._take_early, message))

    def _take_early(self, message: dict[str, Any]) -> None:
        """Entries of one slide of a bundle that goes on; those of a bundle that ended are known."""
        for flight in self._flights.values():
            if flight.number == message["bundle"] and flight.received == message["index"]:
                lines = [decode_line(line) for line in message["lines"]]
                self._take_entries(flight, [entry for entry in lines if entry is not None])

    def _take_entries(self, flight: _Flight, entries: list[Entry]) -> None:
        self._on_entries(entries)
        self._progress.end_slide(flight.slide)
        flight.received += 1
        flight.began, flight.watched_from = time.monotonic(), self._watched_s

    def _fill_workers(self) -> None:
        """Give every free worker a bundle; take back those of workers that left."""
        now = time.monotonic()
        workers = self._fleet.look_around(now)
        for address in self._left_in_good_order(set(workers), now):
            self._take_back(self._flights.pop(address), self._gone_since[address])
        self._judge_deaths({str(worker.get("nanny")) for worker in workers.values()}, now)
        usable = set(workers) - set(self._restarts)
        for address in self._fleet.youngest_first(usable - set(self._flights)):
            if self._waiting:
                self._submit_bundle(address, workers[address], self._waiting.popleft())
        self._miss_workers(usable, now)

    def _miss_workers(self, usable: set[str], now: float) -> None:
        """Have local workers that are gone started again; end a stage that none comes back to."""
        if not self._external and now - self._renewed_at > _RENEWED_EVERY_S:
            self._renewed_at = now
            # Here: distributed takes a second that other commands save.
            from pipeline.run.private import renew_workers

            renew_workers(self._client.cluster)
        if usable or self._flights or self._dead:
            self._absent_from = None
        elif self._absent_from is None:
            self._absent_from = self._watched_s
        elif 0 < self._absent_s < self._watched_s - self._absent_from:
            slides = sum(len(bundle) for bundle in self._waiting)
            raise UserError(
                f"no worker has been there for {format_seconds(self._absent_s)}, and {slides} "
                "slides wait for one: is memory short, or were the workers killed? What was "
                "committed stays; run the same command again to go on"
            )

    def _left_in_good_order(self, present: set[str], now: float) -> list[str]:
        """Workers that are gone though nothing failed (their walltime): no slide is to blame."""
        # A worker that died is gone too: its task then fails within two seconds or so.
        gone = {
            address
            for address, flight in self._flights.items()
            if address not in present and not flight.future.done()
        }
        self._gone_since = {address: self._gone_since.get(address, now) for address in gone}
        return [
            address
            for address, since in self._gone_since.items()
            if now - since > _REPORTED_WITHIN_S
        ]

    def _submit_bundle(
        self, address: str, worker: dict[str, object], tasks: list[SlideTask]
    ) -> None:
        name = f"{worker.get('name', '')} {address}"
        for task in tasks:
            self._progress.begin_slide(task)
            self._observer.log_begun(task.slide_id, name)
        # Bound to its worker: Dask must not give a second bundle to one that has a slide already.
        number = next(self._numbers)
        future = self._client.submit(
            run_bundle, self._function, [task.arguments for task in tasks], number, pure=False,
            retries=0, workers=[address], allow_other_workers=False,
        )  # fmt: skip
        self._flights[address] = _Flight(
            future, tasks, number, str(worker.get("nanny")), name,
            self._fleet.since[address], time.monotonic(), self._watched_s,
        )  # fmt: skip
        self._await_end(address, self._flights[address])

    def _await_end(self, address: str, flight: _Flight) -> None:
        """Queue `_end_flight` for when the bundle has ended."""
        end = partial(self._end_flight, address, flight.number)
        flight.future.add_done_callback(lambda _: self._actions.put(end))

    def _end_flight(self, address: str, number: int) -> None:
        """A bundle has ended: take its entries, or judge what ended it."""
        # The worker may have left meanwhile, and its address may have another bundle.
        flight = self._flights.get(address)
        if flight is None or flight.number != number:
            return
        from distributed.scheduler import KilledWorker

        results, error = _fetch_results(flight.future)
        if isinstance(error, _LostResultsError) and self._may_still_send(address, flight):
            self._await_end(address, flight)
            return
        del self._flights[address]
        if error is None:
            for entries in results[flight.received :]:
                self._take_entries(flight, entries)
        elif isinstance(error, UnfitWorkerError):
            raise UserError(str(error))
        elif isinstance(error, _CancelledError):
            self._try_again(flight, self._attempts_of(flight.slide).after_job_loss())
        elif isinstance(error, KilledWorker | _LostResultsError):
            self._end_with_worker(flight)
        elif len(flight.rest) > 1:
            self._try_apart(flight)
        else:
            text = redact_secrets(one_line(error, 10_000))[:200]
            reason = describe_machine_error(error)
            reason = redact_secrets(reason or f"internal error: {type(error).__name__}: {text}")
            self._take_entries(flight, flight.slide.failed_entries(reason))

    def _may_still_send(self, address: str, flight: _Flight) -> bool:
        """Whether a worker that holds a bundle's entries may send them yet; else it is killed."""
        if address not in self._fleet.look_around(time.monotonic()):
            return False
        if flight.unsent_from is None:
            flight.unsent_from = self._watched_s
        if self._watched_s - flight.unsent_from <= _SENT_WITHIN_S:
            return True
        self._replace_worker(address)
        return False

    def _end_with_worker(self, flight: _Flight) -> None:
        """Its worker died, with what it had not sent."""
        slide_id = flight.slide.slide_id
        self._observer.log_event("worker died", worker=flight.worker, slide=slide_id)
        if self._external:
            self._dead.append((time.monotonic() + RETURNS_WITHIN_S, flight))
        else:
            self._charge_death(flight)

    def _judge_deaths(self, nannies: set[str], now: float) -> None:
        """A worker that died and came back was killed by its slide; a job that ended was not."""
        for death in self._dead[:]:
            deadline, flight = death
            if flight.nanny in nannies:
                self._charge_death(flight)
            elif now > deadline:
                attempts = self._attempts_of(flight.slide).after_job_loss()
                self._try_again(flight, attempts)
            else:
                continue
            self._dead.remove(death)

    def _charge_death(self, flight: _Flight) -> None:
        """The worker died and its job goes on: only a slide that was alone with it is charged."""
        if len(flight.rest) > 1:
            self._try_apart(flight)
            return
        attempts = self._attempts_of(flight.slide)
        was_alone = len(flight.tasks) == 1
        self._try_again(flight, attempts.after_death() if was_alone else attempts)

    def _take_back(self, flight: _Flight, gone_since: float) -> None:
        """What a worker that left has not finished goes back."""
        flight.future.cancel()
        slide_id = flight.slide.slide_id
        self._observer.log_event("worker left", worker=flight.worker, slide=slide_id)
        seconds = gone_since - flight.began
        life_s = self._lifetime_s or gone_since - flight.worker_since
        attempts = self._attempts_of(flight.slide).after_departure(seconds, life_s)
        # Once per run: what one slide wastes, others may waste too.
        if attempts.wasted_a_whole_life and not self._has_warned:
            self._has_warned = True
            print_line(
                f"{slide_id}: workers ended before it did, up to "
                f"{format_seconds(attempts.longest_s)} after it began: is the walltime long enough?"
            )
        self._try_again(flight, attempts)

    def _try_again(self, flight: _Flight, attempts: Attempts) -> None:
        """Try again what a flight left unfinished, or fail its slide in progress."""
        self._attempts[flight.slide.slide_id] = attempts
        reason = attempts.reason_to_give_up()
        if not reason:
            self._waiting.appendleft(flight.rest)
            return
        if behind := flight.rest[1:]:
            self._waiting.appendleft(behind)
        self._take_entries(flight, flight.slide.failed_entries(reason))

    def _try_apart(self, flight: _Flight) -> None:
        """Any slide of the bundle may be to blame: each is tried alone."""
        for task in reversed(flight.rest):
            self._waiting.appendleft([task])

    def _attempts_of(self, task: SlideTask) -> Attempts:
        return self._attempts.get(task.slide_id, Attempts())
