"""Batches of the stream, read ahead by threads: a thread owns slots, never whole batches.

Decoding releases the GIL, and a slot's cursors walk through blocks in their order, so that each
block is read once a visit whatever the number of threads.
"""

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal, Self

import torch
from torch import Tensor

from common.errors import UserError
from train.source import BlockSource, OpenBlock, Sample
from train.stream import Stream, StreamRow, Visit

OnError = Literal["stop", "skip"]


@dataclass
class Batch:
    """A rank's part of batch `step`, by slot.

    `tiles` uint8 [n, px, px, 3] RGB, `cls` float32 [n, d], `tokens` float16 [n, t, d]; `cls` and
    `tokens` are None where the run does not use them. `damaged` says of each tile that another
    stands in for what is the matter with it, and where.
    """

    step: int
    slots: range
    tiles: Tensor
    cls: Tensor | None
    tokens: Tensor | None
    damaged: list[str] = field(default_factory=list)


class SlotReader:
    """Reads one slot's row of each step, keeping one open block a cursor."""

    def __init__(self, stream: Stream, source: BlockSource, slot: int, on_error: OnError) -> None:
        self.stream, self.source, self.slot, self.on_error = stream, source, slot, on_error
        self._open: dict[int, OpenBlock] = {}
        self._visits: dict[int, Visit] = {}

    def read(self, step: int) -> tuple[Sample, str | None]:
        """The slot's sample, tile uint8 [px, px, 3], at that step, and a stand-in's error.

        The stand-in is the nearest earlier row of the same cursor and epoch that can be read,
        or the nearest later one at the stretch's start: a function of the step and the files
        alone, so resume stays exact. Raises `UserError` where none can be read.
        """
        try:
            return self._read_sample(self._find_row(step)), None
        except UserError as error:
            if self.on_error == "stop":
                raise
            stand_in = self._read_stand_in(step)
            # The tile's error says more than that of its last neighbour.
            if stand_in is None:
                raise
            return stand_in, str(error)

    def _find_row(self, step: int) -> StreamRow:
        """`stream.find_row`, looked up once a block."""
        epoch, cursor, position = self.stream.find_place(step, self.slot)
        visit = self._visits.get(cursor)
        if visit is None or not visit.covers_position(epoch, position):
            visit = self._visits[cursor] = self.stream.find_visit(epoch, position)
        return visit.make_row(cursor, position)

    def _read_stand_in(self, step: int) -> Sample | None:
        for other in self.stream.cursor_neighbours(step):
            try:
                return self._read_sample(self.stream.find_row(other, self.slot))
            except UserError:
                continue
        return None

    def _read_sample(self, row: StreamRow) -> Sample:
        block = self._open.get(row.cursor)
        if block is None or (block.slide_id, block.block) != (row.slide_id, row.block):
            try:
                block = self.source.open_block(row.slide_id, row.block)
            except UserError as error:  # of a whole block: say for which tile it was read
                raise UserError(f"slide {row.slide_id}, rank {row.rank}: {error}") from error
            self._open[row.cursor] = block
        return self.source.read_sample(block, row.rank, row.row)


@dataclass
class _Pending:
    """A batch that threads are filling."""

    batch: Batch | None = None
    filled: int = 0
    errors: list[BaseException] = field(default_factory=list)


class BatchReader:
    """Iterates over a rank's batches of steps [first_step, stop_step), in order.

    At most `prefetch` batches are in memory beside the one in use. A damaged tile raises its
    `UserError` at the very step it belongs to, or is replaced with on_error="skip". `wait_s` is
    how many seconds the consumer has waited for data. Use as a context manager: leaving it
    stops the threads.
    """

    def __init__(
        self,
        stream: Stream,
        source: BlockSource,
        slots: range,
        *,
        first_step: int,
        stop_step: int,
        threads: int = 4,
        prefetch: int = 2,
        on_error: OnError = "stop",
        pin_memory: bool = False,
    ) -> None:
        self.slots, self.pin_memory = slots, pin_memory
        self.first_step, self.stop_step = first_step, stop_step
        self.wait_s = 0.0
        self._prefetch = prefetch
        self._readers = [SlotReader(stream, source, slot, on_error) for slot in slots]
        self._pending: dict[int, _Pending] = {}
        self._next = first_step
        self._stopped = False
        self._changed = threading.Condition()
        # A thread without a slot would only wait.
        count = max(1, min(threads, len(slots)))
        self._threads = [
            threading.Thread(
                target=self._fill_slots, args=(range(k, len(slots), count),), daemon=True
            )
            for k in range(count)
        ]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def __iter__(self) -> Iterator[Batch]:
        for step in range(self.first_step, self.stop_step):
            yield self._take_batch(step)

    def _take_batch(self, step: int) -> Batch:
        started = time.monotonic()
        with self._changed:
            self._changed.wait_for(lambda: self._is_ready(step))
            pending = self._pending.pop(step)
            self._next = step + 1
            self._changed.notify_all()
        self.wait_s += time.monotonic() - started
        if pending.errors:
            raise pending.errors[0]
        assert pending.batch is not None
        return pending.batch

    def _is_ready(self, step: int) -> bool:
        pending = self._pending.get(step)
        return pending is not None and (
            bool(pending.errors) or pending.filled == len(self._readers)
        )

    def _fill_slots(self, places: range) -> None:
        """A thread's life: its slots of each step, never further ahead than the prefetch."""
        for step in range(self.first_step, self.stop_step):
            pending = self._begin_batch(step)
            if pending is None:
                return
            try:
                for place in places:
                    self._place_sample(pending, step, place)
            except BaseException as error:
                with self._changed:
                    pending.errors.append(error)
                    self._changed.notify_all()
                return

    def _begin_batch(self, step: int) -> _Pending | None:
        """The batch to fill, once there is room for it; None when the reader was stopped."""

        def may_go() -> bool:
            return self._stopped or step <= self._next + self._prefetch

        with self._changed:
            self._changed.wait_for(may_go)
            return None if self._stopped else self._pending.setdefault(step, _Pending())

    def _place_sample(self, pending: _Pending, step: int, place: int) -> None:
        sample, damage = self._readers[place].read(step)
        with self._changed:
            if pending.batch is None:
                pending.batch = self._allocate_batch(step, sample)
            batch = pending.batch
        stores = (batch.tiles, batch.cls, batch.tokens)
        for store, values in zip(stores, sample, strict=True):
            if store is not None:
                store.numpy()[place] = values
        with self._changed:
            if damage is not None:
                batch.damaged.append(damage)
            pending.filled += 1
            # Per batch: a wake-up per tile would cost as much as reading it.
            if pending.filled == len(self._readers):
                self._changed.notify_all()

    def _allocate_batch(self, step: int, sample: Sample) -> Batch:
        count = len(self.slots)

        def allocate_tensor(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
            return torch.empty((count, *shape), dtype=dtype, pin_memory=self.pin_memory)

        return Batch(
            step,
            self.slots,
            allocate_tensor(sample.tile.shape, torch.uint8),
            None if sample.cls is None else allocate_tensor(sample.cls.shape, torch.float32),
            None if sample.tokens is None else allocate_tensor(sample.tokens.shape, torch.float16),
        )
