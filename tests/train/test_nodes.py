"""Several nodes simulated on one machine: torchrun groups that meet by a loopback rendezvous."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import SMALL, weights_of

from pipeline.dataset import Dataset
from train.checkpoint import list_checkpoints

pytestmark = pytest.mark.full

ROOT = Path(__file__).resolve().parents[2]
STEPS = 4


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@contextmanager
def node(run: Path, dataset: Dataset, port: int, *more: str, nodes: str, processes: int = 1,
         overrides: tuple[str, ...] = ()) -> Iterator[subprocess.Popen[str]]:  # fmt: skip
    """One node: a torchrun in a process group of its own, so that it can be killed as a whole."""
    command = [
        sys.executable, "-m", "torch.distributed.run", f"--nnodes={nodes}",
        f"--nproc-per-node={processes}", "--rdzv-id=test", "--rdzv-backend=c10d",
        f"--rdzv-endpoint=127.0.0.1:{port}", "--local-addr=127.0.0.1", *more,
        "-m", "train", *SMALL, f"run.steps={STEPS}", "checkpoint.every=2", "checkpoint.keep=9",
        "log.every=1", f"data.dataset={dataset.root}", f"run.dir={run}", *overrides,
        "--config", str(run.parent / "empty.yaml"),
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT),
                   "PYTHONSAFEPATH": "1", "GLOO_SOCKET_IFNAME": "lo"}  # fmt: skip
    process = subprocess.Popen(
        command, env=environment, start_new_session=True, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        yield process
    finally:
        kill(process)
        process.communicate()


def wait_for_store(port: int, seconds: float = 200) -> None:
    """Until the node that was started first holds the rendezvous: either could take the port."""
    until = time.monotonic() + seconds
    while True:
        with socket.socket() as one:
            if one.connect_ex(("127.0.0.1", port)) == 0:
                return
        assert time.monotonic() < until, f"nobody listens on port {port} after {seconds} s"
        time.sleep(0.1)


def kill(process: subprocess.Popen[str]) -> None:
    """The whole node at once, without a warning: its torchrun and its workers."""
    for pid in [*workers_of(process.pid), process.pid]:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def workers_of(parent: int) -> list[int]:
    """torchrun starts its workers in sessions of their own."""
    children = Path(f"/proc/{parent}/task/{parent}/children")
    try:
        return [int(pid) for pid in children.read_text().split()]
    except OSError:
        return []


def ended(process: subprocess.Popen[str], seconds: float = 300) -> str:
    said, _ = process.communicate(timeout=seconds)
    assert process.returncode == 0, said[-3000:]
    return said


def steps_of(run: Path) -> list[int]:
    path = run / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [int(row["step"]) for row in rows if "sit/denoise" in row]


def wait_for_step(run: Path, step: int, seconds: float = 200) -> None:
    until = time.monotonic() + seconds
    while not any(int(path.name.split("-")[1]) >= step for path in list_checkpoints(run)):
        assert time.monotonic() < until, f"no checkpoint of step {step} in {seconds} s"
        time.sleep(0.05)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "empty.yaml").write_text("{}\n")
    return tmp_path


def test_two_nodes_train_as_one_and_one_goes_on_alone(folder: Path, train_dataset: Dataset) -> None:
    whole, two, hurt = folder / "whole", folder / "two", folder / "hurt"
    with node(whole, train_dataset, free_port(), nodes="1", processes=2) as one:
        ended(one)

    port = free_port()
    with node(two, train_dataset, port, nodes="2") as first:
        wait_for_store(port)
        with node(two, train_dataset, port, nodes="2") as second:
            ended(second)
        ended(first)
    expected = weights_of(whole, STEPS)
    assert len(expected) > 50
    for name, value in weights_of(two, STEPS).items():
        assert value.equal(expected[name]), f"{name}: two nodes of one are one of two"

    # Slower steps, so that the kill comes in the middle; the survivor holds the rendezvous.
    port, elastic = free_port(), ("--max-restarts=3", "--rdzv-conf=last_call_timeout=3")
    longer = ("data.batch_size=8", "run.steps=24")
    with node(hurt, train_dataset, port, *elastic, nodes="1:2", overrides=longer) as survivor:
        wait_for_store(port)
        with node(hurt, train_dataset, port, *elastic, nodes="1:2", overrides=longer) as victim:
            wait_for_step(hurt, 4)
            kill(victim)
        said = ended(survivor)
    assert "going on from step" in said
    assert "on 2 x cpu" in said
    assert "on 1 x cpu" in said
    done = steps_of(hurt)
    assert done[-1] == 24
    assert sorted(set(done)) == list(range(1, 25)), "no step is left out"
    repeated = len(done) - len(set(done))
    assert repeated <= 4, f"only what came after the last checkpoint is done again: {done}"
