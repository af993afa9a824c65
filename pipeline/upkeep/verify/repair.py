"""`verify --repair`: remove what its stage makes again, and nothing that may be sound."""

import os
import time
from collections.abc import Mapping
from pathlib import Path

from common.errors import UserError
from pipeline.dataset import Dataset, commit_bytes, new_run_id
from pipeline.upkeep.verify.inventory import Inventory
from pipeline.upkeep.verify.journal_lines import canonical, journal_lines
from pipeline.upkeep.verify.runs import live_run, may_be_alive
from pipeline.upkeep.verify.sums import Problem, sha256_of

_BUFFER_BYTES = 1 << 22
_EXAMPLES = 3

Stamp = tuple[tuple[str, int, int, int], ...]


def refuse_live_runs(dataset: Dataset) -> None:
    """Raise `UserError` while a run may be at work: what it is writing has no line yet."""
    try:
        busy = live_run(dataset)
    except OSError as error:
        raise UserError(
            f"{error.filename} cannot be read ({error.strerror}), so that nobody knows whether a "
            "run is at work: make it readable, then repair again"
        ) from error
    if busy:
        raise UserError(f"{dataset.root}: --repair removes nothing while a run is at work; {busy}")


def repair_damage(dataset: Dataset, damaged: Mapping[str, Problem]) -> list[str]:
    """Remove altered files and drop bad journal lines; returns notes of what was done and kept.

    The check may have taken hours: each file is looked at once more before it goes.
    """
    journals, buffer = _Journals(dataset), bytearray(_BUFFER_BYTES)
    removed, kept = 0, {}
    for path, problem in damaged.items():
        if problem.kind == "unreadable":
            kept[path] = problem.words
        elif problem.kind == "altered":
            why = _remove_altered(journals, path, buffer)
            removed += not why
            kept |= {path: why} if why else {}
    for journal in sorted((dataset.root / "status").glob("*/*.jsonl")):
        try:
            removed += _repair_journal(dataset, journal)
        except OSError as error:
            kept[dataset.relative(journal)] = _unreadable(error)
    notes = [f"repair: kept {path}: {why}" for path, why in list(kept.items())[:_EXAMPLES]]
    if len(kept) > _EXAMPLES:
        notes.append(f"repair: kept {len(kept) - _EXAMPLES:,} more for reasons of these kinds")
    done = f"repair: removed {removed:,} damaged files and journal lines; run what is named"
    return [*notes, done]


def _unreadable(error: OSError) -> str:
    return f"cannot be read: {error.strerror or error}"


class _Journals:
    """What the journals say now; they are read again only after one has changed."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset
        self._stamp: Stamp | None = None
        self._inventory = Inventory(dataset, {})

    def now(self) -> Inventory:
        """The inventory as of this moment; raises OSError where a journal cannot be read."""
        stamp = self._look()
        if stamp != self._stamp:
            self._inventory, self._stamp = Inventory.take(self.dataset), stamp
        return self._inventory

    def _look(self) -> Stamp:
        """Opened, not only looked up: a network file system then asks its server."""
        found = []
        for path in sorted((self.dataset.root / "status").glob("*/*.jsonl")):
            with path.open("rb") as file:
                stat = os.fstat(file.fileno())
            found.append((str(path), stat.st_ino, stat.st_size, stat.st_mtime_ns))
        return tuple(found)


def _remove_altered(journals: _Journals, path: str, buffer: bytearray) -> str:
    """Remove a file that is still not as written; returns why it was kept, '' where it was not."""
    file = journals.dataset.root / path
    try:
        before = file.stat()
        found = sha256_of(file, buffer)
        # In this order: a file renamed into place is either named by a line that is read now, or
        # of a run that is at work still, or came after it was hashed.
        named = journals.now().named.get(path, [])
        busy = live_run(journals.dataset)
        after = file.stat()
    except OSError as error:
        return _unreadable(error)
    if not named:
        return "no journal line names it any more"
    if any(one.stage == "select" for one in named):
        return "selections are never removed"
    if any((one.record.bytes, one.record.sha256) == found for one in named):
        return "it is as written by now"
    if busy:
        return busy
    if _identity(before) != _identity(after) or found[0] != after.st_size:
        return "it changed meanwhile"
    try:
        file.unlink()
    except OSError as error:
        return f"cannot be removed: {error.strerror or error}"
    return ""


def _identity(stat: os.stat_result) -> tuple[int, int, int]:
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


def _repair_journal(dataset: Dataset, journal: Path) -> int:
    """Write a journal without its bad lines; returns how many. Not while its run may live."""
    lines = list(journal_lines(journal))
    bad = [line for line in lines if line.damage]
    if not bad or _is_written(journal):
        return 0
    kept = b"".join(canonical(line.data) for line in lines if line.damage in (None, "respelt"))
    run_id = new_run_id()
    commit_bytes(dataset, run_id, journal, kept)
    dataset.staging_dir(run_id).rmdir()
    return len(bad)


def _is_written(journal: Path) -> bool:
    return may_be_alive(journal.stem, journal.stat().st_mtime, time.time())
