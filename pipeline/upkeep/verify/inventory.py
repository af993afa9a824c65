"""What is in a dataset's folder, and which journal line, if any, names it."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import PurePosixPath

from pipeline.dataset import (
    Dataset,
    DatasetKind,
    Entry,
    FileRecord,
    Ledger,
    files_present,
    kind_of,
    read_journal,
)
from pipeline.dataset.card import CARD_FILE
from pipeline.dataset.layout import DAMAGED_DIR

_STAGE_OF_FOLDER = {
    "tiles": "tile", "features": "cache", "tissue": "tissue", "candidates": "tissue",
}  # fmt: skip
"""Folders whose files readers see only by a journal line, and the stage that writes the lines."""
_NOT_WALKED = ("status", ".tmp", DAMAGED_DIR)


@dataclass(frozen=True)
class Named:
    """A file as a current journal line names it."""

    stage: str
    entry: Entry
    record: FileRecord


@dataclass(frozen=True)
class Stray:
    """A file that no current line names; path relative to the dataset."""

    path: str
    bytes: int
    inode: int
    mtime_ns: int


@dataclass
class Strays:
    """Files without a current line, by what that means.

    In the folders of tiles, features, masks and candidates: `superseded`, an older line names
    them; `leftover`, none ever did. Anywhere else, and where the journal is lost: `uncovered`,
    for somebody may read them without a line, such as a selection that others wrote.
    """

    superseded: list[Stray] = field(default_factory=list)
    leftover: list[Stray] = field(default_factory=list)
    uncovered: list[Stray] = field(default_factory=list)
    links: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Inventory:
    """All journals of a dataset."""

    dataset: Dataset
    journals: dict[str, list[Entry]]

    def current_entries(self, stage: str) -> Iterator[Entry]:
        """The entries of a stage that are valid, in all its scopes."""
        ledger = Ledger(self.journals.get(stage, []), partial(files_present, self.dataset))
        for scope in ledger.scopes:
            for slide_id in sorted(ledger[scope]):
                yield from ledger[scope].entries(slide_id)

    @cached_property
    def named(self) -> dict[str, list[Named]]:
        """By path, the current lines that name it: more than one where stages share a file."""
        lines: dict[str, list[Named]] = {}
        for stage in self.journals:
            for entry in self.current_entries(stage):
                for record in entry.files:
                    lines.setdefault(record.path, []).append(Named(stage, entry, record))
        return lines

    def list_strays(self) -> Strays:
        """Every file that no current line names; journals, `.tmp` and `.damaged` left out.

        So are dataset.json, which has its own sum, and the card, which nothing reads.
        """
        unjournalled = (self.dataset.identity_file.name, CARD_FILE)
        ever_named = {
            record.path
            for entries in self.journals.values()
            for entry in entries
            for record in entry.files
        }
        strays = Strays()
        for stray in _walk_files(self.dataset, strays.links):
            if stray.path in self.named or stray.path in unjournalled:
                continue
            parts = PurePosixPath(stray.path).parts
            has_journal = self.journals.get(_STAGE_OF_FOLDER.get(parts[0], ""))
            # encoder.json is read without a line; older releases wrote none.
            if not has_journal or (stray.path not in ever_named and parts[-1] == "encoder.json"):
                strays.uncovered.append(stray)
            else:
                is_superseded = stray.path in ever_named
                (strays.superseded if is_superseded else strays.leftover).append(stray)
        return strays


def read_inventory(dataset: Dataset) -> Inventory:
    """The journals of every stage that has some."""
    folder = dataset.root / "status"
    stages = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    # What `--repair` moved away is not read: its own journal is left out.
    journals = {stage: read_journal(dataset, stage) for stage in stages if stage != "verify"}
    return Inventory(dataset, journals)


def tile_writer(identity: Mapping[str, object]) -> str:
    """The command that writes a dataset's tiles, in backticks."""
    commands = {
        DatasetKind.GENERATED: "`evaluate generate`",
        DatasetKind.IMPORTED_TILES: "`pipeline import tiles`",
    }
    return commands.get(kind_of(identity), "`pipeline tile`")


def _walk_files(dataset: Dataset, links: list[str]) -> Iterator[Stray]:
    """Files below the dataset in the order of their paths; linked folders are only listed."""
    for folder, folders, files in os.walk(dataset.root):
        top = folder == str(dataset.root)
        links += [os.path.relpath(os.path.join(folder, f), dataset.root)
                  for f in sorted(folders) if os.path.islink(os.path.join(folder, f))]  # fmt: skip
        folders[:] = sorted(f for f in folders if not (top and f in _NOT_WALKED))
        for name in sorted(files):
            path = os.path.join(folder, name)
            try:
                stat = os.lstat(path)
            except FileNotFoundError:
                continue
            relative = PurePosixPath(os.path.relpath(path, dataset.root)).as_posix()
            yield Stray(relative, stat.st_size, stat.st_ino, stat.st_mtime_ns)
