"""The machine's copy of what users read: one JSON line per event of a run.

`status/<stage>/<run_id>.log` is next to the run's journal. Nothing depends on it: it is not
checked, only its first and last lines are synced, and a line may be torn by a kill. `pipeline
status` reads it for what runs now.
"""

import json
import os
import socket
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.files import make_directory, naming_errors, open_text, read_lines, sync_directory
from common.json_text import parse_json
from common.redact import redact_all

SUFFIX = ".log"


class EventLog:
    """Appends events of one run to one file; a log that cannot be written stops nothing."""

    def __init__(self, path: Path, run_id: str, stage: str) -> None:
        self.path, self._run, self._stage = path, run_id, stage
        self._handle: int | None = None
        self._broken = False

    @property
    def has_events(self) -> bool:
        """Whether an event was written."""
        return self._handle is not None

    def write(self, event: str, **fields: Any) -> None:
        """One line: time (UTC), run, stage, event, and the fields, without secrets."""
        if self._broken:
            return
        record = {
            "time": utc_now(),
            "run": self._run,
            "stage": self._stage,
            "event": event,
            **fields,
        }
        line = json.dumps(redact_all(record), ensure_ascii=False) + "\n"
        try:
            # Opened at the first event, so that a run with nothing to do leaves no file.
            is_first = self._handle is None
            if self._handle is None:
                make_directory(self.path.parent)
                flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW
                self._handle = os.open(self.path, flags, 0o666)
            os.write(self._handle, line.encode(errors="backslashreplace"))
            if is_first:
                # After a power loss an empty log would not say which run it was.
                os.fsync(self._handle)
                sync_directory(self.path.parent)
        except OSError:
            # A full disk would fail again at every event.
            self._broken = True

    def close(self) -> None:
        """Sync and close the file."""
        if self._handle is not None:
            with suppress(OSError):
                os.fsync(self._handle)
            os.close(self._handle)
            self._handle = None


def utc_now() -> str:
    """The time in UTC, to 1 ms: `YYYY-MM-DDTHH:MM:SS.mmmZ`."""
    seconds = time.time()
    stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))
    return f"{stamp}.{int(seconds * 1000) % 1000:03d}Z"


def process_location() -> dict[str, object]:
    """Where this process runs: host, process, batch job."""
    names = {"slurm_job": "SLURM_JOB_ID", "slurm_array_task": "SLURM_ARRAY_TASK_ID"}
    batch = {key: os.environ[name] for key, name in names.items() if name in os.environ}
    return {"host": socket.gethostname(), "pid": os.getpid(), **batch}


@dataclass(frozen=True)
class Event:
    """A line of a log."""

    time: str
    run: str
    stage: str
    event: str
    fields: dict[str, Any]


def decode_event(line: str) -> Event | None:
    """The event of a line, or None where the line is torn."""
    try:
        record = parse_json(line)
        head = [str(record.pop(key)) for key in ("time", "run", "stage", "event")]
        return Event(head[0], head[1], head[2], head[3], record)
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def read_events(path: Path) -> list[Event]:
    """Every whole line of a log."""
    # A torn line may end inside a character.
    with naming_errors(path), open_text(path, errors="replace") as lines:
        return [event for line in read_lines(lines) if (event := decode_event(line)) is not None]
