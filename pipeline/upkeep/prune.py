"""`prune`: remove what no selection needs, and what crashes and older parameters left behind.

Or, with an encoder's name, all of its features, so that they can be made with other weights.

What a kill -9 leaves is always what the next run of `prune` removes: first a journal line says
`pruned`, from which moment no reader sees the shard, then its files go.
"""

from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
from rich.table import Table

from common.console import EXIT_OK, open_meter, print_line, stdout
from common.errors import UserError
from common.text import format_bytes, format_seconds, list_some
from pipeline.dataset import (
    BLOCK_ROWS,
    Dataset,
    Entry,
    Run,
    read_identity,
    read_selection,
    software_versions,
)
from pipeline.dataset.claim import FEATURES, SELECTIONS, hold_claim
from pipeline.dataset.inside import remove_file, remove_tree
from pipeline.dataset.layout import DAMAGED_DIR
from pipeline.upkeep.verify.damaged import (
    STAGE as VERIFY,
)
from pipeline.upkeep.verify.damaged import (
    is_replaced,
    journalled_moves,
    list_damaged,
)
from pipeline.upkeep.verify.inventory import Inventory, Stray, read_inventory, tile_writer
from pipeline.upkeep.verify.runs import StagingFolder, live_run, staging_folders
from pipeline.upkeep.verify.sums import sha256_of

_CACHE = "cache"
_STAGES = ("tile", _CACHE)
_RECORD = "/encoder.json"
_ENTRIES_PER_TURN = 256
_BUFFER_BYTES = 1 << 20

Needs = dict[str, list[npt.NDArray[np.int32]]]
"""Per slide, the ascending ranks of each selection that counts."""


@dataclass(frozen=True)
class PlanRow:
    """A kind of files to be removed: how many, and their bytes."""

    kind: str
    files: int
    bytes: int


@dataclass
class PrunePlan:
    """What is to be removed, and what stays and why."""

    entries: dict[str, list[Entry]] = field(default_factory=dict)
    strays: list[Stray] = field(default_factory=list)
    folders: list[StagingFolder] = field(default_factory=list)
    rows: list[PlanRow] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    reason: str = "no selection needs it"
    title: str = "what nothing needs"

    @property
    def files(self) -> int:
        """Number of files to be removed."""
        return sum(row.files for row in self.rows)

    @property
    def bytes(self) -> int:
        """Bytes to be freed."""
        return sum(row.bytes for row in self.rows)

    def add_entries(self, dataset: Dataset, kind: str, entries: Iterable[Entry]) -> None:
        """Count the files that the entries name, as they are on disk."""
        sizes = []
        for record in (record for entry in entries for record in entry.files):
            try:
                sizes.append((dataset.root / record.path).lstat().st_size)
            except OSError:
                continue
        self.rows.append(PlanRow(kind, len(sizes), sum(sizes)))


def prune(
    dataset: Dataset,
    keep: Sequence[str] = (),
    yes: bool = False,
    features: str = "",
    damaged: bool = False,
) -> int:
    """List, or with `yes` remove, what no selection (of those to keep) needs.

    With `features`, the name of an encoder, all of its features and nothing else; with `damaged`
    also what is in `.damaged` and was not made again. Returns the exit status. Raises `UserError`
    where it is not certain what is needed, or may be removed.
    """
    if features and (keep or damaged):
        other = "--keep-selection" if keep else "--damaged"
        raise UserError(f"--features removes an encoder's features whole: leave {other} out")
    if not yes:
        return _prune_claimed(dataset, keep, yes, features, damaged)
    if features and (running := live_run(dataset)):
        raise UserError(f"--features {features}: {running}")
    # What is planned is removed under the same claim: a selection that is made at the same time
    # waits, and `tile` and `cache` then find out what it lacks.
    with hold_claim(dataset, FEATURES if features else SELECTIONS, "prune"):
        return _prune_claimed(dataset, keep, yes, features, damaged)


def _prune_claimed(
    dataset: Dataset, keep: Sequence[str], yes: bool, features: str, damaged: bool
) -> int:
    inventory = read_inventory(dataset)
    plan = plan_features(inventory, features) if features else make_plan(inventory, keep, damaged)
    if any(row.files for row in plan.rows):
        table = Table("what", "files", "bytes", title=f"prune: {plan.title}")
        for row in plan.rows:
            if row.files:
                table.add_row(row.kind, f"{row.files:,}", format_bytes(row.bytes))
        stdout.print(table)
    for note in plan.notes:
        print_line(f"note: {note}")
    if not (plan.files or plan.folders or plan.entries):
        nothing = f"no features of {features} in" if features else "nothing to remove in"
        print_line(f"prune: {nothing} {dataset.root}")
        return EXIT_OK
    what = f"{plan.files:,} files, {format_bytes(plan.bytes)}"
    # Removing is the exception: tiles of a cohort take days to cut again.
    if not yes:
        print_line(f"prune: would remove {what}; nothing was removed, give --yes to do it")
        return EXIT_OK
    try:
        seconds = _remove_planned(dataset, plan)
    except OSError as error:
        raise UserError(
            f"cannot remove {error.filename}: {error.strerror}; fix that and prune again"
        ) from error
    print_line(f"prune: removed {what} from {dataset.root} in {format_seconds(seconds)}")
    return EXIT_OK


def make_plan(inventory: Inventory, keep: Sequence[str], damaged: bool = False) -> PrunePlan:
    """What may go, with `damaged` also damaged files without a replacement; nothing is touched."""
    # Needs first: where they are uncertain, nothing at all is planned.
    plan = PrunePlan()
    needs = _find_needs(inventory, keep, plan)
    strays, folders = inventory.list_strays(), staging_folders(inventory.dataset)
    if inventory.dataset.staging_dir("").is_symlink():
        plan.notes.append(".tmp is a link: what is behind it stays")
        folders = []
    plan.folders = [folder for folder in folders if not folder.alive]
    alive = [folder for folder in folders if folder.alive]
    # What is behind a link may belong to another dataset too.
    linked = tuple(f"{link}/" for link in strays.links)
    for stage in _STAGES:
        _plan_stage(inventory, stage, needs, linked, bool(alive), plan)
    files, size = sum(f.files for f in plan.folders), sum(f.bytes for f in plan.folders)
    plan.rows.append(PlanRow(".tmp of runs that died", files, size))
    for kind, found in (("superseded", strays.superseded), ("no line names", strays.leftover)):
        if alive and found:
            plan.notes.append(
                f"{len(found):,} files ({kind}) stay, they may be of the run "
                f"{alive[0].path.name}, which may be under way"
            )
            continue
        plan.strays += found
        size = sum(stray.bytes for stray in found)
        plan.rows.append(PlanRow(f"files: {kind}", len(found), size))
    _plan_damaged(inventory, damaged, plan)
    return plan


def _plan_damaged(inventory: Inventory, whole: bool, plan: PrunePlan) -> None:
    """What `verify --repair` moved: all with `whole`, else where the file was made again."""
    files = list_damaged(inventory.dataset)
    going = [file for file in files if whole or is_replaced(inventory, file.path)]
    if staying := len(files) - len(going):
        size = sum(file.bytes for file in files) - sum(file.bytes for file in going)
        plan.notes.append(
            f"{staying:,} files, {format_bytes(size)}, stay in {DAMAGED_DIR}: they were not made "
            "again, and are perhaps all that is left (--damaged takes them too)"
        )
    moves = journalled_moves(inventory.dataset)
    if journalled := [moves[file.path] for file in going if file.path in moves]:
        plan.entries[VERIFY] = journalled
    plan.strays += [file for file in going if file.path not in moves]
    size = sum(file.bytes for file in going)
    plan.rows.append(PlanRow(f"{DAMAGED_DIR}: damaged files", len(going), size))


def plan_features(inventory: Inventory, encoder: str) -> PrunePlan:
    """All features of an encoder, of every slide, tile size, kind and view; nothing is touched.

    `encoder` may be a folder's name, h0-mini+jpeg70, which takes the features of that view alone.
    Raises `UserError` for a name of which the dataset never had features.
    """
    strays = inventory.list_strays()
    linked = tuple(f"{link}/" for link in strays.links)
    plan = PrunePlan(
        reason=f"prune --features {encoder}", title=f"features of {encoder}, whoever needs them"
    )
    by_scope: dict[str, list[Entry]] = {}
    for entry in inventory.current_entries(_CACHE):
        if entry.outcome == "done" and is_of_encoder(entry.scope, encoder):
            by_scope.setdefault(entry.scope, []).append(entry)
    for scope, entries in by_scope.items():
        if any(record.path.startswith(linked) for entry in entries for record in entry.files):
            plan.notes.append(f"{scope}: features in a linked folder stay, remove them there")
            continue
        plan.entries.setdefault(_CACHE, []).extend(entries)
        plan.add_entries(inventory.dataset, f"{_CACHE} {scope}", entries)
    # The record refuses other weights as long as any features are left: it goes last.
    plan.entries.get(_CACHE, []).sort(key=lambda entry: entry.scope.endswith(_RECORD))
    # Files that a killed run left, or a line that was lost; the user named all of the encoder's.
    plan.strays = [
        stray
        for stray in (*strays.superseded, *strays.leftover, *strays.uncovered)
        if stray.path.startswith("features/") and stray.path.endswith((".parquet", _RECORD))
        and is_of_encoder(stray.path.partition("/")[2], encoder)
    ]  # fmt: skip
    size = sum(stray.bytes for stray in plan.strays)
    plan.rows.append(PlanRow("files that no current line names", len(plan.strays), size))
    if not plan.files and not plan.entries:
        _check_encoder_name(inventory, encoder)
    return plan


def is_of_encoder(place: str, encoder: str) -> bool:
    """Whether a scope, or a path below `features/`, is of an encoder or of its folder.

    >>> scope = "224/h0-mini+jpeg70/cls"
    >>> [is_of_encoder(scope, name) for name in ("h0-mini", "h0-mini+jpeg70", "h0", "h0-mini+x")]
    [True, True, False, False]
    """
    folder = place.partition("/")[2].partition("/")[0]
    return encoder in (folder, folder.partition("+")[0])


def _check_encoder_name(inventory: Inventory, encoder: str) -> None:
    """Refuse a name of which no line ever was: a slip of the pen must not look like success."""
    scopes = [entry.scope for entry in inventory.journals.get(_CACHE, [])]
    if any(is_of_encoder(scope, encoder) for scope in scopes):
        return
    there = sorted({scope.split("/")[1] for scope in scopes if "/" in scope})
    raise UserError(
        f"--features {encoder}: {inventory.dataset.root} has no such features; there: "
        f"{list_some(there)}"
    )


def _find_needs(inventory: Inventory, keep: Sequence[str], plan: PrunePlan) -> Needs:
    """The ranks that selections need; a selection that is missing or altered is refused."""
    dataset = inventory.dataset
    existing = dataset.selection_names()
    names = list(keep) or existing
    if not names:
        raise UserError(
            f"{dataset.root} has no selection, so that nothing would be needed; run "
            "`python -m pipeline select` first"
        )
    for path in inventory.named:
        is_table = path.startswith("selections/") and path.endswith(".parquet")
        if not is_table or (dataset.root / path).exists():
            continue
        # A selection whose file is lost may need anything: only naming the others settles it.
        name = Path(path).stem
        if not keep or name in keep:
            raise UserError(
                f"selection '{name}' is missing from {dataset.root}: select it again, take it off "
                f"with `select --remove {name}`, or name those that count with --keep-selection"
            )
        plan.notes.append(f"selection '{name}' is missing; `select --remove {name}` takes it off")
    needs: Needs = {}
    for name in names:
        selection = read_selection(dataset, name)
        # As it was written: a flipped byte must not cost a shard.
        file = dataset.selection_file(name)
        lines = inventory.named.get(dataset.relative_path(file), [])
        now = sha256_of(file, bytearray(_BUFFER_BYTES))
        if lines and all((line.record.bytes, line.record.sha256) != now for line in lines):
            raise UserError(f"{file} was altered since it was written: remove and select it again")
        for slide_id, ranks in selection.items():
            needs.setdefault(slide_id, []).append(ranks)
    if others := sorted(set(existing) - set(names)):
        writers = f"{tile_writer(read_identity(dataset))} and `pipeline cache`"
        plan.notes.append(
            f"selections {', '.join(others)} stay, what only they need goes: {writers} "
            "would write it again"
        )
    return needs


def _plan_stage(
    inventory: Inventory,
    stage: str,
    needs: Needs,
    linked: tuple[str, ...],
    alive: bool,
    plan: PrunePlan,
) -> None:
    """The stage's current shards that no need touches, scope by scope."""
    by_scope: dict[str, list[Entry]] = {}
    for entry in inventory.current_entries(stage):
        if entry.outcome == "done":
            by_scope.setdefault(entry.scope, []).append(entry)
    chosen: list[Entry] = []
    remaining: set[str] = set()
    for scope, entries in by_scope.items():
        # A line without ranks is a table or a record, and goes with the shards below.
        shards = [entry for entry in entries if entry.start >= 0]
        idle = [entry for entry in shards if not is_needed(needs.get(entry.slide_id, []), entry)]
        removable = [e for e in idle if not any(f.path.startswith(linked) for f in e.files)]
        if len(removable) < len(idle):
            count = len(idle) - len(removable)
            plan.notes.append(f"{stage} {scope}: {count:,} shards in a linked folder stay")
        if len(removable) < len(shards):
            remaining.add(scope)
        chosen += removable
        plan.add_entries(inventory.dataset, f"{stage} {scope}", removable)
    # encoder.json says what its features were made with, and refuses others: it goes with them,
    # but a run under way writes it before the first of them.
    records = [
        entry
        for scope, entries in by_scope.items()
        if scope.endswith(_RECORD) and scope.removesuffix(_RECORD) not in remaining and not alive
        for entry in entries
    ]
    plan.add_entries(inventory.dataset, "encoder.json without features", records)
    if chosen or records:
        plan.entries[stage] = chosen + records


def is_needed(ranks: Sequence[npt.NDArray[np.int32]], entry: Entry) -> bool:
    """Whether a selected rank is in one of the blocks of the shard.

    >>> shard = Entry("S", "done", "", start=20, stop=32)
    >>> [is_needed([np.array([rank], np.int32)], shard) for rank in (15, 16, 31, 32)]
    [False, True, True, False]
    """
    first = entry.start // BLOCK_ROWS * BLOCK_ROWS
    stop = -(-entry.stop // BLOCK_ROWS) * BLOCK_ROWS
    return any(np.searchsorted(some, first) < np.searchsorted(some, stop) for some in ranks)


def _remove_planned(dataset: Dataset, plan: PrunePlan) -> float:
    """Do it: lines first, then files. Returns seconds."""
    with open_meter("prune", plan.files, "files") as progress:
        # What no journal names goes without a line.
        for folder in plan.folders:
            remove_tree(dataset, dataset.relative_path(folder.path))
            progress.advance(folder.files)
        versions = software_versions()
        for stage, entries in plan.entries.items():
            reason = "made again, or not wanted" if stage == VERIFY else plan.reason
            with Run(dataset, stage, versions) as run:
                for start in range(0, len(entries), _ENTRIES_PER_TURN):
                    turn = entries[start : start + _ENTRIES_PER_TURN]
                    # The lines first: from then on no reader looks for the files.
                    run.append(
                        Entry(
                            entry.slide_id, "pruned", entry.fingerprint, reason,
                            scope=entry.scope, start=entry.start, stop=entry.stop,
                        )
                        for entry in turn
                    )  # fmt: skip
                    for entry in turn:
                        progress.advance(_remove_files(dataset, entry))
        for stray in plan.strays:
            _remove_stray(dataset, stray)
            progress.advance()
        return progress.seconds


def _remove_files(dataset: Dataset, entry: Entry) -> int:
    """Remove the files that an entry named; returns how many."""
    removed = 0
    for record in entry.files:
        with suppress(FileNotFoundError):
            removed += remove_file(dataset, record.path)
    return removed


def _remove_stray(dataset: Dataset, stray: Stray) -> None:
    """Remove a file that is still the one that was listed."""
    with suppress(FileNotFoundError):
        remove_file(dataset, stray.path, (stray.inode, stray.bytes, stray.mtime_ns))
