"""Which tile stands in which place of which batch: a pure function of the step.

Batch t depends on the selection, the seed, the global batch B, the cursors a slot K and t alone;
not on ranks, threads, shard files or restarts. So the reader's whole state is the integer t.

An epoch e shuffles the selection's blocks by Philox(seed, e) and concatenates their selected
rows, N in all. With L = N // (B K) and E = L K steps an epoch, `e, i = divmod(t, E)`, and slot j
reads row `(j K + i mod K) L + i // K`: K cursors a slot walk through disjoint stretches, each
block is read once by a cursor, and a batch mixes B K distant places over K steps.
"""

import hashlib
import json
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt

from common.errors import UserError
from pipeline.dataset import BLOCK_ROWS, Selection

BLOCK_DTYPE = np.dtype([("slide", "<u4"), ("block", "<u4"), ("mask", "<u2")])
"""A block of the selection in 10 bytes: slide index, block number, bit i set for row i."""

_BITS = np.arange(BLOCK_ROWS, dtype=np.uint16)
_SLIDES_FILE, _BLOCKS_FILE = "slides.json", "blocks.npy"
_KEPT_EPOCHS = 2  # reader threads run ahead into the next epoch while others end this one


@dataclass(frozen=True)
class BlockTable:
    """The selected rows of a dataset as blocks, sorted by (slide_id, block).

    `blocks` has BLOCK_DTYPE, 10 bytes per block; its `slide` indexes `slide_ids`.
    """

    slide_ids: tuple[str, ...]
    blocks: npt.NDArray[np.void]

    @cached_property
    def row_counts(self) -> npt.NDArray[np.int64]:
        """Selected rows of each block, int64, from 1 to 16."""
        bits = (self.blocks["mask"][:, None] >> _BITS) & 1
        return bits.sum(axis=1, dtype=np.int64)

    @property
    def num_rows(self) -> int:
        """Selected rows in all, N."""
        return int(self.row_counts.sum())

    @property
    def read_amplification(self) -> float:
        """Tiles read from disk for each one trained on: whole blocks are read, so 1 to 16."""
        return len(self.blocks) * BLOCK_ROWS / max(self.num_rows, 1)

    def spread_rows(self, count: int) -> list[tuple[str, int]]:
        """`count` rows (slide_id, rank) spread evenly over the table, or all where it has fewer."""
        ends = np.cumsum(self.row_counts)
        total = int(ends[-1]) if len(ends) else 0
        places = np.unique(np.linspace(0, total - 1, min(count, total)).astype(int))
        found = []
        for place in places.tolist():
            entry = int(np.searchsorted(ends, place, side="right"))
            slide, block, mask = self.blocks[entry]
            bit = _set_bits(int(mask))[place - int(ends[entry] - self.row_counts[entry])]
            found.append((self.slide_ids[slide], int(block) * BLOCK_ROWS + bit))
        return found

    @cached_property
    def content_hash(self) -> str:
        """sha256 of the slides and blocks: two tables of one hash give one stream."""
        digest = hashlib.sha256("\0".join(self.slide_ids).encode() + b"\0\0")
        digest.update(self.blocks.tobytes())
        return digest.hexdigest()


def compile_blocks(selection: Selection) -> BlockTable:
    """The block table of a selection; shard files play no part in it."""
    slides = np.repeat(
        np.arange(len(selection.slide_ids), dtype=np.uint32), np.diff(selection.offsets)
    )
    numbers = (selection.ranks // BLOCK_ROWS).astype(np.uint32)
    bits = np.left_shift(np.uint16(1), (selection.ranks % BLOCK_ROWS).astype(np.uint16))
    # Slides and ranks are sorted, so that the rows of a block are neighbours.
    changes = (np.diff(slides) != 0) | (np.diff(numbers) != 0)
    starts = np.concatenate([[0], np.flatnonzero(changes) + 1]) if len(slides) else np.zeros(0, int)
    blocks = np.empty(len(starts), BLOCK_DTYPE)
    blocks["slide"], blocks["block"] = slides[starts], numbers[starts]
    blocks["mask"] = np.bitwise_or.reduceat(bits, starts) if len(starts) else 0
    return BlockTable(selection.slide_ids, blocks)


def write_blocks(table: BlockTable, folder: Path) -> None:
    """Write a table as whole files: `slides.json`, and `blocks.npy` with 10 bytes per block."""
    folder.mkdir(parents=True, exist_ok=True)
    # Not synced: every start writes them again before it reads them.
    staged = folder / f".writing-{os.getpid()}"
    staged.write_text(json.dumps(table.slide_ids))
    staged.replace(folder / _SLIDES_FILE)
    with staged.open("wb") as file:
        np.save(file, table.blocks)
    staged.replace(folder / _BLOCKS_FILE)


def map_blocks(folder: Path) -> BlockTable:
    """The table in a folder; its blocks are mapped, so that a node's processes share them."""
    slides = tuple(json.loads((folder / _SLIDES_FILE).read_text()))
    return BlockTable(slides, np.load(folder / _BLOCKS_FILE, mmap_mode="r"))


def epoch_order(num_blocks: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """The order int64 of an epoch's blocks: the stable sort order of Philox's first words.

    Raw words under the key (seed, epoch), not NumPy's `permutation`, whose algorithm may change
    between versions.
    """
    words = np.random.Philox(key=np.array([seed, epoch], np.uint64)).random_raw(num_blocks)
    return np.argsort(words, kind="stable")


def slots_of_rank(rank: int, num_ranks: int, batch_size: int) -> range:
    """The slots [r B // R, (r+1) B // R) of the global batch for rank r from 0 to R - 1."""
    return range(rank * batch_size // num_ranks, (rank + 1) * batch_size // num_ranks)


@dataclass(frozen=True)
class StreamRow:
    """One tile of the stream: which cursor reads it, and its block's row from 0 to 15."""

    cursor: int
    slide_id: str
    block: int
    row: int

    @property
    def rank(self) -> int:
        """The tile's rank in its slide, from 0 up."""
        return self.block * BLOCK_ROWS + self.row


@dataclass(frozen=True)
class Visit:
    """A block in an epoch: its selected rows `bits` (0 to 15) are at positions from `first` on."""

    epoch: int
    first: int
    slide_id: str
    block: int
    bits: tuple[int, ...]

    def covers_position(self, epoch: int, position: int) -> bool:
        """Whether the position is in this block."""
        return epoch == self.epoch and 0 <= position - self.first < len(self.bits)

    def make_row(self, cursor: int, position: int) -> StreamRow:
        """The row at a position that the block covers, as a cursor reads it."""
        return StreamRow(cursor, self.slide_id, self.block, self.bits[position - self.first])


@dataclass(frozen=True)
class _Epoch:
    order: npt.NDArray[np.int64]
    ends: npt.NDArray[np.int64]  # rows up to and with each block in that order


class Stream:
    """Rows of the endless training stream by step and slot; safe to share between threads.

    Raises `UserError` when the selection has fewer than batch_size * cursors rows.
    """

    def __init__(self, table: BlockTable, *, seed: int, batch_size: int, cursors: int) -> None:
        self.table, self.seed = table, seed
        self.batch_size, self.cursors = batch_size, cursors
        self.stretch = table.num_rows // (batch_size * cursors)
        if self.stretch == 0:
            raise UserError(_describe_shortage(table.num_rows, batch_size, cursors))
        self._epochs: dict[int, _Epoch] = {}
        self._lock = threading.Lock()

    @property
    def steps_per_epoch(self) -> int:
        """E = L K."""
        return self.stretch * self.cursors

    def find_place(self, step: int, slot: int) -> tuple[int, int, int]:
        """Epoch, cursor and position in the epoch of what the slot reads at that step."""
        epoch, index = divmod(step, self.steps_per_epoch)
        cursor = index % self.cursors
        position = (slot * self.cursors + cursor) * self.stretch + index // self.cursors
        return epoch, cursor, position

    def find_row(self, step: int, slot: int) -> StreamRow:
        """The row that the slot reads at that step."""
        epoch, cursor, position = self.find_place(step, slot)
        return self.find_visit(epoch, position).make_row(cursor, position)

    def find_batch(self, step: int) -> list[StreamRow]:
        """The rows of the whole global batch, by slot."""
        return [self.find_row(step, slot) for slot in range(self.batch_size)]

    def cursor_neighbours(self, step: int) -> Iterator[int]:
        """The steps of the same epoch at which a slot's same cursor reads: nearest earlier ones
        first, then the later ones. Where a tile is damaged, its stand-in is looked for there."""
        first = step // self.steps_per_epoch * self.steps_per_epoch
        yield from range(step - self.cursors, first - 1, -self.cursors)
        yield from range(step + self.cursors, first + self.steps_per_epoch, self.cursors)

    def find_visit(self, epoch: int, position: int) -> Visit:
        """The block that holds a position of an epoch."""
        shuffled = self._shuffle_epoch(epoch)
        place = int(np.searchsorted(shuffled.ends, position, side="right"))
        entry = int(shuffled.order[place])
        slide, block, mask = self.table.blocks[entry].item()
        bits = tuple(_set_bits(mask))
        first = int(shuffled.ends[place]) - len(bits)
        return Visit(epoch, first, self.table.slide_ids[slide], block, bits)

    def _shuffle_epoch(self, epoch: int) -> _Epoch:
        with self._lock:
            if epoch not in self._epochs:
                order = epoch_order(len(self.table.blocks), self.seed, epoch)
                self._epochs[epoch] = _Epoch(order, np.cumsum(self.table.row_counts[order]))
                for old in sorted(self._epochs)[:-_KEPT_EPOCHS]:
                    del self._epochs[old]
            return self._epochs[epoch]


def _set_bits(mask: int) -> list[int]:
    """Positions of the mask's ones, ascending."""
    return [bit for bit in range(BLOCK_ROWS) if mask >> bit & 1]


def _describe_shortage(rows: int, batch_size: int, cursors: int) -> str:
    need = f"data.batch_size x data.cursors = {batch_size} x {cursors} = {batch_size * cursors}"
    if rows == 0:
        fix = "select tiles with `python -m pipeline select`"
    elif rows < batch_size:
        fix = f"lower data.batch_size to {rows} or less (with data.cursors=1), or select more"
    else:
        fix = f"lower data.cursors to {rows // batch_size}, or select more tiles"
    return f"the selection has {rows} rows, fewer than {need} that a step draws from: {fix}"
