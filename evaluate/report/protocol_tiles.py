"""Tiles of a protocol's page: generated ones with their sources, suspicious ones with copies."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from common.errors import UserError
from common.record import Record
from evaluate.report.images import ImagePair, Tile, read_tile_pairs
from pipeline.dataset import Dataset, TileStore, open_dataset, read_selection

_MOST_PAIRS, _FEWEST = 96, 4
_PLACES = (
    ("generated", "generated"),
    ("guide", "guided by"),
    ("nearest", "nearest training tile"),
    ("same_slide", "next of that slide"),
)


@dataclass(frozen=True)
class ImageGrid:
    """Pairs of one dataset of images."""

    title: str
    pairs: list[ImagePair]


def read_grids(results: Record, count: int) -> list[ImageGrid]:
    """Up to `count` pairs of each dataset of generated images; none where tiles are gone.

    Of many datasets each shows fewer, so that the page stays some 25 MB at most.
    """
    sources = results.part("sources")
    # The page carries its images: the more datasets, the fewer of each.
    generated = [name for name in sources if sources.part(name)["kind"] == "generated"]
    count = min(count, max(_FEWEST, _MOST_PAIRS // max(len(generated), 1)))
    grids = []
    for name in generated:
        source = sources.part(name)
        guide = sources.part(source.text("guidance", "")) or source
        try:
            dataset = open_dataset(Path(source.text("dataset")))
            selection = read_selection(dataset, source.text("selection"))
            guidance = open_dataset(Path(guide.text("dataset")))
            grids.append(ImageGrid(name, read_tile_pairs(dataset, selection, guidance, count)))
        except UserError:
            continue  # features and numbers may outlive the tiles
    return grids


@dataclass(frozen=True)
class SuspectTile:
    """A generated tile and its neighbours (caption, name, uint8 [px, px, 3]), and how near."""

    tiles: list[tuple[str, str, Tile | None]]
    caption: str


def read_suspects(results: Record, search: Record, order: str, count: int) -> list[SuspectTile]:
    """The first `count` of the most suspicious images of a search, with their neighbours.

    `order` is "ratio" or "score"; `search` is an entry of `memorisation`.
    """
    sources = results.part("sources")
    generated = sources.part(search.text("source"))
    train = sources.part(search.part("train").text("set"))
    guide = sources.part(generated.text("guidance", ""))
    places = {"generated": generated, "guide": guide, "nearest": train, "same_slide": train}
    stores = {key: _open_tiles(source) for key, source in places.items()}
    return [_read_suspect(one, stores) for one in search.part("top").parts(order)[:count]]


def _open_tiles(source: Record) -> TileStore | None:
    if not source or not Path(source.text("dataset")).exists():
        return None
    return TileStore(Dataset(Path(source.text("dataset"))), source.count("tile_px"))


def _read_suspect(suspect: Record, stores: Mapping[str, TileStore | None]) -> SuspectTile:
    tiles = []
    for key, caption in _PLACES:
        place = suspect.items_of(key)
        name = f"{place[0]}, {place[1]}" if place else "none"
        tiles.append((caption, name, _read_tile(stores[key], place)))
    text = f"d₁ {suspect.number('distance'):.4g}, d₁/d₂ {suspect.number('ratio'):.3f}"
    if suspect.optional("score") is not None:
        text += f", FLD score {suspect.number('score'):.3f}"
    return SuspectTile(tiles, text)


def _read_tile(store: TileStore | None, place: list[object]) -> Tile | None:
    """The tile at (slide, rank), None where it is not known or not on disk."""
    if store is None or not place:
        return None
    try:
        return store.read(str(place[0]), [int(str(place[1]))])[0]
    except UserError:
        return None
