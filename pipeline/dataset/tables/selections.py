"""selections/<name>.parquet: rows (slide_id, rank), with the plan that made them."""

import hashlib
import json
import re
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from common.errors import UserError
from common.files import open_text, read_lines
from common.json_text import parse_json
from common.text import list_some, one_line
from pipeline.dataset.commit import FileRecord, HashingFile, commit_file
from pipeline.dataset.layout import Dataset, check_slide_id
from pipeline.dataset.ledger import Ledger
from pipeline.dataset.tables.candidates import candidate_count
from pipeline.dataset.tables.expansion import require_bounded
from pipeline.dataset.tables.parquet_table import (
    MOST_ROWS,
    Column,
    check_column,
    read_schema,
    unreadable_error,
)


@dataclass(frozen=True)
class Selection:
    """A named view of a dataset: ranks of slides, sorted by (slide_id, rank).

    `ranks[offsets[i]:offsets[i + 1]]` (int32, ascending) belong to `slide_ids[i]`.
    """

    name: str
    slide_ids: tuple[str, ...]
    offsets: npt.NDArray[np.int64]
    ranks: npt.NDArray[np.int32]
    plan: dict[str, Any]

    @property
    def rows(self) -> int:
        """Number of selected tiles."""
        return len(self.ranks)

    def ranks_of(self, index: int) -> npt.NDArray[np.int32]:
        """Ascending ranks, int32 [n], of the slide at that position."""
        return self.ranks[self.offsets[index] : self.offsets[index + 1]]

    def items(self) -> Iterator[tuple[str, npt.NDArray[np.int32]]]:
        """(slide_id, ranks int32 [n]) pairs, sorted by slide_id."""
        for index, slide_id in enumerate(self.slide_ids):
            yield slide_id, self.ranks_of(index)

    @cached_property
    def content_hash(self) -> str:
        """sha256 of the rows (ids as UTF-8, ranks as int32): which tiles, not the name or plan."""
        sha = hashlib.sha256()
        for slide_id, ranks in self.items():
            sha.update(slide_id.encode() + b"\0" + ranks.astype("<i4").tobytes() + b"\0")
        return sha.hexdigest()


def make_selection(
    name: str, ranks_by_slide: dict[str, npt.NDArray[np.int32]], plan: dict[str, Any]
) -> Selection:
    """A selection from ranks int32 [n] by slide; slides without ranks are left out."""
    # Sorted: equal rows give an equal hash, whatever made them.
    slides = sorted(slide for slide, ranks in ranks_by_slide.items() if len(ranks))
    parts = [np.sort(ranks_by_slide[slide]).astype(np.int32) for slide in slides]
    offsets = np.zeros(len(slides) + 1, np.int64)
    np.cumsum([len(part) for part in parts], out=offsets[1:])
    ranks = np.concatenate(parts) if parts else np.zeros(0, np.int32)
    return Selection(name, tuple(slides), offsets, ranks, plan)


SELECTION_SCHEMA = pa.schema(
    [("slide_id", pa.dictionary(pa.int32(), pa.string())), ("rank", pa.int32())]
)
_SELECTION_GROUP_ROWS = 1 << 20


def write_selection(dataset: Dataset, run_id: str, selection: Selection) -> FileRecord:
    """Write selections/<name>.parquet with its plan in the file's metadata.

    No Python object per tile, and a row group at a time, so that 10^8 rows need little more memory
    than their ranks, 4 bytes each. Slides are dictionary codes and ranks are differences:
    consecutive ranks cost next to nothing.
    """
    final = dataset.selection_file(selection.name)
    return commit_file(dataset, run_id, final, lambda file: write_rows(file, selection))


def write_rows(file: HashingFile, selection: Selection) -> None:
    """The rows (slide_id, rank int32) of a selection as Parquet, its plan in the metadata."""
    plan = json.dumps(selection.plan, sort_keys=True)
    with pq.ParquetWriter(
        file,
        SELECTION_SCHEMA.with_metadata({"plan": plan}),
        use_dictionary=["slide_id"],
        column_encoding={"rank": "DELTA_BINARY_PACKED"},
        compression="zstd",
        write_statistics=["rank"],
        write_page_checksum=True,
    ) as writer:
        for start in range(0, selection.rows, _SELECTION_GROUP_ROWS):
            stop = min(start + _SELECTION_GROUP_ROWS, selection.rows)
            writer.write_table(_selection_rows(selection, start, stop))


def _selection_rows(selection: Selection, start: int, stop: int) -> pa.Table:
    """Rows [start, stop), the dictionary holding the slides that occur in them."""
    first = int(np.searchsorted(selection.offsets, start, "right")) - 1
    last = int(np.searchsorted(selection.offsets, stop, "left"))
    edges = np.clip(selection.offsets[first : last + 1], start, stop)
    codes = np.repeat(np.arange(last - first, dtype=np.int32), np.diff(edges))
    names = pa.array(selection.slide_ids[first:last], pa.string())
    slides = pa.DictionaryArray.from_arrays(pa.array(codes), names)
    ranks = pa.array(selection.ranks[start:stop])
    return pa.Table.from_arrays([slides, ranks], schema=SELECTION_SCHEMA)


def read_selection(dataset: Dataset, name: str) -> Selection:
    """The named selection, all of whose slides and ranks the dataset has.

    Raises `UserError`: where it is missing, with those there are; where its file is no table of
    (slide_id, rank) rows; where a slide is unknown or a rank is beyond the slide's candidates.
    """
    selection = read_selection_rows(dataset, name)
    check_selection(dataset, selection)
    return selection


def read_selection_rows(dataset: Dataset, name: str) -> Selection:
    """The named selection as its file has it; slides and candidates are not looked at.

    For commands that treat each slide alone, or report what is wrong.
    """
    path = dataset.selection_file(name)
    if not path.exists():
        known = ", ".join(dataset.selection_names()) or "none"
        raise UserError(
            f"no selection '{name}' in {dataset.root}; there: {known}; "
            f"make it with `python -m pipeline select --name {name}`"
        )
    return read_rows(path, name)


def check_selection(dataset: Dataset, selection: Selection) -> None:
    """Refuse a selection of slides that the dataset does not have, or of ranks beyond theirs.

    A rank is a row of the slide's candidates: any other one would be a tile that nothing knows of.
    """
    last = {
        slide_id: int(ranks[-1]) for slide_id, ranks in selection.items() if len(ranks)
    }  # ascending
    # The journal states the counts: footers of 10,000 files on a shared disk take minutes.
    lowest = _journalled_counts(dataset)
    doubtful = [slide_id for slide_id, rank in last.items() if rank >= lowest.get(slide_id, 0)]
    counts = _candidate_counts(dataset, doubtful)
    unknown = [slide_id for slide_id in doubtful if counts[slide_id] is None]
    if unknown and _has_candidates(dataset):
        raise UserError(
            f"{dataset.selection_file(selection.name)}: selection '{selection.name}' names slides "
            f"that {dataset.root} does not have or has no candidates of: "
            f"{list_some(unknown, 3)}; make it again with `python -m pipeline select`"
        )
    for slide_id in doubtful:
        count = counts[slide_id]
        if count is not None and last[slide_id] >= count:
            raise UserError(
                f"{dataset.selection_file(selection.name)}: selection '{selection.name}' names "
                f"rank {last[slide_id]} of slide {slide_id}, which has {count:,} candidates (ranks "
                "from 0): it was made from others; make it again with `python -m pipeline select`"
            )


_COUNT = re.compile(r'"candidate tiles": (\d{1,9})\b.*?"slide_id": "([^"\\]+)"')


def _journalled_counts(dataset: Dataset) -> dict[str, int]:
    """The least number of candidates that any journal line of a slide states.

    A look at the lines, thirty times as fast as reading the ledger: it can prove that ranks are
    there, and leaves every other slide to the ledger.
    """
    counts: dict[str, int] = {}
    try:
        for path in dataset.status_dir("tissue").glob("*.jsonl"):
            with open_text(path, errors="replace") as file:
                for line in read_lines(file):
                    if found := _COUNT.search(line):
                        count, slide_id = int(found[1]), found[2]
                        counts[slide_id] = min(count, counts.get(slide_id, count))
    except OSError:
        return {}  # which the ledger reports
    return counts


def _candidate_counts(dataset: Dataset, slides: Collection[str]) -> dict[str, int | None]:
    """The current number of candidates of each of the slides; None where there are none."""
    if not slides:
        return {}
    ledger = Ledger.read(dataset, "tissue")[""]

    def count_of(slide_id: str) -> int | None:
        latest = ledger.latest(slide_id)
        if latest is not None and type(latest.counts.get("candidate tiles")) is int:
            return latest.counts["candidate tiles"]
        exists = dataset.candidates_file(slide_id).exists()
        return candidate_count(dataset, slide_id) if exists else None

    with ThreadPoolExecutor(16) as pool:
        return dict(zip(slides, pool.map(count_of, slides), strict=True))


def _has_candidates(dataset: Dataset) -> bool:
    """Whether any slide has candidates; none has in the dataset of `plan-cohort`, only planned."""
    return dataset.status_dir("tissue").is_dir() or (dataset.root / "candidates").is_dir()


def read_plan(dataset: Dataset, name: str) -> dict[str, Any]:
    """A selection's plan, from the file's footer alone; {} where it has none."""
    path = dataset.selection_file(name)
    return _plan_of(path, read_schema(path, (), _HINT, _MOST_ROWS))


def _plan_of(path: Path, schema: pa.Schema) -> dict[str, Any]:
    """The plan in a file's metadata, whose parts that others rely on have their types."""
    try:
        plan = parse_json((schema.metadata or {}).get(b"plan", b"{}"))
        if not isinstance(plan, dict):
            raise ValueError("it is no JSON object")
        if not isinstance(plan.get("parameters", {}), dict):
            raise ValueError("its parameters are no JSON object")
        return plan
    except (ValueError, TypeError) as error:
        raise UserError(
            f"{path} cannot be read: the plan in its metadata: {one_line(error)}; remove it and "
            "run `select`"
        ) from error


_HINT = "make it again with `python -m pipeline select`"
_SLIDE = Column("slide_id", pa.string())
_RANK = Column("rank", pa.int32(), least=0, most=MOST_ROWS - 1)
_MOST_ROWS = 1 << 28
"""Tiles of a selection, 12 bytes each while they are sorted."""


def read_rows(path: Path, name: str, hint: str = _HINT) -> Selection:
    """A file of (slide_id, rank) rows in any order, sorted, with the plan in it.

    Read a row group at a time: 10^8 rows need twice the memory of their ranks. Raises `UserError`
    with the hint where columns are missing or of other types, and where a row has no value, a
    negative rank, an id that no slide can have, or is there twice.
    """
    known: dict[str, int] = {}
    plan = _plan_of(path, read_schema(path, (_SLIDE, _RANK), hint, _MOST_ROWS))
    try:
        with pq.ParquetFile(
            path, read_dictionary=["slide_id"], page_checksum_verification=True
        ) as file:
            rows = file.metadata.num_rows
            codes, ranks = np.empty(rows, np.int32), np.empty(rows, np.int32)
            start = 0
            for table in _read_parts(path, file):
                stop = start + table.num_rows
                if stop > rows:
                    raise ValueError(f"it has more than the {rows:,} rows that it states")
                slides = table["slide_id"]
                if slides.null_count:
                    check_column(path, slides, _SLIDE, hint, start)
                codes[start:stop] = _global_codes(slides, known)
                ranks[start:stop] = check_column(path, table["rank"], _RANK, hint, start).to_numpy()
                _refuse_repeated(path, list(known), codes[start:stop], ranks[start:stop], hint)
                start = stop
            if start != rows:
                raise ValueError(f"it has {start:,} rows and states {rows:,}")
    except (OSError, ValueError, KeyError, TypeError, MemoryError, pa.ArrowException) as error:
        raise unreadable_error(path, error, hint) from error
    try:
        for slide_id in known:
            check_slide_id(slide_id)
    except UserError as error:
        raise UserError(f"{path}: column 'slide_id': {error}; {hint}") from error
    selection = _group_by_slide(name, list(known), codes, ranks, plan)
    for slide_id, slide_ranks in selection.items():
        twice = np.flatnonzero(slide_ranks[1:] == slide_ranks[:-1])
        if len(twice):
            raise _twice_error(path, slide_id, int(slide_ranks[twice[0]]), hint)
    return selection


def _read_parts(path: Path, file: pq.ParquetFile) -> Iterator[pa.Table]:
    """The rows of a file, a million at a time; pages that become too much are a `ValueError`."""
    names = ["slide_id", "rank"]
    for group in range(file.num_row_groups):
        require_bounded(path, file.metadata, names, [group])
        for batch in file.iter_batches(
            _SELECTION_GROUP_ROWS, row_groups=[group], columns=names, use_threads=False
        ):
            yield pa.Table.from_batches([batch])


def _refuse_repeated(
    path: Path,
    names: Sequence[str],
    codes: npt.NDArray[np.int32],
    ranks: npt.NDArray[np.int32],
    hint: str,
) -> None:
    """Refuse rows [n] that repeat the one before: runs of equal rows are billions in a kilobyte."""
    same = np.flatnonzero((codes[1:] == codes[:-1]) & (ranks[1:] == ranks[:-1]))
    if len(same):
        raise _twice_error(path, names[codes[same[0]]], int(ranks[same[0]]), hint)


def _twice_error(path: Path, slide_id: str, rank: int, hint: str) -> UserError:
    return UserError(
        f"{path}: rank {rank} of slide {one_line(slide_id, 80)} comes twice, expected each tile "
        f"once; {hint}"
    )


def _global_codes(column: pa.ChunkedArray, known: dict[str, int]) -> npt.NDArray[np.int32]:
    """Codes of the column's names in `known`, which takes up new ones."""
    parts = [np.zeros(0, np.int32)]
    for chunk in column.chunks:
        encoded = chunk if pa.types.is_dictionary(chunk.type) else chunk.dictionary_encode()
        names = encoded.dictionary.to_pylist()
        if encoded.null_count or not all(isinstance(name, str) for name in names):
            raise ValueError("a slide_id is missing or no text")
        # Every row group has a dictionary of its names: codes of one mean nothing in another.
        place = np.array([known.setdefault(name, len(known)) for name in names], np.int32)
        parts.append(place[encoded.indices.to_numpy(zero_copy_only=False)])
    return np.concatenate(parts)


def _group_by_slide(
    name: str,
    names: list[str],
    codes: npt.NDArray[np.int32],
    ranks: npt.NDArray[np.int32],
    plan: dict[str, Any],
) -> Selection:
    by_name = sorted(range(len(names)), key=names.__getitem__)
    place = np.empty(len(names), np.int32)
    place[by_name] = np.arange(len(names))
    keys = place[codes]
    # A sort needs an int64 index per row: only where rows are not in order already.
    if not _in_order(keys, ranks):
        ranks = ranks[np.lexsort((ranks, keys))]
    counts = np.zeros(len(names), np.int64)
    for start in range(0, len(keys), _SELECTION_GROUP_ROWS):
        # In pieces: bincount casts to int64, which would double the memory.
        counts += np.bincount(keys[start : start + _SELECTION_GROUP_ROWS], minlength=len(names))
    kept = np.flatnonzero(counts)
    offsets = np.concatenate([[0], np.cumsum(counts[kept])]).astype(np.int64)
    return Selection(name, tuple(names[by_name[i]] for i in kept), offsets, ranks, plan)


def _in_order(keys: npt.NDArray[np.int32], ranks: npt.NDArray[np.int32]) -> bool:
    """Whether rows are sorted by (key, rank) already, as `write_selection` leaves them."""
    for start in range(0, len(keys), _SELECTION_GROUP_ROWS):
        key = keys[start : start + _SELECTION_GROUP_ROWS + 1]
        rank = ranks[start : start + _SELECTION_GROUP_ROWS + 1]
        later = (key[1:] > key[:-1]) | ((key[1:] == key[:-1]) & (rank[1:] >= rank[:-1]))
        if not later.all():
            return False
    return True
