"""Staging folders under `.tmp`: which belong to runs that may still be under way."""

import re
import socket
from dataclasses import dataclass
from pathlib import Path

from common.leases import read_holder
from common.processes import is_process_alive
from pipeline.dataset import Dataset
from pipeline.upkeep.activity import RunJudge, list_running

_RUN_ID = re.compile(r"^(r\d{12}-)?\d{8}T\d{6}-\d{9}-(?P<host>.*)-(?P<pid>\d{1,10})-[0-9a-f]{6}$")
_HOST_CHARACTERS = 24
_HIGHEST_PID = 1 << 22
"""Linux gives no higher ids, in any container."""
_SILENT_S = 24 * 3600.0
"""A run of an older release, which has no lease, that has written nothing for a day is dead."""


@dataclass(frozen=True)
class StagingFolder:
    """A folder under `.tmp`: the files in it, and whether its run may still be under way."""

    path: Path
    alive: bool
    files: int
    bytes: int


def staging_folders(dataset: Dataset) -> list[StagingFolder]:
    """Everything under `.tmp` but locks that are held, sorted by name."""
    top, judge = dataset.staging_dir(""), RunJudge(dataset)
    folders = [
        _measure_folder(path, judge) for path in sorted(top.iterdir() if top.is_dir() else ())
    ]
    return [folder for folder in folders if not (folder.alive and _is_lock(folder.path))]


def _is_lock(path: Path) -> bool:
    return path.is_file() and not path.is_symlink() and read_holder(path) is not None


def live_run(dataset: Dataset) -> str:
    """A run that may be writing into the dataset, in words that say what ends this; '' if none.

    By the logs, which name a run before it writes its first file, and by `.tmp`.
    """
    for run in list_running(dataset):
        # `pipeline run` writes nothing itself: its steps do, and have logs of their own.
        if run.alive and run.stage != "run":
            return (
                f"{run.stage} on {run.host}, process {run.pid}, is at work: wait for its end (if "
                f"it is dead, remove status/{run.stage}/{run.run}.log)"
            )
    for folder in staging_folders(dataset):
        if folder.alive:
            name = folder.path.name
            return f"the run {name} may be at work: wait for its end (if dead, remove .tmp/{name})"
    return ""


def _measure_folder(path: Path, judge: RunJudge) -> StagingFolder:
    newest, files, size = 0.0, 0, 0
    inside = path.rglob("*") if path.is_dir() and not path.is_symlink() else ()
    for entry in (path, *inside):
        try:
            stat = entry.lstat()
        except FileNotFoundError:
            continue
        newest = max(newest, stat.st_mtime)
        if not entry.is_dir() or entry.is_symlink():
            files, size = files + 1, size + stat.st_size
    if _is_lock(path):
        return StagingFolder(path, judge.may_hold(path), files, size)
    return StagingFolder(path, may_write(judge, path.name, newest), files, size)


def may_write(judge: RunJudge, run_id: str, newest: float) -> bool:
    """Whether a run may still be writing; `newest` is when it last wrote, in epoch seconds."""
    if (is_alive := judge.may_live(run_id, newest)) is not None:
        return is_alive
    now = judge.server_time
    return now is None or may_be_alive(run_id, newest, now)


def may_be_alive(run_id: str, newest: float, now: float) -> bool:
    """Whether a run without a lease, of an older release, may still be writing.

    `newest` is when it last wrote and `now` the present, both in epoch seconds of the file server.
    A process that is there on a host of that name lives. One that is not proves nothing, for it
    may be in a container of that name: only a day without a sign of life does.
    """
    host = "".join(c if c.isalnum() else "-" for c in socket.gethostname())
    match = _RUN_ID.match(run_id)
    # Where the host's name is cut short in the id, the process may be another machine's.
    if match and match["host"] == host and len(host) < _HOST_CHARACTERS:
        pid = int(match["pid"])
        if pid > _HIGHEST_PID or is_process_alive(pid):
            return pid <= _HIGHEST_PID
    return now - newest < _SILENT_S
