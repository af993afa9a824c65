"""The tables of a dataset: slides, candidates, selections. Readers ignore unknown columns."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from model.errors import UserError
from pipeline.dataset.commit import FileRecord, HashingFile, commit_file
from pipeline.dataset.layout import Dataset

LEVEL = pa.struct([("width", pa.int32()), ("height", pa.int32()), ("downsample", pa.float64())])

SLIDES_SCHEMA = pa.schema(
    [
        ("slide_id", pa.string()),
        ("path", pa.string()),
        ("status", pa.string()),
        ("reason", pa.string()),
        ("reader", pa.string()),
        ("vendor", pa.string()),
        ("mpp", pa.float64()),
        ("mpp_source", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("levels", pa.list_(LEVEL)),
        ("bytes", pa.int64()),
        ("mtime_ns", pa.int64()),
        ("sha256", pa.string()),
        ("patient", pa.string()),
        ("site", pa.string()),
        ("project", pa.string()),
        ("sample_type", pa.string()),
        ("codec", pa.string()),
    ]
)

CANDIDATES_SCHEMA = pa.schema(
    [
        ("rank", pa.int32()),
        ("x_level0", pa.float64()),
        ("y_level0", pa.float64()),
        ("tissue_fraction", pa.float32()),
        ("artifact_fraction", pa.float32()),
    ]
)

GENERATED_SCHEMA = (
    CANDIDATES_SCHEMA.append(pa.field("source_slide_id", pa.string()))
    .append(pa.field("source_rank", pa.int32()))
    .with_metadata(None)
)


@dataclass(frozen=True)
class Slide:
    """One row of slides.parquet.

    `mpp` is micrometres per pixel at level 0; `levels` are (width, height, downsample);
    `status` is ok, rejected or failed, `reason` says why for the last two. A file is recognised
    by its size and modification time, and by `sha256` where scan was asked to take it. `codec`
    is that of its native tiles (jpeg, jpeg2000), '' where the reader does not say.
    """

    slide_id: str
    path: str
    status: str = "ok"
    reason: str = ""
    reader: str = ""
    vendor: str = ""
    mpp: float | None = None
    mpp_source: str = ""
    width: int = 0
    height: int = 0
    levels: tuple[tuple[int, int, float], ...] = ()
    bytes: int = 0
    mtime_ns: int = 0
    sha256: str = ""
    patient: str = ""
    site: str = ""
    project: str = ""
    sample_type: str = ""
    codec: str = ""

    @property
    def content_key(self) -> dict[str, Any]:
        """What identifies the slide's bytes: sha256 where known, else size and time."""
        if self.sha256:
            return {"sha256": self.sha256}
        return {"bytes": self.bytes, "mtime_ns": self.mtime_ns}


def _write_table(
    dataset: Dataset, run_id: str, final: Path, table: pa.Table, **options: Any
) -> FileRecord:
    def write(file: HashingFile) -> None:
        pq.write_table(table, file, write_page_checksum=True, **options)

    return commit_file(dataset, run_id, final, write)


def read_table(path: Path, columns: list[str] | None = None, hint: str = "") -> pa.Table:
    """A Parquet file as a table; missing or damaged files become a `UserError` with the hint."""
    if not path.exists():
        raise UserError(f"{path} is missing{': ' + hint if hint else ''}")
    try:
        return pq.read_table(path, columns=columns, page_checksum_verification=True)
    except (OSError, pa.ArrowException) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path} cannot be read: {reason}; remove it and run again") from error


def write_slides(dataset: Dataset, run_id: str, slides: Iterable[Slide]) -> FileRecord:
    """Write slides.parquet, sorted by slide_id."""
    rows = []
    for slide in sorted(slides, key=lambda s: s.slide_id):
        row = dict(slide.__dict__)
        row["levels"] = [{"width": w, "height": h, "downsample": d} for w, h, d in slide.levels]
        rows.append(row)
    table = pa.Table.from_pylist(rows, schema=SLIDES_SCHEMA)
    return _write_table(dataset, run_id, dataset.slides_file, table)


def read_slides(dataset: Dataset) -> list[Slide]:
    """All slides, sorted by slide_id."""
    table = read_table(dataset.slides_file, hint="run `python -m pipeline scan` first")
    rows = table.select([name for name in SLIDES_SCHEMA.names if name in table.column_names])
    return [_slide(row) for row in rows.to_pylist()]


def _slide(row: dict[str, Any]) -> Slide:
    levels = tuple((v["width"], v["height"], v["downsample"]) for v in row.pop("levels") or ())
    return Slide(levels=levels, **row)


def write_candidates(dataset: Dataset, run_id: str, slide_id: str, table: pa.Table) -> FileRecord:
    """Write a slide's candidates (rank order, rank 0 first)."""
    return _write_table(dataset, run_id, dataset.candidates_file(slide_id), table)


def read_candidates(dataset: Dataset, slide_id: str) -> pa.Table:
    """A slide's candidates in rank order."""
    path = dataset.candidates_file(slide_id)
    return read_table(path, hint="run `python -m pipeline tissue` first")


def candidate_count(dataset: Dataset, slide_id: str) -> int:
    """How many candidates a slide has, from the file's footer alone."""
    path = dataset.candidates_file(slide_id)
    try:
        return int(pq.read_metadata(path).num_rows)
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path} cannot be read ({error}): run `tissue` again") from error


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
        """Ascending ranks of the slide at that position."""
        return self.ranks[self.offsets[index] : self.offsets[index + 1]]

    def items(self) -> Iterator[tuple[str, npt.NDArray[np.int32]]]:
        """(slide_id, ranks) pairs, sorted by slide_id."""
        for index, slide_id in enumerate(self.slide_ids):
            yield slide_id, self.ranks_of(index)

    @cached_property
    def content_hash(self) -> str:
        """sha256 of the rows: which tiles, whatever the name or plan."""
        sha = hashlib.sha256()
        for slide_id, ranks in self.items():
            sha.update(slide_id.encode() + b"\0" + ranks.astype("<i4").tobytes() + b"\0")
        return sha.hexdigest()


def make_selection(
    name: str, ranks_by_slide: dict[str, npt.NDArray[np.int32]], plan: dict[str, Any]
) -> Selection:
    """A selection from ranks a slide; slides without ranks are left out."""
    slides = sorted(slide for slide, ranks in ranks_by_slide.items() if len(ranks))
    parts = [np.sort(ranks_by_slide[slide]).astype(np.int32) for slide in slides]
    offsets = np.zeros(len(slides) + 1, np.int64)
    np.cumsum([len(part) for part in parts], out=offsets[1:])
    ranks = np.concatenate(parts) if parts else np.zeros(0, np.int32)
    return Selection(name, tuple(slides), offsets, ranks, plan)


def write_selection(dataset: Dataset, run_id: str, selection: Selection) -> FileRecord:
    """Write selections/<name>.parquet with its plan in the file's metadata."""
    index = np.repeat(
        np.arange(len(selection.slide_ids), dtype=np.int32), np.diff(selection.offsets)
    )
    names = pa.array(selection.slide_ids, pa.string())
    slide_ids = pa.DictionaryArray.from_arrays(pa.array(index), names)
    table = pa.table(
        {"slide_id": slide_ids, "rank": pa.array(selection.ranks)}
    ).replace_schema_metadata({"plan": json.dumps(selection.plan, sort_keys=True)})
    return _write_table(dataset, run_id, dataset.selection_file(selection.name), table)


def read_selection(dataset: Dataset, name: str) -> Selection:
    """The named selection; a `UserError` lists the ones that stand where it does not."""
    path = dataset.selection_file(name)
    if not path.exists():
        known = ", ".join(dataset.selection_names()) or "none"
        raise UserError(
            f"no selection '{name}' in {dataset.root}; there: {known}; "
            f"make it with `python -m pipeline select --name {name}`"
        )
    table = read_table(path)
    plan = json.loads((table.schema.metadata or {}).get(b"plan", b"{}"))
    column = table["slide_id"].combine_chunks()
    if isinstance(column, pa.ChunkedArray):
        column = pa.concat_arrays(column.chunks)
    encoded = column if pa.types.is_dictionary(column.type) else column.dictionary_encode()
    names = encoded.dictionary.to_pylist()
    codes = encoded.indices.to_numpy(zero_copy_only=False)
    ranks = table["rank"].to_numpy().astype(np.int32)
    return _grouped(name, names, codes, ranks, plan)


def _grouped(
    name: str,
    names: list[str],
    codes: npt.NDArray[Any],
    ranks: npt.NDArray[np.int32],
    plan: dict[str, Any],
) -> Selection:
    by_name = np.argsort(np.array(names, dtype=object)) if names else np.zeros(0, np.int64)
    place = np.empty(len(names), np.int64)
    place[by_name] = np.arange(len(names))
    keys = place[codes] if len(codes) else np.zeros(0, np.int64)
    order = np.lexsort((ranks, keys))
    counts = np.bincount(keys, minlength=len(names))
    kept = np.flatnonzero(counts)
    offsets = np.concatenate([[0], np.cumsum(counts[kept])]).astype(np.int64)
    slides = tuple(names[by_name[i]] for i in kept)
    return Selection(name, slides, offsets, ranks[order], plan)
