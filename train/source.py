"""A block of the dataset with its features: tiles, CLS tokens and patch tokens in one order."""

import hashlib
import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from common.errors import UserError
from pipeline.dataset import Dataset, Ledger, ScopeLedger, TileStore
from pipeline.dataset.features import FeatureStore, feature_scope
from pipeline.dataset.lineage import Lineage
from train.stream import BlockTable


class Sample(NamedTuple):
    """An RGB `tile` uint8 [px, px, 3], its `cls` float32 [d] and `tokens` float16 [t, d].

    Features that the run does not use are None.
    """

    tile: npt.NDArray[np.uint8]
    cls: npt.NDArray[np.floating] | None
    tokens: npt.NDArray[np.floating] | None


@dataclass(frozen=True)
class OpenBlock:
    """A block read from disk: PNG bytes by rank, `cls` [r, d] and `tokens` [r, t, d] by row.

    Decoded, its 16 tiles would take five times as much memory.
    """

    slide_id: str
    block: int
    png: dict[int, bytes]
    cls: npt.NDArray[np.floating] | None
    tokens: npt.NDArray[np.floating] | None


class BlockSource:
    """Reads blocks of tiles and features; safe to share between threads."""

    def __init__(
        self,
        dataset: Dataset,
        *,
        tile_px: int,
        encoder: str,
        view: str = "",
        with_cls: bool = True,
        with_tokens: bool = True,
        tokens_kind: str = "tokens-float16",
    ) -> None:
        self.tile_px = tile_px
        self._tiles = TileStore(dataset, tile_px)
        self._cls = self._tokens = None
        if with_cls:
            self._cls = FeatureStore(
                dataset, tile_px=tile_px, encoder=encoder, kind="cls", view=view
            )
        if with_tokens:
            self._tokens = FeatureStore(
                dataset, tile_px=tile_px, encoder=encoder, kind=tokens_kind, view=view
            )

    @property
    def encoder_record(self) -> dict[str, Any]:
        """The encoder.json of the features in use; empty for a run without features."""
        store = self._tokens or self._cls
        return dict(store.record) if store is not None else {}

    def hash_tiles(self, slide_ids: Iterable[str]) -> str:
        """A sum of what the slides' tiles were made from: equal where their tiles are."""
        sha = hashlib.sha256()
        for slide_id in slide_ids:
            sha.update(f"{slide_id}\0{self._tiles.fingerprint_of(slide_id)}\0".encode())
        return sha.hexdigest()

    def open_block(self, slide_id: str, block: int) -> OpenBlock:
        """Read a block of at most 16 tiles; raises `UserError` naming the file it cannot read."""
        return OpenBlock(
            slide_id,
            block,
            self._tiles.read_block_bytes(slide_id, block),
            self._cls.read_block(slide_id, block) if self._cls else None,
            self._tokens.read_block(slide_id, block) if self._tokens else None,
        )

    def read_sample(self, block: OpenBlock, rank: int, row: int) -> Sample:
        """Row `row`, from 0 to 15, of an open block.

        Raises `UserError` for a damaged tile, and for features that are no encoder's.
        """
        where = f"slide {block.slide_id}, rank {rank}"
        if rank not in block.png:
            raise UserError(f"{where}: the tile is not in its shard; run `python -m pipeline tile`")
        tile = self._tiles.decode_tile(block.slide_id, rank, block.png[rank])
        if tile.shape != (self.tile_px, self.tile_px, 3):
            raise UserError(f"{where}: tile of shape {tile.shape}, expected {self.tile_px} px RGB")
        for features, store in ((block.cls, self._cls), (block.tokens, self._tokens)):
            if features is None or store is None:
                continue
            if row >= len(features):
                raise UserError(f"{where}: no features; run `python -m pipeline cache` again")
            # By row, not by block: a tile that the selection leaves out harms no other.
            store.check_rows(block.slide_id, np.array([rank]), features[row : row + 1])
        return Sample(
            tile,
            None if block.cls is None else block.cls[row],
            None if block.tokens is None else block.tokens[row],
        )


def check_coverage(
    dataset: Dataset,
    table: BlockTable,
    *,
    tile_px: int,
    encoder: str,
    view: str,
    kinds: Iterable[str],
) -> None:
    """Raise `UserError` with the command to run where tiles or features of the table are missing.

    Or where they are of a former state of their slide, see `Lineage`.

    A training run must not find out after days that its last slides were never cached.
    """
    root = shlex.quote(str(dataset.root))
    tiles = Ledger.read(dataset, "tile")[str(tile_px)]
    _require_blocks(
        table, tiles, f"{tile_px} px tiles", f"python -m pipeline tile --dataset {root}"
    )
    lineage = Lineage(dataset, tile_px)
    for slide_id in table.slide_ids:
        lineage.check_tiles(slide_id, tiles.written[slide_id])
    caches = Ledger.read(dataset, "cache")
    for kind in kinds:
        done = caches[feature_scope(tile_px, encoder, view, kind)]
        command = f"python -m pipeline cache --dataset {root} --encoder {encoder}"
        what = f"{kind} features of {encoder}"
        _require_blocks(table, done, what, command)
        for slide_id in table.slide_ids:
            lineage.check_features(slide_id, done.written[slide_id], what)


def _require_blocks(table: BlockTable, ledger: ScopeLedger, what: str, command: str) -> None:
    # Blocks are sorted by slide, so that each slide's are one stretch.
    missing = 0
    first = ""
    starts = np.searchsorted(table.blocks["slide"], np.arange(len(table.slide_ids) + 1))
    for index, slide_id in enumerate(table.slide_ids):
        done = ledger.recorded_blocks(slide_id)
        needed = table.blocks["block"][starts[index] : starts[index + 1]].tolist()
        gaps = [block for block in needed if block not in done]
        missing += len(gaps)
        first = first or (f"slide {slide_id}, block {gaps[0]}" if gaps else "")
    if missing:
        raise UserError(
            f"{missing} of {len(table.blocks)} blocks of the selection have no {what} "
            f"(first: {first}): run `{command}` for the selection"
        )
