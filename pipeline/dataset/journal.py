"""Append-only journals: the only files that exist are those that a journal line names.

One file `status/<stage>/<run_id>.jsonl` a coordinator or array element; one line a slide and
scope, with a CRC, so that a line torn by kill -9 is recognised and left out.
"""

import json
import os
import time
import zlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from model.errors import UserError
from pipeline.dataset.commit import FileRecord, clean_staging, new_run_id, sync_directory
from pipeline.dataset.layout import Dataset

Outcome = Literal["done", "rejected", "failed"]


@dataclass(frozen=True)
class Entry:
    """What became of one slide in one stage.

    `scope` says which part of the stage ("" or e.g. `224/h0-mini/cls`); `start`/`stop` is the
    half-open rank range, both -1 where the stage has none.
    """

    slide_id: str
    outcome: Outcome
    fingerprint: str
    reason: str = ""
    scope: str = ""
    start: int = -1
    stop: int = -1
    files: tuple[FileRecord, ...] = ()
    counts: dict[str, int] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0


def _crc(record: dict[str, Any]) -> str:
    text = json.dumps(record, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return f"{zlib.crc32(text.encode()):08x}"


def encode_line(entry: Entry, versions: dict[str, str]) -> str:
    """One journal line, newline included."""
    record = asdict(entry) | {
        "versions": versions,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    record = json.loads(json.dumps(record))
    record["crc"] = _crc(record)
    return json.dumps(record, sort_keys=True, ensure_ascii=False) + "\n"


def decode_line(line: str) -> Entry | None:
    """The entry of a line, or None where the line is torn or was altered."""
    try:
        record = json.loads(line)
        crc = record.pop("crc")
    except (ValueError, KeyError, AttributeError, TypeError):
        return None
    if crc != _crc(record):
        return None
    known = {key: record[key] for key in Entry.__dataclass_fields__ if key in record}
    known["files"] = tuple(FileRecord(**one) for one in record.get("files", ()))
    return Entry(**known)


class Run:
    """One run of one stage: its id, its staging folder, its journal."""

    def __init__(self, dataset: Dataset, stage: str, versions: dict[str, str]) -> None:
        self.dataset, self.stage, self.versions = dataset, stage, versions
        self.run_id = new_run_id()
        self._handle: int | None = None

    @property
    def journal_file(self) -> Path:
        """This run's journal."""
        return self.dataset.status_dir(self.stage) / f"{self.run_id}.jsonl"

    def append(self, entries: Iterable[Entry]) -> None:
        """Append lines and sync: after this returns, the entries stand."""
        data = "".join(encode_line(entry, self.versions) for entry in entries).encode()
        try:
            if self._handle is None:
                self.journal_file.parent.mkdir(parents=True, exist_ok=True)
                flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
                self._handle = os.open(self.journal_file, flags, 0o666)
                sync_directory(self.journal_file.parent)
            os.write(self._handle, data)
            os.fsync(self._handle)
        except OSError as error:
            raise UserError(f"cannot write {self.journal_file}: {error.strerror}") from error

    def close(self) -> None:
        """Close the journal and remove the staging folder."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None
        clean_staging(self.dataset, self.run_id)

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_journal(dataset: Dataset, stage: str) -> list[Entry]:
    """Every valid line of a stage, oldest run first."""
    entries: list[Entry] = []
    for path in sorted(dataset.status_dir(stage).glob("*.jsonl")):
        with path.open(encoding="utf-8", errors="replace") as lines:
            entries.extend(entry for line in lines if (entry := decode_line(line)) is not None)
    return entries


def standing(entries: Iterable[Entry], scope: str = "") -> dict[str, list[Entry]]:
    """Per slide, the entries that hold: those with the fingerprint of the slide's latest line.

    Lines of an older fingerprint (the slide or a parameter changed since) are superseded; of two
    lines for the same rank range the later one holds.
    """
    latest: dict[str, dict[tuple[int, int], Entry]] = {}
    current: dict[str, str] = {}
    for entry in entries:
        if entry.scope != scope:
            continue
        if current.get(entry.slide_id) != entry.fingerprint:
            current[entry.slide_id] = entry.fingerprint
            latest[entry.slide_id] = {}
        latest[entry.slide_id][entry.start, entry.stop] = entry
    return {slide: sorted(rows.values(), key=lambda e: e.start) for slide, rows in latest.items()}


def files_present(dataset: Dataset, entry: Entry) -> bool:
    """Whether every file that the entry names is there with the recorded size."""
    for record in entry.files:
        try:
            if (dataset.root / record.path).stat().st_size != record.bytes:
                return False
        except OSError:
            return False
    return True
