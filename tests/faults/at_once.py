"""Commands that really run at the same time: renames that take long show what they step over."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

SLOW_RENAME = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
static void wait_for(const char *to) {
    const char *name = getenv("SLOW_NAME"), *seconds = getenv("SLOW_S");
    if (name && seconds && strstr(to, name)) usleep((useconds_t)(atof(seconds) * 1e6));
}
int rename(const char *from, const char *to) {
    int (*real)(const char *, const char *) = dlsym(RTLD_NEXT, "rename");
    wait_for(to);
    return real(from, to);
}
"""
"""Renames to a path that contains SLOW_NAME take SLOW_S seconds more."""


def slow_renames(
    preload_shim: Callable[[str], dict[str, str]], name: str, seconds: float
) -> dict[str, str]:
    """The variables under which renames to a path with `name` in it take that much longer."""
    return preload_shim(SLOW_RENAME) | {"SLOW_NAME": name, "SLOW_S": str(seconds)}


def start(arguments: list[str], **variables: str) -> subprocess.Popen[str]:
    """`python ARGUMENTS` in a process of its own; what it says is kept."""
    return subprocess.Popen(
        [sys.executable, *arguments], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, env=os.environ | {"PYTHONSAFEPATH": "1", "PYTHONPATH": str(ROOT)} | variables,
    )  # fmt: skip


def start_pipeline(command: str, root: Path, *options: str, **variables: str) -> subprocess.Popen:
    """`python -m pipeline COMMAND --dataset ROOT OPTIONS`."""
    return start(["-m", "pipeline", command, "--dataset", str(root), *options], **variables)


def wait_until_there(paths: Callable[[], Iterator[Path]], process: subprocess.Popen[str]) -> None:
    """Wait for one of the paths while the process runs: it is as far as that."""
    deadline = time.monotonic() + 120
    while not any(True for _ in paths()):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def end(process: subprocess.Popen[str]) -> tuple[int, str]:
    """The exit status of a process, and what it said on one line."""
    said = process.communicate(timeout=300)[0]
    return process.returncode, " ".join(said.split())
