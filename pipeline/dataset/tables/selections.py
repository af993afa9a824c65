"""selections/<name>.parquet: rows (slide_id, rank), with the plan that made them."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from common.errors import UserError
from common.files import require_regular
from common.json_text import parse_json
from pipeline.dataset.commit import FileRecord, HashingFile, commit_file
from pipeline.dataset.layout import Dataset, check_slide_id


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
    """The named selection; a `UserError` lists those there are where it is missing."""
    path = dataset.selection_file(name)
    if not path.exists():
        known = ", ".join(dataset.selection_names()) or "none"
        raise UserError(
            f"no selection '{name}' in {dataset.root}; there: {known}; "
            f"make it with `python -m pipeline select --name {name}`"
        )
    return read_rows(path, name)


def read_plan(dataset: Dataset, name: str) -> dict[str, Any]:
    """A selection's plan, from the file's footer alone; {} where it has none."""
    path = dataset.selection_file(name)
    try:
        require_regular(path)
        metadata = pq.read_schema(path).metadata or {}
        return dict(parse_json(metadata.get(b"plan", b"{}")))
    except (OSError, ValueError, TypeError, pa.ArrowException) as error:
        raise UserError(f"{path} cannot be read: {error}; remove it and run `select`") from error


def read_rows(path: Path, name: str) -> Selection:
    """A file of (slide_id, rank int32) rows in any order, sorted, with the plan in it.

    Read a row group at a time: 10^8 rows need twice the memory of their ranks.
    """
    known: dict[str, int] = {}
    try:
        require_regular(path)
        with pq.ParquetFile(
            path, read_dictionary=["slide_id"], page_checksum_verification=True
        ) as file:
            plan = parse_json((file.schema_arrow.metadata or {}).get(b"plan", b"{}"))
            codes = np.empty(file.metadata.num_rows, np.int32)
            ranks = np.empty(file.metadata.num_rows, np.int32)
            start = 0
            for group in range(file.num_row_groups):
                table = file.read_row_group(group, ["slide_id", "rank"], use_threads=False)
                stop = start + table.num_rows
                codes[start:stop] = _global_codes(table["slide_id"], known)
                ranks[start:stop] = table["rank"].to_numpy()
                start = stop
            for slide_id in known:
                check_slide_id(slide_id)
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path} cannot be read: {reason}; remove it and run again") from error
    return _group_by_slide(name, list(known), codes, ranks, plan)


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
