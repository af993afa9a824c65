"""The worker of the `cache` stage: the missing features of a bundle of slides."""

import time
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

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
    candidate_count,
    commit_file,
)
from pipeline.dataset.commit import HashingFile
from pipeline.dataset.features.parquet import cls_table, open_writer, token_table, write_blocks
from pipeline.dataset.layout import ShardName
from pipeline.features.compute import (
    Batch,
    Decoder,
    Features,
    Forward,
    Span,
    SpanWriter,
    batches,
    decode_threads,
    lanes_for,
    worker_threads,
)
from pipeline.features.config import CacheConfig
from pipeline.features.device import worker_device
from pipeline.features.views import view_function
from pipeline.run.engine import report_note, report_progress

if TYPE_CHECKING:
    from model.encoders import Encoder

Work: TypeAlias = dict[tuple[int, int], list[str]]
"""Runs of missing blocks [first, stop) of a slide, and the kinds of features that each lacks."""
Arguments: TypeAlias = tuple[str, str, str, CacheConfig, int, Work, str, str]
"""Root, run id, slide, configuration, tile size, missing spans, fingerprint, sum of weights."""


def cache_bundle(bundle: list[Arguments]) -> Iterator[list[Entry]]:
    """Compute and write the missing features of several slides; one slide's entries at a time."""
    root, _, _, config, tile_px, _, _, weights_sha256 = bundle[0]
    try:
        encoder = loaded(config.encoder, config.weights, worker_device(config.device), config.dtype)
        if encoder.weights_sha256 != weights_sha256:
            raise UserError(f"weights '{config.weights}' changed while the stage ran; run it again")
    except UserError as error:
        for _, _, slide_id, _, _, work, mark, _ in bundle:
            scopes = lacking_scopes(config, tile_px, work.values())
            yield [Entry(slide_id, "failed", mark, str(error), scope=scope) for scope in scopes]
        return
    store = TileStore(Dataset(Path(root)), tile_px)
    with _Bundle(bundle, encoder, store) as slides:
        yield from slides.run()


def lacking_scopes(
    config: CacheConfig, tile_px: int, spans: Iterable[Iterable[str]]
) -> tuple[str, ...]:
    """Scopes of a failure's lines: of the kinds that some span lacks, and a later run writes.

    No other scope will have a line that says that the slide is done.
    """
    lacking = set(chain.from_iterable(spans))
    return tuple(config.scope(tile_px, kind) for kind in config.kinds if kind in lacking)


class _Bundle:
    """The slides of a bundle on their way through decoder, encoder and writer."""

    def __init__(self, bundle: list[Arguments], encoder: "Encoder", store: TileStore) -> None:
        self._config = bundle[0][3]
        self._encoder, self._store = encoder, store
        self._jobs = [
            _Job(Dataset(Path(root)), run_id, slide_id, config, tile_px, encoder, mark)
            for root, run_id, slide_id, config, tile_px, _, mark, _ in bundle
        ]
        self._spans = [
            Span(index, arguments[2], range(*blocks), tuple(kinds))
            for index, arguments in enumerate(bundle)
            for blocks, kinds in sorted(arguments[5].items())
        ]
        self._kinds: list[dict[range, tuple[str, ...]]] = [{} for _ in bundle]
        for span in self._spans:
            self._kinds[span.slide][span.blocks] = span.kinds
        self._unended = Counter(span.slide for span in self._spans)
        self._failed: dict[int, UserError] = {}
        self._writers: list[dict[range, SpanWriter]] = [{} for _ in bundle]
        threads = worker_threads(self._config.threads)
        self._lanes = lanes_for(encoder.device.type, threads) if self._config.stores_tokens else 1
        view = view_function(self._config.view)
        self._decoder = Decoder(store, view, decode_threads(threads))
        # One more than are fed: a file that is being synced keeps no other waiting.
        self._pool = ThreadPoolExecutor(self._lanes + 1, "write")

    def __enter__(self) -> "_Bundle":
        return self

    def __exit__(self, *_: object) -> None:
        for writer in (one for writers in self._writers for one in writers.values()):
            writer.put(UserError("interrupted"))
        self._decoder.close()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def run(self) -> Iterator[list[Entry]]:
        """The entries of each slide, in order, as soon as its last file is committed."""
        forward = Forward(self._encoder, self._config.batch, self._config.tokens, report_note)
        told = 0
        work = self._decoder.run(batches(self._spans, self._config.batch, self._lanes))
        for batch in work:
            self._advance(batch, forward)
            self._unended[batch.span.slide] -= batch.last
            while told < batch.span.slide and self._ended(told):
                yield self._entries(told)
                told += 1
        for index in range(told, len(self._jobs)):
            yield self._entries(index)

    def _advance(self, batch: Batch, forward: Forward) -> None:
        index, span = batch.span.slide, batch.span
        if index in self._failed:
            return
        writers = self._writers[index]
        if span.blocks not in writers:
            write = partial(self._jobs[index].write, span, self._lanes)
            writers[span.blocks] = SpanWriter(self._pool, write)
        writer = writers[span.blocks]
        try:
            tiles = batch.tiles.result()
            going = writer.put(forward(tiles, tokens=span.wants_tokens))
            report_progress(span.slide_id, len(tiles))
        except UserError as error:
            self._failed[index] = error
            for one in writers.values():
                one.put(error)
            return
        if not going or (batch.last and not writer.put(None)):
            # Disk full, say: what the writer raised is told with the slide's entries.
            self._failed[index] = UserError("")
            for one in writers.values():
                one.put(UserError(""))

    def _ended(self, index: int) -> bool:
        return not self._unended[index] and all(
            writer.result.done() for writer in self._writers[index].values()
        )

    def _entries(self, index: int) -> list[Entry]:
        """A slide's entries; waits for its files."""
        job, entries = self._jobs[index], []
        failure = self._failed.get(index)
        written: set[range] = set()
        for blocks, writer in sorted(self._writers[index].items(), key=lambda one: one[0].start):
            try:
                entries += writer.result.result()
                written.add(blocks)
            except UserError as error:
                failure = error if failure is None or not str(failure) else failure
        if failure is not None:
            left = [kinds for blocks, kinds in self._kinds[index].items() if blocks not in written]
            entries += job.failed(str(failure), left)
        return entries


@dataclass(frozen=True)
class _Job:
    """One slide's features with everything that writing them needs."""

    dataset: Dataset
    run_id: str
    slide_id: str
    config: CacheConfig
    tile_px: int
    encoder: "Encoder"
    mark: str

    def failed(self, reason: str, left: Iterable[Iterable[str]]) -> list[Entry]:
        """The lines of a failure: after those of what was written, which do not take it back."""
        return [
            Entry(self.slide_id, "failed", self.mark, reason, scope=scope)
            for scope in lacking_scopes(self.config, self.tile_px, left)
        ]

    def write(self, span: Span, lanes: int, parts: Iterator[Features]) -> list[Entry]:
        """Write the files of a span from its features; tokens stream, CLS waits in memory.

        The encoder's time is shared by `lanes` spans, and the entries state this one's part.
        """
        began = time.monotonic()
        cls: list[npt.NDArray[np.float32]] = []
        staged: list[tuple[str, FileRecord]] = []
        token_kind = next((kind for kind in span.kinds if kind != "cls"), None)
        start = span.blocks.start * BLOCK_ROWS
        # The slide's last block may be short: how many rows there are, the features say.
        if token_kind is None:
            cls.extend(part.cls for part in parts)
            stop = start + sum(map(len, cls))
        else:
            stop = self._stop(span)
            path = self._path(token_kind, start, stop)
            write = partial(self._write_tokens, parts, cls)
            staged.append((token_kind, commit_file(self.dataset, self.run_id, path, write)))
        if "cls" in span.kinds:
            table = cls_table(start, np.concatenate(cls))
            path = self._path("cls", start, stop)
            write = partial(_write_table, table)
            staged.insert(0, ("cls", commit_file(self.dataset, self.run_id, path, write)))
        seconds = (time.monotonic() - began) / lanes
        return [
            Entry(
                self.slide_id, "done", self.mark, scope=self.config.scope(self.tile_px, kind),
                start=start, stop=stop, files=(record,), seconds=seconds,
                counts={"tiles": stop - start} if place == 0 else {},
            )
            for place, (kind, record) in enumerate(staged)
        ]  # fmt: skip

    def _write_tokens(
        self, parts: Iterator[Features], cls: list[npt.NDArray[np.float32]], file: HashingFile
    ) -> None:
        tables = (self._tokens(part, cls) for part in parts)
        first = next(tables)
        with open_writer(file, first.schema) as writer:
            for table in chain([first], tables):
                write_blocks(writer, table)

    def _tokens(self, part: Features, cls: list[npt.NDArray[np.float32]]) -> pa.Table:
        assert part.tokens is not None
        cls.append(part.cls)
        return token_table(part.tokens, part.scale)

    def _path(self, kind: str, start: int, stop: int) -> Path:
        config = self.config
        folder = self.dataset.features_dir(self.tile_px, config.encoder, config.view) / kind
        return folder / str(ShardName(self.slide_id, start, stop, "parquet"))

    def _stop(self, span: Span) -> int:
        """The rank after the last tile of the span."""
        rows = candidate_count(self.dataset, self.slide_id)
        return min(span.blocks.stop * BLOCK_ROWS, rows)


def _write_table(table: pa.Table, file: HashingFile) -> None:
    with open_writer(file, table.schema) as writer:
        write_blocks(writer, table)


@lru_cache(maxsize=1)
def loaded(name: str, weights: str, device: str, dtype: str) -> "Encoder":
    """The encoder, kept by its process from slide to slide."""
    import torch

    from model.encoders import load_encoder

    return load_encoder(name, weights, device=device, dtype=getattr(torch, dtype))
