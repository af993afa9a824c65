"""Ctrl-C in the middle of a stage: one line, nothing left running, nothing lost."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.__main__ import main
from pipeline.dataset import Dataset
from tests.pipeline.faults import ROOT, contents

SLOW_FETCH = f"{sys.executable} -c 'import time; time.sleep(300)' {{dest}}"


def start(root: Path) -> subprocess.Popen[str]:
    """`tile` with a worker that waits for its slide, in a process group of its own."""
    process = subprocess.Popen(
        [sys.executable, "-m", "pipeline", "tile", "--dataset", str(root), "--tile-px", "256",
         "--workers", "1", "--stage-in", SLOW_FETCH],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not list(root.glob(".tmp/*/histogen-stage-in-*")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(0.3)  # From the folder to the command that fills it.
    return process


def wait_until_none_is_left(group: int) -> None:
    """A killed worker is noticed by its parent, an orphan by nobody: ten seconds are plenty."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    left = subprocess.run(["ps", "-o", "pid,ppid,args", "-g", str(group)], capture_output=True)
    os.killpg(group, signal.SIGKILL)
    pytest.fail(f"still running: {left.stdout.decode()}")


@pytest.mark.parametrize("whom", ["everyone", pytest.param("coordinator", marks=pytest.mark.full)])
def test_ctrl_c_ends_cleanly(whom: str, own_tiled: Dataset) -> None:
    before = contents(own_tiled.root)
    process = start(own_tiled.root)
    if whom == "coordinator":
        process.send_signal(signal.SIGINT)
    else:
        os.killpg(process.pid, signal.SIGINT)
    said = process.communicate(timeout=120)
    assert process.returncode == 130
    assert said[1].splitlines() == [
        "interrupted: what was committed stays; run the same command to go on"
    ]
    assert "Traceback" not in said[0]
    wait_until_none_is_left(process.pid)
    assert list((own_tiled.root / ".tmp").iterdir()) == []
    assert contents(own_tiled.root) == before


@pytest.mark.full
def test_a_killed_coordinator_leaves_nothing_running_and_is_gone_on_from(
    own_tiled: Dataset,
) -> None:
    before = contents(own_tiled.root)
    process = start(own_tiled.root)
    process.kill()
    process.communicate(timeout=120)
    wait_until_none_is_left(process.pid)
    assert contents(own_tiled.root) == before
    again = ["tile", "--dataset", str(own_tiled.root), "--tile-px", "256", "--workers", "1"]
    assert main(again) == 0
    assert len(list(own_tiled.tiles_dir(256).glob("*.tar"))) == 1
