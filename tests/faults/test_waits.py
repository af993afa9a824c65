"""No wait of the engine is without a limit: workers, nannies and schedulers killed or stopped."""

import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import dask
import psutil
import pytest

from common.console import Meter
from common.errors import UserError
from pipeline.dataset import Entry
from pipeline.run import drain, give_up, private, workers
from pipeline.run.drain import run_tasks
from pipeline.run.tasks import SlideTask
from pipeline.run.workers import EngineConfig

ROOT = Path(__file__).resolve().parents[2]


def work(slide_id: str, seconds: float) -> list[Entry]:
    time.sleep(seconds)
    return [Entry(slide_id, "done", "f")]


def run(config: EngineConfig, slides: int, seconds: float) -> list[Entry]:
    entries: list[Entry] = []
    tasks = [SlideTask(f"s{i}", "f", (f"s{i}", seconds)) for i in range(slides)]
    run_tasks(work, tasks, config, entries.extend, Meter("test", slides, "slides"))
    return entries


def worker_processes(parent: int) -> list[psutil.Process]:
    found = []
    with suppress(psutil.Error):
        for child in psutil.Process(parent).children(recursive=True):
            with suppress(psutil.Error):
                if "spawn_main" in " ".join(child.cmdline()):
                    found.append(child)
    return found


def test_a_bundle_that_the_scheduler_forgets_is_done_again() -> None:
    """As when the connection to the scheduler was lost for a moment."""
    from distributed import Future, default_client

    entries: list[Entry] = []

    def take(rows: list[Entry]) -> None:
        if not entries:
            client = default_client()
            client.cancel([Future(key, client) for key in list(client.futures)])
        entries.extend(rows)

    tasks = [SlideTask("a", "f", ("a", 0.1), 2.0), SlideTask("b", "f", ("b", 1.0))]
    run_tasks(work, tasks, EngineConfig(2), take, Meter("test", 2, "slides"))
    assert sorted((entry.slide_id, entry.outcome) for entry in entries) == [
        ("a", "done"), ("b", "done"),
    ]  # fmt: skip


def test_a_cluster_that_does_not_close_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(private, "CLOSES_WITHIN_S", 0.0)
    assert [entry.outcome for entry in run(EngineConfig(1), 1, 0.0)] == ["done"]
    for process in multiprocessing.active_children():
        process.join(5.0)
    assert not worker_processes(os.getpid())


@contextmanager
def start_scheduler(folder: Path) -> Iterator[tuple[str, dict[str, int]]]:
    """A scheduler, and a nanny with one worker: its address, their process ids by name."""
    from distributed import Client

    file = folder / "scheduler.json"
    environment = os.environ | {
        "DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES": "0",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests" / "faults")]),
    }

    def start(*command: str) -> Any:
        return subprocess.Popen(
            [sys.executable, "-m", *command, "--scheduler-file", str(file), "--no-dashboard"],
            cwd=folder, env=environment, start_new_session=True,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip

    scheduler = start("distributed.cli.dask_scheduler", "--host", "127.0.0.1", "--port", "0")
    nanny = start("distributed.cli.dask_worker", "--nthreads", "1")
    try:
        while not (file.exists() and worker_processes(nanny.pid)):
            assert scheduler.poll() is None
            assert nanny.poll() is None
            time.sleep(0.05)
        address = json.loads(file.read_text())["address"]
        with Client(address, timeout=30.0, set_as_default=False) as client:
            client.wait_for_workers(1, timeout=60.0)
        yield address, {"scheduler": scheduler.pid, "nanny": nanny.pid}
    finally:
        for process in (nanny, scheduler):
            with suppress(OSError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@pytest.mark.full
@pytest.mark.parametrize(
    ("part", "sent", "message"),
    [
        ("nanny", signal.SIGKILL, "no worker has been there for 2.0 s, and 8 slides wait"),
        ("scheduler", signal.SIGKILL, "the connection to it was lost"),
        ("scheduler", signal.SIGSTOP, "it has not answered for 5 s"),
    ],
)
def test_a_part_of_a_running_cluster_that_ends_or_stops_ends_the_stage_in_one_line(
    part: str, sent: signal.Signals, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drain, "_ABSENT_S", 2.0)
    monkeypatch.setattr(drain, "RETURNS_WITHIN_S", 2.0)
    monkeypatch.setattr(workers, "_ANSWERS_WITHIN_S", 1.0)
    monkeypatch.setattr(workers, "_CONNECT_WITHIN_S", 3.0)
    entries: list[Entry] = []
    with start_scheduler(tmp_path) as (address, pids):

        def take(rows: list[Entry]) -> None:
            entries.extend(rows)
            if len(entries) == 2:
                os.kill(pids[part], sent)

        tasks = [SlideTask(f"s{i}", "f", (f"s{i}", 0.3)) for i in range(10)]
        config = EngineConfig(scheduler=address)
        with pytest.raises(UserError, match=message) as caught:
            run_tasks(work, tasks, config, take, Meter("test", 10, "slides"))
    assert "run the same command again" in str(caught.value)
    assert [entry.outcome for entry in entries] == ["done", "done"]


@pytest.mark.full
def test_workers_that_are_stopped_while_they_start_are_one_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(private, "STARTS_WITHIN_S", 1.5)
    monkeypatch.setattr(workers, "_STARTS", 1)
    done = threading.Event()

    def stop_at_once() -> None:
        while not done.is_set():
            for process in worker_processes(os.getpid()):
                with suppress(psutil.Error):
                    process.suspend()
            time.sleep(0.01)

    attacker = threading.Thread(target=stop_at_once)
    attacker.start()
    try:
        with pytest.raises(UserError, match="the local workers did not start, 1 times"):
            run(EngineConfig(1), 1, 0.0)
    finally:
        done.set()
        attacker.join()
    assert not worker_processes(os.getpid())


@pytest.mark.full
def test_workers_killed_and_stopped_at_random_moments_cost_no_slide(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also while Dask starts them again; one that is stopped is replaced in time."""
    monkeypatch.setattr(give_up, "MAX_WORKER_DEATHS", 100)
    monkeypatch.setattr(drain, "_SENT_WITHIN_S", 5.0)
    monkeypatch.setattr(drain, "_RENEWED_EVERY_S", 2.0)
    monkeypatch.setattr(workers, "RETURNS_WITHIN_S", 10.0)
    monkeypatch.setattr(private, "STARTS_WITHIN_S", 20.0)
    choice, done = random.Random(1), threading.Event()

    def attack() -> None:
        done.wait(3.0)
        while not done.wait(choice.uniform(0.5, 4.0)):
            if found := worker_processes(os.getpid()):
                victim = choice.choice(found)
                with suppress(psutil.Error):
                    victim.send_signal(choice.choice([signal.SIGKILL, signal.SIGSTOP]))

    attacker = threading.Thread(target=attack)
    attacker.start()
    try:
        with dask.config.set({"distributed.scheduler.worker-ttl": "3s"}):
            entries = run(EngineConfig(2), 16, 0.3)
    finally:
        done.set()
        attacker.join()
    assert sorted(entry.slide_id for entry in entries) == sorted(f"s{i}" for i in range(16))
    assert {entry.outcome for entry in entries} == {"done"}
