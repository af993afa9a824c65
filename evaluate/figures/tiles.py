"""The tiles of a synthetic dataset by condition and variation, and the real ones behind them."""

from typing import cast

import numpy as np
import numpy.typing as npt

from common.errors import UserError
from common.files import read_regular
from common.json_text import read_json
from evaluate.generate.condition_source import foreign_guidance
from evaluate.generate.conditions import CONDITIONS_FILE, ConditionListing
from evaluate.generate.plan import IMAGES_PER_SLIDE, pseudo_slide_id
from evaluate.generate.write import GUIDANCE_DIR, SELECTION_NAME
from pipeline.dataset import (
    Dataset,
    DatasetKind,
    TileStore,
    decode_png,
    identity_value,
    kind_of,
    read_candidates,
    read_identity,
    read_selection,
)

Tile = npt.NDArray[np.uint8]


class GeneratedTiles:
    """The tiles of a synthetic dataset; `guidance` is the dataset whose tiles guided them.

    `images` is the number of images and `variations` that of images per condition; a tile is
    RGB uint8 [px, px, 3].
    """

    def __init__(self, dataset: Dataset, guidance: Dataset | None = None) -> None:
        self.dataset, self.guidance = dataset, guidance
        self.identity = read_identity(dataset)
        if kind_of(self.identity) != DatasetKind.GENERATED:
            raise UserError(f"{dataset.root} contains no generated images; give one of `generate`")
        self.images = read_selection(dataset, SELECTION_NAME).rows
        self.variations = int(self.identity["variations"])
        self._store = TileStore(dataset, int(identity_value(dataset, "tile_px")))
        self._listing = _read_listing(dataset)

    @property
    def condition_count(self) -> int:
        """Number of conditions that have all their variations."""
        return self.images // self.variations

    def read_tile(self, image: int) -> Tile:
        """A generated tile, uint8 [px, px, 3], by its image index, from 0 up."""
        slide, rank = divmod(image, IMAGES_PER_SLIDE)
        return self._store.read(pseudo_slide_id(slide), [rank])[0]

    def read_variation(self, condition: int, number: int) -> Tile:
        """A generated tile, uint8 [px, px, 3], by its condition and variation, both from 0 up."""
        return self.read_tile(condition * self.variations + number)

    def interpolation_ends(self, condition: int) -> tuple[tuple[int, int], float] | None:
        """The two reference tiles and the factor, from 0 to 1, of an interpolated condition."""
        listed = self._listing["conditions"][condition] if self._listing else None
        if listed is None or listed["factor"] is None:
            return None
        first, second = listed["tiles"]
        return (first, second), float(listed["factor"])

    def read_reference(self, condition: int) -> Tile:
        """The real tile behind a condition, uint8 [px, px, 3].

        Raises `UserError` where there is no single tile (none, a mean), or its pixels are
        elsewhere.
        """
        if self._listing is not None:
            tiles = self._listing["conditions"][condition]["tiles"]
            if len(tiles) != 1:
                raise UserError(f"{self.dataset.root}: its images are guided by no single tile")
            return self.read_reference_tile(tiles[0])
        # A selection's tiles are named by the candidates, and their pixels are in its own dataset.
        slide, rank = divmod(condition * self.variations, IMAGES_PER_SLIDE)
        table = read_candidates(self.dataset, pseudo_slide_id(slide))
        source_slide, source_rank = (
            table[name][rank].as_py() for name in ("source_slide_id", "source_rank")
        )
        if source_slide is None:
            raise UserError(f"{self.dataset.root}: its images are guided by no tile")
        if self.guidance is None:
            raise UserError("the real tiles are in another dataset: give --guidance DATASET")
        foreign = foreign_guidance(self.dataset, self.guidance)
        if foreign:
            raise UserError(foreign)
        store = TileStore(self.guidance, int(identity_value(self.guidance, "tile_px")))
        return store.read(source_slide, [source_rank])[0]

    def read_reference_tile(self, number: int) -> Tile:
        """A reference tile, uint8 [px, px, 3], that the dataset has a copy of, by its number."""
        listing = self._listing
        if listing is None:
            raise UserError(f"{self.dataset.root} keeps no copies of the tiles that guided it")
        listed = listing["tiles"][number]
        if listed["file"] is None:
            raise UserError(f"{self.dataset.root}: tile {listed['name']} was not on disk")
        path = self.dataset.resolve_inside(f"{GUIDANCE_DIR}/{listed['file']}")
        try:
            return decode_png(read_regular(path))
        except OSError as error:
            raise UserError(
                f"{path} cannot be read; run `python -m pipeline verify --repair`, then the same "
                "`generate`"
            ) from error

    def image_warnings(self) -> tuple[str, ...]:
        """What a figure must not hide of its images."""
        identity = self.identity
        texts = {
            "model_encoder_random": "RANDOM ENCODER WEIGHTS: a dry run, these images mean nothing",
            "forced_guidance": "FORCED: guided by features that do not fit the model",
            "generator_note": f"{identity.get('generator')}: UNTESTED ON THE GATED WEIGHTS",
        }
        return tuple(text for key, text in texts.items() if identity.get(key))


def _read_listing(dataset: Dataset) -> ConditionListing | None:
    path = dataset.root / GUIDANCE_DIR / CONDITIONS_FILE
    try:
        return cast(ConditionListing, read_json(path))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise UserError(
            f"{path} is damaged; run `python -m pipeline verify --repair`, then the same `generate`"
        ) from error
