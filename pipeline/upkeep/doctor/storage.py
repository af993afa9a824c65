"""The file system of a dataset: what commits rely on, and how fast it is.

A commit is: write under `.tmp`, sync, rename, sync the folder. Readers on other nodes must then
see the whole file or none.
"""

import errno
import fcntl
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from common.files import sync_directory
from common.text import format_bytes, format_seconds
from pipeline.dataset import Dataset, new_run_id
from pipeline.upkeep.doctor.finding import Finding, judged

_SLOW_WRITE_BYTES_PER_S, _SLOW_READ_BYTES_PER_S = 100e6, 200e6
_SLOW_COMMIT_S = 0.2
_COMMITS = 20
_FEW_INODES = 1_000_000
_CLOCK_S = 30.0
_CHUNK = 8 << 20
_MEET_WITHIN_S = 90.0
_LOCK = """
import fcntl, sys
with open(sys.argv[1], "r+b") as file:
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        sys.exit(7)
"""


@contextmanager
def workshop(root: Path) -> Iterator[Path]:
    """An empty folder on the dataset's file system, gone afterwards with all that it made."""
    folder = Dataset(root).staging_dir(f"doctor-{new_run_id()}")
    made = [one for one in (folder.parent, *folder.parent.parents) if not one.exists()]
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        for one in made:
            try:
                one.rmdir()
            except OSError:
                break


def storage_findings(root: Path, size_bytes: int) -> list[Finding]:
    """All findings about the file system that holds, or would hold, a dataset."""
    subject = f"folder {root}"
    try:
        with workshop(root) as folder:
            found = [_space(folder), _inodes(folder)]
            checks = (rename_problem, append_problem, case_problem, lock_problem, clock_problem)
            found += [_safely(check, folder) for check in checks]
            return [*found, _speed(folder, size_bytes), _commits(folder)]
    except OSError as error:
        mend = "choose a folder that this account may write, or ask for the right to"
        return [Finding(subject, "bad", f"cannot be written: {error.strerror or error}", mend)]


def _safely(check: Callable[[Path], Finding], folder: Path) -> Finding:
    try:
        return check(folder)
    except OSError as error:
        mend = "use another file system for the dataset"
        return Finding(check.__name__, "bad", f"{error.strerror or error}", mend)


def rename_problem(folder: Path) -> Finding:
    """Files and folders are replaced in one step, and a reader of the old one is not disturbed."""
    old, new = folder / "final", folder / "staged"
    old.write_bytes(b"old")
    new.write_bytes(b"new" * 100_000)
    problem = ""
    with old.open("rb") as reader:
        new.replace(old)
        sync_directory(folder)
        if reader.read() != b"old":
            problem = "a file that was replaced changes under its reader"
    if old.read_bytes() != b"new" * 100_000 or new.exists():
        problem = "a renamed file is not the one that was written"
    (folder / "staged-folder").mkdir()
    (folder / "staged-folder" / "chunk").write_bytes(b"1")
    (folder / "staged-folder").rename(folder / "final-folder")
    sync_directory(folder)
    if (folder / "final-folder" / "chunk").read_bytes() != b"1":
        problem = "a renamed folder lost a file"
    return judged(
        "rename", "atomic for files and folders, and synced", problem,
        "results there may be seen half-written: use another file system for the dataset",
    )  # fmt: skip


def append_problem(folder: Path) -> Finding:
    """A journal's lines, appended and synced through another handle than they are read by."""
    path = folder / "journal"
    lines = [f"line {number}\n".encode() for number in range(50)]
    for line in lines:
        handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            os.write(handle, line)
            os.fsync(handle)
        finally:
            os.close(handle)
    problem = "" if path.read_bytes() == b"".join(lines) else "appended lines are lost or torn"
    return judged(
        "append", "lines appended and synced are all there", problem,
        "journals would lose lines: use another file system for the dataset",
    )  # fmt: skip


def case_problem(folder: Path) -> Finding:
    """Slides named A and a are two."""
    (folder / "Case").write_bytes(b"1")
    problem = "names that differ in case alone are one file" if (folder / "case").exists() else ""
    return judged(
        "names", "upper and lower case are told apart", problem,
        "make sure that no two slides' names differ in case alone", "warning",
    )  # fmt: skip


def lock_problem(folder: Path) -> Finding:
    """A lock that this process holds is refused to another one."""
    path = folder / "lock"
    path.write_bytes(b"1")
    problem = ""
    with path.open("r+b") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            command = [sys.executable, "-c", _LOCK, str(path)]
            if subprocess.run(command, timeout=60, check=False).returncode != 7:
                problem = "a locked file can be locked again by another process"
        except OSError as error:
            name = errno.errorcode.get(error.errno or 0, "")
            problem = f"files cannot be locked ({name or error})"
    return judged(
        "locking", "a lock is refused to a second process", problem,
        "stages need no locks, but the hub's cache does: set HF_HOME to a file system that locks "
        "(Lustre: mount with -o flock)", "warning",
    )  # fmt: skip


def clock_problem(folder: Path) -> Finding:
    """Of two runs' lines the later one holds, by each machine's clock."""
    path = folder / "clock"
    before = time.time()
    path.write_bytes(b"1")
    stamp = path.stat().st_mtime
    skew = max(before - stamp, stamp - time.time(), 0.0)
    problem = f"its time differs from this machine's by {skew:.0f} s" if skew > _CLOCK_S else ""
    return judged(
        "clock", f"agrees with the file system's within {max(skew, 1.0):.0f} s", problem,
        "set the clocks by NTP: of two runs on one slide the later one holds", "warning",
    )  # fmt: skip


def _space(folder: Path) -> Finding:
    usage = shutil.disk_usage(folder)
    problem = "" if usage.free > 10e9 else f"{format_bytes(usage.free)} free"
    return judged(
        "space", f"{format_bytes(usage.free)} free of {format_bytes(usage.total)}", problem,
        "`pipeline run --dry-run` says what a dataset needs; `pipeline prune` frees what none does",
        "warning",
    )  # fmt: skip


def _inodes(folder: Path) -> Finding:
    stats = os.statvfs(folder)
    if not stats.f_files:
        return Finding("inodes", "ok", "not limited by the file system")
    problem = "" if stats.f_favail > _FEW_INODES else f"{stats.f_favail:,} free"
    return judged(
        "inodes", f"{stats.f_favail:,} free", problem,
        "a slide takes 8 to 10 files; `pipeline run --dry-run` counts them", "warning",
    )  # fmt: skip


def _speed(folder: Path, size_bytes: int) -> Finding:
    """Sequential writing with a sync, and reading back what the page cache has let go."""
    path, chunk = folder / "speed", os.urandom(_CHUNK)
    count = max(1, size_bytes // _CHUNK)
    began = time.monotonic()
    with path.open("wb", buffering=0) as file:
        for _ in range(count):
            file.write(chunk)
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    written = count * _CHUNK / (time.monotonic() - began)
    began = time.monotonic()
    with path.open("rb", buffering=0) as file:
        while file.read(_CHUNK):
            pass
    read = count * _CHUNK / (time.monotonic() - began)
    path.unlink()
    found = f"writes {format_bytes(written)}/s, reads {format_bytes(read)}/s, one process"
    slow = written < _SLOW_WRITE_BYTES_PER_S or read < _SLOW_READ_BYTES_PER_S
    return judged(
        "disk speed", found, found if slow else "",
        "tiling writes 10 MB/s a core and training reads 300 kB a tile: use the cluster's fast "
        "file system for the dataset", "warning",
    )  # fmt: skip


def _commits(folder: Path) -> Finding:
    """Small commits a second: what a slide of `scan` or `tissue` costs beside its work."""
    began = time.monotonic()
    for number in range(_COMMITS):
        staged = folder / f"staged-{number}"
        with staged.open("wb") as file:
            file.write(b"1")
            file.flush()
            os.fsync(file.fileno())
        staged.replace(folder / f"final-{number}")
        sync_directory(folder)
    each = (time.monotonic() - began) / _COMMITS
    found = f"a file is committed (written, synced, renamed) in {1000 * each:.1f} ms"
    return judged(
        "commits", found, found if each > _SLOW_COMMIT_S else "",
        f"100,000 slides of 8 files would spend {format_seconds(each * 8e5)} in commits alone: "
        "ask for a file system with faster metadata", "warning",
    )  # fmt: skip


def meeting(root: Path, task: int, tasks: int, job: str) -> Finding:
    """Whether the tasks of one `srun` see each other's commits, and how soon.

    Each task commits a file and waits for those of the others. Call it once a task.
    """
    folder = Dataset(root).staging_dir(f"doctor-meeting-{job}")
    folder.mkdir(parents=True, exist_ok=True)
    staged = folder / f".staged-{task}"
    staged.write_text(str(task))
    began = time.monotonic()
    staged.replace(folder / f"{task}")
    sync_directory(folder)
    missing = set(range(tasks))
    while missing and time.monotonic() - began < _MEET_WITHIN_S:
        missing = {one for one in missing if not _reads(folder / str(one), str(one))}
        time.sleep(0.05 if missing else 0)
    waited = time.monotonic() - began
    problem = f"files of tasks {sorted(missing)} are not seen here" if missing else ""
    _leave(folder, task, tasks)
    return judged(
        "other nodes", f"{tasks} tasks see each other's files ({waited:.1f} s)", problem,
        "the nodes do not share this folder, or cache its names for too long: use a file system "
        "that all nodes mount",
    )  # fmt: skip


def _reads(path: Path, text: str) -> bool:
    try:
        return path.read_text() == text
    except OSError:
        return False


def _leave(folder: Path, task: int, tasks: int) -> None:
    """The last one out removes the folder: nobody's file goes while another still looks."""
    (folder / f"{task}.left").touch()
    if len(list(folder.glob("*.left"))) == tasks:
        shutil.rmtree(folder, ignore_errors=True)
