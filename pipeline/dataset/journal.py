"""Append-only journals: the only files that exist are those that a journal line names.

One file `status/<stage>/<run_id>.jsonl` per coordinator or array element; one line per slide and
scope, with a CRC, so that a line torn by kill -9 is recognised and left out.

Clocks may lie, so that no time says which of two lines is the later one. A run id begins with a
number, one more than the highest in the folder when the run claims it, which it does after having
read what it decides by: whatever a run knew of is older than its own lines. Runs that knew nothing
of each other are in the order of their names. Older releases wrote no number; their runs come
first, by name, which begins with their time, and they read newer ones in the right order too.
"""

import json
import os
import re
import time
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from common.errors import UserError
from common.files import make_directory, open_text, read_lines, sync_directory
from common.json_text import parse_json
from common.leases import Lease, clear_leases
from common.redact import redact_secrets
from pipeline.dataset.commit import FileRecord, clean_staging, new_run_id
from pipeline.dataset.events import SUFFIX, EventLog, process_location
from pipeline.dataset.layout import Dataset, is_stage_file

STAGES = ("scan", "import", "tissue", "select", "generate", "tile", "cache", "curate")
"""The stages that keep journals, in the order of a dataset's life."""

LEASE_SUFFIX = ".lease"
"""`status/<stage>/<run_id>.lease` is there while the run lives; see `common.leases`."""
_NUMBERED = re.compile(r"r([0-9]{12})-")
_HIGHEST = 10**12 - 1

Outcome = Literal["done", "rejected", "failed", "pruned"]
"""`pruned` supersedes the `done` line of a rank range whose files `prune` removed."""


@dataclass(frozen=True)
class Entry:
    """What became of one slide in one stage.

    `scope` says which part of the stage ("" or e.g. `224/h0-mini/cls`); `start`/`stop` is the
    half-open rank range, both -1 where the stage has none; `seconds` is how long it took.
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


def _checksum_of(record: Mapping[str, object]) -> str:
    text = json.dumps(record, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    # Names of files may have bytes that are no text; JSON writes those as the same escapes.
    return f"{zlib.crc32(text.encode(errors='backslashreplace')):08x}"


def encode_line(entry: Entry, versions: dict[str, str]) -> str:
    """One journal line, newline included: JSON and a CRC-32 over the bytes of its other keys."""
    record = asdict(entry) | {
        "versions": versions,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    # Through JSON first: the checksum is of what a reader gets back (tuples become lists).
    record = json.loads(json.dumps(record))
    record["crc"] = _checksum_of(record)
    return json.dumps(record, sort_keys=True, ensure_ascii=False) + "\n"


def decode_line(line: str) -> Entry | None:
    """The entry of a line, or None where the line is torn or was altered."""
    try:
        record = parse_json(line)
        # Half a character has no bytes to be summed: that is a ValueError, too.
        if record.pop("crc") != _checksum_of(record):
            return None
    except (ValueError, KeyError, AttributeError, TypeError):
        return None
    # Keys of newer releases are passed over.
    known = {key: record[key] for key in Entry.__dataclass_fields__ if key in record}
    try:
        known["files"] = tuple(map(_file_record, record.get("files", ())))
        return _check_types(Entry(**known))
    except (TypeError, ValueError, KeyError):
        return None


MOST_RANKS = 1 << 26
"""Ranks that a slide may have; the most of a real one are fewer than 10^7."""
_TEXTS = ("slide_id", "outcome", "fingerprint", "reason", "scope")
_MOST = 1 << 62
"""Of any number that a run writes."""


def _check_types(entry: Entry) -> Entry:
    """The entry, if its values are of the types that a run writes."""
    texts = all(isinstance(getattr(entry, name), str) for name in _TEXTS)
    whole = all(type(value) is int for value in (entry.start, entry.stop))
    tables = isinstance(entry.counts, dict) and isinstance(entry.values, dict)
    # Blocks are counted one by one: a range without end would take all memory.
    in_range = whole and -1 <= entry.start <= entry.stop <= MOST_RANKS
    # What is read is summed: a number of a thousand digits fits into no other.
    sane = tables and all(map(_is_sane, (entry.seconds, *entry.counts.values())))
    if not (texts and in_range and sane):
        raise ValueError("not a line of a journal")
    return entry


def _is_sane(value: object) -> bool:
    return isinstance(value, int | float) and abs(value) < _MOST


def _file_record(values: dict[str, Any]) -> FileRecord:
    record = FileRecord(**values)
    texts = isinstance(record.path, str) and isinstance(record.sha256, str)
    if not texts or type(record.bytes) is not int or abs(record.bytes) > _MOST:
        raise ValueError("not a file's record")
    return record


def run_order(name: str) -> tuple[int, str]:
    """What runs are sorted by, oldest first: the number that an id begins with, then the name.

    >>> sorted(["r000000000002-a", "zzz", "20260101T000000-b", "r000000000001-c"], key=run_order)
    ['20260101T000000-b', 'zzz', 'r000000000001-c', 'r000000000002-a']
    """
    match = _NUMBERED.match(name)
    return (int(match[1]) if match else 0, name)


def _claim_run_id(folder: Path) -> str:
    """An id that comes after all runs of a stage's folder."""
    # The logs and leases count too: a run may have begun, and not have written a line yet.
    highest = max((run_order(name)[0] for name in _list_folder(folder)), default=0)
    # A forged name may have the highest number: then names decide, and nothing breaks.
    return f"r{min(highest + 1, _HIGHEST):012d}-{new_run_id()}"


class Run:
    """One run of one stage: its id, its staging folder, its journal, its log of events, its lease.

    The log's last line has the run's outcomes and how many seconds it took. The id is claimed when
    it is first needed, and later than all that was there by then: a run reads first, then asks for
    its id. One that writes nothing claims nothing.
    """

    def __init__(
        self, dataset: Dataset, stage: str, versions: dict[str, str], *, device: str = ""
    ) -> None:
        self.dataset, self.stage, self.versions = dataset, stage, versions
        self._device = {"device": device} if device else {}
        self._folder = dataset.status_dir(stage)
        self._handle: int | None = None
        # Before hours of work, and for what is staged without a commit.
        for folder in (self._folder, dataset.staging_dir("")):
            dataset.refuse_linked_folders(folder / "file")
        self._lease: Lease | None = None
        self._journal_id = ""
        self._workers: dict[str, str] = {}
        self._outcomes: Counter[str] = Counter()
        self._began = time.monotonic()

    @cached_property
    def run_id(self) -> str:
        """The run's id, by which its staging folder, journal, log and lease are named."""
        run_id = _claim_run_id(self._folder)
        self._lease = Lease(self._folder / f"{run_id}{LEASE_SUFFIX}")
        clear_leases(self._folder.glob(f"*{LEASE_SUFFIX}"), self._lease.path)
        return run_id

    @cached_property
    def _log(self) -> EventLog:
        return EventLog(self._folder / f"{self.run_id}{SUFFIX}", self.run_id, self.stage)

    @property
    def journal_file(self) -> Path:
        """This run's journal."""
        return self._folder / f"{self._journal_id or self.run_id}.jsonl"

    def take_precedence(self) -> None:
        """Have what is appended from now on count over all lines that are there now.

        For what is decided after reading again, while other runs may have written. It goes to a
        journal of its own if there are later runs than this one.
        """
        mine = run_order(self._journal_id or self.run_id)
        theirs = (run_order(name.partition(".")[0]) for name in _list_folder(self._folder))
        if all(one <= mine for one in theirs):
            return
        self._close_journal()
        self._journal_id = _claim_run_id(self._folder)

    def log_event(self, name: str, **fields: Any) -> None:
        """Add a line to the run's log; the first one is preceded by where and with what it runs."""
        if not self._log.has_events:
            self._log.write("begin", **process_location(), **self._device, versions=self.versions)
        self._log.write(name, **fields)

    def log_begun(self, slide_id: str, worker: str) -> None:
        """Log that a slide was given to a worker."""
        self._workers[slide_id] = worker
        self.log_event("slide begun", slide=slide_id, worker=worker)

    def append(self, entries: Iterable[Entry]) -> None:
        """Append lines and sync: after this returns, the entries count."""
        entries = [replace(entry, reason=redact_secrets(entry.reason)) for entry in entries]
        data = "".join(encode_line(entry, self.versions) for entry in entries).encode(
            errors="backslashreplace"
        )
        try:
            if self._handle is None:
                make_directory(self.journal_file.parent)
                flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW
                self._handle = os.open(self.journal_file, flags, 0o666)
                sync_directory(self.journal_file.parent)
            # A disk that is all but full takes a part of the bytes without an error.
            unwritten = memoryview(data)
            while unwritten:
                unwritten = unwritten[os.write(self._handle, unwritten) :]
            os.fsync(self._handle)
        except OSError as error:
            raise UserError(f"cannot write {self.journal_file}: {error.strerror}") from error
        for entry in entries:
            self._log_entry(entry)

    def _log_entry(self, entry: Entry) -> None:
        self._outcomes[entry.outcome] += 1
        fields: dict[str, Any] = {"worker": self._workers.pop(entry.slide_id, "")}
        if entry.reason:
            fields["reason"] = entry.reason
        if entry.start >= 0:
            fields["ranks"] = [entry.start, entry.stop]
        self.log_event(
            f"slide {entry.outcome}", slide=entry.slide_id, scope=entry.scope, **fields,
            seconds=round(entry.seconds, 3), bytes=sum(file.bytes for file in entry.files),
            **({"counts": entry.counts} if entry.counts else {}),
        )  # fmt: skip

    def close(self) -> None:
        """Close the journal and the log, remove the staging folder, and end the lease."""
        self._close_journal()
        if self._lease is None:
            return
        if self._log.has_events:
            seconds = round(time.monotonic() - self._began, 3)
            self._log.write("end", outcomes=dict(self._outcomes), seconds=seconds)
            self._log.close()
        clean_staging(self.dataset, self.run_id)
        self._lease.end()

    def _close_journal(self) -> None:
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def begun_stages(dataset: Dataset) -> list[str]:
    """The stages that have a journal folder: the known ones in their order, then others by name."""
    folder = dataset.root / "status"
    names = [path.name for path in folder.glob("*") if path.is_dir()]
    places = {stage: place for place, stage in enumerate(STAGES)}
    return sorted(names, key=lambda name: (places.get(name, len(STAGES)), name))


def read_journal(dataset: Dataset, stage: str, *, outside: bool = False) -> list[Entry]:
    """Every valid line of a stage, oldest run first.

    A journal is data, and others may have written it: a line that names a file which the stage
    does not write is left out, but for those that report it (`outside`).
    """
    entries: list[Entry] = []
    folder = dataset.status_dir(stage)
    for name in sorted(_list_folder(folder), key=run_order):
        if name.endswith(".jsonl"):
            try:
                with open_text(folder / name, errors="replace") as file:
                    lines = map(decode_line, read_lines(file))
                    entries += [entry for entry in lines if entry is not None]
            except OSError as error:
                raise _refuse_journal(folder / name, error) from error
    if outside:
        return entries
    return [entry for entry in entries if not foreign_file(stage, entry)]


def foreign_file(stage: str, entry: Entry) -> str:
    """The first file of a line that its stage does not write, or not for this line; '' if none."""
    for record in entry.files:
        if not is_stage_file(stage, record.path, vars(entry)):
            return record.path or "''"
    return ""


def _list_folder(folder: Path) -> list[str]:
    """The names in a stage's folder, none where it has none."""
    try:
        # Not a glob: that takes a folder that may not be read for an empty one.
        return os.listdir(folder) if folder.exists() else []
    except OSError as error:
        raise _refuse_journal(folder, error) from error


def _refuse_journal(path: Path, error: OSError) -> UserError:
    return UserError(
        f"journal {error.filename or path} cannot be read: {error.strerror or error}; fix its "
        "permissions or its disk: without it, finished work would be done again"
    )


def files_present(dataset: Dataset, entry: Entry) -> bool:
    """Whether every file that the entry names is there with the recorded number of bytes."""
    for record in entry.files:
        try:
            if (dataset.root / record.path).stat().st_size != record.bytes:
                return False
        except OSError:
            return False
    return True
