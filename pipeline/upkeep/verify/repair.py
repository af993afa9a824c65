"""`verify --repair`: what its stage surely makes again is removed, all else that is damaged moved.

Nothing that may be sound is touched, and nothing that is behind a link.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from common.errors import UserError
from common.files import open_regular
from common.text import format_bytes
from pipeline.dataset import (
    Dataset,
    Entry,
    FileRecord,
    Run,
    commit_bytes,
    new_run_id,
    software_versions,
)
from pipeline.dataset.inside import file_state, free_place, move_inside, remove_file
from pipeline.dataset.layout import DAMAGED_DIR, is_known_stage
from pipeline.upkeep.activity import RunJudge
from pipeline.upkeep.verify.damaged import STAGE, Remaking, unit_of
from pipeline.upkeep.verify.inventory import Inventory, Named, read_inventory
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
    """Clear damaged files and journal lines away; returns notes of what was done and kept.

    The check may have taken hours: each file is looked at once more before it goes.
    """
    repair = Repair(dataset)
    for path, damage in damaged.items():
        if damage.kind == "unreadable":
            repair.kept[path] = damage.words
        elif damage.kind == "altered":
            repair.clear_file(path)
    # Lines after files: what says that a file is damaged is still there while it is moved.
    judge = RunJudge(dataset)
    for journal in sorted((dataset.root / "status").glob("*/*.jsonl")):
        repair.clear_lines(journal, judge)
    repair.journal_moves()
    return repair.describe()


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


class Repair:
    """One repair: what it removed and moved, and what it kept, by path and with the reason."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset
        self.removed = 0
        self.moved: list[Entry] = []
        self.kept: dict[str, str] = {}
        self._journals, self._remaking = JournalReader(dataset), Remaking(dataset)
        self._buffer = bytearray(_BUFFER_BYTES)
        self._units: set[str] = set()

    def clear_file(self, path: str) -> None:
        """Remove a file that is still not as written, or move it to `.damaged`, or keep it."""
        unit = unit_of(path)
        if unit in self._units:
            return  # it went with another file of its array
        try:
            file = self.dataset.resolve_inside(path)
            before = file.lstat()
            now = sha256_of(file, self._buffer)
            # In this order: a file renamed into place is either named by a line that is read now,
            # or of a run that is at work still, or came after it was hashed.
            named = self._journals.read().named.get(path, [])
            busy = live_run(self.dataset)
            is_same = file_state(file.lstat()) == file_state(before) and now[0] == before.st_size
            if why := _reason_to_keep(path, named, now, busy, is_same):
                self.kept[path] = why
            elif all(map(self._remaking.is_certain, named)):
                if remove_file(self.dataset, path, file_state(before)):
                    self.removed += 1
            else:
                self._move_unit(path, unit, named, now, file_state(before))
        except UserError as error:
            self.kept[path] = str(error)
        except OSError as error:
            self.kept[path] = describe_unreadable(error)

    def _move_unit(
        self,
        path: str,
        unit: str,
        named: Sequence[Named],
        now: tuple[int, str],
        state: tuple[int, int, int],
    ) -> None:
        place = free_place(self.dataset, unit)
        # A folder is moved as it is: its state says nothing of the file in it.
        if not move_inside(self.dataset, unit, place, state if unit == path else None):
            self.kept[path] = "it changed meanwhile"
            return
        self._units.add(unit)
        entry = named[-1].entry
        record = FileRecord(place + path.removeprefix(unit), *now)
        reason = "damaged; the same bytes may not be made again"
        self.moved.append(
            Entry(entry.slide_id, "done", entry.fingerprint, reason, scope=place, files=(record,))
        )

    def clear_lines(self, journal: Path, judge: RunJudge) -> None:
        """Write a journal without its bad lines, which go to `.damaged`.

        Not while its run may live.
        """
        path = self.dataset.relative_path(journal)
        try:
            self.removed += _rewrite_journal(self.dataset, journal, judge)
        except OSError as error:
            self.kept[path] = describe_unreadable(error)
        except UserError as error:
            self.kept[path] = str(error)

    def journal_moves(self) -> None:
        """Record what was moved, from where to where."""
        if not self.moved:
            return
        try:
            with Run(self.dataset, STAGE, software_versions()) as run:
                run.append(self.moved)
        except UserError as error:
            self.kept[DAMAGED_DIR] = f"what was moved there is in no journal: {error}"

    def describe(self) -> list[str]:
        """What was done and kept, a line each."""
        notes = [f"repair: kept {path}: {why}" for path, why in list(self.kept.items())[:_EXAMPLES]]
        if len(self.kept) > _EXAMPLES:
            notes.append(
                f"repair: kept {len(self.kept) - _EXAMPLES:,} more for reasons of these kinds"
            )
        if self.moved:
            size = format_bytes(sum(entry.files[0].bytes for entry in self.moved))
            examples = ", ".join(entry.scope for entry in self.moved[:_EXAMPLES])
            notes.append(
                f"repair: moved {len(self.moved):,} damaged files, {size}, whose bytes may not be "
                f"made again from what is here: {examples}"
                + (" and others" if len(self.moved) > _EXAMPLES else "")
            )
        notes.append(
            f"repair: removed {self.removed:,} damaged files and journal lines; run what is named"
        )
        return notes


def _reason_to_keep(
    path: str, named: Sequence[Named], now: tuple[int, str], busy: str, is_same: bool
) -> str:
    """Why a damaged file stays where it is; '' where it does not."""
    if not named:
        return "no journal line names it any more"
    if any(line.stage == "select" for line in named) or path.startswith("selections/"):
        return "selections are never removed"
    if not all(is_known_stage(line.stage) for line in named):
        return f"this release does not know stage '{named[-1].stage}', which wrote it"
    if any((line.record.bytes, line.record.sha256) == now for line in named):
        return "it is as written by now"
    return busy or ("" if is_same else "it changed meanwhile")


def _rewrite_journal(dataset: Dataset, journal: Path, judge: RunJudge) -> int:
    """Write a journal without its bad lines, once these are safe; returns how many."""
    lines = list(journal_lines(journal))
    bad = [line.data for line in lines if line.damage not in (None, "respelt")]
    if all(line.damage is None for line in lines):
        return 0
    if may_write(judge, journal.stem, journal.stat().st_mtime):
        return 0
    path = dataset.relative_path(journal)
    dataset.resolve_inside(path)
    kept = (line.data for line in lines if line.damage in (None, "respelt"))
    run_id = new_run_id()
    # They may be all that is left of what somebody recorded.
    if bad:
        commit_bytes(dataset, run_id, dataset.root / free_place(dataset, path), b"".join(bad))
    commit_bytes(dataset, run_id, journal, b"".join(map(canonical_line, kept)))
    dataset.staging_dir(run_id).rmdir()
    return sum(line.damage is not None for line in lines)
