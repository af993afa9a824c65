"""Training on full disks, without a reader of its output, and asked to stop in one process."""

import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from listening import listening_at

from common.console import EXIT_INTERRUPTED, EXIT_REQUEUE, report_error
from common.errors import UserError
from pipeline.dataset import Dataset
from tests.train.conftest import command, environment, make_dataset, small_config
from train.checkpoint import RunState, list_checkpoints, write_checkpoint
from train.loop import train
from train.metrics_log import MetricsLog

HOME = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return make_dataset(tmp_path_factory.mktemp("dataset"))


def fill(disk: Path) -> None:
    with (disk / "fill").open("wb", buffering=0) as file:
        try:
            while file.write(bytes(4096)):
                pass
        except OSError:
            pass


def test_a_disk_that_is_full_at_the_start_is_one_line(
    dataset: Dataset, make_small_disk: Callable[[int], Path]
) -> None:
    disk = make_small_disk(64)
    fill(disk)
    with pytest.raises(UserError, match=r"cannot write .*run/config.yaml: No space left"):
        train(small_config(dataset, disk / "run"))


def test_a_disk_without_room_for_a_checkpoint_is_one_line_each(
    dataset: Dataset, make_small_disk: Callable[[int], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    disk = make_small_disk(64)
    with pytest.raises(UserError, match=r"cannot write checkpoint \S+-00000002: No space left"):
        train(small_config(dataset, disk / "run", "run.steps=3", "checkpoint.every=1"))
    said = capsys.readouterr().out.splitlines()
    assert [line for line in said if "warning" in line] == [
        line for line in said if "step 2" in line
    ]
    assert not list_checkpoints(disk / "run")
    subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
    assert train(small_config(dataset, disk / "run", "run.steps=3", "checkpoint.every=1")) == 0


def test_a_disk_with_room_for_as_many_as_are_kept_is_enough(
    tmp_path: Path, make_small_disk: Callable[[int], Path]
) -> None:
    disk = make_small_disk(300)
    tensors = {"sit": {"w": torch.zeros(80 * 256)}}  # 80 KiB: three fit, and no fourth
    for step in range(1, 7):
        write_checkpoint(disk, RunState(step, "", ""), tensors, keep=3)
    assert [path.name[-1] for path in list_checkpoints(disk)] == ["4", "5", "6"]
    fill(disk)
    with pytest.raises(UserError, match="No space left"):
        write_checkpoint(disk, RunState(7, "", ""), {"sit": {"w": torch.zeros(10**6)}}, keep=3)
    assert len(list_checkpoints(disk)) == 2, "one made room; the others are never the price"


def test_events_that_cannot_be_written_are_given_up_with_one_line(
    dataset: Dataset, make_small_disk: Callable[[int], Path], capfd: pytest.CaptureFixture[str]
) -> None:
    disk = make_small_disk(64)
    (disk / "run").mkdir()
    config = small_config(dataset, disk / "run", "log.tensorboard=true")
    with MetricsLog(disk / "run", config, step=0) as log:
        log.write_line(1, {"loss": 1.0})
        fill(disk)
        for step in range(2, 400):
            try:
                log.write_line(step, {f"loss {k}": 1.0 for k in range(40)})
            except OSError:
                continue  # metrics.jsonl's own line, which the reporter tolerates
    said = "".join(capfd.readouterr())
    assert said.count("TensorBoard's events cannot be written (No space left on device)") <= 1
    assert "Traceback" not in said


@pytest.mark.parametrize("command_line", ["status", "doctor"])
@pytest.mark.full
def test_a_result_that_cannot_be_printed_is_a_failure(dataset: Dataset, command_line: str) -> None:
    with open("/dev/full", "w") as full:
        run = subprocess.run(
            [sys.executable, "-m", "pipeline", command_line, "--dataset", str(dataset.root)],
            stdout=full, stderr=subprocess.PIPE, text=True, env=environment(), check=False,
        )  # fmt: skip
    assert run.returncode == 1
    assert run.stderr == "error: standard output cannot be written: No space left on device\n"


@pytest.mark.full
@pytest.mark.parametrize("kind", ["full", "closed pipe", "closed", "terminal gone"])
def test_training_goes_on_without_its_output(dataset: Dataset, tmp_path: Path, kind: str) -> None:
    arguments = command(dataset, tmp_path / "run", "run.steps=2")
    output, ours = _broken_output(kind)
    options = {} if output is None else {"stdout": output}
    if output is None:
        arguments = ["sh", "-c", 'exec "$0" "$@" >&-', *arguments]
    process = subprocess.Popen(
        arguments, env=environment(), stderr=subprocess.PIPE, text=True, cwd=HOME, **options
    )
    if ours is not None:
        os.close(ours)
    said = process.communicate(timeout=300)[1]
    assert process.returncode == 0, said
    assert (tmp_path / "run" / "summary.json").exists()
    lost = [line for line in said.splitlines() if "its lines are lost, the work goes on" in line]
    assert len(lost) == (0 if kind == "closed" else 1), said
    assert "Traceback" not in said


def _broken_output(kind: str) -> tuple[int | None, int | None]:
    """What the process gets as its output, and the end that is to be closed."""
    if kind == "full":
        return os.open("/dev/full", os.O_WRONLY), None
    if kind == "closed pipe":
        reading, writing = os.pipe()
        return writing, reading
    if kind == "terminal gone":
        ours, theirs = pty.openpty()
        return theirs, ours
    return None, None


@pytest.mark.full
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_to_one_of_two_stops_both_with_one_line(
    dataset: Dataset, tmp_path: Path, number: signal.Signals
) -> None:
    more = ("run.steps=1000000", "checkpoint.every=2")
    arguments = command(dataset, tmp_path / "run", *more)
    launch = [sys.executable, "-m", "common.launch", "2", *arguments[2:]]
    process = subprocess.Popen(
        launch, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        cwd=HOME,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 200
        while not list_checkpoints(tmp_path / "run") and time.monotonic() < deadline:
            time.sleep(0.1)
        assert {address for address, _ in listening_at(process.pid)} == {"127.0.0.1"}
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(children[-1]), number)
        said = process.communicate(timeout=100)[0]
    finally:
        process.kill()
    assert process.returncode == EXIT_REQUEUE, said
    assert said.count("stopped on request at step ") == 1, said
    assert "Traceback" not in said
    assert "error" not in said
    stopped = int(said.partition("stopped on request at step ")[2].split()[0])
    assert list_checkpoints(tmp_path / "run")[-1].name == f"step-{stopped:08d}"


@pytest.mark.parametrize(
    ("is_resumable", "says"), [(True, "committed stays"), (False, "no result was written")]
)
def test_an_interrupt_says_what_is_left(
    capsys: pytest.CaptureFixture[str], is_resumable: bool, says: str
) -> None:
    assert report_error(KeyboardInterrupt(), is_resumable=is_resumable) == EXIT_INTERRUPTED
    assert says in capsys.readouterr().err
