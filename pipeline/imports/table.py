"""Tables of tile positions that others made: CSV or Parquet, columns by name.

Ten million rows are a few hundred megabytes here: slide names are dictionary codes, positions
are arrays, no row becomes a Python object.
"""

import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from common.csv_rows import describe_columns
from common.errors import UserError
from common.files import require_regular
from common.text import one_line
from pipeline.dataset.tables.expansion import most_bytes_from, require_bounded
from pipeline.imports.config import Columns

_SYNONYMS = {
    "slide": (
        "slide_id", "slide", "slide_name", "wsi", "wsi_id", "filename", "file_name", "slide_path",
        "path",
    ),
    "x": ("x_level0", "x", "coord_x", "x_coord", "tile_x"),
    "y": ("y_level0", "y", "coord_y", "y_coord", "tile_y"),
    "level": ("level", "slide_level", "pyramid_level"),
    "mpp": ("mpp", "tile_mpp", "um_per_px", "microns_per_pixel"),
}  # fmt: skip
"""Names under which each column is known, first come first taken, in any case."""

_LEVEL0_SUFFIX = "_level0"
_HEAD_BYTES = 1 << 16
_LINES_SHOWN = 5
_MOST_ROWS = 1 << 27
"""Positions of all slides in one table."""
_MOST_CSV_FACTOR = 100
"""Compressed text of positions is a tenth of it or so, and takes as much in memory."""

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class PositionTable:
    """Positions as a table has them.

    `codes` int32 [n] point into `slides` (the names as written), `x` and `y` are float64 [n] in
    pixels of `units`: "level0", "level" (`scale` is the row's level) or "mpp" (`scale` is its
    µm per pixel). Row i is in line `first_line + i` of the file.
    """

    path: Path
    slides: list[str]
    codes: npt.NDArray[np.int32]
    x: Floats
    y: Floats
    units: str
    scale: Floats | None
    first_line: int
    columns: Columns

    def describe_units(self) -> str:
        """The units and corner in which x and y were read."""
        columns = f"columns {self.columns.x}, {self.columns.y}"
        if self.scale is None or not len(self.scale):
            return f"x and y ({columns}) as level-0 pixels"
        least, most = float(self.scale.min()), float(self.scale.max())
        span = f"{least:g}" if least == most else f"{least:g} to {most:g}"
        if self.units == "level":
            return f"x and y ({columns}) as pixels of level {span} (column {self.columns.level})"
        return f"x and y ({columns}) as pixels of {span} µm (column {self.columns.mpp})"

    def lines(self, rows: npt.NDArray[np.int64]) -> str:
        """'lines 3, 17, ...' of the rows, the first few of them."""
        shown = ", ".join(str(row + self.first_line) for row in rows[:_LINES_SHOWN])
        more = ", ..." if len(rows) > _LINES_SHOWN else ""
        return f"line{'' if len(rows) == 1 else 's'} {shown}{more}"


def read_positions(path: Path, columns: Columns, units: str = "") -> PositionTable:
    """Read a CSV or Parquet table of positions.

    `units` '' takes level 0 where the x column's name says so or no level and mpp column is there,
    else what that column says. Raises `UserError` naming file, column and
    lines where a value is missing or no number.
    """
    # Only the columns that are needed are read: tables of features have hundreds.
    is_csv = path.suffix.lower() not in (".parquet", ".pq")
    try:
        require_regular(path)
        header = _read_csv_header(path) if is_csv else list(pq.read_schema(path).names)
        resolved = _resolve_columns(path, header, columns)
        units = _resolve_units(path, resolved, units)
        names = [resolved.slide, resolved.x, resolved.y]
        names += [getattr(resolved, units)] if units != "level0" else []
        table = _read_csv(path, names) if is_csv else _read_parquet(path, names)
    except (OSError, ValueError, MemoryError, pa.ArrowException) as error:
        reason = one_line(error)
        raise UserError(f"{path} cannot be read as a table of positions: {reason}") from error
    first_line = 2 if is_csv else 1
    numbers = [_read_floats(path, table, name, first_line) for name in names[1:]]
    slides, codes = _read_codes(path, table, resolved.slide, first_line)
    scale = numbers[2] if units != "level0" else None
    return PositionTable(
        path, slides, codes, numbers[0], numbers[1], units, scale, first_line, resolved
    )


def _read_csv_header(path: Path) -> list[str]:
    with pa.input_stream(str(path)) as stream:
        head = stream.read(_HEAD_BYTES).decode("utf-8-sig", "replace")
    lines = head.splitlines()
    return next(csv.reader(lines[:1], delimiter=_csv_delimiter(path)), []) if lines else []


def _csv_delimiter(path: Path) -> str:
    return "\t" if ".tsv" in (suffix.lower() for suffix in path.suffixes) else ","


def _resolve_columns(path: Path, header: list[str], columns: Columns) -> Columns:
    """The columns that are there; slide, x and y must be."""
    # Reversed, so that of two names that differ in case alone the first one is taken.
    by_lower = {name.lower(): name for name in reversed(header)}
    there = describe_columns(header)
    resolved = {}
    for role, requested in columns.as_dict().items():
        if requested and requested not in header:
            raise UserError(f"{path}: no column '{requested}'; there: {there}")
        names = (by_lower[name] for name in _SYNONYMS[role] if name in by_lower)
        resolved[role] = requested or next(names, "")
        if resolved[role] and header.count(resolved[role]) > 1:
            raise UserError(f"{path}: column '{resolved[role]}' is there twice")
        if not resolved[role] and role in ("slide", "x", "y"):
            raise UserError(
                f"{path}: no {role} column; expected one of {', '.join(_SYNONYMS[role])} or "
                f"--{role}-column, there: {there}"
            )
    return Columns(**resolved)


def _resolve_units(path: Path, columns: Columns, units: str) -> str:
    if units:
        if units != "level0" and not getattr(columns, units):
            raise UserError(
                f"{path}: --units {units} needs a {units} column; give --{units}-column"
            )
        return units
    # A column named x_level0 says what it is, whatever other columns there are.
    if columns.x.lower().endswith(_LEVEL0_SUFFIX):
        return "level0"
    if columns.level and columns.mpp:
        raise UserError(
            f"{path}: has both a level column '{columns.level}' and an mpp column '{columns.mpp}'; "
            "say which the coordinates are in: --units level0, level or mpp"
        )
    return "level" if columns.level else "mpp" if columns.mpp else "level0"


def _read_csv(path: Path, names: list[str]) -> pa.Table:
    """The columns of a CSV, compressed or not, read part by part: its end may never come."""
    # Stated, so that the first rows of a file do not decide what a column is.
    types: dict[str, object] = dict.fromkeys(names[1:], pa.float64())
    # Text is text: a slide may be called NA or 02.
    types[names[0]] = pa.string()
    convert = pacsv.ConvertOptions(
        column_types=types, include_columns=names, strings_can_be_null=False
    )
    parse = pacsv.ParseOptions(delimiter=_csv_delimiter(path))
    most = most_bytes_from(path.stat().st_size, _MOST_CSV_FACTOR)
    size, rows, parts = 0, 0, []
    with pacsv.open_csv(path, parse_options=parse, convert_options=convert) as reader:
        schema = reader.schema.set(0, pa.field(names[0], pa.dictionary(pa.int32(), pa.string())))
        for batch in reader:
            # Names as codes part by part, so that no row keeps a text.
            part = batch.set_column(0, names[0], batch.column(0).dictionary_encode())
            rows, size = rows + part.num_rows, size + part.nbytes
            _require_rows(rows)
            if size > most:
                raise ValueError(f"its rows become over {most:,} bytes: it swells without end")
            parts.append(part)
    return pa.Table.from_batches(parts, schema)


def _read_parquet(path: Path, names: list[str]) -> pa.Table:
    """The columns of a Parquet file, if what its pages become is in proportion to it."""
    with pq.ParquetFile(path) as file:
        metadata = file.metadata
    _require_rows(metadata.num_rows)
    most = most_bytes_from(path.stat().st_size)
    texts = require_bounded(path, metadata, names, most_bytes=most)
    with pq.ParquetFile(path, metadata=metadata, read_dictionary=texts) as file:
        table = file.read(names)
    column = table[names[0]]
    if not pa.types.is_dictionary(column.type):
        table = table.set_column(
            table.column_names.index(names[0]), names[0], pc.dictionary_encode(column)
        )
    return table


def _require_rows(rows: int) -> None:
    if rows > _MOST_ROWS:
        raise ValueError(f"it has {rows:,} rows or more, expected at most {_MOST_ROWS:,}")


def _read_floats(path: Path, table: pa.Table, name: str, first_line: int) -> Floats:
    try:
        values = table[name].cast(pa.float64()).to_numpy()
    except (pa.ArrowException, ValueError) as error:
        raise UserError(
            f"{path}: column '{name}' is {table[name].type}, expected numbers"
        ) from error
    bad = np.flatnonzero(~np.isfinite(values))
    if len(bad):
        raise UserError(
            f"{path}: column '{name}' has no number in {len(bad):,} rows, first in line "
            f"{bad[0] + first_line}"
        )
    return np.asarray(values, np.float64)


def _read_codes(
    path: Path, table: pa.Table, name: str, first_line: int
) -> tuple[list[str], npt.NDArray[np.int32]]:
    # Each chunk of a file has a dictionary; codes mean the same only after they are one.
    column = table[name].unify_dictionaries().combine_chunks()
    if isinstance(column, pa.ChunkedArray):
        column = column.chunk(0) if column.num_chunks else pa.array([], column.type)
    if column.null_count:
        first = int(np.flatnonzero(column.indices.is_null().to_numpy(zero_copy_only=False))[0])
        raise UserError(
            f"{path}: column '{name}' is empty in {column.null_count:,} rows, first in line "
            f"{first + first_line}"
        )
    try:
        slides = [str(value) for value in column.dictionary.to_pylist()]
    except ValueError as error:
        raise UserError(f"{path}: column '{name}' is not UTF-8: {one_line(error)}") from error
    return slides, column.indices.to_numpy(zero_copy_only=False).astype(np.int32)
