"""What tiles a number was measured on: sums of their files and pixels, and their JPEG traces."""

import hashlib
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice

import numpy as np
import numpy.typing as npt

from common.console import open_meter
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


@dataclass(frozen=True)
class TileFacts:
    """What is known of a selection's tiles: `described` for a record (see `tile_provenance`).

    `keys` uint64 [n] tell the tiles apart by their pixels, in order; None where tiles are gone.
    """

    described: dict[str, object]
    keys: npt.NDArray[np.uint64] | None


def tile_provenance(dataset: Dataset, selection: Selection, tile_px: int) -> dict[str, object]:
    """The selection's codec, rounding and sums, and how blocky its tiles are.

    `tile_px` is the side of the tiles in pixels.
    `files_sha256` is of the journal's sums of all shards that contain selected tiles, in order of
    slide and rank; `pixels_sha256` is of the decoded pixels of the selected tiles in that order,
    which does not depend on the codec. Where tiles are gone (features may outlive them) both sums
    and the blockiness are None, and `missing` names a tile.
    """
    return find_tile_facts(dataset, selection, tile_px).described


def find_tile_facts(dataset: Dataset, selection: Selection, tile_px: int) -> TileFacts:
    """The provenance of a selection's tiles, and what tells them apart."""
    identity = read_identity(dataset)
    # All keys are always there, so that a reader can tell "not known" from "older results".
    unknown = dict.fromkeys(("files_sha256", "pixels_sha256", "blockiness", "missing"))
    described = {"codec": identity.get("codec"), "rounding": identity.get("rounding"), **unknown}
    try:
        files_sha256 = _files_sha256(dataset, selection, tile_px)
        pixels_sha256, keys = _hash_pixels(dataset, selection, tile_px)
        known = {
            "files_sha256": files_sha256,
            "pixels_sha256": pixels_sha256,
            "blockiness": mean_blockiness(dataset, selection, tile_px),
        }
        return TileFacts(described | known, keys)
    except UserError as error:
        return TileFacts(described | {"missing": str(error)}, None)


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


def _hash_pixels(
    dataset: Dataset, selection: Selection, tile_px: int
) -> tuple[str, npt.NDArray[np.uint64]]:
    """The sum of all pixels, and a key of each tile's; decoded in threads by blocks of 16."""
    store = TileStore(dataset, tile_px)
    digest, keys = hashlib.sha256(), []
    with (
        ThreadPoolExecutor(_DECODERS, "decode") as pool,
        open_meter(f"pixels of {dataset.root.name}", selection.rows, "tiles") as shown,
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
                    data = np.ascontiguousarray(tile).data
                    digest.update(data)
                    keys.append(zlib.crc32(data) << 32 | zlib.adler32(data))
                shown.advance(len(tiles), "")
    return digest.hexdigest(), np.array(keys, np.uint64)
