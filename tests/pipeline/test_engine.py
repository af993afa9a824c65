"""Faults injected into real Dask workers."""

import os
import signal
import time
from collections.abc import Iterator

import dask
import pytest

from model.errors import UserError
from pipeline import engine
from pipeline.console import Meter
from pipeline.dataset import Entry
from pipeline.engine import (
    EngineConfig,
    SlideTask,
    bundled,
    report_note,
    report_progress,
    run_bundles,
    run_tasks,
)


def work(slide_id: str, what: str) -> list[Entry]:
    if what == "die":
        time.sleep(0.5)  # What the slides before it sent has arrived.
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "raise":
        raise RuntimeError("two\nlines")
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


def test_a_killed_bundle_costs_only_what_it_had_not_finished(capsys):
    kinds = ["ok", "note", "die", "ok", "ok", "raise", "ok"]
    tasks = [SlideTask(f"s{i}", "f", (f"s{i}", kind), units=4) for i, kind in enumerate(kinds)]
    bundles = bundled(tasks, 20)
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
    bundles = bundled(tasks, 10)
    assert [task for bundle in bundles for task in bundle] == tasks
    assert all(len(b) == 1 or sum(task.units for task in b) <= 10 for b in bundles)


def test_a_scheduler_that_is_not_there_is_one_line(monkeypatch):
    monkeypatch.setattr(engine, "_CONNECT_WITHIN_S", 1.0)
    with pytest.raises(UserError, match="no Dask scheduler answers"):
        run_tasks(
            work,
            [SlideTask("s", "f", ("s", "ok"))],
            EngineConfig(scheduler="tcp://127.0.0.1:9"),
            lambda rows: None,
            Meter("test", 1, "slides"),
        )
