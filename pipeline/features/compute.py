"""The worker's half of the `cache` stage: decoding, forward pass and writing overlap.

Threads decode the next batches while the encoder works on one and writers take what came
before, across the slides of a bundle. Batches never span slides and begin at the first missing
block, so that a slide's features do not depend on its neighbours in the bundle.
"""

import os
import queue
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from common.errors import UserError
from pipeline.dataset import BLOCK_ROWS, TileStore
from pipeline.dataset.features import MOST_FEATURE, find_outside

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from model.encoders import Encoder

Tiles = npt.NDArray[np.uint8]
View: TypeAlias = Callable[[Tiles], Tiles]

_DECODED_AHEAD = 3
"""Batches that wait decoded, for each decoding thread."""
_WRITTEN_BEHIND = 4
"""Batches that may wait for a span's writer before the encoder does."""
_MOST_LANES = 4
_CORES_A_LANE = 4


@dataclass(frozen=True)
class Span:
    """Missing blocks [start, stop) of a slide and the kinds of features that they lack."""

    slide: int
    slide_id: str
    blocks: range
    kinds: tuple[str, ...]

    @property
    def wants_tokens(self) -> bool:
        """Whether patch tokens are among the kinds."""
        return any(kind != "cls" for kind in self.kinds)


@dataclass(frozen=True)
class Features:
    """What a batch gave: CLS float32 [n, d], and tokens and their scales where wanted."""

    cls: npt.NDArray[np.float32]
    tokens: npt.NDArray[Any] | None = None
    scale: npt.NDArray[np.float16] | None = None


@dataclass
class TileBatch:
    """Whole blocks of one span, `tiles` uint8 [n, px, px, 3]; `last` ends the span."""

    span: Span
    blocks: range
    last: bool
    tiles: "Future[Tiles]" = field(default_factory=Future)


def order_batches(
    spans: list[Span], rows: int, lanes: int = 1
) -> Iterator[tuple[Span, range, bool]]:
    """Each span's blocks in order, at most `rows` tiles (but a whole block) at a time.

    Of `lanes` spans (at least 1) by turns, whose files are then written at the same time: what a
    batch contains does not depend on it.
    """
    waiting = iter(spans)
    active = deque(_batches_of(span, rows) for span in islice(waiting, lanes))
    while active:
        lane = active.popleft()
        if (batch := next(lane, None)) is not None:
            yield batch
            active.append(lane)
        elif (span := next(waiting, None)) is not None:
            active.appendleft(_batches_of(span, rows))


def _batches_of(span: Span, rows: int) -> Iterator[tuple[Span, range, bool]]:
    step = max(1, rows // BLOCK_ROWS)
    for first in range(span.blocks.start, span.blocks.stop, step):
        stop = min(first + step, span.blocks.stop)
        yield span, range(first, stop), stop == span.blocks.stop


def lanes_for(device: str, threads: int) -> int:
    """Files to write at the same time: a GPU gives more tokens a second than one thread writes.

    One thread writes 500 MB/s with both checksums, 1,700 tiles per second of float16 tokens.
    """
    # On a CPU the encoder is slower than any writer.
    if device == "cpu":
        return 1
    return max(1, min(_MOST_LANES, threads // _CORES_A_LANE))


class TileDecoder:
    """Decodes batches uint8 [n, px, px, 3] ahead, in order, on a few threads."""

    def __init__(self, store: TileStore, view: View, threads: int) -> None:
        self._store, self._view = store, view
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads, "decode")

    def run(self, work: Iterator[tuple[Span, range, bool]]) -> Iterator[TileBatch]:
        """Batches whose `tiles` [n, px, px, 3] are being decoded; damage raises in `result`."""
        waiting: deque[TileBatch] = deque()
        for span, blocks, last in work:
            waiting.append(self._begin_decoding(span, blocks, last))
            if len(waiting) > _DECODED_AHEAD * self._threads:
                yield waiting.popleft()
        yield from waiting

    def _begin_decoding(self, span: Span, blocks: range, last: bool) -> TileBatch:
        tiles = self._pool.submit(self._decode_blocks, span.slide_id, blocks)
        return TileBatch(span, blocks, last, tiles)

    def _decode_blocks(self, slide_id: str, blocks: range) -> Tiles:
        tiles: list[Tiles] = []
        for block in blocks:
            by_rank = self._store.read_block(slide_id, block)
            tiles.extend(self._view(by_rank[rank]) for rank in sorted(by_rank))
        return np.stack(tiles)

    def close(self) -> None:
        """End the threads; what waits is dropped."""
        self._pool.shutdown(cancel_futures=True)


class Forward:
    """The encoder on batches uint8 [n, px, px, 3]; out of memory halves the batch and goes on."""

    def __init__(
        self, encoder: "Encoder", batch: int, tokens: str, note: Callable[[str], None]
    ) -> None:
        self._encoder, self._tokens, self._note = encoder, tokens, note
        self.batch = batch

    def __call__(
        self, tiles: Tiles, *, tokens: bool, slide_id: str, first_rank: int
    ) -> Callable[[], Features]:
        """Begin the batch; the result is to be called where the features are needed.

        On a GPU the copy back runs while the next batch is computed. The result raises `UserError`
        naming slide and rank of a tile whose features are no encoder's; the first has `first_rank`.
        """
        while True:
            size = self.batch
            try:
                parts = [
                    self._begin_batch(tiles[i : i + size], tokens, slide_id, first_rank + i)
                    for i in range(0, len(tiles), size)
                ]
                return lambda: _join_parts([part() for part in parts])
            except RuntimeError as error:
                if not _is_out_of_memory(error):
                    raise
            if size == 1:
                raise UserError(
                    f"out of memory on {self._encoder.device} with a single tile: free the "
                    "device, use --dtype bfloat16 or a smaller encoder"
                )
            self._halve_batch()

    def _halve_batch(self) -> None:
        import torch

        self.batch //= 2
        torch.cuda.empty_cache()
        self._note(
            f"cache: out of memory on {self._encoder.device}, going on with batches of {self.batch}"
        )

    def _begin_batch(
        self, tiles: Tiles, tokens: bool, slide_id: str, first_rank: int
    ) -> Callable[[], Features]:
        import torch

        images: Any = tiles
        if self._encoder.device.type == "cuda":
            images = torch.from_numpy(np.ascontiguousarray(tiles)).pin_memory()
        output = self._encoder.encode(images, tokens=tokens)
        stored: list[Tensor] = [output.cls]
        if output.tokens is not None:
            stored += (
                quantise_tensor(output.tokens) if self._tokens == "int8" else [output.tokens.half()]
            )
        return _fetch_results(stored, slide_id, first_rank)


def quantise_tensor(tokens: "Tensor") -> "list[Tensor]":
    """int8 tokens [n, t, d] and scales float16 [n, t], as `quantise.py` defines."""
    import torch

    values = tokens.float()
    largest = values.abs().amax(-1)
    scale = largest.half()
    # Positive floats are in the order of their bits.
    next_above = (scale.view(torch.int16) + 1).view(torch.float16)
    scale = torch.where(scale.float() < largest, next_above, scale)
    divisor = torch.where(scale == 0, torch.ones_like(largest), scale.float())
    return [torch.round(values * (127.0 / divisor)[..., None]).to(torch.int8), scale]


def _fetch_results(
    stored: "list[Tensor]", slide_id: str, first_rank: int
) -> Callable[[], Features]:
    """The tensors on the host; the copy is begun now and waited for when called."""
    import torch

    # int8 values are in range by nature: their scales show whether the tokens were. NaN is not
    # within the limit either.
    sound = torch.stack(
        [(one.abs() <= MOST_FEATURE).all() for one in stored if one.is_floating_point()]
    ).all()
    tensors = [*stored, sound]
    if sound.device.type != "cuda":
        return lambda: _features_of(tensors, slide_id, first_rank)
    copies, done = _copied_aside(tensors)

    def wait() -> Features:
        done.synchronize()
        return _features_of(copies, slide_id, first_rank)

    return wait


def _copied_aside(tensors: "list[Tensor]") -> "tuple[list[Tensor], torch.cuda.Event]":
    """Copies to the host under way on a separate stream, and the event of their end.

    On the encoder's stream they would hold the next batch back.
    """
    import torch

    device = tensors[0].device
    aside = _copy_stream(device)
    aside.wait_stream(torch.cuda.current_stream(device))
    done = torch.cuda.Event()
    copies = []
    with torch.cuda.stream(aside):
        for tensor in tensors:
            host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            copies.append(host.copy_(tensor, non_blocking=True))
            tensor.record_stream(aside)
        done.record(aside)
    return copies, done


@lru_cache(maxsize=1)
def _copy_stream(device: "torch.device") -> "torch.cuda.Stream":
    import torch

    return torch.cuda.Stream(device)


def _features_of(tensors: "list[Tensor]", slide_id: str, first_rank: int) -> Features:
    *stored, sound = tensors
    arrays = [tensor.numpy() for tensor in stored]
    if not bool(sound):
        raise _outside_error(arrays, slide_id, first_rank)
    return Features(*arrays)


def _outside_error(arrays: list[npt.NDArray[Any]], slide_id: str, first_rank: int) -> UserError:
    """The error that names the first tile with features that no encoder gives."""
    found = [find_outside(array) for array in arrays if array.dtype.kind == "f"]
    row, value = min((one for one in found if one is not None), key=lambda one: one[0])
    return UserError(
        f"the encoder gave features with the value {value:g} for rank {first_rank + row} of slide "
        f"{slide_id}, expected finite numbers of magnitude up to {MOST_FEATURE:,.0f}; look at the "
        "tile, check the weights, or use --dtype float32"
    )


def _join_parts(parts: list[Features]) -> Features:
    def join(name: str) -> Any:
        arrays = [getattr(part, name) for part in parts]
        return None if arrays[0] is None else np.concatenate(arrays)

    return parts[0] if len(parts) == 1 else Features(join("cls"), join("tokens"), join("scale"))


def _is_out_of_memory(error: RuntimeError) -> bool:
    import torch

    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def worker_threads(asked: int | None) -> int:
    """Threads of this worker, at least 1: its share of the host's cores, all of them for None."""
    cores = len(os.sched_getaffinity(0))
    return min(asked or cores, cores)


def decode_threads(threads: int) -> int:
    """How many of a worker's threads decode: at least 1, all but one, which feeds the encoder.

    >>> decode_threads(8), decode_threads(1)
    (7, 1)
    """
    return max(1, threads - 1)


class SpanWriter:
    """Feeds one span's features to a function that runs in the writer's thread.

    `write` is given an iterator over the features and returns what it made. A full queue holds
    the encoder back; a writer that failed raises in `put_item`.
    """

    def __init__(
        self, pool: ThreadPoolExecutor, write: Callable[[Iterator[Features]], Any]
    ) -> None:
        self._queue: queue.Queue[Callable[[], Features] | UserError | None] = queue.Queue(
            _WRITTEN_BEHIND
        )
        self.result: Future[Any] = pool.submit(lambda: write(self._queued_items()))

    def _queued_items(self) -> Iterator[Features]:
        while True:
            item = self._queue.get()
            if item is None:
                return
            if isinstance(item, UserError):
                raise item
            yield item()

    def put_item(self, item: Callable[[], Features] | UserError | None) -> bool:
        """Hand over a batch, the end (None), or why there is no more; False: the writer failed."""
        # With a time limit, since a writer that has failed empties the queue no more.
        while not self.result.done():
            try:
                self._queue.put(item, timeout=0.2)
                return True
            except queue.Full:
                continue
        return False
