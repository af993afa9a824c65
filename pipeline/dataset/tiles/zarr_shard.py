"""Tiles in a Zarr v3 array per shard: one tile per chunk, all chunks in one sharded file.

`c/0/0/0/0` contains the chunks in rank order, then the shard index (offset and size of each chunk,
little-endian uint64, then their crc32c), as the sharding codec of the Zarr v3 specification has
it. A chunk is planar (transpose), delta-coded along the rows (numcodecs), zstd, CRC-32 in front
(numcodecs). Stock zarr reads it; reading and encoding here need no zarr.
"""

import errno
import itertools
import json
import os
import secrets
import shutil
import struct
import zlib
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from common.errors import UserError
from common.files import hash_file, make_directory, open_regular, sync_directory
from pipeline.dataset.commit import FileRecord, HashingFile
from pipeline.dataset.layout import BLOCK_ROWS, Dataset, parse_shard_name
from pipeline.dataset.tiles.png_tar import SHARD_REMEDY, ShardHandle

CODEC = "zarr-delta-zstd"
_ZSTD_LEVEL = 3
_CHUNK_FILE = ("c", "0", "0", "0", "0")
_INDEX_ROW, _CRC = 16, 4
_MOST_TURNS = 100


def encode_chunk(tile: npt.NDArray[np.uint8]) -> bytes:
    """The bytes of one chunk [1, px, px, 3]."""
    # Neighbours of one channel are alike: their differences compress better.
    flat = tile.transpose(2, 0, 1).ravel()
    delta = np.empty_like(flat)
    delta[0] = flat[0]
    np.subtract(flat[1:], flat[:-1], out=delta[1:])
    data: bytes = _zstd_codec().compress(delta, asbytes=True)
    return struct.pack("<I", zlib.crc32(data)) + data


def decode_chunk(data: bytes | memoryview, tile_px: int) -> npt.NDArray[np.uint8]:
    """The RGB tile uint8 [px, px, 3] of a chunk; raises ValueError on damaged bytes."""
    if len(data) <= _CRC or struct.unpack_from("<I", data)[0] != zlib.crc32(data[_CRC:]):
        raise ValueError("the chunk's CRC-32 does not match")
    size = tile_px * tile_px * 3
    try:
        flat = np.frombuffer(_zstd_codec().decompress(data[_CRC:], size), np.uint8)
    except OSError as error:
        raise ValueError(f"the chunk cannot be decompressed ({error})") from error
    planar = np.cumsum(flat, dtype=np.uint8).reshape(3, tile_px, tile_px)
    return np.ascontiguousarray(planar.transpose(1, 2, 0))


def _zstd_codec() -> Any:
    # One per call: threads decode at the same time.
    return pa.Codec("zstd", compression_level=_ZSTD_LEVEL)


def array_metadata(slide_id: str, start: int, stop: int, tile_px: int) -> dict[str, object]:
    """zarr.json of an array uint8 [ranks, px, px, 3], one chunk [1, px, px, 3] per tile."""
    shape = [stop - start, tile_px, tile_px, 3]
    inner = [
        {"name": "transpose", "configuration": {"order": [0, 3, 1, 2]}},
        {"name": "numcodecs.delta", "configuration": {"dtype": "|u1"}},
        {"name": "bytes"},
        {"name": "zstd", "configuration": {"level": _ZSTD_LEVEL, "checksum": False}},
        {"name": "numcodecs.crc32", "configuration": {}},
    ]
    index = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]
    sharding = {
        "chunk_shape": [1, *shape[1:]],
        "codecs": inner,
        "index_codecs": index,
        "index_location": "end",
    }
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": shape,
        "data_type": "uint8",
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": shape}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": 0,
        "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
        "dimension_names": ["rank", "y", "x", "channel"],
        "attributes": {"slide_id": slide_id, "start": start, "stop": stop},
    }


def commit_zarr(
    dataset: Dataset, run_id: str, final: Path, tile_px: int, chunks: Iterable[bytes]
) -> tuple[FileRecord, ...]:
    """Write encoded chunks in rank order as the array `final`; synced, then renamed once.

    The records have sizes in bytes. Raises `UserError` naming the array when the disk is full or
    not writable.
    """
    name = parse_shard_name(final.name)
    for path in (final, dataset.staging_dir(run_id) / final.name):
        dataset.refuse_linked_folders(path)
    staged = dataset.staging_dir(run_id) / f"{secrets.token_hex(4)}-{final.name}"
    head = json.dumps(
        array_metadata(name.slide_id, name.start, name.stop, tile_px), indent=2
    ).encode()
    try:
        body = staged.joinpath(*_CHUNK_FILE)
        body.parent.mkdir(parents=True)
        sizes = [
            _write_parts(staged / "zarr.json", [head]),
            _write_parts(body, _with_index(chunks, name.stop - name.start)),
        ]
        # The data first, then the folders that name it, from the innermost out.
        for folder in [*body.parents][: len(_CHUNK_FILE)]:
            sync_directory(folder)
        # Renamed as a whole: readers see all of the array or nothing.
        make_directory(final.parent)
        _replace_folder(staged, final, sizes)
    except OSError as error:
        raise UserError(
            f"cannot write {final}: {error.strerror or error}; free space or choose another folder"
        ) from error
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    paths = [final / "zarr.json", final.joinpath(*_CHUNK_FILE)]
    return tuple(
        FileRecord(dataset.relative_path(path), size, sha256)
        for path, (size, sha256) in zip(paths, sizes, strict=True)
    )


def _replace_folder(staged: Path, final: Path, sums: Sequence[tuple[int, str]]) -> None:
    """Rename the folder into place; what is there with the same `sums` stays, all else goes.

    Another run may do the same at the same time: whoever is second finds the other's array.
    """
    if final.is_symlink():
        final.unlink()  # a link is replaced, and what it leads to is left alone
    for number in itertools.count():
        try:
            # Fails where there is an array, and only then; an empty folder is replaced.
            staged.rename(final)
            break
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
                raise
            if number >= _MOST_TURNS:
                raise
        if _has_sums(final, sums):
            break
        # A damaged one, or another run's: moved away whole, since readers may have it open.
        old = staged.with_name(f"{staged.name}.old{number}")
        with suppress(FileNotFoundError):
            final.rename(old)
        shutil.rmtree(old, ignore_errors=True)
        if old.is_file():
            old.unlink(missing_ok=True)
    sync_directory(final.parent)


def _has_sums(array: Path, sums: Sequence[tuple[int, str]]) -> bool:
    """Whether an array's files have these sizes in bytes and sha256."""
    files = (array / "zarr.json", array.joinpath(*_CHUNK_FILE))
    try:
        # Sizes first: a damaged array is often short, and need not be read.
        return all(
            file.stat().st_size == size for file, (size, _) in zip(files, sums, strict=True)
        ) and all(hash_file(file) == sha256 for file, (_, sha256) in zip(files, sums, strict=True))
    except OSError:
        return False


def _write_parts(path: Path, parts: Iterable[bytes]) -> tuple[int, str]:
    with path.open("wb") as raw:
        file = HashingFile(raw)
        for part in parts:
            file.write(part)
        raw.flush()
        os.fsync(raw.fileno())
    return file.bytes, file.sha256


def _with_index(chunks: Iterable[bytes], count: int) -> Iterable[bytes]:
    from google_crc32c import value as crc32c

    rows, offset = [], 0
    for chunk in chunks:
        rows.append((offset, len(chunk)))
        offset += len(chunk)
        yield chunk
    if len(rows) != count:
        raise ValueError(f"{len(rows)} chunks for {count} ranks")
    index = np.array(rows, "<u8").tobytes()
    yield index + struct.pack("<I", crc32c(index))


def _check_index(index: npt.NDArray[np.uint64], size: int) -> None:
    """Chunks follow each other from the file's beginning, as our writer leaves them."""
    rows = index.astype(object)
    ends = np.cumsum(rows[:, 1]) if len(rows) else np.zeros(0)
    if not len(rows) or (rows[:, 0] != ends - rows[:, 1]).any() or ends[-1] > size:
        raise ValueError("its index is not that of its chunks")


@dataclass(frozen=True)
class ZarrShard:
    """An open Zarr shard: offset and size in bytes of each chunk, `index` uint64 [ranks, 2]."""

    path: Path
    start: int
    stop: int
    index: npt.NDArray[np.uint64]

    @classmethod
    def open(cls, path: Path) -> "ZarrShard":
        """Read the shard's index, 16 bytes per rank; `path` is the array's folder."""
        name = parse_shard_name(path.name)
        count = name.stop - name.start
        # The index is at the end, and its length follows from the ranks in the name.
        try:
            with open_regular(path.joinpath(*_CHUNK_FILE)) as file:
                file.seek(-(count * _INDEX_ROW + _CRC), os.SEEK_END)
                size = file.tell()
                index = np.frombuffer(file.read(count * _INDEX_ROW), "<u8").reshape(count, 2)
            _check_index(index, size)
        except (OSError, ValueError, OverflowError) as error:
            raise UserError(f"{path} cannot be read ({error}): {SHARD_REMEDY}") from error
        return cls(path, name.start, name.stop, index)

    @property
    def data_file(self) -> Path:
        """The file of all chunks."""
        return self.path.joinpath(*_CHUNK_FILE)

    def open_handle(self) -> ShardHandle:
        """Open the shard's file for reading of bytes."""
        return ShardHandle(self.data_file)

    def first_crc(self, handle: ShardHandle) -> int | None:
        """The CRC-32 in front of the first chunk."""
        return int.from_bytes(handle.read(0, _CRC), "little")

    def read_block(self, block: int, handle: ShardHandle | None = None) -> dict[int, bytes]:
        """Encoded chunks by rank of one block of the slide, in one read."""
        handle = handle or self.open_handle()
        first = block * BLOCK_ROWS
        if not self.start <= first < self.stop:
            raise UserError(f"{self.path} has no block {block}: {SHARD_REMEDY}")
        rows = self.index[first - self.start : first - self.start + BLOCK_ROWS].astype(np.int64)
        begin, end = int(rows[0, 0]), int(rows[-1].sum())
        data = handle.read(begin, end)
        return {
            first + i: data[offset - begin : offset - begin + size]
            for i, (offset, size) in enumerate(rows.tolist())
        }
