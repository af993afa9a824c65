"""`prune`: remove what no selection needs, and what crashes and older parameters left behind.

What a kill -9 leaves is always what the next run of `prune` removes: first a journal line says
`pruned`, from which moment no reader sees the shard, then its files go.
"""

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
from rich.table import Table

from common.console import EXIT_OK, meter, say, stdout
from common.errors import UserError
from common.text import format_bytes, format_seconds
from pipeline.dataset import (
    BLOCK_ROWS,
    Dataset,
    Entry,
    Run,
    Selection,
    read_identity,
    read_selection,
    software_versions,
)
from pipeline.upkeep.verify.inventory import Inventory, Stray, tile_writer
from pipeline.upkeep.verify.runs import StagingFolder, staging_folders
from pipeline.upkeep.verify.sums import sha256_of

_STAGES = ("tile", "cache")
_RECORD = "/encoder.json"
_ENTRIES_A_TURN = 256
_BUFFER_BYTES = 1 << 20

Needs = dict[str, list[npt.NDArray[np.int32]]]
"""Per slide, the ascending ranks of each selection that counts."""


@dataclass
class Plan:
    """What is to be removed, and what is left and why."""

    entries: dict[str, list[Entry]] = field(default_factory=dict)
    strays: list[Stray] = field(default_factory=list)
    folders: list[StagingFolder] = field(default_factory=list)
    rows: list[tuple[str, int, int]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def files(self) -> int:
        """Number of files to be removed."""
        return sum(row[1] for row in self.rows)

    @property
    def bytes(self) -> int:
        """Bytes to be freed."""
        return sum(row[2] for row in self.rows)


def prune(dataset: Dataset, keep: Sequence[str] = (), yes: bool = False) -> int:
    """List, or with `yes` remove, what no standing (or kept) selection needs.

    Returns the exit status. Raises `UserError` where it is not certain what is needed.
    """
    inventory = Inventory.take(dataset)
    plan = make_plan(inventory, keep)
    _print_plan(plan)
    if not (plan.files or plan.folders or plan.entries):
        say(f"prune: nothing to remove in {dataset.root}")
        return EXIT_OK
    what = f"{plan.files:,} files, {format_bytes(plan.bytes)}"
    if not yes:
        say(f"prune: would remove {what}; nothing was removed, say --yes to do it")
        return EXIT_OK
    try:
        seconds = _remove(dataset, plan)
    except OSError as error:
        raise UserError(
            f"cannot remove {error.filename}: {error.strerror}; mend that and prune again"
        ) from error
    say(f"prune: removed {what} from {dataset.root} in {format_seconds(seconds)}")
    return EXIT_OK


def make_plan(inventory: Inventory, keep: Sequence[str]) -> Plan:
    """What may go; nothing is touched."""
    dataset = inventory.dataset
    plan = Plan()
    needs = _needs(inventory, keep, plan)
    strays = inventory.strays()
    linked = tuple(f"{link}/" for link in strays.links)
    folders = staging_folders(dataset)
    plan.folders = [folder for folder in folders if not folder.alive]
    alive = [folder for folder in folders if folder.alive]
    for stage in _STAGES:
        _plan_stage(inventory, stage, needs, linked, bool(alive), plan)
    files, size = sum(f.files for f in plan.folders), sum(f.bytes for f in plan.folders)
    plan.rows.append((".tmp of runs that died", files, size))
    for kind, found in (("superseded", strays.superseded), ("no line names", strays.leftover)):
        if alive and found:
            plan.notes.append(
                f"{len(found):,} files ({kind}) stay, they may be of the run "
                f"{alive[0].path.name}, which may be under way"
            )
            continue
        plan.strays += found
        plan.rows.append((f"files: {kind}", len(found), sum(one.bytes for one in found)))
    return plan


def _needs(inventory: Inventory, keep: Sequence[str], plan: Plan) -> Needs:
    """The ranks that selections need; every selection that counts is sound, or it is refused."""
    dataset = inventory.dataset
    names = list(keep) or dataset.selection_names()
    if not names:
        raise UserError(
            f"{dataset.root} has no selection, so that nothing would be needed; run "
            "`python -m pipeline select` first"
        )
    _refuse_missing(inventory, keep, plan)
    needs: Needs = {}
    for name in names:
        for slide_id, ranks in _sound_selection(inventory, name).items():
            needs.setdefault(slide_id, []).append(ranks)
    others = sorted(set(dataset.selection_names()) - set(names))
    if others:
        plan.notes.append(
            f"selections {', '.join(others)} stay, what only they need goes: {_writers(dataset)} "
            "would write it again"
        )
    return needs


def _writers(dataset: Dataset) -> str:
    """What writes tiles and features again."""
    tiles = tile_writer(read_identity(dataset))
    return f"{tiles} and `pipeline cache`"


def _refuse_missing(inventory: Inventory, keep: Sequence[str], plan: Plan) -> None:
    """A selection whose file is lost may need anything: only naming others makes that plain."""
    dataset = inventory.dataset
    for path in inventory.named:
        table = path.startswith("selections/") and path.endswith(".parquet")
        if not table or (dataset.root / path).exists():
            continue
        name = Path(path).stem
        if not keep or name in keep:
            raise UserError(
                f"selection '{name}' is missing from {dataset.root}: select it again, take it off "
                f"with `select --remove {name}`, or name those that count with --keep-selection"
            )
        plan.notes.append(f"selection '{name}' is missing; `select --remove {name}` takes it off")


def _sound_selection(inventory: Inventory, name: str) -> Selection:
    """A selection as it was written: a flipped byte must not cost a shard."""
    dataset = inventory.dataset
    selection = read_selection(dataset, name)
    path = dataset.selection_file(name)
    lines = inventory.named.get(dataset.relative(path), [])
    found = sha256_of(path, bytearray(_BUFFER_BYTES))
    if lines and all((one.record.bytes, one.record.sha256) != found for one in lines):
        raise UserError(f"{path} was altered since it was written: remove it and select it again")
    return selection


def _plan_stage(
    inventory: Inventory,
    stage: str,
    needs: Needs,
    linked: tuple[str, ...],
    alive: bool,
    plan: Plan,
) -> None:
    """The stage's standing shards that no need touches, scope by scope."""
    by_scope: dict[str, list[Entry]] = {}
    for entry in inventory.current(stage):
        if entry.outcome == "done":
            by_scope.setdefault(entry.scope, []).append(entry)
    chosen: list[Entry] = []
    left: set[str] = set()
    for scope, entries in by_scope.items():
        shards = [entry for entry in entries if entry.start >= 0]
        idle = [entry for entry in shards if not is_needed(needs.get(entry.slide_id, []), entry)]
        behind = [e for e in idle if any(f.path.startswith(linked) for f in e.files)]
        if behind:
            plan.notes.append(f"{stage} {scope}: {len(behind):,} shards in a linked folder stay")
            idle = [e for e in idle if not any(f.path.startswith(linked) for f in e.files)]
        if len(idle) < len(shards):
            left.add(scope)
        chosen += idle
        _count_entries(inventory.dataset, plan, f"{stage} {scope}", idle)
    # encoder.json tells what its features were made with, and refuses others: it goes with them,
    # but a run under way writes it before the first of them.
    records = [
        entry
        for scope, entries in by_scope.items()
        if scope.endswith(_RECORD) and scope.removesuffix(_RECORD) not in left and not alive
        for entry in entries
    ]
    _count_entries(inventory.dataset, plan, "encoder.json without features", records)
    if chosen or records:
        plan.entries.setdefault(stage, []).extend(chosen + records)


def is_needed(ranks: Sequence[npt.NDArray[np.int32]], entry: Entry) -> bool:
    """Whether a selected rank lies in one of the blocks of the shard."""
    first = entry.start // BLOCK_ROWS * BLOCK_ROWS
    stop = -(-entry.stop // BLOCK_ROWS) * BLOCK_ROWS
    return any(np.searchsorted(one, first) < np.searchsorted(one, stop) for one in ranks)


def _count_entries(dataset: Dataset, plan: Plan, kind: str, entries: list[Entry]) -> None:
    sizes = [size for entry in entries for size in _sizes(dataset, entry)]
    plan.rows.append((kind, len(sizes), sum(sizes)))


def _sizes(dataset: Dataset, entry: Entry) -> Iterator[int]:
    for record in entry.files:
        try:
            yield (dataset.root / record.path).lstat().st_size
        except OSError:
            continue


def _print_plan(plan: Plan) -> None:
    rows = [row for row in plan.rows if row[1]]
    if rows:
        table = Table("what", "files", "bytes", title="prune: what nothing needs")
        for kind, files, size in rows:
            table.add_row(kind, f"{files:,}", format_bytes(size))
        stdout.print(table)
    for note in plan.notes:
        say(f"note: {note}")


def _remove(dataset: Dataset, plan: Plan) -> float:
    """Do it: lines first, then files. Returns seconds."""
    with meter("prune", plan.files, "files") as progress:
        for folder in plan.folders:
            if folder.path.is_dir() and not folder.path.is_symlink():
                shutil.rmtree(folder.path)
            else:
                folder.path.unlink()
            progress.advance(folder.files)
        for stray in plan.strays:
            _remove_stray(dataset, stray)
            progress.advance()
        versions = software_versions()
        for stage, entries in plan.entries.items():
            with Run(dataset, stage, versions) as run:
                for start in range(0, len(entries), _ENTRIES_A_TURN):
                    turn = entries[start : start + _ENTRIES_A_TURN]
                    run.append(map(_pruned, turn))
                    for entry in turn:
                        progress.advance(_remove_files(dataset, entry))
        return progress.seconds


def _pruned(entry: Entry) -> Entry:
    """The line that supersedes an entry."""
    return Entry(
        entry.slide_id, "pruned", entry.fingerprint, "no selection needs it", scope=entry.scope,
        start=entry.start, stop=entry.stop,
    )  # fmt: skip


def _remove_files(dataset: Dataset, entry: Entry) -> int:
    """Remove the files that an entry named, if they lie inside; returns how many."""
    removed = 0
    root = dataset.root.resolve()
    for record in entry.files:
        path = dataset.root / record.path
        if path.parent.resolve().is_relative_to(root) and path.exists():
            path.unlink()
            removed += 1
            _remove_empty(dataset, path.parent)
    return removed


def _remove_stray(dataset: Dataset, stray: Stray) -> None:
    """Remove a file that is still the one that was listed."""
    path = dataset.root / stray.path
    try:
        stat = path.lstat()
    except FileNotFoundError:
        return
    if (stat.st_ino, stat.st_mtime_ns) == (stray.inode, stray.mtime_ns):
        path.unlink()
        _remove_empty(dataset, path.parent)


def _remove_empty(dataset: Dataset, folder: Path) -> None:
    """Remove folders that were left empty, up to the dataset's own."""
    while folder != dataset.root and folder.is_relative_to(dataset.root):
        try:
            folder.rmdir()
        except OSError:
            return
        folder = folder.parent
