"""slides.parquet: one row per slide. Readers ignore unknown columns."""

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pyarrow as pa

from common.errors import UserError
from common.text import list_some, one_line
from pipeline.dataset.commit import FileRecord
from pipeline.dataset.layout import Dataset, check_slide_id
from pipeline.dataset.tables.parquet_table import Column, read_table, write_table

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
        ("md5", pa.string()),
        ("preparation", pa.string()),
        ("tile_mpp", pa.float64()),
        ("series", pa.string()),
        ("levels_left_out", pa.list_(pa.int32())),
        ("notes", pa.list_(pa.string())),
        ("sampled_sha256", pa.string()),
        ("bounds", pa.list_(pa.int32())),
    ]
)


@dataclass(frozen=True)
class Slide:
    """One row of slides.parquet.

    `mpp` is micrometres per pixel at level 0, `tile_mpp` that of the slide's tiles (within the
    tolerance of the dataset's, and exactly it where they are resampled); `levels` are (width,
    height, downsample); `status` is ok, rejected or failed, `reason` says why for the last two. A
    file is recognised by its size in bytes and modification time, and by `sha256` where that was
    requested. `codec` is that of its native tiles (jpeg, jpeg2000), '' where the reader does not
    say. `md5` is what the table or manifest states; `preparation` is ffpe, frozen or ''. The path
    of a slide that is staged in is its URI, and its `mtime_ns` is 0. `series` names the image of
    the file that is the slide, '' where it has one only; `levels_left_out` are the reader's levels
    that are not used, so that `levels` are the others; `notes` is what a person should know of a
    slide that is taken. `sampled_sha256` is of samples of the file's bytes: by it `scan` recognises
    a slide that was moved, and a file that only has the slide's name. `bounds` is the scanned area
    (x, y, width, height) in level-0 px, None where the file states none or an earlier release
    scanned it.
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
    md5: str = ""
    preparation: str = ""
    tile_mpp: float | None = None
    series: str = ""
    levels_left_out: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()
    sampled_sha256: str = ""
    bounds: tuple[int, int, int, int] | None = None

    @property
    def content_key(self) -> dict[str, object]:
        """What identifies the slide's bytes: sha256 where known, else size and time or md5."""
        if self.sha256:
            return {"sha256": self.sha256}
        if not self.mtime_ns:
            return {"bytes": self.bytes, "md5": self.md5, "uri": self.path}
        return {"bytes": self.bytes, "mtime_ns": self.mtime_ns}

    @property
    def sampled_key(self) -> str:
        """What slides under several names share that are one file's image, '' where not known."""
        return f"{self.sampled_sha256} {self.series}" if self.sampled_sha256 else ""


def describe_copies(slides: Iterable[Slide]) -> str:
    """Which slides are one file under several names, '' for none; of use are those that are ok.

    By the number and samples of their bytes: `scan` takes no sum of the whole, unless asked to.
    """
    names: dict[str, list[str]] = {}
    for slide in slides:
        if slide.status == "ok" and slide.sampled_key:
            names.setdefault(slide.sampled_key, []).append(slide.slide_id)
    copies = sorted(" = ".join(sorted(same)) for same in names.values() if len(same) > 1)
    if not copies:
        return ""
    return (
        f"slides that are one file under several names: {list_some(copies, 5)}; their tiles would "
        "count twice: leave all but one out"
    )


def write_slides(dataset: Dataset, run_id: str, slides: Iterable[Slide]) -> FileRecord:
    """Write slides.parquet, sorted by slide_id; mpp in µm per px, sizes in level-0 px."""
    # Sorted, so that equal slides give equal bytes.
    table = _slides_table(sorted(slides, key=lambda slide: slide.slide_id))
    return write_table(dataset, run_id, dataset.slides_file, table)


def can_be_rows(slides: Iterable[Slide]) -> bool:
    """Whether all values have the types and sizes of the table's columns: others' may not."""
    try:
        table = _slides_table(slides)
    except (TypeError, ValueError, OverflowError, pa.ArrowException):
        return False
    return all(not table[name].null_count for name in table.column_names if name not in _NULLABLE)


def _slides_table(slides: Iterable[Slide]) -> pa.Table:
    rows = []
    for slide in slides:
        row = dict(slide.__dict__)
        row["levels"] = [{"width": w, "height": h, "downsample": d} for w, h, d in slide.levels]
        rows.append(row)
    return pa.Table.from_pylist(rows, schema=SLIDES_SCHEMA)


_NULLABLE = ("mpp", "tile_mpp", "bounds")


_HINT = "run `python -m pipeline scan` first"
_STATUSES = ("ok", "rejected", "failed")
MOST_SLIDES, _MOST_ITEMS = 1 << 18, 1 << 21
"""Rows, and entries of their lists; a generated dataset of 10^8 images has 98,000 slides."""
_ROWS_AT_ONCE = 1 << 10
_LIMITS = {
    "mpp": (1e-6, 1e6), "tile_mpp": (1e-6, 1e6), "width": (0, None), "height": (0, None),
    "bytes": (0, None),
}  # fmt: skip
# Rows of earlier releases lack the later columns; a table of another tool has nulls for ''.
_COLUMNS = tuple(
    Column(
        field.name, field.type, field.name in ("slide_id", "path"),
        field.name not in ("slide_id", "path", "status"), *_LIMITS.get(field.name, (None, None)),
    )
    for field in SLIDES_SCHEMA
)  # fmt: skip


def read_slides(dataset: Dataset) -> list[Slide]:
    """All slides, sorted by slide_id; mpp in µm per px, sizes in level-0 px.

    Raises `UserError` naming file, column and row where the table is not one of slides.
    """
    path = dataset.slides_file
    slides: dict[str, Slide] = {}
    table = read_table(path, _COLUMNS, _HINT, most_rows=MOST_SLIDES)
    _check_items(path, table)
    # In parts: rows are Python objects, fifty times as large as in the table.
    batches = table.to_batches(max_chunksize=_ROWS_AT_ONCE)
    rows = itertools.chain.from_iterable(batch.to_pylist() for batch in batches)
    for number, row in enumerate(rows):
        try:
            slide = _slide_of_row(row)
        except (TypeError, KeyError, ValueError, UserError) as error:
            raise UserError(
                f"{path} is not a table of slides (row {number:,}: {one_line(error)}): remove it "
                "and run `scan`"
            ) from error
        if slide.slide_id in slides:
            raise UserError(
                f"{path}: row {number:,}: slide '{slide.slide_id}' comes twice, expected each once;"
                " remove the table and run `scan`"
            )
        slides[slide.slide_id] = slide
    return [slides[slide_id] for slide_id in sorted(slides)]


def _check_items(path: Path, table: pa.Table) -> None:
    """Refuse lists that are together longer than those of all slides can be."""
    for name in table.column_names:
        if pa.types.is_list(table[name].type):
            count = sum(len(chunk.flatten()) for chunk in table[name].chunks)
            if count > _MOST_ITEMS:
                raise UserError(
                    f"{path}: column '{name}' has lists of {count:,} entries together, expected at "
                    f"most {_MOST_ITEMS:,}; {_HINT}"
                )


_DEFAULTS: dict[str, Any] = {field.name: field.default for field in fields(Slide)}


def _slide_of_row(row: dict[str, Any]) -> Slide:
    """A row as a slide; raises `ValueError` where it is none."""
    levels = tuple(
        (int(v["width"]), int(v["height"]), float(v["downsample"]))
        for v in row.pop("levels", None) or ()
    )
    if not all(w > 0 and h > 0 and 0 < d < math.inf for w, h, d in levels):
        raise ValueError(f"levels {levels[:4]}, expected sizes and factors above 0")
    # Rows of earlier releases lack these columns.
    left_out = tuple(int(index) for index in row.pop("levels_left_out", None) or ())
    notes = tuple(str(note) for note in row.pop("notes", None) or ())
    bounds = bounds_from(row.pop("bounds", None))
    known = {name: _DEFAULTS[name] if value is None else value for name, value in row.items()}
    slide = Slide(levels=levels, levels_left_out=left_out, notes=notes, bounds=bounds, **known)
    check_slide_id(slide.slide_id)
    if slide.status not in _STATUSES:
        raise ValueError(f"status '{slide.status[:40]}', expected {', '.join(_STATUSES)}")
    return slide


def bounds_from(values: Sequence[int] | None) -> tuple[int, int, int, int] | None:
    """A scanned area (x, y, width, height) as JSON and Parquet return it; None without one.

    >>> bounds_from([2200, 1700, 3000, 2500])
    (2200, 1700, 3000, 2500)
    """
    if not values:
        return None
    x, y, width, height = map(int, values)
    return x, y, width, height
