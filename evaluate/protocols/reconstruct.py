"""Real tiles through a model's autoencoder and back: the best that the model could draw.

The reconstructions are a synthetic dataset like any other, made by the same loop: their
condition is the tile itself.
"""

from functools import cached_property

import numpy as np

from common.terms import Terms
from evaluate.generate.condition_source import Positions, ShuffledSelection
from evaluate.generators import EncoderRecord
from evaluate.generators.interface import Features, Seeds, StepProgress, Tiles
from model import CytoSyn
from model.weights import tensors_sha256
from pipeline.dataset import TileStore


class TileConditions(ShuffledSelection):
    """The tiles of a selection as conditions: float32 [n, px * px * 3], values 0 to 255."""

    def identity(self) -> dict[str, object]:
        """Which tiles."""
        return self.tile_identity("the tiles themselves")

    def made_from(self, positions: Positions) -> str:
        """A sum of what the tiles were made from."""
        return self.hash_slides(positions, self._store.fingerprint_of)

    @cached_property
    def _store(self) -> TileStore:
        return TileStore(self.dataset, self.tile_px)

    def read_features(self, positions: Positions) -> Features:
        """The tiles' values, float32 [n, px * px * 3], from 0 to 255."""
        tiles = [
            self._store.read(self.selection.slide_ids[slide], [int(rank)])[0]
            for slide, rank in zip(self._slides[positions], self._ranks[positions], strict=True)
        ]
        return np.stack(tiles).reshape(len(tiles), -1).astype(np.float32)


class Reconstruction:
    """A `Generator` that encodes a tile, uint8 [px, px, 3], to its mean and decodes it."""

    mpp: float | None = None
    condition_dim: int | None = None
    encoder_record: EncoderRecord | None = None

    def __init__(self, model: CytoSyn, tile_px: int) -> None:
        self._model, self.tile_px = model, tile_px
        self._weights_sha256 = tensors_sha256(model.vae.state_dict())

    @property
    def terms(self) -> tuple[Terms, ...]:
        """The terms of what the model descends from."""
        return self._model.records.terms

    def identity(self) -> dict[str, object]:
        """The autoencoder's sum; no sampler."""
        return {
            "model_sha256": self._weights_sha256,
            "solver": "reconstruction",
            "compute_dtype": "float32",
        }

    def generate_tiles(
        self, features: Features | None, seeds: Seeds, progress: StepProgress | None = None
    ) -> Tiles:
        """Tiles uint8 [B, px, px, 3] from their own values [B, px * px * 3]."""
        assert features is not None
        tiles = features.astype(np.uint8).reshape(-1, self.tile_px, self.tile_px, 3)
        return self._model.decode(self._model.encode(tiles))
