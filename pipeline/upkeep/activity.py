"""What runs on a dataset now, from the logs that runs write (`pipeline.dataset.events`)."""

import os
import socket
import time
from calendar import timegm
from dataclasses import dataclass
from pathlib import Path

from pipeline.dataset import Dataset
from pipeline.dataset.events import SUFFIX, Event, decode_event, read_events

_SILENT_S = 120.0
"""A run says every 30 s that it is alive; one on another machine that said nothing for this long
is taken for ended without a word."""
_TAIL_BYTES = 4096
_SLIDES_SHOWN = 20


@dataclass(frozen=True)
class Running:
    """A run that has not ended: `alive`, or killed without a word.

    `done`, `total` and `rate` (a second) count `unit`s; `slides` are those in progress with their
    workers, at most 20 of them, `in_progress` says how many there are; `seconds_left` is at the
    rate so far. `array_task` is the element of a SLURM job array, '' otherwise.
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


def running(dataset: Dataset) -> list[Running]:
    """Runs without an end; a dead one only where its work was not begun again since."""
    found: list[Running] = []
    for folder in sorted((dataset.root / "status").glob("*")):
        begun_since: set[str] = set()
        for path in sorted(folder.glob(f"*{SUFFIX}"), reverse=True):
            if not _has_ended(path) and (events := read_events(path)):
                seen = _seen(events, path.stat().st_mtime)
                if seen.alive or seen.array_task not in begun_since:
                    found.append(seen)
            begun_since.add(_array_task(path))
    return found


def _array_task(path: Path) -> str:
    """The element of a job array that a log is of, from its first line."""
    with path.open(encoding="utf-8", errors="replace") as lines:
        first = decode_event(lines.readline())
    return str(first.fields.get("slurm_array_task", "")) if first else ""


def _has_ended(path: Path) -> bool:
    """Whether the log's last line is the run's end; the rest is not read."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - _TAIL_BYTES))
        return b'"event": "end"' in file.read().rstrip().rpartition(b"\n")[2]


def _seen(events: list[Event], written_at: float) -> Running:
    begin, last = events[0].fields, events[-1]
    held: dict[str, str] = {}
    total, unit, done, rate = 0, "slides", 0, None
    for event in events:
        fields = event.fields
        if event.event == "slide begun":
            held[str(fields.get("slide"))] = str(fields.get("worker"))
        elif event.event.startswith("slide "):
            held.pop(str(fields.get("slide")), None)
        elif event.event == "tasks":
            total, unit = int(fields["total"]), str(fields["unit"])
        elif event.event == "progress":
            done, rate = int(fields["done"]), float(fields["rate"])
    if rate is None and unit == "slides":
        done = sum(e.event.startswith("slide ") and e.event != "slide begun" for e in events)
        rate = done / max(_age(events[0].time) - _age(last.time), 1e-3) if done else None
    host, pid = str(begin.get("host", "")), int(begin.get("pid", 0))
    return Running(
        stage=last.stage, run=last.run, host=host, pid=pid,
        slurm_job=str(begin.get("slurm_job", "")),
        array_task=str(begin.get("slurm_array_task", "")),
        since=events[0].time, last=last.time,
        alive=_is_alive(host, pid, written_at),
        done=done, total=total, unit=unit, rate=rate,
        seconds_left=(total - done) / rate if rate else None,
        in_progress=len(held),
        slides=[{"slide": s, "worker": w} for s, w in list(held.items())[:_SLIDES_SHOWN]],
    )  # fmt: skip


def _age(stamp: str) -> float:
    """Seconds since a line's time."""
    return time.time() - timegm(time.strptime(stamp[:19], "%Y-%m-%dT%H:%M:%S"))


def _is_alive(host: str, pid: int, written_at: float) -> bool:
    """By its process where it is one of this machine's, else by how long it is silent."""
    if host == socket.gethostname():
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            pass
        return True
    return time.time() - written_at < _SILENT_S
