"""The tiles of a synthetic dataset by condition and variation, and the real ones behind them."""

import json
from typing import Any

import numpy as np
import numpy.typing as npt

from common.errors import UserError
from evaluate.generate.conditions import CONDITIONS_FILE
from evaluate.generate.guidance import foreign_guidance
from evaluate.generate.plan import IMAGES_A_SLIDE, pseudo_slide_id
from evaluate.generate.write import GUIDANCE_DIR, SELECTION_NAME
from pipeline.dataset import (
    Dataset,
    TileStore,
    decode_png,
    identity_value,
    read_candidates,
    read_identity,
    read_selection,
)

Tile = npt.NDArray[np.uint8]


class Synthetic:
    """A synthetic dataset as its figures see it; `guidance` is the dataset that guided it."""

    def __init__(self, dataset: Dataset, guidance: Dataset | None = None) -> None:
        self.dataset, self.guidance = dataset, guidance
        self.identity = read_identity(dataset)
        if self.identity.get("kind") != "generated":
            raise UserError(f"{dataset.root} holds no generated images; give one of `generate`")
        self.images = read_selection(dataset, SELECTION_NAME).rows
        self.variations = int(self.identity["variations"])
        self._store = TileStore(dataset, int(identity_value(dataset, "tile_px")))
        self._listing = _read_listing(dataset)

    @property
    def conditions(self) -> int:
        """Number of conditions that have all their variations."""
        return self.images // self.variations

    def tile(self, image: int) -> Tile:
        """A generated tile by its image index."""
        slide, rank = divmod(image, IMAGES_A_SLIDE)
        return self._store.read(pseudo_slide_id(slide), [rank])[0]

    def variation(self, condition: int, number: int) -> Tile:
        """A generated tile by its condition and variation."""
        return self.tile(condition * self.variations + number)

    def ends(self, condition: int) -> tuple[tuple[int, int], float] | None:
        """The two reference tiles and the factor of an interpolated condition, else None."""
        if self._listing is None:
            return None
        one = self._listing["conditions"][condition]
        if one["factor"] is None:
            return None
        first, second = one["tiles"]
        return (first, second), float(one["factor"])

    def reference(self, condition: int) -> Tile:
        """The real tile behind a condition.

        Raises `UserError` where there is no one tile (none, a mean), or its pixels are elsewhere.
        """
        if self._listing is not None:
            tiles = self._listing["conditions"][condition]["tiles"]
            if len(tiles) != 1:
                raise UserError(f"{self.dataset.root}: its images are guided by no single tile")
            return self.reference_tile(tiles[0])
        image = condition * self.variations
        slide, rank = divmod(image, IMAGES_A_SLIDE)
        table = read_candidates(self.dataset, pseudo_slide_id(slide))
        row = table.slice(rank, 1).to_pylist()[0]
        if row["source_slide_id"] is None:
            raise UserError(f"{self.dataset.root}: its images are guided by no tile")
        if self.guidance is None:
            raise UserError("the real tiles are in another dataset: give --guidance DATASET")
        foreign = foreign_guidance(self.dataset, self.guidance)
        if foreign:
            raise UserError(foreign)
        store = TileStore(self.guidance, int(identity_value(self.guidance, "tile_px")))
        return store.read(row["source_slide_id"], [row["source_rank"]])[0]

    def reference_tile(self, number: int) -> Tile:
        """A reference tile that the dataset keeps a copy of."""
        listed = (self._listing or {"tiles": []})["tiles"][number]
        if listed["file"] is None:
            raise UserError(f"{self.dataset.root}: tile {listed['name']} was not on disk")
        path = self.dataset.root / GUIDANCE_DIR / listed["file"]
        try:
            return decode_png(path.read_bytes())
        except OSError as error:
            raise UserError(f"{path} cannot be read; run the same `generate` again") from error

    def warnings(self) -> tuple[str, ...]:
        """What a figure must not hide of its images."""
        found = []
        if self.identity.get("model_encoder_random"):
            found.append("RANDOM ENCODER WEIGHTS: a dry run, these images mean nothing")
        if self.identity.get("forced_guidance"):
            found.append("FORCED: guided by features that do not fit the model")
        if self.identity.get("generator_note"):
            found.append(f"{self.identity['generator']}: UNTESTED ON THE GATED WEIGHTS")
        return tuple(found)


def _read_listing(dataset: Dataset) -> dict[str, Any] | None:
    path = dataset.root / GUIDANCE_DIR / CONDITIONS_FILE
    try:
        return dict(json.loads(path.read_text()))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise UserError(f"{path} is damaged; run the same `generate` again") from error
