"""What tiles a number was measured on: sums of their files and pixels, and their JPEG traces."""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

import numpy as np
import numpy.typing as npt

from common.console import meter
from common.errors import UserError
from evaluate.generate.plan import source_order
from evaluate.metrics.blockiness import measure_blockiness
from pipeline.dataset import (
    BLOCK_ROWS,
    Dataset,
    Ledger,
    Selection,
    TileStore,
    read_identity,
)

_DECODERS = 4
_BLOCKINESS_TILES = 256

Tile = npt.NDArray[np.uint8]


def tile_provenance(dataset: Dataset, selection: Selection, tile_px: int) -> dict[str, object]:
    """The selection's codec, rounding and sums, and how blocky its tiles are.

    `tile_px` is the side of the tiles in pixels.
    `files_sha256` is of the journal's sums of all shards that contain selected tiles, in order of
    slide and rank; `pixels_sha256` is of the decoded pixels of the selected tiles in that order,
    which does not depend on the codec. Where tiles are gone (features may outlive them) both sums
    and the blockiness are None, and `missing` names a tile.
    """
    identity = read_identity(dataset)
    # All keys are always there, so that a reader can tell "not known" from "older results".
    unknown = dict.fromkeys(("files_sha256", "pixels_sha256", "blockiness", "missing"))
    described = {"codec": identity.get("codec"), "rounding": identity.get("rounding"), **unknown}
    try:
        return described | {
            "files_sha256": _files_sha256(dataset, selection, tile_px),
            "pixels_sha256": _pixels_sha256(dataset, selection, tile_px),
            "blockiness": mean_blockiness(dataset, selection, tile_px),
        }
    except UserError as error:
        return described | {"missing": str(error)}


def mean_blockiness(
    dataset: Dataset, selection: Selection, tile_px: int
) -> dict[str, object] | None:
    """Mean, standard error and number of the scores of a fixed sample of up to 256 tiles.

    None for tiles below 32 px, which are too small.
    """
    if tile_px < 32:
        return None
    # A fixed sample, in the order of slides: each shard is opened once.
    sample = np.sort(source_order(selection.rows, selection.content_hash)[:_BLOCKINESS_TILES])
    store = TileStore(dataset, tile_px)
    slides = np.searchsorted(selection.offsets, sample, side="right") - 1
    scores = [
        measure_blockiness(store.read(selection.slide_ids[slide], [int(selection.ranks[row])])[0])
        for slide, row in zip(slides, sample, strict=True)
    ]
    spread = float(np.std(scores, ddof=1) / np.sqrt(len(scores))) if len(scores) > 1 else None
    return {"mean": float(np.mean(scores)), "standard_error": spread, "tiles": len(scores)}


def _files_sha256(dataset: Dataset, selection: Selection, tile_px: int) -> str:
    digest = hashlib.sha256()
    shards = Ledger.read(dataset, "tile")[str(tile_px)].written
    for slide_id, ranks in selection.items():
        for entry in sorted(shards.get(slide_id, []), key=lambda one: (one.start, one.stop)):
            if ((ranks >= entry.start) & (ranks < entry.stop)).any():
                for file in entry.files:
                    digest.update(f"{file.path} {file.sha256}\n".encode())
    return digest.hexdigest()


def _pixels_sha256(dataset: Dataset, selection: Selection, tile_px: int) -> str:
    """Decoded in threads by blocks of 16 tiles, hashed in order."""
    store = TileStore(dataset, tile_px)
    digest = hashlib.sha256()
    with (
        ThreadPoolExecutor(_DECODERS, "decode") as pool,
        meter(f"pixels of {dataset.root.name}", selection.rows, "tiles") as shown,
    ):
        blocks = (
            (slide_id, ranks[ranks // BLOCK_ROWS == block].tolist())
            for slide_id, ranks in selection.items()
            for block in np.unique(ranks // BLOCK_ROWS)
        )
        # A few blocks per thread at a time: the pool would read all of a selection ahead.
        while batch := list(islice(blocks, 4 * _DECODERS)):
            for tiles in pool.map(lambda block: store.read(*block), batch):
                for tile in tiles:
                    digest.update(np.ascontiguousarray(tile).data)
                shown.advance(len(tiles), "")
    return digest.hexdigest()
