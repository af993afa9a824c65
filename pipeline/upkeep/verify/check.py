"""`verify`: every file that a journal line names is re-read, and the journals themselves."""

import os
import threading
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from rich.markup import escape
from rich.table import Table

from common.console import EXIT_FAILURES, EXIT_OK, Meter, meter, say, stdout
from common.errors import UserError
from common.text import format_bytes, format_seconds
from pipeline.dataset import Dataset, read_identity
from pipeline.dataset.identity import identity_damage
from pipeline.upkeep.verify.inventory import Inventory, Named, Stray, tile_writer
from pipeline.upkeep.verify.journal_lines import Damage, journal_lines
from pipeline.upkeep.verify.repair import refuse_live_runs, repair_damage
from pipeline.upkeep.verify.runs import staging_folders
from pipeline.upkeep.verify.sums import Problem, damaged_files

_ROWS_SHOWN = 100
_EXAMPLES = 3
_WORDS_WIDTH = 60
_MB = 1_000_000
_LINE_WORDS: dict[Damage, str] = {
    "torn": "line {} is torn: readers leave it out",
    "altered": "line {} was altered: readers leave it out",
    "respelt": "line {} was altered, in bytes that do not change what it says",
}


@dataclass(frozen=True)
class Finding:
    """A file that is not as it was written, and how to mend it."""

    path: str
    problem: str
    mend: str


@dataclass
class Checked:
    """What a check read and found."""

    findings: list[Finding]
    notes: list[str]
    files: int = 0
    bytes: int = 0
    seconds: float = 0.0

    def count(self, size: int) -> None:
        """Count a file."""
        self.files, self.bytes = self.files + 1, self.bytes + size


def verify(dataset: Dataset, workers: int | None = None, repair: bool = False) -> int:
    """Re-read the dataset, print what is wrong and how to mend it; returns the exit status.

    With `repair`, damaged files that their stage makes again from what it has are removed (never
    selections or dataset.json, nor what could not be read), and bad journal lines are dropped.
    Raises `UserError` for that while a run may be at work.
    """
    if not dataset.root.is_dir() or not any(dataset.root.glob("*")):
        raise UserError(f"no dataset at {dataset.root}: expected a folder with dataset.json")
    if repair:
        refuse_live_runs(dataset)
    inventory = _take_inventory(dataset)
    checked = Checked([], [])
    _check_identity(dataset, checked)
    _check_journals(dataset, checked)
    damaged = _check_named(inventory, workers or len(os.sched_getaffinity(0)), checked)
    _note_strays(inventory, checked.notes)
    _note_staging(dataset, checked.notes)
    if repair:
        checked.notes += repair_damage(dataset, damaged)
    return _report(checked)


def _take_inventory(dataset: Dataset) -> Inventory:
    try:
        return Inventory.take(dataset)
    except OSError as error:
        raise UserError(
            f"{error.filename} cannot be read ({error.strerror}), and without its lines nobody "
            "knows what was written: make it readable, then verify again"
        ) from error


def _check_identity(dataset: Dataset, checked: Checked) -> None:
    path = dataset.identity_file
    damage = identity_damage(dataset)
    if damage:
        problem = "missing" if not path.exists() else damage.removeprefix(f"{path} ")
        checked.findings.append(Finding(path.name, problem, "restore it from a copy"))
    if path.exists():
        checked.count(path.stat().st_size)
        if not damage and b'"crc"' not in path.read_bytes():
            checked.notes.append(
                f"not covered: {path.name} holds no checksum (removed, or made by an older release)"
            )


def _check_journals(dataset: Dataset, checked: Checked) -> None:
    for folder in sorted((dataset.root / "status").glob("*")):
        journals = sorted(folder.glob("*.jsonl"))
        for index, journal in enumerate(journals):
            try:
                _check_journal(dataset, journal, journals[index + 1 :], checked)
            except OSError as error:
                path = dataset.relative(journal)
                problem = f"cannot be read: {error.strerror or error}"
                checked.findings.append(Finding(path, problem, f"run {_command(folder.name)}"))


def _check_journal(dataset: Dataset, journal: Path, later: list[Path], checked: Checked) -> None:
    path, size = dataset.relative(journal), 0
    for line in journal_lines(journal):
        size += len(line.data)
        if line.damage is None:
            continue
        problem = _LINE_WORDS[line.damage].format(line.number)
        if line.damage == "torn" and any(map(_has_sound_line, later)):
            checked.notes.append(f"{path}: {problem} (a run was killed; the stage ran since)")
            continue
        again = "" if line.damage == "respelt" else f"run {_command(journal.parent.name)}, then "
        mend = f"{again}`pipeline verify --repair`"
        checked.findings.append(Finding(path, problem, mend))
    checked.count(size)


def _has_sound_line(journal: Path) -> bool:
    return any(line.damage is None for line in journal_lines(journal))


def _check_named(inventory: Inventory, workers: int, checked: Checked) -> dict[str, Problem]:
    """Hash all named files; returns path and problem of those that are not as written."""
    expected = {path: [one.record for one in lines] for path, lines in inventory.named.items()}
    outside = [path for path in expected if _leaves_dataset(path)]
    total = sum(records[-1].bytes for records in expected.values())
    with meter("verify", total // _MB, "MB") as progress:
        advance = _ByteCounter(progress)
        inside = {path: rows for path, rows in expected.items() if path not in set(outside)}
        damaged = damaged_files(inventory.dataset.root, inside, workers, advance)
        checked.seconds = progress.seconds
    checked.files += len(inside) - sum(one.kind == "missing" for one in damaged.values())
    checked.bytes += advance.total
    beyond = Problem("outside", "the journal names a file outside the dataset")
    damaged |= dict.fromkeys(outside, beyond)
    tiles_by = _tile_writer(inventory.dataset)
    for path in sorted(damaged):
        named = inventory.named[path][-1]
        mend = _mend(named, damaged[path], tiles_by)
        checked.findings.append(Finding(path, damaged[path].words, mend))
    return damaged


def _leaves_dataset(path: str) -> bool:
    return path.startswith("/") or ".." in path.split("/")


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


def _command(stage: str) -> str:
    return "`evaluate generate`" if stage == "generate" else f"`pipeline {stage}`"


def _tile_writer(dataset: Dataset) -> str:
    try:
        return tile_writer(read_identity(dataset))
    except UserError:
        return tile_writer({})


def _mend(named: Named, problem: Problem, tiles_by: str) -> str:
    """How to have the file again; `tiles_by` is the command that writes the dataset's tiles."""
    if problem.kind == "unreadable":
        return "it may be sound: make it readable (its rights? the file system?), verify again"
    missing = problem.kind == "missing"
    name = named.entry.slide_id
    if named.stage == "select":
        again = f"run `pipeline select --name {name}` with the same options"
        gone = f", or `pipeline select --remove {name}`" if missing else ""
        return f"{again}{gone}" if missing else f"remove it, {again}"
    command = tiles_by if named.stage == "tile" else _command(named.stage)
    if named.stage in ("scan", "tissue") and "import" in tiles_by:
        command = tiles_by
    elif "source" in named.entry.values:
        command = "`pipeline import`"
    return f"run {command}" if missing else f"run `pipeline verify --repair`, then {command}"


def _note_strays(inventory: Inventory, notes: list[str]) -> None:
    strays = inventory.strays()
    for files, what in (
        (strays.superseded, "superseded (`pipeline prune` removes them)"),
        (strays.leftover, "leftovers that no journal line names (`pipeline prune` removes them)"),
        (strays.uncovered, "not covered: no journal line holds their sum"),
    ):
        if files:
            notes.append(f"{what}: {_count(files)}, e.g. {_examples(one.path for one in files)}")
    if strays.links:
        notes.append(f"linked folders, not searched for leftovers: {_examples(strays.links)}")


def _count(files: list[Stray]) -> str:
    return f"{len(files):,} files, {format_bytes(sum(one.bytes for one in files))}"


def _examples(names: Iterable[str]) -> str:
    listed = list(names)
    more = f" and {len(listed) - _EXAMPLES:,} more" if len(listed) > _EXAMPLES else ""
    return ", ".join(listed[:_EXAMPLES]) + more


def _note_staging(dataset: Dataset, notes: list[str]) -> None:
    for folder in staging_folders(dataset):
        state = "may be under way" if folder.alive else "is dead (`pipeline prune` removes it)"
        notes.append(
            f".tmp/{folder.path.name}: the run {state}; "
            f"{folder.files:,} files, {format_bytes(folder.bytes)}"
        )


def _print_findings(findings: list[Finding]) -> None:
    """A table, or lines where it would be too wide: names are for copying, never cut or folded."""
    longest = max(len(one.path) for one in findings)
    if longest + _WORDS_WIDTH > stdout.width:
        for one in findings:
            say(f"{one.path}: {one.problem}; {one.mend}")
        return
    table = Table(title="verify: findings")
    table.add_column("file", no_wrap=True, min_width=longest)
    table.add_column("what is wrong")
    table.add_column("how to mend it")
    for one in findings:
        table.add_row(escape(one.path), escape(one.problem), escape(one.mend))
    stdout.print(table)


def _report(checked: Checked) -> int:
    if checked.findings:
        _print_findings(checked.findings[:_ROWS_SHOWN])
        _say_rest(checked.findings[_ROWS_SHOWN:])
    for note in checked.notes:
        say(note)
    rate = f" ({checked.bytes / _MB / checked.seconds:.0f} MB/s)" if checked.seconds > 0.05 else ""
    bad = len(checked.findings)
    verdict = f"{bad:,} finding{'s'[: bad > 1]}" if bad else "all as written"
    say(
        f"verify: {checked.files:,} files, {format_bytes(checked.bytes)} checked in "
        f"{format_seconds(checked.seconds)}{rate}: {verdict}"
    )
    return EXIT_FAILURES if bad else EXIT_OK


def _say_rest(rest: list[Finding]) -> None:
    for mend, count in Counter(one.mend for one in rest).most_common(_EXAMPLES):
        say(f"... and {count:,} more: {mend}")
