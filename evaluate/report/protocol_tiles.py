"""Tiles of a protocol's page: generated beside their sources, and suspicious ones beside theirs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import UserError
from evaluate.report.images import Pair, Tile, tile_pairs
from pipeline.dataset import Dataset, TileStore, open_dataset, read_selection

_MOST_PAIRS, _FEWEST = 96, 4
_PLACES = (
    ("generated", "generated"),
    ("guide", "guided by"),
    ("nearest", "nearest training tile"),
    ("same_slide", "next of that slide"),
)


@dataclass(frozen=True)
class Grid:
    """Pairs of one dataset of images."""

    title: str
    pairs: list[Pair]


def grids(results: Mapping[str, Any], count: int) -> list[Grid]:
    """Up to `count` pairs of each dataset of generated images; none where tiles are gone.

    Of many datasets each shows fewer, so that the page stays some 25 MB at most.
    """
    found = []
    made = sum(one["kind"] == "generated" for one in results["sources"].values())
    count = min(count, max(_FEWEST, _MOST_PAIRS // max(made, 1)))
    for name, one in results["sources"].items():
        if one["kind"] != "generated":
            continue
        guide = results["sources"].get(one["guidance"])
        try:
            dataset = open_dataset(Path(one["dataset"]))
            selection = read_selection(dataset, one["selection"])
            holder = open_dataset(Path(guide["dataset"])) if guide else dataset
            pairs = tile_pairs(dataset, selection, holder, count)
        except UserError:
            continue  # features and numbers may outlive the tiles
        found.append(Grid(name, pairs))
    return found


@dataclass(frozen=True)
class Suspect:
    """A generated tile and its neighbours (caption, name, tile), and how near they are."""

    tiles: list[tuple[str, str, Tile | None]]
    caption: str


def suspects(
    results: Mapping[str, Any], found: Mapping[str, Any], order: str, count: int
) -> list[Suspect]:
    """The first `count` of the most suspicious images of a search, with their neighbours."""
    stores = _stores(results, found)
    return [_suspect(one, stores) for one in found["top"][order][:count]]


def _stores(results: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, TileStore | None]:
    sources = results["sources"]
    made = sources[found["source"]]
    train = sources[found["train"]["set"]]
    guide = sources.get(made["guidance"])
    places = {"generated": made, "guide": guide, "nearest": train, "same_slide": train}
    return {key: _store(one) for key, one in places.items()}


def _store(one: Mapping[str, Any] | None) -> TileStore | None:
    if one is None or not Path(one["dataset"]).exists():
        return None
    return TileStore(Dataset(Path(one["dataset"])), int(one["tile_px"]))


def _suspect(one: Mapping[str, Any], stores: Mapping[str, TileStore | None]) -> Suspect:
    tiles = []
    for key, caption in _PLACES:
        place = one.get(key)
        name = "none" if place is None else f"{place[0]}, {place[1]}"
        tiles.append((caption, name, _read(stores[key], place)))
    text = f"d₁ {one['distance']:.4g}, d₁/d₂ {one['ratio']:.3f}"
    if one["score"] is not None:
        text += f", FLD score {one['score']:.3f}"
    return Suspect(tiles, text)


def _read(store: TileStore | None, place: Sequence[Any] | None) -> Tile | None:
    if store is None or place is None:
        return None
    try:
        return store.read(str(place[0]), [int(place[1])])[0]
    except UserError:
        return None
