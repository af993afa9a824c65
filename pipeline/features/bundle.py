"""The worker of the `cache` stage: the missing features of a bundle of slides."""

import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache, partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from common.errors import UserError
from pipeline.dataset import (
    BLOCK_ROWS,
    Dataset,
    Entry,
    FileRecord,
    TileStore,
    commit_file,
)
from pipeline.dataset.commit import HashingFile
from pipeline.dataset.features.parquet import (
    FeatureShard,
    cls_table,
    open_writer,
    token_table,
    write_blocks,
)
from pipeline.dataset.layout import ShardName, ranks_of_blocks
from pipeline.dataset.lineage import FIRST_CRC, TILES
from pipeline.features.compute import (
    Features,
    Forward,
    Span,
    SpanWriter,
    TileBatch,
    TileDecoder,
    decode_threads,
    lanes_for,
    order_batches,
    worker_threads,
)
from pipeline.features.config import CacheConfig
from pipeline.features.device import worker_device
from pipeline.features.views import view_function
from pipeline.run.tasks import report_note, report_progress

if TYPE_CHECKING:
    from model.encoders import Encoder


@dataclass(frozen=True)
class SlideWork:
    """One slide's missing features, as a worker receives them.

    `spans` are the ranges [start, stop) of blocks to compute, each with the kinds of features that
    it lacks; `tile_px` is the tile side in px; `rows` is one more than the slide's last written
    rank; `made_from` is what the lines state of the tiles (see `pipeline.dataset.lineage`).
    """

    root: str
    run_id: str
    slide_id: str
    config: CacheConfig
    tile_px: int
    spans: Mapping[range, tuple[str, ...]]
    fingerprint: str
    weights_sha256: str
    rows: int
    made_from: Mapping[str, object] = field(default_factory=dict)

    def failed_entries(self, reason: str, kinds_left: Iterable[Iterable[str]]) -> list[Entry]:
        """The lines of a failure, of the kinds that some span lacks and a later run writes.

        No other scope will have a line that says that the slide is done.
        """
        lacking = set(chain.from_iterable(kinds_left))
        return [
            Entry(self.slide_id, "failed", self.fingerprint, reason,
                  scope=self.config.scope(self.tile_px, kind))
            for kind in self.config.kinds
            if kind in lacking
        ]  # fmt: skip


def cache_bundle(bundle: list[tuple[SlideWork]]) -> Iterator[list[Entry]]:
    """Compute and write the missing features of several slides; one slide's entries at a time.

    CLS is float32 [d] per tile, patch tokens are [t, d] in float16 or int8.
    """
    works = [work for (work,) in bundle]
    first = works[0]
    config = first.config
    try:
        encoder = load_encoder_once(
            config.encoder, config.weights, worker_device(config.device), config.dtype
        )
        # Each worker reads the weights, which may have been replaced since the stage began.
        if encoder.weights_sha256 != first.weights_sha256:
            raise UserError(f"weights '{config.weights}' changed while the stage ran; run it again")
    except UserError as error:
        for work in works:
            yield work.failed_entries(str(error), work.spans.values())
        return
    store = TileStore(Dataset(Path(first.root)), first.tile_px)
    with _Bundle(works, encoder, store) as slides:
        yield from slides.run()


class _StoppedError(UserError):
    """Ends a writer because another one of the same slide failed, which says why."""


class _SlideWriters:
    """The files of one slide that are being written, and why it stopped, if it did."""

    def __init__(self, job: "_FeatureJob") -> None:
        self.job = job
        self.by_span: dict[range, SpanWriter] = {}
        self.unended_spans = len(job.work.spans)
        self.is_stopped = False
        self.error: UserError | None = None

    def refuse_other_tiles(self, store: TileStore) -> None:
        """Stop where the slide's tiles are others by now than the stage planned with."""
        planned = self.job.work.made_from.get(TILES)
        if planned and store.fingerprint_of(self.job.work.slide_id) != planned:
            self.stop(
                UserError(
                    f"slide {self.job.work.slide_id}: its tiles were made again while `cache` ran: "
                    "run it again"
                )
            )

    def stop(self, error: UserError | None = None) -> None:
        """No further features come: of a damaged tile, or as a writer failed (which says why)."""
        self.is_stopped, self.error = True, error
        for writer in self.by_span.values():
            writer.put_item(
                error or _StoppedError("another file of the slide could not be written")
            )

    @property
    def has_ended(self) -> bool:
        """Whether all spans were computed and their files written, or failed."""
        return not self.unended_spans and all(
            writer.result.done() for writer in self.by_span.values()
        )

    def entries(self) -> list[Entry]:
        """The slide's entries; waits for its files."""
        entries: list[Entry] = []
        written: set[range] = set()
        failure, stopped = self.error, None
        # Every writer is waited for, also after a failure: what was written is journalled.
        for blocks, writer in sorted(self.by_span.items(), key=lambda item: item[0].start):
            try:
                entries += writer.result.result()
                written.add(blocks)
            except _StoppedError as error:
                stopped = error
            except UserError as error:
                failure = failure or error
        # A writer that was stopped does not know why: another one's reason comes first.
        failure = failure or stopped
        if failure is not None:
            spans = self.job.work.spans.items()
            unwritten = [kinds for blocks, kinds in spans if blocks not in written]
            entries += self.job.work.failed_entries(str(failure), unwritten)
        return entries


class _Bundle:
    """The slides of a bundle on their way through decoder, encoder and writer."""

    def __init__(self, works: list[SlideWork], encoder: "Encoder", store: TileStore) -> None:
        self._config = works[0].config
        self._encoder = encoder
        self._slides = [_SlideWriters(_FeatureJob(work, encoder)) for work in works]
        for slide in self._slides:
            slide.refuse_other_tiles(store)
        self._spans = [
            Span(index, work.slide_id, blocks, kinds)
            for index, work in enumerate(works)
            for blocks, kinds in sorted(work.spans.items(), key=lambda item: item[0].start)
        ]
        threads = worker_threads(self._config.threads)
        self._lanes = lanes_for(encoder.device.type, threads) if self._config.stores_tokens else 1
        view = view_function(self._config.view)
        self._decoder = TileDecoder(store, view, decode_threads(threads))
        # One more than are fed: a file that is being synced keeps no other waiting.
        self._pool = ThreadPoolExecutor(self._lanes + 1, "write")

    def __enter__(self) -> "_Bundle":
        return self

    def __exit__(self, *_: object) -> None:
        # Also after an exception: writers wait for features that will never come.
        for slide in self._slides:
            slide.stop(UserError("interrupted"))
        self._decoder.close()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def run(self) -> Iterator[list[Entry]]:
        """The entries of each slide, in order, as soon as its last file is committed."""
        forward = Forward(self._encoder, self._config.batch, self._config.tokens, report_note)
        yielded = 0
        for batch in self._decoder.run(order_batches(self._spans, self._config.batch, self._lanes)):
            slide = self._slides[batch.span.slide]
            if not slide.is_stopped:
                self._encode_batch(slide, batch, forward)
            slide.unended_spans -= batch.last
            # In the bundle's order: the coordinator counts slides as they come.
            while yielded < batch.span.slide and self._slides[yielded].has_ended:
                yield self._slides[yielded].entries()
                yielded += 1
        for slide in self._slides[yielded:]:
            yield slide.entries()

    def _encode_batch(self, slide: _SlideWriters, batch: TileBatch, forward: Forward) -> None:
        """Compute one batch and hand its features to the writer of its span."""
        span = batch.span
        if span.blocks not in slide.by_span:
            write = partial(slide.job.write, span, self._lanes)
            slide.by_span[span.blocks] = SpanWriter(self._pool, write)
        writer = slide.by_span[span.blocks]
        try:
            tiles = batch.tiles.result()
            features = forward(
                tiles, tokens=span.wants_tokens, slide_id=span.slide_id,
                first_rank=batch.blocks.start * BLOCK_ROWS,
            )  # fmt: skip
            goes_on = writer.put_item(features)
            report_progress(span.slide_id, len(tiles))
        except UserError as error:
            slide.stop(error)
            return
        if not goes_on or (batch.last and not writer.put_item(None)):
            slide.stop()


@dataclass(frozen=True)
class _FeatureJob:
    """One slide's features with everything that writing them needs."""

    work: SlideWork
    encoder: "Encoder"

    @property
    def dataset(self) -> Dataset:
        """The dataset that the features are written to."""
        return Dataset(Path(self.work.root))

    def write(self, span: Span, lanes: int, parts: Iterator[Features]) -> list[Entry]:
        """Write the files of a span from its features; tokens stream, CLS waits in memory.

        The encoder's time is shared by `lanes` spans, and the entries state this one's part.
        """
        work, began = self.work, time.monotonic()
        cls: list[npt.NDArray[np.float32]] = []
        staged: list[tuple[str, FileRecord]] = []
        token_kind = next((kind for kind in span.kinds if kind != "cls"), None)
        start = span.blocks.start * BLOCK_ROWS
        # The slide's last block may be short: how many rows there are, the features say.
        if token_kind is None:
            cls.extend(part.cls for part in parts)
            stop = start + sum(map(len, cls))
        else:
            rows = self.work.rows
            stop = ranks_of_blocks(span.blocks, rows).stop
            path = self._file_path(token_kind, start, stop)
            write = partial(self._write_tokens, parts, cls)
            staged.append((token_kind, commit_file(self.dataset, self.work.run_id, path, write)))
        if "cls" in span.kinds:
            table = cls_table(start, np.concatenate(cls))
            path = self._file_path("cls", start, stop)
            write = partial(_write_table, table)
            staged.insert(0, ("cls", commit_file(self.dataset, self.work.run_id, path, write)))
        seconds = (time.monotonic() - began) / lanes
        return [
            Entry(
                work.slide_id, "done", work.fingerprint,
                scope=work.config.scope(work.tile_px, kind),
                start=start, stop=stop, files=(record,), seconds=seconds,
                counts={"tiles": stop - start} if place == 0 else {},
                values={**work.made_from, FIRST_CRC: FeatureShard(self._path(record)).first_crc},
            )
            for place, (kind, record) in enumerate(staged)
        ]  # fmt: skip

    def _path(self, record: FileRecord) -> Path:
        return self.dataset.root / record.path

    def _write_tokens(
        self, parts: Iterator[Features], cls: list[npt.NDArray[np.float32]], file: HashingFile
    ) -> None:
        tables = (self._token_table(part, cls) for part in parts)
        first = next(tables)
        with open_writer(file, first.schema) as writer:
            for table in chain([first], tables):
                write_blocks(writer, table)

    def _token_table(self, part: Features, cls: list[npt.NDArray[np.float32]]) -> pa.Table:
        assert part.tokens is not None
        cls.append(part.cls)
        return token_table(part.tokens, part.scale)

    def _file_path(self, kind: str, start: int, stop: int) -> Path:
        config = self.work.config
        folder = self.dataset.features_dir(self.work.tile_px, config.encoder, config.view) / kind
        return folder / str(ShardName(self.work.slide_id, start, stop, "parquet"))


def _write_table(table: pa.Table, file: HashingFile) -> None:
    with open_writer(file, table.schema) as writer:
        write_blocks(writer, table)


@lru_cache(maxsize=1)
def load_encoder_once(name: str, weights: str, device: str, dtype: str) -> "Encoder":
    """The encoder in `dtype` (float32 or bfloat16), kept by its process from slide to slide."""
    import torch

    from model.encoders import load_encoder

    return load_encoder(name, weights, device=device, dtype=getattr(torch, dtype))
