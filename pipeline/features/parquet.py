"""Features in Parquet: a row group is a block of 16 ranks, pages carry checksums.

CLS: `rank` and `cls` as fixed_size_list<float32>[d], so that any Parquet tool can query it.
Patch tokens: fixed_size_binary of t*d float16 values, row-major, without dictionary, statistics
or compression: measured 10 to 40 times faster to read than list layouts (docs/decisions.md).
"""

import json
import threading
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from model.errors import UserError
from pipeline.dataset.commit import HashingFile
from pipeline.dataset.layout import BLOCK_ROWS, parse_shard_name

_META_KEY = b"features"


def cls_table(start: int, cls: npt.NDArray[np.float32]) -> pa.Table:
    """CLS tokens float32 [n, d] of consecutive ranks from `start`."""
    count, dim = cls.shape
    values = pa.FixedSizeListArray.from_arrays(pa.array(cls.reshape(-1)), dim)
    ranks = pa.array(np.arange(start, start + count, dtype=np.int32))
    meta = {"kind": "cls", "shape": [dim], "dtype": "float32"}
    return pa.table({"rank": ranks, "cls": values}).replace_schema_metadata(
        {_META_KEY: json.dumps(meta)}
    )


def token_table(tokens: npt.NDArray[np.float16]) -> pa.Table:
    """Patch tokens float16 [n, t, d]; row i is rank start + i."""
    count, grid, dim = tokens.shape
    data = np.ascontiguousarray(tokens, "<f2")
    binary = pa.FixedSizeBinaryArray.from_buffers(
        pa.binary(grid * dim * 2), count, [None, pa.py_buffer(data)]
    )
    meta = {"kind": "tokens", "shape": [grid, dim], "dtype": "float16"}
    return pa.table({"tokens": binary}).replace_schema_metadata({_META_KEY: json.dumps(meta)})


def open_writer(file: HashingFile, schema: pa.Schema) -> pq.ParquetWriter:
    """A Parquet writer in the layout of the cache; write whole blocks with `write_blocks`."""
    return pq.ParquetWriter(
        file,
        schema,
        use_dictionary=False,
        compression="none",
        write_statistics=False,
        write_page_checksum=True,
        data_page_size=1 << 30,
    )


def write_blocks(writer: pq.ParquetWriter, table: pa.Table) -> None:
    """Append rows of whole blocks, one row group a block (the slide's last may be shorter)."""
    writer.write_table(table, row_group_size=BLOCK_ROWS)


class FeatureShard:
    """An open feature file; blocks come as arrays that own no copy where the layout allows.

    Safe to share between threads: pyarrow's reader is used under a lock.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.start = parse_shard_name(path.name).start
        try:
            self._file = pq.ParquetFile(path, memory_map=True, page_checksum_verification=True)
            meta = json.loads((self._file.schema_arrow.metadata or {})[_META_KEY])
        except (OSError, pa.ArrowException, KeyError, ValueError) as error:
            raise UserError(
                f"{path} is not a readable feature file ({str(error).splitlines()[0]}); "
                "remove it and run `python -m pipeline cache` again"
            ) from error
        self.kind: str = meta["kind"]
        self.shape: tuple[int, ...] = tuple(meta["shape"])
        self._lock = threading.Lock()

    def read_block(self, block: int) -> npt.NDArray[np.floating]:
        """Features of a block: float32 [rows, d] for CLS, float16 [rows, t, d] for tokens."""
        group = block - self.start // BLOCK_ROWS
        try:
            with self._lock:
                table = self._file.read_row_group(group, columns=[self.kind], use_threads=False)
        except (OSError, pa.ArrowException) as error:
            raise UserError(
                f"{self.path}: block {block} is damaged ({str(error).splitlines()[0]}); "
                "run `python -m pipeline verify`"
            ) from error
        return _as_array(table[self.kind].chunk(0), self.shape)


def _as_array(column: pa.Array, shape: tuple[int, ...]) -> npt.NDArray[np.floating]:
    rows = len(column)
    if pa.types.is_fixed_size_binary(column.type):
        size = int(np.prod(shape))
        flat = np.frombuffer(column.buffers()[1], "<f2", rows * size, column.offset * size * 2)
        return flat.reshape(rows, *shape)
    return column.flatten().to_numpy().reshape(rows, *shape)
