"""`verify`: every file that a journal line names is re-read, and the journals themselves."""

import os
import threading
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from common.console import EXIT_FAILURES, EXIT_OK, Meter, open_meter, print_line, stdout
from common.errors import UserError
from common.files import read_regular
from common.text import format_bytes, format_seconds
from pipeline.dataset import Dataset, read_identity, read_selection, read_slides
from pipeline.dataset.identity import (
    copy_damage,
    identity_damage,
    list_copies,
    mixed_kinds,
    restore_identity,
    way_back,
)
from pipeline.dataset.journal import run_order
from pipeline.dataset.layout import DAMAGED_DIR
from pipeline.dataset.lineage import is_other_file
from pipeline.upkeep.verify.damaged import list_damaged
from pipeline.upkeep.verify.inventory import Inventory, Named, read_inventory, tile_writer
from pipeline.upkeep.verify.journal_lines import LineDamage, journal_lines
from pipeline.upkeep.verify.repair import refuse_live_runs, repair_damage
from pipeline.upkeep.verify.runs import staging_folders
from pipeline.upkeep.verify.sums import FileDamage, damaged_files, describe_unreadable

_ROWS_SHOWN = 100
_EXAMPLES = 3
_WORDS_WIDTH = 60
_NAME_SHOWN = 200
_MB = 1_000_000
_LINE_WORDS: dict[LineDamage, str] = {
    "torn": "line {} is torn: readers leave it out",
    "altered": "line {} was altered: readers leave it out",
    "respelt": "line {} was altered, in bytes that do not change what it says",
    "foreign": "line {} names {!r}, which is outside the dataset or no file of the line's stage "
    "and slide: readers leave it out",
}


@dataclass(frozen=True)
class Problem:
    """A file that is not as it was written, and how to fix it."""

    path: str
    what: str
    fix: str


def verify(dataset: Dataset, workers: int | None = None, repair: bool = False) -> int:
    """Re-read the dataset, print what is wrong and how to fix it; returns the exit status.

    With `repair`, dataset.json is restored from the stages' copies, damaged files that their stage
    makes again from what it has are removed, others are moved to `.damaged` (never selections, nor
    what could not be read), and bad journal lines are moved there too.
    Raises `UserError` for that while a run may be at work.
    """
    if not dataset.root.is_dir() or not any(dataset.root.glob("*")):
        raise UserError(f"no dataset at {dataset.root}: expected a folder with dataset.json")
    # Before hours of reading, not after them.
    if repair:
        refuse_live_runs(dataset)
    try:
        inventory = read_inventory(dataset)
    except OSError as error:
        raise UserError(
            f"{error.filename} cannot be read ({error.strerror}), and without its lines it is "
            "unknown what was written: make it readable, then verify again"
        ) from error
    check = Verification(dataset)
    # First: without the identity it is unknown which command makes what is damaged again.
    if repair:
        check.notes += restore_identity(dataset)
    check.check_identity()
    check.check_journals()
    damaged = check.check_files(inventory, workers or len(os.sched_getaffinity(0)))
    check.check_slides(inventory)
    check.check_tables(damaged)
    check.note_strays(inventory)
    if repair:
        check.notes += repair_damage(dataset, damaged)
    return check.report_problems()


class Verification:
    """What a check has read, what is wrong, and what else is to be said of the dataset."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset
        self.problems: list[Problem] = []
        self.notes: list[str] = []
        self.files = self.bytes = 0
        self.seconds = 0.0

    def check_identity(self) -> None:
        """Check dataset.json and the stages' copies of it."""
        path = self.dataset.identity_file
        damage = identity_damage(self.dataset)
        if damage:
            fix = way_back(self.dataset)
            what = damage.removeprefix(f"{path} ").removesuffix(f": {fix}")
            self.problems.append(Problem(path.name, what if path.exists() else "missing", fix))
        if path.exists():
            self.files, self.bytes = self.files + 1, self.bytes + path.stat().st_size
            if not damage and b'"crc"' not in read_regular(path):
                self.notes.append(
                    f"not covered: {path.name} has no checksum (removed, or made by an older "
                    "release)"
                )
        if not damage:
            self._check_kind()
        for copy in list_copies(self.dataset):
            self.files, self.bytes = self.files + 1, self.bytes + copy.stat().st_size
            if what := copy_damage(copy):
                fix = "run `pipeline verify --repair`"
                self.problems.append(Problem(self.dataset.relative_path(copy), what, fix))

    def _check_kind(self) -> None:
        """Whether all of the dataset is of one kind: slides, imported tiles or generated."""
        try:
            slides = read_slides(self.dataset)
        except UserError:
            return  # a table that cannot be read is damage, which is reported as such
        if what := mixed_kinds(read_identity(self.dataset), [slide.reader for slide in slides]):
            fix = "restore dataset.json and slides.parquet from a copy"
            self.problems.append(Problem(self.dataset.identity_file.name, what, fix))

    def check_journals(self) -> None:
        """Check the lines of every journal."""
        for folder in sorted((self.dataset.root / "status").glob("*")):
            journals = sorted(folder.glob("*.jsonl"), key=lambda path: run_order(path.name))
            for index, journal in enumerate(journals):
                try:
                    self._check_journal(journal, journals[index + 1 :])
                except OSError as error:
                    path = self.dataset.relative_path(journal)
                    fix = f"run {_command_of(folder.name)}"
                    self.problems.append(Problem(path, describe_unreadable(error), fix))

    def _check_journal(self, journal: Path, later: list[Path]) -> None:
        path, size = self.dataset.relative_path(journal), 0
        for line in journal_lines(journal):
            size += len(line.data)
            if line.damage is None:
                continue
            what = _LINE_WORDS[line.damage].format(line.number, line.names[:_NAME_SHOWN])
            # A kill tears the last line; a later run that wrote anything has done its work again.
            if line.damage == "torn" and any(
                sound.damage is None for other in later for sound in journal_lines(other)
            ):
                self.notes.append(f"{path}: {what} (a run was killed; the stage ran since)")
                continue
            rerun = f"run {_command_of(journal.parent.name)}, then "
            is_work = line.damage not in ("respelt", "foreign")
            fix = f"{rerun if is_work else ''}`pipeline verify --repair`"
            self.problems.append(Problem(path, what, fix))
        self.files, self.bytes = self.files + 1, self.bytes + size

    def check_files(self, inventory: Inventory, workers: int) -> dict[str, FileDamage]:
        """Hash all named files; returns the damage of those that are not as written."""
        expected = {path: [line.record for line in ls] for path, ls in inventory.named.items()}
        total = sum(records[-1].bytes for records in expected.values())
        with open_meter("verify", total // _MB, "MB") as progress:
            advance = _ByteCounter(progress)
            damaged = damaged_files(self.dataset.root, expected, workers, advance)
            self.seconds = progress.seconds
        # A missing file was not read.
        self.files += len(expected) - sum(damage.kind == "missing" for damage in damaged.values())
        self.bytes += advance.total
        try:
            tiles_by = tile_writer(read_identity(self.dataset))
        except UserError:
            tiles_by = tile_writer({})
        for path in sorted(damaged):
            fix = suggest_fix(inventory.named[path][-1], damaged[path], tiles_by)
            self.problems.append(Problem(path, damaged[path].words, fix))
        return damaged

    def check_slides(self, inventory: Inventory) -> None:
        """Check that masks and tiles are of the slide files that slides.parquet records."""
        try:
            slides = {slide.slide_id: slide for slide in read_slides(self.dataset)}
        except UserError:
            return  # damage of the table is reported as such
        for stage in ("tissue", "tile"):
            others: dict[str, list[str]] = {}
            for entry in inventory.current_entries(stage):
                slide = slides.get(entry.slide_id)
                is_made = entry.outcome == "done" and bool(entry.files)
                if is_made and slide and is_other_file(slide, entry.values.get("slide")):
                    others.setdefault(entry.slide_id, []).append(entry.files[0].path)
            for slide_id, paths in others.items():
                more = f" (and {len(paths) - 1:,} more files)" if len(paths) > 1 else ""
                what = f"made from another file of slide {slide_id} than slides.parquet has{more}"
                fix = "run `pipeline tissue`, `pipeline select` and `pipeline tile`"
                self.problems.append(Problem(paths[0], what, fix))

    def check_tables(self, damaged: Mapping[str, FileDamage]) -> None:
        """Check what the sums do not cover: tables that others wrote, or of what was there before.

        `damaged` files are reported already.
        """
        files = [self.dataset.slides_file] if self.dataset.slides_file.exists() else []
        files += [self.dataset.selection_file(name) for name in self.dataset.selection_names()]
        for path in files:
            name = self.dataset.relative_path(path)
            if name in damaged:
                continue
            try:
                if path == self.dataset.slides_file:
                    read_slides(self.dataset)
                else:
                    read_selection(self.dataset, path.stem)
            except UserError as error:
                stage = "scan" if path == self.dataset.slides_file else "select"
                what = str(error).removeprefix(f"{path}").lstrip(": ")
                self.problems.append(Problem(name, what, f"remove it and run {_command_of(stage)}"))

    def note_strays(self, inventory: Inventory) -> None:
        """Note files that no line names, and what runs have under `.tmp`."""
        # Notes, not problems: none of these makes a reader see wrong bytes.
        strays = inventory.list_strays()
        for files, what in (
            (strays.superseded, "superseded (`pipeline prune` removes them)"),
            (
                strays.leftover,
                "leftovers that no journal line names (`pipeline prune` removes them)",
            ),
            (strays.uncovered, "not covered: no journal line has their sum"),
        ):
            if files:
                size = format_bytes(sum(stray.bytes for stray in files))
                examples = _list_examples(stray.path for stray in files)
                self.notes.append(f"{what}: {len(files):,} files, {size}, e.g. {examples}")
        if strays.links:
            links = _list_examples(strays.links)
            self.notes.append(
                f"linked folders: {links}; nothing behind them is searched for leftovers, written "
                "or removed"
            )
        if moved := list_damaged(self.dataset):
            size = format_bytes(sum(file.bytes for file in moved))
            self.notes.append(
                f"{DAMAGED_DIR}: {len(moved):,} files, {size}, which `--repair` moved there; "
                "`pipeline prune` removes those that were made again since"
            )
        is_linked = self.dataset.staging_dir("").is_symlink()
        for folder in () if is_linked else staging_folders(self.dataset):
            state = "may be under way" if folder.alive else "is dead (`pipeline prune` removes it)"
            self.notes.append(
                f".tmp/{folder.path.name}: the run {state}; "
                f"{folder.files:,} files, {format_bytes(folder.bytes)}"
            )

    def report_problems(self) -> int:
        """Print problems, notes and the summary; returns the exit status."""
        if self.problems:
            _print_problems(self.problems[:_ROWS_SHOWN])
        # A lost folder makes thousands of problems, with one fix.
        fixes = Counter(problem.fix for problem in self.problems[_ROWS_SHOWN:])
        for fix, count in fixes.most_common(_EXAMPLES):
            print_line(f"... and {count:,} more: {fix}")
        for note in self.notes:
            print_line(note)
        rate = f" ({self.bytes / _MB / self.seconds:.0f} MB/s)" if self.seconds > 0.05 else ""
        bad = len(self.problems)
        verdict = f"{bad:,} problem{'s'[: bad > 1]}" if bad else "all as written"
        print_line(
            f"verify: {self.files:,} files, {format_bytes(self.bytes)} checked in "
            f"{format_seconds(self.seconds)}{rate}: {verdict}"
        )
        return EXIT_FAILURES if bad else EXIT_OK


class _ByteCounter:
    """Advances a meter by whole megabytes; called from several threads."""

    def __init__(self, progress: Meter) -> None:
        self._progress, self._lock = progress, threading.Lock()
        self.total = 0

    def __call__(self, count: int) -> None:
        with self._lock:
            before = self.total // _MB
            self.total += count
            if self.total // _MB > before:
                self._progress.advance(self.total // _MB - before)


def _command_of(stage: str) -> str:
    return "`evaluate generate`" if stage == "generate" else f"`pipeline {stage}`"


def suggest_fix(named: Named, damage: FileDamage, tiles_by: str) -> str:
    """How to have the file again; `tiles_by` is the command that writes the dataset's tiles."""
    if damage.kind == "unreadable":
        return "it may be sound: make it readable (its rights? the file system?), verify again"
    missing = damage.kind == "missing"
    name = named.entry.slide_id
    if named.stage == "select":
        again = f"run `pipeline select --name {name}` with the same options"
        return (
            f"{again}, or `pipeline select --remove {name}`" if missing else f"remove it, {again}"
        )
    # What an import wrote, only the same import writes again.
    command = tiles_by if named.stage == "tile" else _command_of(named.stage)
    if named.stage in ("scan", "tissue") and "import" in tiles_by:
        command = tiles_by
    elif "source" in named.entry.values:
        command = "`pipeline import`"
    return f"run {command}" if missing else f"run `pipeline verify --repair`, then {command}"


def _list_examples(names: Iterable[str]) -> str:
    listed = list(names)
    more = f" and {len(listed) - _EXAMPLES:,} more" if len(listed) > _EXAMPLES else ""
    return ", ".join(listed[:_EXAMPLES]) + more


def _print_problems(problems: list[Problem]) -> None:
    """A table, or lines where it would be too wide: names are for copying, never cut or folded."""
    longest = max(len(problem.path) for problem in problems)
    if longest + _WORDS_WIDTH > stdout.width:
        for problem in problems:
            print_line(f"{problem.path}: {problem.what}; {problem.fix}")
        return
    table = Table(title="verify: problems")
    table.add_column("file", no_wrap=True, min_width=longest)
    table.add_column("what is wrong")
    table.add_column("how to fix it")
    for problem in problems:
        table.add_row(problem.path, problem.what, problem.fix)
    stdout.print(table)
