"""Processes of one command that lose their launcher, one another, or their patience."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from common.console import EXIT_REQUEUE
from common.processes import is_process_alive
from pipeline.dataset import Dataset
from tests.train.conftest import command, environment, make_dataset
from train.checkpoint import list_checkpoints

HOME = Path(__file__).resolve().parents[2]

_CHILD = """
import os, signal, sys, time
from common.console import run_door
from common.following import tied_children
def work():
    if DEAF:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    print("up", os.getpid(), flush=True)
    time.sleep(100)
    return 0
run_door(work, ("common",))
"""
_PARENT = """
import subprocess, sys
from common.following import tied_children
with tied_children() as tie:
    subprocess.run([sys.executable, "-c", sys.argv[1]], **tie.options())
"""


def wait_until_gone(pid: int, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while is_running(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not is_running(pid)


def is_running(pid: int) -> bool:
    """Whether it lives, and is no zombie that nobody has asked after."""
    if not is_process_alive(pid):
        return False
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    return False


@pytest.mark.parametrize("is_deaf", [False, True])
def test_a_child_ends_with_the_one_that_started_it(is_deaf: bool) -> None:
    script = _CHILD.replace("DEAF", str(is_deaf))
    patience = {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "0.5"}
    parent = subprocess.Popen(
        [sys.executable, "-c", _PARENT, script], env=environment(**patience), cwd=HOME,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert parent.stdout is not None
    child = int(parent.stdout.readline().split()[1])
    try:
        parent.kill()
        said = parent.communicate(timeout=30)[1]  # until the child has closed it, too
        assert wait_until_gone(child, 10)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
    lines = said.splitlines()
    assert len(lines) == is_deaf, said
    assert not is_deaf or "what started this process has ended" in lines[0]


@contextlib.contextmanager
def launched(dataset: Dataset, run_dir: Path, *more: str) -> Iterator[subprocess.Popen[str]]:
    """A training on two processes that goes on for ever."""
    more = ("run.steps=1000000", "checkpoint.every=2", *more)
    arguments = command(dataset, run_dir, *more)
    process = subprocess.Popen(
        [sys.executable, "-m", "common.launch", "2", *arguments[2:]], env=environment(), cwd=HOME,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        yield process
    finally:
        ranks = children_of(process.pid)
        process.kill()
        for rank in ranks:
            with contextlib.suppress(ProcessLookupError):
                os.kill(rank, signal.SIGKILL)


def children_of(pid: int) -> list[int]:
    try:
        return [
            int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        ]
    except OSError:
        return []


def wait_for_steps(run_dir: Path) -> None:
    deadline = time.monotonic() + 200
    while not list_checkpoints(run_dir) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert list_checkpoints(run_dir)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return make_dataset(tmp_path_factory.mktemp("dataset"))


@pytest.mark.full
def test_a_training_ends_with_its_launcher_and_saves(dataset: Dataset, tmp_path: Path) -> None:
    with launched(dataset, tmp_path / "run") as process:
        wait_for_steps(tmp_path / "run")
        ranks = children_of(process.pid)
        process.kill()
        said = process.communicate(timeout=60)[0]  # the ranks have its other end
        assert all(wait_until_gone(rank, 20) for rank in ranks)
    assert len(ranks) == 2
    assert said.count("stopped on request at step ") == 1, said
    stopped = int(said.partition("stopped on request at step ")[2].split()[0])
    assert list_checkpoints(tmp_path / "run")[-1].name == f"step-{stopped:08d}"
    assert "Traceback" not in said


@pytest.mark.full
@pytest.mark.parametrize("which", [0, 1])
def test_a_rank_that_is_killed_ends_the_others_with_one_line(
    dataset: Dataset, tmp_path: Path, which: int
) -> None:
    with launched(dataset, tmp_path / "run") as process:
        wait_for_steps(tmp_path / "run")
        os.kill(children_of(process.pid)[which], signal.SIGKILL)
        said = process.communicate(timeout=60)[0]
    assert process.returncode == 128 + signal.SIGKILL
    assert [line for line in said.splitlines() if "error" in line or "stopped" in line] == [
        f"error: process {which} of 2 was ended by SIGKILL (was there too little memory?); the "
        "others are ended, and the same command goes on from what is saved"
    ], said
    assert "Traceback" not in said


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_signal_before_torch_is_loaded_is_a_training_to_be_resumed(
    dataset: Dataset, tmp_path: Path, number: signal.Signals
) -> None:
    """SLURM's warning may come right after the start of a job."""
    process = subprocess.Popen(
        [*command(dataset, tmp_path / "run")], env=environment(PYTHONVERBOSE="1"), cwd=HOME,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("import 'torch"):
            break
    process.send_signal(number)
    said = process.communicate(timeout=60)[0]
    assert process.returncode == EXIT_REQUEUE
    assert said.count("stopped on request before the first step") == 1, said
    assert not (tmp_path / "run").exists()


def test_a_signal_while_the_ranks_start_is_a_training_to_be_resumed(
    dataset: Dataset, tmp_path: Path
) -> None:
    with launched(dataset, tmp_path / "run") as process:
        while len(ranks := children_of(process.pid)) < 2 and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGUSR1)
        said = process.communicate(timeout=60)[0]
        assert all(wait_until_gone(rank, 10) for rank in ranks)
    assert process.returncode == EXIT_REQUEUE, said
    assert "Traceback" not in said
    assert "error" not in said
