"""A Parquet file as a table, committed and read whole."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from common.errors import UserError
from common.files import require_regular
from pipeline.dataset.commit import FileRecord, HashingFile, commit_file
from pipeline.dataset.layout import Dataset


def write_table(
    dataset: Dataset, run_id: str, final: Path, table: pa.Table, **options: Any
) -> FileRecord:
    """Commit a table as Parquet with page checksums; `options` are those of pyarrow."""

    def write(file: HashingFile) -> None:
        pq.write_table(table, file, write_page_checksum=True, **options)

    return commit_file(dataset, run_id, final, write)


def read_table(path: Path, columns: list[str] | None = None, hint: str = "") -> pa.Table:
    """A Parquet file as a table; missing or damaged files become a `UserError` with the hint."""
    if not path.exists():
        raise UserError(f"{path} is missing{': ' + hint if hint else ''}")
    try:
        require_regular(path)
        table = pq.read_table(path, columns=columns, page_checksum_verification=True)
        table.column_names  # noqa: B018 (damaged names are no text, which is found out here)
        return table
    except (OSError, ValueError, pa.ArrowException) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path} cannot be read: {reason}; remove it and run again") from error
