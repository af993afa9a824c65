"""Reading tiles by (slide, rank), whatever shard they are in."""

import os
import threading
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from common.errors import UserError
from pipeline.dataset.journal import Entry
from pipeline.dataset.layout import BLOCK_ROWS, Dataset
from pipeline.dataset.ledger import Ledger
from pipeline.dataset.lineage import FIRST_CRC, Lineage
from pipeline.dataset.tiles.png_tar import (
    MADE_AGAIN,
    SHARD_REMEDY,
    ShardHandle,
    TarShard,
    decode_png,
)
from pipeline.dataset.tiles.zarr_shard import ZarrShard, decode_chunk

_OPEN_FILES = 128
_DATA = (".tar", "/c/0/0/0/0")


class TileStore:
    """Random access to the tiles uint8 [px, px, 3] of one size. Safe to share between threads.

    Only shards that a journal line names are seen, and tiles of former candidates or a former slide
    are refused (see `Lineage`), as are shards that were made again under the same name since the
    store was opened. At most 128 files are open at a time; what
    stays in memory is one offset per block.
    """

    def __init__(self, dataset: Dataset, tile_px: int) -> None:
        self.dataset, self.tile_px = dataset, tile_px
        self._ledger = Ledger.read(dataset, "tile")[str(tile_px)]
        self._lineage = Lineage(dataset, tile_px)
        self._checked: set[str] = set()
        self._shards: dict[str, TarShard | ZarrShard] = {}
        self._stated: dict[str, Entry] = {}
        self._states: dict[str, tuple[int, int]] = {}
        self._handles: OrderedDict[str, ShardHandle] = OrderedDict()
        self._lock = threading.Lock()

    def slide_ids(self) -> list[str]:
        """Slides with at least one shard, sorted."""
        return sorted(self._ledger.written)

    def recorded_blocks(self, slide_id: str) -> set[int]:
        """Blocks (from 0 up, of 16 ranks each) that the journal says were written of the slide."""
        return self._ledger.recorded_blocks(slide_id)

    def fingerprint_of(self, slide_id: str) -> str:
        """The fingerprint of the slide's tiles, '' where it has none."""
        entry = self._ledger.latest(slide_id)
        return entry.fingerprint if entry else ""

    def read_block_bytes(self, slide_id: str, block: int) -> dict[int, bytes]:
        """Encoded bytes by rank of a block: PNG, or a chunk of a Zarr shard (see `decode_tile`)."""
        shard = self._shard_of_block(slide_id, block)
        return shard.read_block(block, self._open_handle(shard))

    def read_block(self, slide_id: str, block: int) -> dict[int, npt.NDArray[np.uint8]]:
        """RGB tiles uint8 [px, px, 3] by rank of a block."""
        tiles = {}
        for rank, data in self.read_block_bytes(slide_id, block).items():
            tiles[rank] = self.decode_tile(slide_id, rank, data)
        return tiles

    def decode_tile(self, slide_id: str, rank: int, data: bytes) -> npt.NDArray[np.uint8]:
        """Decode what `read_block_bytes` gave, a PNG or a Zarr chunk, to uint8 [px, px, 3].

        A `UserError` names slide, rank and file where it is damaged.
        """
        zarr = isinstance(self._shard_of_block(slide_id, rank // BLOCK_ROWS), ZarrShard)
        try:
            decode = decode_chunk if zarr else decode_png
            tile = decode(data, self.tile_px)
        except ValueError as error:
            where = self._shard_of_block(slide_id, rank // BLOCK_ROWS).path
            raise UserError(
                f"{where}: tile {rank} of slide {slide_id} is damaged ({error}); {SHARD_REMEDY}"
            ) from error
        return tile

    def read(self, slide_id: str, ranks: Iterable[int]) -> list[npt.NDArray[np.uint8]]:
        """RGB tiles uint8 [px, px, 3] in the order of `ranks`; each block is read once."""
        wanted = [int(rank) for rank in ranks]
        blocks = {
            block: self.read_block_bytes(slide_id, block)
            for block in sorted({rank // BLOCK_ROWS for rank in wanted})
        }
        return [
            self.decode_tile(slide_id, rank, blocks[rank // BLOCK_ROWS][rank]) for rank in wanted
        ]

    def _shard_of_block(self, slide_id: str, block: int) -> TarShard | ZarrShard:
        rank = block * BLOCK_ROWS
        entry = self._ledger.file_of(slide_id, rank)
        if entry is None:
            raise UserError(
                f"slide {slide_id}: tiles of {self.tile_px} px at ranks from {rank} are not in "
                f"{self.dataset.root}; run `python -m pipeline tile` for the selection"
            )
        if slide_id not in self._checked:
            self._lineage.check_tiles(slide_id, self._ledger.written[slide_id])
            self._checked.add(slide_id)
        # Two threads may open the same shard: the second then replaces an equal one.
        path = _shard_path(entry)
        with self._lock:
            shard = self._shards.get(path)
        if shard is None:
            shard = _open_shard(self.dataset, path, entry)
            with self._lock:
                self._shards[path] = shard
                self._stated[str(shard.path)] = entry
        return shard

    def _open_handle(self, shard: TarShard | ZarrShard) -> ShardHandle:
        key = str(shard.path)
        with self._lock:
            if key in self._handles:
                self._handles.move_to_end(key)
                return self._handles[key]
        try:
            handle = shard.open_handle()
        except OSError as error:
            raise UserError(f"{shard.path} cannot be opened: {error.strerror}") from error
        self._check_same(shard, handle)
        with self._lock:
            self._handles[key] = handle
            while len(self._handles) > _OPEN_FILES:
                self._handles.popitem(last=False)
        return handle

    def _check_same(self, shard: TarShard | ZarrShard, handle: ShardHandle) -> None:
        """Refuse a file that was just opened where it is not the one that its line states."""
        stat, key = os.fstat(handle.fd), str(shard.path)
        state = (stat.st_size, stat.st_mtime_ns)
        with self._lock:
            known, entry = self._states.get(key), self._stated[key]
        if known is None:
            size = next((f.bytes for f in entry.files if f.path.endswith(_DATA)), state[0])
            stated = entry.values.get(FIRST_CRC)
            is_same = size == state[0] and stated in (None, shard.first_crc(handle))
        else:
            is_same = known == state
        if not is_same:
            raise UserError(f"{shard.path} {MADE_AGAIN}")
        with self._lock:
            self._states[key] = state


def with_first_crc(dataset: Dataset, entry: Entry) -> Entry:
    """The line of a shard that was just written, with its `FIRST_CRC`."""
    shard = _open_shard(dataset, _shard_path(entry), entry)
    crc = shard.first_crc(shard.open_handle())
    return replace(entry, values={**entry.values, FIRST_CRC: crc})


def _open_shard(dataset: Dataset, path: str, entry: Entry) -> TarShard | ZarrShard:
    """A line's shard, whose index is the one that the line states."""
    if not path.endswith(".tar"):
        return ZarrShard.open(dataset.root / path)
    sums = {record.path: record.sha256 for record in entry.files}
    return TarShard.open(dataset.root / path, sums.get(path.removesuffix(".tar") + ".idx", ""))


def _shard_path(entry: Entry) -> str:
    """The tar, or the folder of the Zarr array, that contains an entry's tiles."""
    for record in entry.files:
        if record.path.endswith(".tar"):
            return record.path
        if record.path.endswith(".zarr/zarr.json"):
            return record.path.removesuffix("/zarr.json")
    raise UserError(
        f"the journal names no tile shard for ranks {entry.start} to {entry.stop} of slide "
        f"{entry.slide_id}; run `python -m pipeline tile` again"
    )
