"""Faults injected into real Dask workers."""

import os
import signal
import time

import pytest

from model.errors import UserError
from pipeline.console import Meter
from pipeline.dataset import Entry
from pipeline.engine import EngineConfig, SlideTask, report_progress, run_tasks


def work(slide_id: str, what: str) -> list[Entry]:
    if what == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "raise":
        raise RuntimeError("two\nlines")
    for _ in range(3):
        report_progress(slide_id, 1)
    time.sleep(0.05)
    return [Entry(slide_id, "done", "f")]


def run(kinds: list[str], workers: int) -> tuple[dict[str, Entry], Meter]:
    tasks = [SlideTask(f"s{i}", "f", (f"s{i}", kind), units=4) for i, kind in enumerate(kinds)]
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
    assert entries["s3"].reason == "internal error: RuntimeError: two lines"
    assert meter.done == 20


def test_no_tasks_start_no_cluster():
    began = time.monotonic()
    assert run([], 2)[0] == {}
    assert time.monotonic() - began < 0.5


def test_a_scheduler_that_is_not_there_is_one_line():
    with pytest.raises(UserError, match="no Dask scheduler answers"):
        run_tasks(
            work,
            [SlideTask("s", "f", ("s", "ok"))],
            EngineConfig(scheduler="tcp://127.0.0.1:9"),
            lambda rows: None,
            Meter("test", 1, "slides"),
        )
