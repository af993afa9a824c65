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
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from common.files import sync_directory
from common.text import format_bytes, format_seconds
from pipeline.dataset import Dataset, new_run_id
from pipeline.upkeep.doctor.finding import Finding, make_finding

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
def temporary_folder(root: Path) -> Iterator[Path]:
    """An empty folder on the dataset's file system, gone afterwards with all that it made."""
    folder = Dataset(root).staging_dir(f"doctor-{new_run_id()}")
    Dataset(root).refuse_linked_folders(folder)
    new = [parent for parent in folder.parents if not parent.exists()]
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        with suppress(OSError):
            for parent in new:
                parent.rmdir()


def storage_findings(root: Path, size_bytes: int) -> list[Finding]:
    """All findings about the file system where a dataset is or would be."""
    subject = f"folder {root}"
    try:
        with temporary_folder(root) as folder:
            findings = [_check_space(folder), _check_inodes(folder)]
            for check in (check_rename, check_append, check_case, check_locks, check_clock):
                try:
                    findings.append(check(folder))
                except OSError as error:
                    fix = "use another file system for the dataset"
                    reason = error.strerror or str(error)
                    findings.append(Finding(check.__name__, "bad", reason, fix))
            return [*findings, _check_speed(folder, size_bytes), _check_commits(folder)]
    except OSError as error:
        fix = "choose a folder that this account may write, or ask for the right to"
        return [Finding(subject, "bad", f"cannot be written: {error.strerror or error}", fix)]


def check_rename(folder: Path) -> Finding:
    """Files and folders are replaced in one step, and a reader of the old one is not disturbed."""
    # A reader that has the old file open must go on reading it.
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
    # Zarr tiles are committed as folders.
    (folder / "staged-folder").mkdir()
    (folder / "staged-folder" / "chunk").write_bytes(b"1")
    (folder / "staged-folder").rename(folder / "final-folder")
    sync_directory(folder)
    if (folder / "final-folder" / "chunk").read_bytes() != b"1":
        problem = "a renamed folder lost a file"
    return make_finding(
        "rename", "atomic for files and folders, and synced", problem,
        "results there may be seen half-written: use another file system for the dataset",
    )  # fmt: skip


def check_append(folder: Path) -> Finding:
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
    return make_finding(
        "append", "lines appended and synced are all there", problem,
        "journals would lose lines: use another file system for the dataset",
    )  # fmt: skip


def check_case(folder: Path) -> Finding:
    """Slides named A and a are two."""
    (folder / "Case").write_bytes(b"1")
    problem = "names that differ in case alone are one file" if (folder / "case").exists() else ""
    return make_finding(
        "names", "upper and lower case are told apart", problem,
        "make sure that no two slides' names differ in case alone", "warning",
    )  # fmt: skip


def check_locks(folder: Path) -> Finding:
    """A lock that this process has is refused to another one."""
    path = folder / "lock"
    path.write_bytes(b"1")
    problem = ""
    with path.open("r+b") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Another process: a process may always lock again what it has locked itself.
            command = [sys.executable, "-c", _LOCK, str(path)]
            if subprocess.run(command, timeout=60, check=False).returncode != 7:
                problem = "a locked file can be locked again by another process"
        except OSError as error:
            name = errno.errorcode.get(error.errno or 0, "")
            problem = f"files cannot be locked ({name or error})"
    return make_finding(
        "locking", "a lock is refused to a second process", problem,
        "stages need no locks, but the hub's cache does: set HF_HOME to a file system that locks "
        "(Lustre: mount with -o flock)", "warning",
    )  # fmt: skip


def check_clock(folder: Path) -> Finding:
    """Of two runs' lines the later one is valid, by each machine's clock."""
    path = folder / "clock"
    before = time.time()
    path.write_bytes(b"1")
    stamp = path.stat().st_mtime
    skew = max(before - stamp, stamp - time.time(), 0.0)
    problem = f"its time differs from this machine's by {skew:.0f} s" if skew > _CLOCK_S else ""
    return make_finding(
        "clock", f"agrees with the file system's within {max(skew, 1.0):.0f} s", problem,
        "set the clocks by NTP: of two runs on one slide the later one is valid", "warning",
    )  # fmt: skip


def _check_space(folder: Path) -> Finding:
    usage = shutil.disk_usage(folder)
    problem = "" if usage.free > 10e9 else f"{format_bytes(usage.free)} free"
    return make_finding(
        "space", f"{format_bytes(usage.free)} free of {format_bytes(usage.total)}", problem,
        "`pipeline run --dry-run` says what a dataset needs; `pipeline prune` frees what none does",
        "warning",
    )  # fmt: skip


def _check_inodes(folder: Path) -> Finding:
    stats = os.statvfs(folder)
    if not stats.f_files:
        return Finding("inodes", "ok", "not limited by the file system")
    problem = "" if stats.f_favail > _FEW_INODES else f"{stats.f_favail:,} free"
    return make_finding(
        "inodes", f"{stats.f_favail:,} free", problem,
        "a slide takes 8 to 10 files; `pipeline run --dry-run` counts them", "warning",
    )  # fmt: skip


def _check_speed(folder: Path, size_bytes: int) -> Finding:
    """Sequential writing with a sync, and reading back what the page cache has let go."""
    path, chunk = folder / "speed", os.urandom(_CHUNK)
    count = max(1, size_bytes // _CHUNK)
    began = time.monotonic()
    with path.open("wb", buffering=0) as file:
        for _ in range(count):
            file.write(chunk)
        os.fsync(file.fileno())
        # So that reading measures the disk and not the page cache.
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    written = count * _CHUNK / (time.monotonic() - began)
    began = time.monotonic()
    with path.open("rb", buffering=0) as file:
        while file.read(_CHUNK):
            pass
    read = count * _CHUNK / (time.monotonic() - began)
    path.unlink()
    result = f"writes {format_bytes(written)}/s, reads {format_bytes(read)}/s, one process"
    is_slow = written < _SLOW_WRITE_BYTES_PER_S or read < _SLOW_READ_BYTES_PER_S
    return make_finding(
        "disk speed", result, result if is_slow else "",
        "tiling writes 10 MB/s per core and training reads 300 kB per tile: use the cluster's fast "
        "file system for the dataset", "warning",
    )  # fmt: skip


def _check_commits(folder: Path) -> Finding:
    """Small commits: what a slide of `scan` or `tissue` costs in addition to its work."""
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
    result = f"a file is committed (written, synced, renamed) in {1000 * each:.1f} ms"
    return make_finding(
        "commits", result, result if each > _SLOW_COMMIT_S else "",
        f"100,000 slides of 8 files would spend {format_seconds(each * 8e5)} in commits alone: "
        "ask for a file system with faster metadata", "warning",
    )  # fmt: skip


def meet_other_tasks(root: Path, task: int, tasks: int, job: str) -> Finding:
    """Whether the tasks of one `srun` see each other's commits, and how soon.

    Each task commits a file and waits for those of the others. Call it once per task.
    """
    folder = Dataset(root).staging_dir(f"doctor-meeting-{job}")
    Dataset(root).refuse_linked_folders(folder / "file")
    folder.mkdir(parents=True, exist_ok=True)
    staged = folder / f".staged-{task}"
    staged.write_text(str(task))
    began = time.monotonic()
    staged.replace(folder / f"{task}")
    sync_directory(folder)
    missing = set(range(tasks))
    while missing and time.monotonic() - began < _MEET_WITHIN_S:
        missing = {other for other in missing if not _has_text(folder / str(other), str(other))}
        time.sleep(0.05 if missing else 0)
    waited = time.monotonic() - began
    problem = f"files of tasks {sorted(missing)} are not seen here" if missing else ""
    # The last task removes the folder: no file may go while another task still looks for it.
    (folder / f"{task}.left").touch()
    if len(list(folder.glob("*.left"))) == tasks:
        shutil.rmtree(folder, ignore_errors=True)
    return make_finding(
        "other nodes", f"{tasks} tasks see each other's files ({waited:.1f} s)", problem,
        "the nodes do not share this folder, or cache its names for too long: use a file system "
        "that all nodes mount",
    )  # fmt: skip


def _has_text(path: Path, text: str) -> bool:
    try:
        return path.read_text() == text
    except OSError:
        return False
