"""Images for a page: pairs of tiles, samples of a selection, overlays of slides."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import cv2
import numpy as np
import numpy.typing as npt

from common.errors import UserError
from common.files import read_regular
from evaluate.generate.condition_source import foreign_guidance
from evaluate.generate.plan import source_order
from pipeline.dataset import (
    Dataset,
    Selection,
    TileStore,
    identity_value,
    read_candidates,
)

Tile = npt.NDArray[np.uint8]


def encode_page_png(tile: Tile) -> bytes:
    """An RGB image uint8 ``[H, W, 3]`` as PNG: lossless, since readers look for artefacts."""
    encoded, data = cv2.imencode(
        ".png", cv2.cvtColor(tile, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_PNG_COMPRESSION, 6]
    )
    if not encoded:
        raise ValueError(f"cannot encode an image of shape {tile.shape}")
    return data.tobytes()


@dataclass(frozen=True)
class ImagePair:
    """A generated tile, uint8 [px, px, 3], and the real tile that guided it, if any."""

    generated: Tile
    generated_name: str
    real: Tile | None
    real_name: str


def read_tile_pairs(
    generated: Dataset, selection: Selection, guidance: Dataset, count: int
) -> list[ImagePair]:
    """The first generated images, up to `count`, one per condition, with their source tiles.

    Tiles that are not on disk (a selection that was never tiled) leave the place empty, as do
    those of another dataset than the one that guided.
    """
    # The same rank of another dataset is another tile, which would look like a bad image.
    foreign = foreign_guidance(generated, guidance)
    real_store = None if foreign else TileStore(guidance, int(identity_value(guidance, "tile_px")))
    store = TileStore(generated, int(identity_value(generated, "tile_px")))
    pairs: list[ImagePair] = []
    seen: set[tuple[str, int]] = set()
    for slide_id, ranks in selection.items():
        rows = read_candidates(generated, slide_id).take(ranks).to_pylist()
        for rank, row in zip(ranks, rows, strict=True):
            source = (str(row.get("source_slide_id") or ""), int(row.get("source_rank") or 0))
            # One image per condition: variations of a tile look alike.
            if source in seen and source[0]:
                continue
            seen.add(source)
            tile = store.read(slide_id, [int(rank)])[0]
            name = f"{slide_id}, {rank}"
            pairs.append(ImagePair(tile, name, *_read_source_tile(real_store, *source)))
            if len(pairs) == count:
                return pairs
    return pairs


def _read_source_tile(store: TileStore | None, slide_id: str, rank: int) -> tuple[Tile | None, str]:
    if not slide_id:
        return None, "no source tile"
    name = f"{slide_id}, {rank}"
    if store is None:
        return None, f"{name} (of another dataset)"
    try:
        return store.read(slide_id, [rank])[0], name
    except UserError:
        return None, f"{name} (not on disk)"


def sample_tiles(dataset: Dataset, selection: Selection, count: int) -> list[Tile]:
    """A fixed random sample of a selection's tiles, uint8 [px, px, 3], for unpaired rows."""
    order = source_order(selection.rows, selection.content_hash)[:count]
    store = TileStore(dataset, int(identity_value(dataset, "tile_px")))
    index = np.searchsorted(selection.offsets, order, side="right") - 1
    return [
        store.read(selection.slide_ids[slide], [int(selection.ranks[row])])[0]
        for slide, row in zip(index, order, strict=True)
    ]


@dataclass(frozen=True)
class Overlay:
    """The tissue overlay of a slide, a JPEG."""

    slide_id: str
    jpeg: bytes


def read_overlays(dataset: Dataset, slide_ids: Sequence[str], count: int) -> list[Overlay]:
    """The overlays of the first slides that have one."""
    files = ((slide_id, dataset.overlay_file(slide_id)) for slide_id in slide_ids)
    existing = ((slide_id, file) for slide_id, file in files if file.exists())
    return [Overlay(slide_id, read_regular(file)) for slide_id, file in islice(existing, count)]
