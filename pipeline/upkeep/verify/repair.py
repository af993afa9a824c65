"""`verify --repair`: remove what its stage makes again, and nothing that may be sound."""

import os
from collections.abc import Mapping
from pathlib import Path

from common.errors import UserError
from common.files import open_regular
from pipeline.dataset import Dataset, commit_bytes, new_run_id
from pipeline.upkeep.activity import RunJudge
from pipeline.upkeep.verify.inventory import Inventory, read_inventory
from pipeline.upkeep.verify.journal_lines import canonical_line, journal_lines
from pipeline.upkeep.verify.runs import live_run, may_write
from pipeline.upkeep.verify.sums import FileDamage, describe_unreadable, sha256_of

_BUFFER_BYTES = 1 << 22
_EXAMPLES = 3


def refuse_live_runs(dataset: Dataset) -> None:
    """Raise `UserError` while a run may be at work: what it is writing has no line yet."""
    try:
        busy = live_run(dataset)
    except OSError as error:
        raise UserError(
            f"{error.filename} cannot be read ({error.strerror}), so that a run may be at work: "
            "make it readable, then repair again"
        ) from error
    if busy:
        raise UserError(f"{dataset.root}: --repair removes nothing while a run is at work; {busy}")


def repair_damage(dataset: Dataset, damaged: Mapping[str, FileDamage]) -> list[str]:
    """Remove altered files and drop bad journal lines; returns notes of what was done and kept.

    The check may have taken hours: each file is looked at once more before it goes.
    """
    journals, buffer = JournalReader(dataset), bytearray(_BUFFER_BYTES)
    removed, kept = 0, dict[str, str]()
    for path, damage in damaged.items():
        why = ""
        if damage.kind == "unreadable":
            why = damage.words
        elif damage.kind == "altered":
            why = _remove_altered(journals, path, buffer)
            removed += not why
        kept |= {path: why} if why else {}
    # Lines after files: what says that a file is damaged is still there while it is removed.
    judge = RunJudge(dataset)
    for journal in sorted((dataset.root / "status").glob("*/*.jsonl")):
        try:
            removed += _rewrite_journal(dataset, journal, judge)
        except OSError as error:
            kept[dataset.relative_path(journal)] = describe_unreadable(error)
    notes = [f"repair: kept {path}: {why}" for path, why in list(kept.items())[:_EXAMPLES]]
    if len(kept) > _EXAMPLES:
        notes.append(f"repair: kept {len(kept) - _EXAMPLES:,} more for reasons of these kinds")
    done = f"repair: removed {removed:,} damaged files and journal lines; run what is named"
    return [*notes, done]


class JournalReader:
    """What the journals say now; they are read again only after one has changed."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset
        self._states: list[tuple[str, int, int, int]] | None = None
        self._inventory = Inventory(dataset, {})

    def read(self) -> Inventory:
        """The inventory as of this moment; raises OSError where a journal cannot be read."""
        states = []
        for path in sorted((self.dataset.root / "status").glob("*/*.jsonl")):
            # Opened, not only looked up: a network file system then asks its server.
            with open_regular(path) as file:
                stat = os.fstat(file.fileno())
            states.append((str(path), stat.st_ino, stat.st_size, stat.st_mtime_ns))
        if states != self._states:
            self._inventory, self._states = read_inventory(self.dataset), states
        return self._inventory


def _remove_altered(journals: JournalReader, path: str, buffer: bytearray) -> str:
    """Remove a file that is still not as written; returns why it was kept, '' where it was not."""
    file = journals.dataset.root / path
    try:
        before = file.stat()
        now = sha256_of(file, buffer)
        # In this order: a file renamed into place is either named by a line that is read now, or
        # of a run that is at work still, or came after it was hashed.
        named = journals.read().named.get(path, [])
        busy = live_run(journals.dataset)
        after = file.stat()
    except OSError as error:
        return describe_unreadable(error)
    is_same = all(
        getattr(before, field) == getattr(after, field)
        for field in ("st_ino", "st_size", "st_mtime_ns")
    )
    if not named:
        return "no journal line names it any more"
    if any(line.stage == "select" for line in named):
        return "selections are never removed"
    if any((line.record.bytes, line.record.sha256) == now for line in named):
        return "it is as written by now"
    if busy:
        return busy
    if not is_same or now[0] != after.st_size:
        return "it changed meanwhile"
    try:
        file.unlink()
    except OSError as error:
        return f"cannot be removed: {error.strerror or error}"
    return ""


def _rewrite_journal(dataset: Dataset, journal: Path, judge: RunJudge) -> int:
    """Write a journal without its bad lines; returns how many. Not while its run may live."""
    lines = list(journal_lines(journal))
    bad = sum(line.damage is not None for line in lines)
    if not bad or may_write(judge, journal.stem, journal.stat().st_mtime):
        return 0
    kept = (line.data for line in lines if line.damage in (None, "respelt"))
    run_id = new_run_id()
    commit_bytes(dataset, run_id, journal, b"".join(map(canonical_line, kept)))
    dataset.staging_dir(run_id).rmdir()
    return bad
