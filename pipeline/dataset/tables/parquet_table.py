"""A Parquet file as a table, committed whole, and checked when it is read.

A table may be of an older or newer release, of another tool or of somebody hostile: each reader
states the columns that it relies on, and what it gets has their types and ranges, or is refused
with one line that names the file, the column, the row and what was expected.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from common.errors import UserError
from common.files import require_regular
from common.text import list_some, one_line
from pipeline.dataset.commit import FileRecord, HashingFile, commit_file
from pipeline.dataset.layout import Dataset
from pipeline.dataset.tables.expansion import (
    MOST_TABLE_BYTES,
    most_bytes_from,
    require_bounded,
)

MOST_ROWS = 1 << 24
"""Rows that a table may have which is read whole: a slide's candidates are fewer than 10^7."""
_MOST_TEXT_BYTES = 1 << 16


@dataclass(frozen=True)
class Column:
    """A column that a reader relies on.

    Attributes:
        type: what readers get; other types are cast where nothing is lost.
        required: whether the column must be there.
        nullable: whether rows may have no value.
        least: the least number allowed; numbers must be finite in any case.
        most: the greatest number allowed.
    """

    name: str
    type: pa.DataType
    required: bool = True
    nullable: bool = False
    least: float | None = None
    most: float | None = None

    def describe_values(self) -> str:
        """The values that are expected, in words.

        >>> Column("rank", pa.int32(), least=0, most=99).describe_values()
        'a whole number from 0 to 99'
        """
        if is_text(self.type):
            return f"text of at most {_MOST_TEXT_BYTES:,} bytes"
        if not (pa.types.is_integer(self.type) or pa.types.is_floating(self.type)):
            return f"{self.type}"
        kind = "a whole number" if pa.types.is_integer(self.type) else "a finite number"
        least = "" if self.least is None else f" from {self.least:,.10g}"
        return kind + least + ("" if self.most is None else f" to {self.most:,.10g}")


def write_table(
    dataset: Dataset, run_id: str, final: Path, table: pa.Table, **options: Any
) -> FileRecord:
    """Commit a table as Parquet with page checksums; `options` are those of pyarrow."""

    def write(file: HashingFile) -> None:
        pq.write_table(table, file, write_page_checksum=True, **options)

    return commit_file(dataset, run_id, final, write)


def read_table(
    path: Path,
    columns: Sequence[Column],
    hint: str,
    *,
    others: bool = False,
    most_rows: int = MOST_ROWS,
) -> pa.Table:
    """The columns of a Parquet file, each of the type and in the range that it is declared with.

    Columns that are not declared are passed over, or with `others` returned as they are. Raises
    `UserError` with the hint where the file is missing, damaged, or not what was declared; rows
    in messages count from 0.
    """
    schema = read_schema(path, columns, hint, most_rows)
    wanted = [column for column in columns if column.name in schema.names]
    names = list(schema.names) if others else [column.name for column in wanted]
    try:
        table = _read_bounded(path, names)
    except (OSError, ValueError, MemoryError, pa.ArrowException) as error:
        raise unreadable_error(path, error, hint) from error
    for column in wanted:
        place = table.schema.get_field_index(column.name)
        table = table.set_column(
            place, column.name, check_column(path, table.column(place), column, hint)
        )
    known = {column.name for column in wanted}
    for place, name in enumerate(names):
        if name not in known:
            column = Column(name, schema.field(name).type, nullable=True)
            table = table.set_column(place, name, _cast(path, table[place], column, hint))
    return table


def _read_bounded(path: Path, names: list[str]) -> pa.Table:
    """The columns, those of texts as dictionaries where the file has one: none is repeated.

    Refused with a `ValueError` before memory is taken where pages become more than a table has.
    """
    with pq.ParquetFile(path) as file:
        metadata = file.metadata
    texts = require_bounded(path, metadata, names, most_bytes=_most_bytes(path))
    with pq.ParquetFile(
        path, metadata=metadata, read_dictionary=texts, page_checksum_verification=True
    ) as file:
        return file.read(names).select(names)


def read_schema(
    path: Path, columns: Sequence[Column], hint: str, most_rows: int = MOST_ROWS
) -> pa.Schema:
    """The schema of a Parquet file that has the columns, by the file's footer alone.

    Raises `UserError` with the hint where it has not.
    """
    if not path.exists():
        raise UserError(f"{path} is missing: {hint}")
    try:
        require_regular(path)
        with pq.ParquetFile(path) as file:
            schema, rows = file.schema_arrow, file.metadata.num_rows
        names = list(schema.names)  # damaged names are no text, which is found out here
    except (OSError, ValueError, MemoryError, pa.ArrowException) as error:
        raise unreadable_error(path, error, hint) from error
    if not 0 <= rows <= most_rows:
        raise UserError(f"{path}: {rows:,} rows, expected at most {most_rows:,}; {hint}")
    for column in columns:
        count = names.count(column.name)
        if count > 1 or (column.required and not count):
            what = f"column '{column.name}' is there twice" if count else (
                f"no column '{column.name}'; there: {list_some(names)}"
            )  # fmt: skip
            raise UserError(f"{path}: {what}; {hint}")
        if count and not _fits(schema.field(column.name).type, column.type):
            raise UserError(
                f"{path}: column '{column.name}' is {one_line(schema.field(column.name).type)}, "
                f"expected {column.describe_values()}; {hint}"
            )
    return schema


def unreadable_error(path: Path, error: BaseException, hint: str) -> UserError:
    """The error to raise for a file that pyarrow cannot read."""
    reason = one_line(error) or "there is not enough memory for it"
    return UserError(
        f"{path} cannot be read: {reason}; remove it, then {hint.removesuffix(' first')}"
    )


def check_column(
    path: Path, values: pa.ChunkedArray, column: Column, hint: str, first_row: int = 0
) -> pa.ChunkedArray:
    """The values as the declared type.

    Raises `UserError` naming the first row that is not what was declared, counted from
    `first_row`.
    """

    def refuse(row: int, value: object) -> UserError:
        return UserError(
            f"{path}: column '{column.name}', row {first_row + row:,}: {one_line(repr(value), 60)}"
            f", expected {column.describe_values()}; {hint}"
        )

    if values.null_count and not column.nullable:
        nulls = values.is_null().to_numpy()
        raise refuse(int(np.argmax(nulls)), None)
    if is_text(column.type):
        return _check_text(path, values, column, refuse, hint)
    if not (pa.types.is_integer(column.type) or pa.types.is_floating(column.type)):
        return _cast(path, values, column, hint)
    plain = values.cast(values.type.value_type) if _is_dictionary(values.type) else values
    numbers = _numbers_of(plain)
    bad = _outside(numbers, column) & ~plain.is_null().to_numpy()
    if bad.any():
        row = int(np.argmax(bad))
        raise refuse(row, plain[row].as_py())
    return _cast(path, plain, column, hint)


def _check_text(
    path: Path, values: pa.ChunkedArray, column: Column, refuse: Any, hint: str
) -> pa.ChunkedArray:
    # By the dictionary's entries first: rows may repeat a text of megabytes.
    for chunk in values.chunks:
        entries = chunk.dictionary if _is_dictionary(chunk.type) else chunk
        try:
            entries.validate(full=True)
        except pa.ArrowException as error:
            raise UserError(
                f"{path}: column '{column.name}' has text that is not UTF-8 ({one_line(error)}); "
                f"{hint}"
            ) from error
        if (pc.max(pc.binary_length(entries)).as_py() or 0) > _MOST_TEXT_BYTES:
            size = pc.max(pc.binary_length(entries)).as_py()
            raise UserError(
                f"{path}: column '{column.name}' has a text of {size:,} bytes, expected "
                f"{column.describe_values()}; {hint}"
            )
    text = _cast(path, values, column, hint)
    # No name, path or reason has one, and the system's calls end at it.
    has_nul = pc.match_substring(text, "\0").fill_null(fill_value=False)
    if pc.any(has_nul).as_py():
        row = int(np.argmax(has_nul.to_numpy()))
        raise refuse(row, text[row].as_py())
    return text


def _cast(path: Path, values: pa.ChunkedArray, column: Column, hint: str) -> pa.ChunkedArray:
    size, most = sum(_text_bytes(chunk) for chunk in values.chunks), _most_bytes(path)
    if size > most:
        raise UserError(
            f"{path}: column '{column.name}' has texts of {size:,} bytes together, expected at "
            f"most {most:,}; {hint}"
        )
    try:
        cast = values.cast(column.type)
        cast.validate(full=True)
        return cast
    except (ValueError, pa.ArrowException) as error:
        raise UserError(
            f"{path}: column '{column.name}' is {one_line(values.type)}, expected "
            f"{column.describe_values()} ({one_line(error)}); {hint}"
        ) from error


def _most_bytes(path: Path) -> int:
    """What a table that is read whole may become in memory."""
    return min(MOST_TABLE_BYTES, most_bytes_from(path.stat().st_size))


def _text_bytes(values: pa.Array) -> int:
    """Bytes of the texts that the entries of a dictionary are written out as; 0 without one."""
    if not _is_dictionary(values.type) or not len(values.dictionary):
        return 0
    uses = np.bincount(values.indices.drop_null(), minlength=len(values.dictionary))
    lengths = pc.binary_length(values.dictionary).fill_null(0).to_numpy()
    return int((uses * lengths.astype(np.int64)).sum())


def _numbers_of(values: pa.ChunkedArray) -> npt.NDArray[Any]:
    """Numbers [n] as they are; where there is none, some number."""
    if values.null_count:
        zero = pa.scalar(0, pa.int32()).cast(
            values.type if not pa.types.is_null(values.type) else pa.int32()
        )
        values = values.cast(zero.type).fill_null(zero)
    return np.asarray(values.to_numpy())


def _outside(numbers: npt.NDArray[Any], column: Column) -> npt.NDArray[np.bool_]:
    """Which numbers [n] the column does not take."""
    bad = np.zeros(len(numbers), bool)
    whole = pa.types.is_integer(column.type)
    if numbers.dtype.kind == "f":
        bad |= ~np.isfinite(numbers)
        if whole:
            bad |= numbers != np.trunc(numbers)
    limits = np.iinfo(column.type.to_pandas_dtype()) if whole else None
    least = column.least if column.least is not None else limits and limits.min
    most = column.most if column.most is not None else limits and limits.max
    if least is not None:
        bad |= numbers < least
    if most is not None:
        bad |= numbers > most
    return bad


def is_text(kind: pa.DataType) -> bool:
    """Whether a type is text, of any width."""
    types = pa.types
    return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)


def _is_dictionary(kind: pa.DataType) -> bool:
    return bool(pa.types.is_dictionary(kind))


def _is_list(kind: pa.DataType) -> bool:
    types = pa.types
    return types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)


def _fits(found: pa.DataType, wanted: pa.DataType) -> bool:
    """Whether values of a type can be those of another without loss, if they are in its range.

    Text is no number, and a number no text, although pyarrow would cast them.
    """
    if _is_dictionary(found):
        return _fits(found.value_type, wanted)
    if pa.types.is_null(found):
        return True
    if _is_list(wanted):
        return _is_list(found) and _fits(found.value_type, wanted.value_type)
    if pa.types.is_struct(wanted):
        names = {field.name: field.type for field in wanted}
        has = {field.name: field.type for field in found} if pa.types.is_struct(found) else {}
        return all(name in has and _fits(has[name], kind) for name, kind in names.items())
    if is_text(wanted):
        return is_text(found)
    return pa.types.is_integer(found) or pa.types.is_floating(found)
