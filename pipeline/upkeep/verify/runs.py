"""Staging folders under `.tmp`: which belong to runs that may still be under way."""

import re
import socket
import time
from calendar import timegm
from dataclasses import dataclass
from pathlib import Path

from common.processes import is_process_alive
from pipeline.dataset import Dataset
from pipeline.upkeep.activity import list_running

_RUN_ID = re.compile(r"^(?P<stamp>\d{8}T\d{6})-\d{9}-(?P<host>.*)-(?P<pid>\d+)-[0-9a-f]{6}$")
_HOST_CHARACTERS = 24
_SILENT_S = 24 * 3600.0
"""A run elsewhere that has written nothing for a day is taken for dead."""


@dataclass(frozen=True)
class StagingFolder:
    """A folder under `.tmp`: the files in it, and whether its run may still be under way."""

    path: Path
    alive: bool
    files: int
    bytes: int


def staging_folders(dataset: Dataset, now: float | None = None) -> list[StagingFolder]:
    """Everything under `.tmp`, sorted by name; `now` is seconds since the epoch."""
    top = dataset.staging_dir("")
    now = time.time() if now is None else now
    return [_measure_folder(path, now) for path in sorted(top.iterdir())] if top.is_dir() else []


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


def _measure_folder(path: Path, now: float) -> StagingFolder:
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
    return StagingFolder(path, may_be_alive(path.name, newest, now), files, size)


def may_be_alive(run_id: str, newest: float, now: float) -> bool:
    """Whether the run may still be writing; `newest` is when it last wrote, in epoch seconds.

    On this host its process decides; elsewhere (or where the host's name is cut short in the id,
    or is missing) only a day without a sign of life is proof.
    """
    match = _RUN_ID.match(run_id)
    if match is None:
        return now - newest < _SILENT_S
    host = "".join(c if c.isalnum() else "-" for c in socket.gethostname())
    if match["host"] == host and len(host) < _HOST_CHARACTERS:
        return is_process_alive(int(match["pid"]))
    began = timegm(time.strptime(match["stamp"], "%Y%m%dT%H%M%S"))
    return now - max(newest, began) < _SILENT_S
