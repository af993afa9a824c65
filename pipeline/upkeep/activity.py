"""What runs on a dataset now, from the logs that runs write and the leases that they renew."""

import os
import socket
import time
from calendar import timegm
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from common.leases import DEAD_S, file_server_time, is_lease_alive
from common.processes import is_process_alive
from pipeline.dataset import Dataset
from pipeline.dataset.events import SUFFIX, Event, decode_event, read_events
from pipeline.dataset.journal import LEASE_SUFFIX, run_order

_SILENT_S = 120.0
"""A run logs every 30 s that it is alive; one of an older release, which has no lease, that logged
nothing for this long is taken for ended without an end in its log."""
_TAIL_BYTES = 4096
_SLIDES_SHOWN = 20


@dataclass(frozen=True)
class Running:
    """A run that has not ended: `alive`, or killed before it could log its end.

    `done`, `total` and `rate` (per second) count `unit`s; `slides` are those in progress with
    their workers, at most 20 of them, `in_progress` is how many there are; `seconds_left` is at
    the rate so far. `array_task` is the element of a SLURM job array, '' otherwise.
    """

    stage: str
    run: str
    host: str
    pid: int
    slurm_job: str
    array_task: str
    since: str
    last: str
    alive: bool
    done: int
    total: int
    unit: str
    rate: float | None
    seconds_left: float | None
    in_progress: int
    slides: list[dict[str, str]]


class RunJudge:
    """Says which runs of a dataset may be at work, by their leases (`common.leases`)."""

    def __init__(self, dataset: Dataset) -> None:
        self._root = dataset.root
        leases = (dataset.root / "status").glob(f"*/*{LEASE_SUFFIX}")
        self._leases = {path.stem: path for path in leases}

    @cached_property
    def server_time(self) -> float | None:
        """Seconds since the epoch on the file server; asked only where nothing else decides."""
        return file_server_time(self._root / "status")

    def was_written_lately(self, written: float, silent_s: float) -> bool:
        """Whether something was written less than `silent_s` ago, in epoch seconds; or may be."""
        return self.server_time is None or self.server_time - written < silent_s

    def may_live(self, run_id: str, written: float) -> bool | None:
        """Whether a run that wrote last at `written` (epoch seconds) may be at work.

        None for a run of an older release, which had no lease.
        """
        if lease := self._leases.get(run_id):
            return is_lease_alive(lease, lambda: self.server_time)
        # A run of this release has a lease for as long as it lives and can write.
        is_numbered = run_order(run_id)[0] > 0
        return self.was_written_lately(written, DEAD_S) if is_numbered else None

    def may_hold(self, lock: Path) -> bool:
        """Whether the holder of a lock, as the file names it, may live."""
        return is_lease_alive(lock, lambda: self.server_time)


def list_running(dataset: Dataset) -> list[Running]:
    """Runs without an end; a dead one only where its work was not begun again since."""
    running: list[Running] = []
    judge = RunJudge(dataset)
    for folder in sorted((dataset.root / "status").glob("*")):
        # From the newest log back: a dead run whose work began again is of no interest.
        begun_since: set[str] = set()
        logs = folder.glob(f"*{SUFFIX}")
        for path in sorted(logs, key=lambda log: run_order(log.name), reverse=True):
            if not _has_ended(path) and (events := read_events(path)):
                run = _summarise_run(events, path, judge)
                if run.alive or run.array_task not in begun_since:
                    running.append(run)
            with path.open(encoding="utf-8", errors="replace") as lines:
                begin = decode_event(lines.readline())
            begun_since.add(str(begin.fields.get("slurm_array_task", "")) if begin else "")
    return running


def _has_ended(path: Path) -> bool:
    """Whether the log's last line is the run's end; the rest is not read."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - _TAIL_BYTES))
        return b'"event": "end"' in file.read().rstrip().rpartition(b"\n")[2]


def _summarise_run(events: list[Event], log: Path, judge: RunJudge) -> Running:
    begin, last = events[0].fields, events[-1]
    worker_of: dict[str, str] = {}
    total, unit, done, ended = 0, "slides", 0, 0
    rate: float | None = None
    for event in events:
        fields = event.fields
        if event.event == "slide begun":
            worker_of[str(fields.get("slide"))] = str(fields.get("worker"))
        elif event.event.startswith("slide "):
            ended += 1
            worker_of.pop(str(fields.get("slide")), None)
        elif event.event == "tasks":
            total, unit = int(fields["total"]), str(fields["unit"])
        elif event.event == "progress":
            done, rate = int(fields["done"]), float(fields["rate"])
    # Before the first report of progress, the slides that have ended tell as much.
    if rate is None and unit == "slides":
        done = ended
        elapsed = _epoch_seconds(last.time) - _epoch_seconds(events[0].time)
        rate = done / max(elapsed, 1e-3) if done else None
    host, pid = str(begin.get("host", "")), int(begin.get("pid", 0))
    written = log.stat().st_mtime
    is_alive = judge.may_live(log.stem, written)
    if is_alive is None:
        # That no process of this id is here proves nothing: a container may have this host's name.
        is_here = host == socket.gethostname() and is_process_alive(pid)
        is_alive = is_here or judge.was_written_lately(written, _SILENT_S)
    return Running(
        stage=last.stage, run=last.run, host=host, pid=pid,
        slurm_job=str(begin.get("slurm_job", "")),
        array_task=str(begin.get("slurm_array_task", "")),
        since=events[0].time, last=last.time,
        alive=is_alive,
        done=done, total=total, unit=unit, rate=rate,
        seconds_left=(total - done) / rate if rate else None,
        in_progress=len(worker_of),
        slides=[{"slide": s, "worker": w} for s, w in list(worker_of.items())[:_SLIDES_SHOWN]],
    )  # fmt: skip


def _epoch_seconds(stamp: str) -> int:
    return timegm(time.strptime(stamp[:19], "%Y-%m-%dT%H:%M:%S"))
