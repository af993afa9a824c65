"""A real SLURM on this machine, for as long as its tests run."""

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).parent
HOME = HERE.parents[1]
_PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch")


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Its folder; commands and jobs find it through the environment."""
    missing = [one for one in _PROGRAMS if shutil.which(one) is None]
    if missing or os.getuid() != 0:
        pytest.skip(f"SLURM cannot run here: root: {os.getuid() == 0}, missing: {missing}")
    folder = tmp_path_factory.mktemp("slurm")
    script = ["bash", str(HERE / "slurm.sh")]
    started = subprocess.run(
        [*script, "start", str(folder), "2"], capture_output=True, text=True, timeout=120
    )
    if started.returncode != 0:
        subprocess.run([*script, "stop", str(folder)], timeout=60, check=False)
        pytest.fail(f"SLURM is installed but does not start: {started.stderr}")
    patch = pytest.MonkeyPatch()
    patch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
    patch.setenv("PYTHONPATH", f"{HOME}{os.pathsep}{HERE}")
    patch.setenv("PYTHONSAFEPATH", "1")
    patch.setenv("OMP_NUM_THREADS", "1")
    yield folder
    subprocess.run([*script, "stop", str(folder)], timeout=120, check=True)
    patch.undo()


def slurm_command(*command: str) -> str:
    """What one of SLURM's commands prints."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, f"{command}: {done.stderr}"
    return done.stdout


def job_field(job_id: str, name: str) -> str:
    """A field of `scontrol show job`."""
    words = slurm_command("scontrol", "--oneliner", "show", "job", job_id).split()
    return next(word.partition("=")[2] for word in words if word.startswith(f"{name}="))


def wait_for(condition: Callable[[], object], what: str, seconds: float = 240) -> None:
    """Wait until the condition holds; fails by its name."""
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, f"waited {seconds:.0f} s for {what}"
        time.sleep(0.3)
