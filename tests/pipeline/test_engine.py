"""Faults injected into real Dask workers."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import dask
import pytest

from common.console import Meter
from common.errors import UserError
from pipeline.dataset import Entry
from pipeline.run import drain, give_up, workers
from pipeline.run.drain import run_bundles, run_tasks
from pipeline.run.progress import SlideProgress
from pipeline.run.tasks import SlideTask, bundle_tasks, report_note, report_progress
from pipeline.run.workers import EngineConfig


def work(slide_id: str, what: str) -> list[Entry]:
    if what == "die":
        time.sleep(0.5)  # What the slides before it sent has arrived.
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "raise":
        raise RuntimeError("two\nlines")
    if what == "stay":
        time.sleep(120.0)
    for _ in range(3):
        report_progress(slide_id, 1)
    time.sleep(0.05)
    return [Entry(slide_id, "done", "f")]


def run(kinds: list[str], workers: int) -> tuple[dict[str, Entry], Meter]:
    tasks = [
        SlideTask(f"s{i}", "f", (f"s{i}", kind), units=4, values={"path": f"/s{i}"})
        for i, kind in enumerate(kinds)
    ]
    entries: dict[str, Entry] = {}
    meter = Meter("test", 4 * len(kinds), "tiles")

    def take(rows: list[Entry]) -> None:
        entries.update({row.slide_id: row for row in rows})

    run_tasks(work, tasks, EngineConfig(workers), take, meter)
    return entries, meter


def test_a_slide_that_kills_its_worker_fails_alone():
    entries, meter = run(["ok", "die", "ok", "raise", "ok"], workers=2)
    assert {k: e.outcome for k, e in entries.items()} == {
        "s0": "done", "s1": "failed", "s2": "done", "s3": "failed", "s4": "done",
    }  # fmt: skip
    assert "killed its worker 3 times" in entries["s1"].reason
    assert entries["s1"].values == {"path": "/s1"}
    assert entries["s3"].reason == "internal error: RuntimeError: two lines"
    assert meter.done == 20


def work_then_die(slide_id: str, marks: str) -> list[Entry]:
    """Slide "b" ends well, after "a"; its worker dies a moment later, the first time."""
    if slide_id == "b":
        time.sleep(1.0)
    if slide_id == "b" and not os.path.exists(marks):
        Path(marks).touch()
        threading.Timer(0.5, os._exit, (1,)).start()
    return [Entry(slide_id, "done", "f")]


def test_a_worker_that_dies_before_it_has_sent_its_result_costs_another_try(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The coordinator is busy with "a" while the worker of "b" ends, then dies."""
    monkeypatch.setattr(drain, "_FETCHED_WITHIN_S", 1.0)
    tasks = [SlideTask(one, "f", (one, str(tmp_path / "died"))) for one in ("a", "b")]
    entries: list[Entry] = []

    def take_slowly(rows: list[Entry]) -> None:
        if rows[0].slide_id == "a":
            time.sleep(4.0)
        entries.extend(rows)

    meter = Meter("test", 2, "slides")
    run_tasks(work_then_die, tasks, EngineConfig(2), take_slowly, meter)
    assert sorted((entry.slide_id, entry.outcome) for entry in entries) == [
        ("a", "done"), ("b", "done"),
    ]  # fmt: skip
    assert (tmp_path / "died").exists()


def test_a_failure_that_the_stage_could_not_write_is_of_its_scopes():
    entries: list[Entry] = []
    task = SlideTask("s", "f", ("s", "raise"), scopes=("224/cls", "224/tokens"))
    run_tasks(work, [task], EngineConfig(1), entries.extend, Meter("test", 1, "slides"))
    assert [(e.outcome, e.scope) for e in entries] == [
        ("failed", "224/cls"), ("failed", "224/tokens"),
    ]  # fmt: skip


def environment(slide_id: str) -> list[Entry]:
    names = ("MALLOC_TRIM_THRESHOLD_", "OMP_NUM_THREADS")
    values = {name: os.environ.get(name) for name in names}
    values["profiled"] = dask.config.get("distributed.worker.profile.enabled")
    return [Entry(slide_id, "done", "f", values=values)]


def test_workers_give_memory_back_and_use_the_threads_they_may():
    entries: list[Entry] = []
    run_tasks(
        environment,
        [SlideTask("s", "f", ("s",))],
        EngineConfig(workers=1, threads=2),
        entries.extend,
        Meter("test", 1, "slides"),
    )
    assert entries[0].values == {
        "MALLOC_TRIM_THRESHOLD_": "65536", "OMP_NUM_THREADS": "2", "profiled": False,
    }  # fmt: skip


def test_no_tasks_start_no_cluster():
    began = time.monotonic()
    assert run([], 2)[0] == {}
    assert time.monotonic() - began < 0.5


def work_on_bundle(bundle: list[tuple[str, str]]) -> Iterator[list[Entry]]:
    for slide_id, what in bundle:
        if what == "note":
            report_note("said once")
        yield work(slide_id, what)


@pytest.mark.full
def test_a_killed_bundle_costs_only_what_it_had_not_finished(capsys):
    kinds = ["ok", "note", "die", "ok", "ok", "raise", "ok"]
    tasks = [SlideTask(f"s{i}", "f", (f"s{i}", kind), units=4) for i, kind in enumerate(kinds)]
    bundles = bundle_tasks(tasks, 20)
    assert [len(bundle) for bundle in bundles] == [5, 2]
    entries: list[Entry] = []
    meter = Meter("test", 4 * len(kinds), "tiles")
    run_bundles(work_on_bundle, bundles, EngineConfig(1), entries.extend, meter)
    outcomes = {entry.slide_id: entry.outcome for entry in entries}
    assert outcomes == {
        "s0": "done", "s1": "done", "s2": "failed", "s3": "done", "s4": "done", "s5": "failed",
        "s6": "done",
    }  # fmt: skip
    assert len(entries) == len(kinds), "no slide is told twice"
    assert meter.done == 28
    assert capsys.readouterr().out.count("said once") == 1


def test_bundles_hold_every_task_once_in_order():
    sizes = [5, 1, 30, 4, 4, 4, 10, 1]
    tasks = [SlideTask(str(i), "f", (), units=size) for i, size in enumerate(sizes)]
    bundles = bundle_tasks(tasks, 10)
    assert [task for bundle in bundles for task in bundle] == tasks
    assert all(len(b) == 1 or sum(task.units for task in b) <= 10 for b in bundles)


def test_a_scheduler_that_is_not_there_is_one_line(monkeypatch):
    monkeypatch.setattr(workers, "_CONNECT_WITHIN_S", 1.0)
    with pytest.raises(UserError, match="no Dask scheduler answers"):
        run_tasks(
            work,
            [SlideTask("s", "f", ("s", "ok"))],
            EngineConfig(scheduler="tcp://127.0.0.1:9"),
            lambda rows: None,
            Meter("test", 1, "slides"),
        )


@contextmanager
def cluster_of(allowed_failures: int, **more: Any) -> Iterator[Any]:
    """A Dask cluster that somebody else started."""
    from distributed import LocalCluster

    options = {
        "distributed.scheduler.allowed-failures": allowed_failures,
        "distributed.worker.daemon": False,
    }
    with (
        dask.config.set(options),
        LocalCluster(
            threads_per_worker=1, dashboard_address="127.0.0.1:0", silence_logs=50, **more
        ) as cluster,
    ):
        yield cluster


def run_there(cluster: Any, *tasks: SlideTask, observer: Any = None) -> dict[str, Entry]:
    entries: dict[str, Entry] = {}
    run_tasks(
        work,
        tasks,
        EngineConfig(scheduler=cluster.scheduler_address),
        lambda rows: entries.update({row.slide_id: row for row in rows}),
        Meter("test", len(tasks), "slides"),
        observer,
    )
    return entries


def test_a_scheduler_without_tls_is_warned_of_once(capsys: pytest.CaptureFixture[str]) -> None:
    with cluster_of(0, n_workers=1) as cluster:
        for name in ("a", "b"):
            assert name in run_there(cluster, SlideTask(name, "f", (name, "ok")))
    assert capsys.readouterr().out.count("without TLS whoever reaches it runs code") == 1


def test_a_scheduler_that_waits_for_dead_workers_is_refused() -> None:
    with (
        cluster_of(1, n_workers=1) as cluster,
        pytest.raises(UserError, match="allowed-failures is 1, expected 0") as caught,
    ):
        run_there(cluster, SlideTask("s", "f", ("s", "ok")))
    assert "ALLOWED_FAILURES=0" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_scheduler_that_does_not_say_is_refused() -> None:
    blocked = {"distributed.scheduler.blocked-handlers": ["run_function"]}
    with (
        dask.config.set(blocked),
        cluster_of(0, n_workers=0) as cluster,
        pytest.raises(UserError, match="does not say its allowed-failures") as caught,
    ):
        run_there(cluster, SlideTask("s", "f", ("s", "ok")))
    assert "\n" not in str(caught.value)


@pytest.mark.full
def test_on_a_scheduler_that_allows_none_a_slide_that_kills_fails_alone() -> None:
    with cluster_of(0, n_workers=1) as cluster:
        entries = run_there(
            cluster, SlideTask("bad", "f", ("bad", "die"), 2.0), SlideTask("ok", "f", ("ok", "ok"))
        )
    assert "killed its worker 3 times" in entries["bad"].reason
    assert entries["ok"].outcome == "done"


class Fleet:
    """Workers that come and go at a clock of the test's, and never end a slide."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, lifetime_s: float) -> None:
        self.now, self.there, self.given = 1000.0, set[str](), list[str]()
        self.entries: dict[str, Entry] = {}
        monkeypatch.setattr(drain, "time", SimpleNamespace(monotonic=lambda: self.now))
        self.drain = drain.Drain(
            self, work, lambda rows: self.entries.update({row.slide_id: row for row in rows}),
            SlideProgress(Meter("test", 1, "slides"), 1), drain.SilentObserver(), external=True,
            lifetime_s=lifetime_s,
        )  # type: ignore[arg-type]  # fmt: skip

    def subscribe_topic(self, *_: object) -> None:
        pass

    scheduler = SimpleNamespace(identity=None)

    def sync(self, *_: object, **__: object) -> dict[str, Any]:
        return {"workers": {one: {"name": one, "nanny": one} for one in self.there}}

    def submit(self, *_: object, workers: list[str], **__: object) -> Any:
        self.given += workers
        return SimpleNamespace(
            done=lambda: False, cancel=lambda: None, add_done_callback=lambda act: None
        )

    def send(self, *slides: str) -> None:
        self.drain._waiting.append([SlideTask(one, "f", (one, "ok")) for one in slides])

    def look(self, after: float = 0.0) -> None:
        self.now += after
        self.drain._fill_workers()

    def live(self, name: str, idle: float, busy: float) -> None:
        """A worker that is there, has the waiting slide after a while, and leaves."""
        waiting, self.drain._waiting = self.drain._waiting.copy(), type(self.drain._waiting)()
        self.there = {name}
        self.look()
        self.drain._waiting = waiting
        self.look(idle)
        self.there = set()
        self.look(busy)
        self.look(3.0)


@pytest.mark.parametrize("lifetime_s", [3600.0, 0.0])
def test_a_slide_that_no_walltime_is_enough_for_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], lifetime_s: float
) -> None:
    fleet = Fleet(monkeypatch, lifetime_s)
    fleet.send("long")
    for number in range(5):
        assert not fleet.entries, f"failed after {number} lives"
        fleet.live(f"w{number}", 0.0, 3600.0)
    entry = fleet.entries["long"]
    assert entry.outcome == "failed"
    assert "5 times before it ended, up to 1 h 00 min" in entry.reason
    assert "longer walltime" in entry.reason
    assert fleet.drain.count_demand() == 0
    assert capsys.readouterr().out.count("is the walltime long enough?") == 1


@pytest.mark.parametrize("lifetime_s", [3600.0, 0.0])
def test_walltimes_never_count_against_a_slide_that_fits(
    monkeypatch: pytest.MonkeyPatch, lifetime_s: float
) -> None:
    """It goes from one ending worker to the next, a hundred times."""
    fleet = Fleet(monkeypatch, lifetime_s)
    fleet.send("unlucky")
    for number in range(100):
        fleet.live(f"w{number}", 3500.0, 100.0)
    assert not fleet.entries
    assert fleet.given == [f"w{number}" for number in range(100)]


def test_preemptions_of_young_jobs_hardly_count(monkeypatch: pytest.MonkeyPatch) -> None:
    fleet = Fleet(monkeypatch, 3600.0)
    fleet.send("slide")
    for number in range(50):
        fleet.live(f"w{number}", 0.0, 60.0)
    assert not fleet.entries


def test_of_a_bundle_only_the_slide_in_progress_is_charged(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fleet = Fleet(monkeypatch, 3600.0)
    fleet.send("short", "long", "next")
    for number in range(6):
        fleet.there = {f"w{number}"}
        fleet.look()
        if number == 0:
            (flight,) = fleet.drain._flights.values()
            fleet.now += 1800.0
            fleet.drain._take_entries(flight, [Entry("short", "done", "f")])
        fleet.there = set()
        fleet.look(1800.0 if number == 0 else 3600.0)
        fleet.look(3.0)
        assert ("long" in fleet.entries) == (number == 5), "half a life, then whole ones"
    assert fleet.entries["long"].outcome == "failed"
    assert [[task.slide_id for task in tasks] for tasks in fleet.drain._waiting] == [["next"]]


def test_what_waits_goes_to_the_youngest_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    fleet = Fleet(monkeypatch, 3600.0)
    fleet.there = {"a", "c"}
    fleet.look()
    fleet.there = {"a", "b", "c"}
    fleet.look(60.0)
    for slide in ("s0", "s1", "s2"):
        fleet.send(slide)
    fleet.look()
    assert fleet.given == ["b", "a", "c"]


@pytest.mark.full
def test_workers_of_too_short_a_life_do_not_go_on_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """Real workers that leave in good order while the slide is in progress."""
    monkeypatch.setattr(give_up, "MAX_WASTED_LIVES", 2.0)
    with cluster_of(0, n_workers=1, lifetime="3s") as cluster:
        left: list[str] = []

        def event(name: str, **fields: Any) -> None:
            if name == "worker left":
                left.append(str(fields["slide"]))
                cluster.scale(len(left) + 1)

        observer = SimpleNamespace(log_begun=lambda *_: None, log_event=event)
        tasks = [SlideTask("long", "f", ("long", "stay"), 2.0), SlideTask("ok", "f", ("ok", "ok"))]
        entries = run_there(cluster, *tasks, observer=observer)
    assert entries["long"].outcome == "failed"
    assert "longer walltime" in entries["long"].reason
    assert entries["ok"].outcome == "done"
    assert left.count("long") >= 2
