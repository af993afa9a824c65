"""Real mechanisms that break things: file systems, users, clocks, process ids, system calls.

Each fixture skips with its reason where the machine does not offer the mechanism.
"""

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pipeline.dataset import Dataset

_CLOCK = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <sys/time.h>
#include <time.h>
int clock_gettime(clockid_t id, struct timespec *now) {
    int (*real)(clockid_t, struct timespec *) = dlsym(RTLD_NEXT, "clock_gettime");
    int status = real(id, now);
    if (id == CLOCK_REALTIME || id == CLOCK_REALTIME_COARSE) now->tv_sec += OFFSET;
    return status;
}
time_t time(time_t *out) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (out) *out = now.tv_sec;
    return now.tv_sec;
}
int gettimeofday(struct timeval *out, void *zone) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    out->tv_sec = now.tv_sec;
    out->tv_usec = now.tv_nsec / 1000;
    return 0;
}
"""


def _attempt(command: list[str]) -> str:
    """Why a command does not work here; '' if it does."""
    if shutil.which(command[0]) is None:
        return f"{command[0]} is not installed"
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    return "" if run.returncode == 0 else run.stderr.strip()[:200] or f"exit {run.returncode}"


@pytest.fixture
def make_small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """`make_small_disk(size_kib)` mounts an empty file system (tmpfs) of that size."""
    mounted: list[Path] = []

    def mount(size_kib: int) -> Path:
        folder = tmp_path / f"disk{len(mounted)}"
        folder.mkdir()
        reason = _attempt(["mount", "-t", "tmpfs", "-o", f"size={size_kib}k", "tmpfs", str(folder)])
        if reason:
            pytest.skip(f"no file system can be mounted here: {reason}")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "-l", str(folder)], check=False)


@pytest.fixture
def as_nobody() -> list[str]:
    """The beginning of a command that runs the rest as user nobody."""
    command = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--"]
    if reason := _attempt([*command, "true"]):
        pytest.skip(f"no command can be run as another user: {reason}")
    return command


@pytest.fixture
def in_new_pid_namespace() -> list[str]:
    """The beginning of a command that runs the rest as a container does: with its own ids."""
    command = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
    if reason := _attempt([*command, "true"]):
        pytest.skip(f"no process namespace can be made here: {reason}")
    return command


@pytest.fixture
def preload_shim(tmp_path: Path) -> Callable[[str], dict[str, str]]:
    """`preload_shim(c_source)` gives the variables under which that C replaces system calls."""

    def build(source: str) -> dict[str, str]:
        if shutil.which("cc") is None:
            pytest.skip("no C compiler (cc) to build the shim with")
        library = tmp_path / f"shim-{len(list(tmp_path.glob('shim-*')))}.so"
        command = ["cc", "-shared", "-fPIC", "-O1", "-o", str(library), "-x", "c", "-", "-ldl"]
        subprocess.run(command, input=source, text=True, check=True)
        return {"LD_PRELOAD": str(library)}

    return build


@pytest.fixture
def shift_clock(preload_shim: Callable[[str], dict[str, str]]) -> Callable[[int], dict[str, str]]:
    """`shift_clock(-86400)` gives the variables under which a process reads that clock.

    Only the time of day is shifted: timeouts go by the monotonic clock, which cannot be set, and
    the times of files are the file server's.
    """
    return lambda seconds: preload_shim(_CLOCK.replace("OFFSET", str(seconds)))


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """The dataset of `door_data`, to be read only."""
    # Here: it takes torch, which most attacks do not need.
    from door_data import make_dataset

    return make_dataset(tmp_path_factory.mktemp("doors") / "d")


@pytest.fixture
def own(made: Dataset, tmp_path: Path) -> Dataset:
    """A copy of it, to be given bad tables."""
    from door_data import copy_dataset

    return copy_dataset(made, tmp_path / "d")


@pytest.fixture
def clean_environment() -> dict[str, str]:
    """The environment of a user's command: this project importable, nothing of the folder's."""
    root = str(Path(__file__).resolve().parents[2])
    return os.environ | {"PYTHONSAFEPATH": "1", "PYTHONPATH": root}
