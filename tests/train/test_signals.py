"""Requests to stop, to real processes: what is saved, what is printed, and the second Ctrl-C."""

import contextlib
import fcntl
import os
import pty
import signal
import subprocess
import sys
import termios
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import pytest
from conftest import HOME, command, environment, small_config, weights_of
from test_loop import assert_same_weights, wait_for
from test_processes import free_port

from common.console import EXIT_REQUEUE
from pipeline.dataset import Dataset
from train.checkpoint import list_checkpoints
from train.loop import train
from train.signals import StopRequests

NUMBERS = [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP]
EXIT_INTERRUPTED = 130

_WAITS_IN_STEP_4 = """
import pathlib, signal, sys, time
from train.reporter import Reporter
from train.__main__ import main
from common.console import run_door

def wait(self, batch):
    if batch.step == 3 and self.processes.rank == self.processes.size - 1:
        pathlib.Path(MARKER).touch()
        time.sleep(SECONDS)
Reporter.note_damage = wait
run_door(lambda: main(sys.argv[1:]), ("train",))
"""


def waiting(dataset: Dataset, run_dir: Path, seconds: float, *more: str) -> list[str]:
    """A run that waits in its fourth step, once there is a file `waits` next to its folder."""
    arguments = command(dataset, run_dir, *more)
    script = _WAITS_IN_STEP_4.replace("MARKER", repr(str(marker(run_dir))))
    arguments[1:3] = ["-c", script.replace("SECONDS", str(seconds))]
    return arguments


def marker(run_dir: Path) -> Path:
    return run_dir.parent / "waits"


def default_signals() -> None:
    """The test's own process may be in the background, where shells ignore SIGINT."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@contextlib.contextmanager
def started(
    arguments: list[str], output: int | IO[str] = subprocess.PIPE, **variables: str
) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        arguments, env=environment(**variables), stdout=output, stderr=subprocess.STDOUT,
        text=True, cwd=HOME, preexec_fn=default_signals,
    ) as process:  # fmt: skip
        try:
            yield process
        finally:
            process.kill()


@pytest.fixture(scope="module")
def whole(train_dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six steps in one go."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    subprocess.run(command(train_dataset, run_dir), env=environment(), cwd=HOME, check=True)
    return run_dir


def steps_of(run_dir: Path) -> list[str]:
    return [path.name for path in list_checkpoints(run_dir)]


@pytest.mark.full
@pytest.mark.parametrize("number", NUMBERS)
def test_a_request_saves_after_the_step_and_the_rest_equals_one_go(
    train_dataset: Dataset, tmp_path: Path, whole: Path, number: signal.Signals
) -> None:
    run_dir = tmp_path / "run"
    with started(waiting(train_dataset, run_dir, 1.0, "log.every=1")) as process:
        wait_for(marker(run_dir), process)
        process.send_signal(number)
        said = process.communicate(timeout=120)[0]
    assert process.returncode == EXIT_REQUEUE, said
    assert steps_of(run_dir) == ["step-00000003", "step-00000005"]
    assert "stopped on request at step 5 of 6" in said
    assert ("Ctrl-C again ends at once" in said) == (number is signal.SIGINT)
    assert "Traceback" not in said
    subprocess.run(command(train_dataset, run_dir), env=environment(), cwd=HOME, check=True)
    assert_same_weights(weights_of(run_dir, 6), weights_of(whole, 6))


@pytest.mark.full
def test_a_second_interrupt_ends_at_once(
    train_dataset: Dataset, tmp_path: Path, whole: Path
) -> None:
    run_dir = tmp_path / "run"
    with started(waiting(train_dataset, run_dir, 60)) as process:
        wait_for(marker(run_dir), process)
        process.send_signal(signal.SIGINT)
        time.sleep(0.5)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=5)[0]
    assert process.returncode == EXIT_INTERRUPTED, said
    assert "interrupted again: ended at once" in said
    assert "Traceback" not in said
    assert steps_of(run_dir) == ["step-00000003"]
    subprocess.run(command(train_dataset, run_dir), env=environment(), cwd=HOME, check=True)
    assert_same_weights(weights_of(run_dir, 6), weights_of(whole, 6))


@pytest.mark.full
def test_a_second_interrupt_ends_processes_that_wait_for_each_other(
    train_dataset: Dataset, tmp_path: Path
) -> None:
    """The first process is in a collective operation, which runs no handler of Python's."""
    run_dir, port = tmp_path / "run", str(free_port())
    with contextlib.ExitStack() as stack:
        both = [
            stack.enter_context(started(
                waiting(train_dataset, run_dir, 60),
                RANK=f"{k}", LOCAL_RANK=f"{k}", WORLD_SIZE="2", MASTER_PORT=port,
                MASTER_ADDR="127.0.0.1",
            ))
            for k in range(2)
        ]  # fmt: skip
        wait_for(marker(run_dir), both[1])
        for _ in range(2):
            for process in both:
                process.send_signal(signal.SIGINT)
            time.sleep(0.5)
        said = [process.communicate(timeout=5)[0] for process in both]
    assert [process.returncode for process in both] == [EXIT_INTERRUPTED] * 2, said
    assert "".join(said).count("interrupted again: ended at once") == 1, said


_WAITS_BEFORE_THE_FIRST_STEP = """
import os, pathlib, sys, time
from train import loop
from train.__main__ import main
from common.console import run_door

def wait(*arguments):
    pathlib.Path(MARKER + os.environ.get("RANK", "0")).touch()
    time.sleep(60)
loop.build_parts = wait
run_door(lambda: main(sys.argv[1:]), ("train",))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("size", [1, pytest.param(2, marks=pytest.mark.full)])
def test_a_request_before_the_first_step_ends_the_run(
    train_dataset: Dataset, tmp_path: Path, number: signal.Signals, size: int
) -> None:
    run_dir, port = tmp_path / "run", str(free_port())
    arguments = command(train_dataset, run_dir)
    place = str(marker(run_dir))
    arguments[1:3] = ["-c", _WAITS_BEFORE_THE_FIRST_STEP.replace("MARKER", repr(place))]
    several = {"WORLD_SIZE": f"{size}", "MASTER_PORT": port, "MASTER_ADDR": "127.0.0.1"}
    with contextlib.ExitStack() as stack:
        all_of_them = [
            stack.enter_context(
                started(arguments, subprocess.PIPE, RANK=f"{k}", LOCAL_RANK=f"{k}", **several)
            )
            for k in range(size)
        ]
        for k, process in enumerate(all_of_them):
            wait_for(Path(f"{place}{k}"), process)
        for process in all_of_them:
            process.send_signal(number)
        said = [process.communicate(timeout=20)[0] for process in all_of_them]
    assert [process.returncode for process in all_of_them] == [EXIT_REQUEUE] * size, said
    assert "".join(said).count("stopped on request before the first step") == 1, said
    assert "Traceback" not in "".join(said)
    assert not (run_dir / "checkpoints").exists()


@pytest.mark.full
@pytest.mark.parametrize("times", [1, 2])
def test_interrupts_of_torchrun(train_dataset: Dataset, tmp_path: Path, times: int) -> None:
    """It passes the first on as SIGINT, and the second as SIGTERM."""
    run_dir = tmp_path / "run"
    # With one slow step for two, training for ever for one.
    more = ("run.steps=1000000", "checkpoint.every=2", "log.every=1")
    arguments = command(train_dataset, run_dir, *more)
    if times == 2:
        arguments = waiting(train_dataset, run_dir, 60, *more)
        script = tmp_path / "waits.py"
        script.write_text(arguments[2])
        arguments[1:3] = [str(script)]
    head = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port", str(free_port())]
    launch = [sys.executable, *head, *arguments[1:]]
    with started(launch) as process:
        wait_for(marker(run_dir) if times == 2 else run_dir / "checkpoints/step-00000004", process)
        process.send_signal(signal.SIGINT)
        if times == 2:
            time.sleep(1.0)
            assert process.poll() is None
            process.send_signal(signal.SIGINT)
        began = time.monotonic()
        said = process.communicate(timeout=100)[0]
    if times == 2:
        assert time.monotonic() - began < 15
        assert "interrupted again: ended at once" in said
        assert steps_of(run_dir) == ["step-00000002"]
        return
    assert said.count("stopped on request at step ") == 1, said
    stopped = int(said.partition("stopped on request at step ")[2].split()[0])
    assert steps_of(run_dir)[-1] == f"step-{stopped:08d}"
    assert train(small_config(train_dataset, run_dir, f"run.steps={stopped + 1}")) == 0


@pytest.mark.full
def test_a_reader_that_the_same_key_ended_costs_no_checkpoint(
    train_dataset: Dataset, tmp_path: Path
) -> None:
    """As `python -m train ... | tee log`, where Ctrl-C ends tee as well."""
    run_dir = tmp_path / "run"
    with started(waiting(train_dataset, run_dir, 1.0)) as process:
        wait_for(marker(run_dir), process)
        assert process.stdout is not None
        process.stdout.close()
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=120) == EXIT_REQUEUE
    assert steps_of(run_dir) == ["step-00000003", "step-00000005"]


@pytest.mark.full
def test_a_closed_terminal_costs_no_checkpoint(train_dataset: Dataset, tmp_path: Path) -> None:
    """The kernel sends SIGHUP to what the terminal controls, and refuses all that is written."""
    run_dir = tmp_path / "run"
    ours, theirs = pty.openpty()

    def take_terminal() -> None:
        default_signals()
        fcntl.ioctl(theirs, termios.TIOCSCTTY, 0)

    process = subprocess.Popen(
        waiting(train_dataset, run_dir, 1.0), env=environment(), cwd=HOME, stdin=theirs,
        stdout=theirs, stderr=theirs, start_new_session=True, preexec_fn=take_terminal,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 120
        while not marker(run_dir).exists() and time.monotonic() < deadline:
            os.set_blocking(ours, False)
            with contextlib.suppress(BlockingIOError):
                os.read(ours, 65536)  # or it would wait for us
            time.sleep(0.02)
        os.close(theirs)
        os.close(ours)
        assert process.wait(timeout=120) == EXIT_REQUEUE
    finally:
        process.kill()
    assert steps_of(run_dir) == ["step-00000003", "step-00000005"]


def test_what_nohup_ignores_stays_ignored() -> None:
    before = {number: signal.getsignal(number) for number in NUMBERS}
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        with StopRequests() as requests:
            requests.begin_steps()
            os.kill(os.getpid(), signal.SIGHUP)
            assert not requests.received
            # A forked process dies of its own signals, and they are none of ours.
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of forking with threads
                child = os.fork()
            if child == 0:
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(10)
                os._exit(0)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
            time.sleep(0.2)
            assert not requests.received
            os.kill(os.getpid(), signal.SIGUSR1)
            assert requests.received
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
