"""Features in Parquet: a row group is a block of 16 ranks, pages carry checksums.

CLS: `rank` and `cls` as fixed_size_list<float32>[d], so that any Parquet tool can query it.
Patch tokens: fixed_size_binary of t*d float16 values, row-major, without dictionary, statistics
or compression: measured 10 to 40 times faster to read than list layouts (docs/decisions.md). Or of
t*d int8 values, with t float16 values in the column `scale` (see `quantise.py`).
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from common.errors import UserError
from common.files import require_regular
from common.json_text import parse_json
from pipeline.dataset.commit import HashingFile
from pipeline.dataset.features.pages import PlainPages
from pipeline.dataset.features.quantise import dequantise_tokens
from pipeline.dataset.features.ranges import MOST_FEATURE
from pipeline.dataset.layout import BLOCK_ROWS, parse_shard_name

_META_KEY = b"features"
_LONGEST = 1 << 20
_MOST_SCALE_BITS = int(np.float16(MOST_FEATURE).view(np.uint16))
DTYPES = {"float16": "<f2", "int8": "i1", "float32": "<f4"}


def cls_table(start: int, cls: npt.NDArray[np.float32]) -> pa.Table:
    """CLS tokens float32 [n, d] of consecutive ranks from `start`."""
    count, dim = cls.shape
    values = pa.FixedSizeListArray.from_arrays(pa.array(cls.reshape(-1)), dim)
    ranks = pa.array(np.arange(start, start + count, dtype=np.int32))
    meta = {"kind": "cls", "shape": [dim], "dtype": "float32"}
    return pa.table({"rank": ranks, "cls": values}).replace_schema_metadata(
        {_META_KEY: json.dumps(meta)}
    )


def token_table(
    tokens: npt.NDArray[np.float16] | npt.NDArray[np.int8],
    scale: npt.NDArray[np.float16] | None = None,
) -> pa.Table:
    """Patch tokens [n, t, d], float16 or int8 with `scale` float16 [n, t]; row i is start + i."""
    count, grid, dim = tokens.shape
    dtype = "float16" if scale is None else "int8"
    meta = {"kind": "tokens", "shape": [grid, dim], "dtype": dtype}
    columns = {"tokens": _binary_column(tokens.astype(DTYPES[dtype], copy=False), count)}
    if scale is not None:
        columns["scale"] = _binary_column(scale.astype("<f2", copy=False), count)
    return pa.table(columns).replace_schema_metadata({_META_KEY: json.dumps(meta)})


def _binary_column(values: npt.NDArray[Any], count: int) -> pa.Array:
    width = values.nbytes // count if count else values.itemsize * int(np.prod(values.shape[1:]))
    data = pa.py_buffer(np.ascontiguousarray(values))
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(width), count, [None, data])


def open_writer(file: HashingFile, schema: pa.Schema) -> pq.ParquetWriter:
    """A Parquet writer in the layout of the cache, pages of at most 1 GiB.

    Write whole blocks with `write_blocks`.
    """
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
    """Append rows [n, ...] of whole blocks, one row group per block (the last may be shorter)."""
    writer.write_table(table, row_group_size=BLOCK_ROWS)


class FeatureShard:
    """An open feature file; features [rows, ...] come as views of pages as they were read.

    Safe to share between threads.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        name = parse_shard_name(path.name)
        self.slide_id, self.start, self.stop = name.slide_id, name.start, name.stop
        # Only the footer is read here; pages are read when their block is.
        try:
            require_regular(path)
            with pq.ParquetFile(path) as file:
                schema, metadata = file.schema_arrow, file.metadata
            meta = parse_json((schema.metadata or {})[_META_KEY])
            self.kind: str = meta["kind"]
            self.shape: tuple[int, ...] = tuple(meta["shape"])
            self.dtype: str = meta["dtype"]
            self._pages = PlainPages(path, metadata)
            self._check_layout(meta, schema)
        except (OSError, pa.ArrowException, KeyError, ValueError, TypeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"{path} is not a readable feature file ({reason}); "
                "remove it and run `python -m pipeline cache` again"
            ) from error

    def _check_layout(self, meta: dict[str, Any], schema: pa.Schema) -> None:
        """What the metadata states must be what the columns contain."""
        known = {("cls", "float32", 1), ("tokens", "float16", 2), ("tokens", "int8", 2)}
        if (self.kind, self.dtype, len(self.shape)) not in known:
            raise ValueError(f"its features are stated as {meta}")
        if any(type(length) is not int or not 0 < length < _LONGEST for length in self.shape):
            raise ValueError(f"its shape is {self.shape}")
        found = schema.field(self.kind).type
        if self.kind == "cls":
            expected: pa.DataType = pa.list_(pa.float32(), self.shape[0])
        else:
            expected = pa.binary(int(np.prod(self.shape)) * np.dtype(DTYPES[self.dtype]).itemsize)
        if found != expected:
            raise ValueError(f"column {self.kind} is {found}, expected {expected}")

    @property
    def first_crc(self) -> int | None:
        """CRC-32 of the first block's features as the file states it, which tells files apart.

        Those of one name are of one size, whatever their values.
        """
        try:
            return self._pages.first_crc(self.kind)
        except (ValueError, IndexError, OSError):
            return None  # a damaged page, which its reader reports

    def read_block(self, block: int) -> npt.NDArray[np.floating]:
        """Features of a block: float32 [rows, d] for CLS, float16 [rows, t, d] for tokens.

        CLS and float16 tokens are read-only views of the page; int8 tokens are brought back to
        float16.
        """
        if self.kind == "cls":
            return self._page_of_group(block, "cls", self.shape, is_list=True)
        tokens = self._page_of_group(block, "tokens", self.shape)
        if self.dtype == "float16":
            return tokens
        return dequantise_tokens(tokens, self._read_scales(block))

    def read_quantised(self, block: int) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float16]]:
        """int8 tokens [rows, t, d] and scales float16 [rows, t]: views of pages."""
        if self.dtype != "int8":
            raise UserError(f"{self.path} contains {self.dtype} {self.kind}, int8 was requested")
        return self._page_of_group(block, "tokens", self.shape), self._read_scales(block)

    def _read_scales(self, block: int) -> npt.NDArray[np.float16]:
        """Scales float16 [rows, t] of a block's tokens, each the largest magnitude of one."""
        scales = self._page_of_group(block, "scale", self.shape[:1])
        # The bits of what is negative, infinite or no number are above those of the limit.
        bad = np.flatnonzero((scales.view(np.uint16) > _MOST_SCALE_BITS).any(axis=1))
        if len(bad):
            worst = scales[bad[0]][scales[bad[0]].view(np.uint16).argmax()]
            raise UserError(
                f"{self.path}: rank {block * BLOCK_ROWS + bad[0]} of slide {self.slide_id} has "
                f"tokens of scale {worst:g}, expected 0 to {MOST_FEATURE:,.0f}; remove the file "
                "and run `python -m pipeline cache` again"
            )
        return scales

    def _page_of_group(
        self, block: int, column: str, shape: tuple[int, ...], *, is_list: bool = False
    ) -> npt.NDArray[Any]:
        dtype = np.dtype("<f2" if column == "scale" else DTYPES[self.dtype])
        try:
            group = block - self.start // BLOCK_ROWS
            values = self._pages.read_values(group, column, dtype, shape, is_list=is_list)
            rows = min(self.stop - block * BLOCK_ROWS, BLOCK_ROWS)
            if len(values) != rows:
                raise ValueError(f"{len(values)} rows, its name states {rows}")
            return values
        except (ValueError, IndexError, OSError) as error:
            raise UserError(
                f"{self.path}: block {block} is damaged ({' '.join(str(error).split())[:200]}); "
                "run `python -m pipeline verify --repair`, then `cache` again"
            ) from error
