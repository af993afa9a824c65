"""Errors of disks, limits and memory are one line; the next run ends with the same bytes."""

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from common.console import run_door
from common.files import hash_file, read_regular
from pipeline.dataset.events import read_events
from tests.pipeline.faults import ROOT, contents, pipeline

SLIDE = ROOT / "tests" / "data" / "slides" / "CMU-1-Small-Region.svs"
SHIM = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>
static int fails(const char *call, const char *path) {
    if (strcmp(call, CALL) || !path || !strstr(path, NAME)) return 0;
    errno = ERROR;
    return 1;
}
static const char *kind(int flags) { return flags & (O_WRONLY | O_RDWR) ? "write" : "open"; }
#define OPEN(name) int name(const char *path, int flags, ...) { \\
    va_list more; va_start(more, flags); int mode = va_arg(more, int); va_end(more); \\
    if (fails(kind(flags), path)) return -1; \\
    return ((int (*)(const char *, int, int))dlsym(RTLD_NEXT, #name))(path, flags, mode); }
OPEN(open)
OPEN(open64)
int rename(const char *from, const char *to) {
    if (fails("rename", to)) return -1;
    return ((int (*)(const char *, const char *))dlsym(RTLD_NEXT, "rename"))(from, to);
}
int unlink(const char *path) {
    if (fails("unlink", path)) return -1;
    return ((int (*)(const char *))dlsym(RTLD_NEXT, "unlink"))(path);
}
ssize_t read(int file, void *buffer, size_t size) {
    char link[64], path[PATH_MAX] = "";
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    if (!strcmp(CALL, "read") && readlink(link, path, PATH_MAX - 1) > 0 && fails("read", path))
        return -1;
    return ((ssize_t (*)(int, void *, size_t))dlsym(RTLD_NEXT, "read"))(file, buffer, size);
}
"""


SELECT = ("select", "--name", "train")


@pytest.fixture(scope="module")
def scanned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """A dataset of one slide before its first selection, and what it has afterwards."""
    root, whole = (tmp_path_factory.mktemp(name) / "d" for name in ("scanned", "whole"))
    for command in (("scan", str(SLIDE)), ("tissue",)):
        assert pipeline(*command, "--dataset", str(root)).returncode == 0
    shutil.copytree(root, whole)
    assert pipeline(*SELECT, "--dataset", str(whole)).returncode == 0
    return root, contents(whole)


@pytest.mark.full
@pytest.mark.parametrize(
    ("call", "name", "error"),
    [
        ("open", "slides.parquet", errno.ESTALE),
        ("read", "slides.parquet", errno.EIO),
        ("rename", "train.parquet", errno.EDQUOT),
        ("unlink", "selections.lock", errno.EROFS),
    ],
)
def test_a_call_that_fails_is_one_line_and_the_next_run_ends_with_the_same_bytes(
    call: str, name: str, error: int, tmp_path: Path, scanned: tuple[Path, dict[str, str]],
    preload_shim: Callable[[str], dict[str, str]],
) -> None:  # fmt: skip
    root, expected = tmp_path / "d", scanned[1]
    shutil.copytree(scanned[0], root)
    source = f'#define CALL "{call}"\n#define NAME "{name}"\n#define ERROR {error}\n{SHIM}'
    done = subprocess.run(
        [sys.executable, "-m", "pipeline", *SELECT, "--dataset", str(root)], cwd=ROOT,
        env=os.environ | {"PYTHONSAFEPATH": "1", "PYTHONPATH": str(ROOT)} | preload_shim(source),
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert "Traceback" not in done.stdout + done.stderr
    if call == "unlink":  # the selection is there; a lock that stays is broken by the next one
        assert done.returncode == 0
        assert (root / ".tmp" / name).exists()
    else:
        assert done.returncode == 2
        (line,) = done.stderr.strip().splitlines()
        assert os.strerror(error) in line
        assert name in line
        assert "; " in line, "what to do"
    assert pipeline(*SELECT, "--dataset", str(root)).returncode == 0
    assert contents(root) == expected


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError(errno.EDQUOT, "Disk quota exceeded", "/d/a"), "/d/a: Disk quota exceeded; your"),
        (OSError(errno.EMFILE, "Too many open files", "/d/a"), "raise the limit on open files"),
        (MemoryError(), "there is not enough memory; free memory"),
        (RuntimeError("can't start new thread"), "no thread can be started; raise the limit on"),
    ],
)
def test_what_the_machine_refuses_is_one_line_at_every_door(
    error: Exception, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> int:
        raise error

    with pytest.raises(SystemExit) as ended:
        run_door(fail, ("common",))
    assert ended.value.code == 2
    (printed,) = capsys.readouterr().err.strip().splitlines()
    assert line in printed


@pytest.mark.parametrize("read", [read_regular, hash_file, read_events])
def test_an_error_while_a_file_is_read_names_it(read: Callable[[Path], object]) -> None:
    path = Path("/proc/self/mem")  # it opens, and its first byte cannot be read
    with pytest.raises(OSError, match=str(path)) as caught:
        read(path)
    assert caught.value.errno == errno.EIO


def test_an_error_of_the_programs_own_is_none_of_the_machines() -> None:
    def fail() -> int:
        raise OSError(errno.EINVAL, "Invalid argument")

    with pytest.raises(OSError, match="Invalid argument"):
        run_door(fail, ("common",))
