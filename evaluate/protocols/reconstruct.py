"""Real tiles through a model's autoencoder and back: the ceiling of what the model can draw.

The reconstructions are a synthetic dataset like any other, made by the same loop: their
condition is the tile itself.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from evaluate.generate.guidance import GUIDING_MARK, SelectionGuidance, Sources, guiding_mark
from evaluate.generate.plan import source_order
from model import CytoSyn
from model.weights import tensors_sha256
from pipeline.dataset import Dataset, Selection, TileStore, read_identity
from pipeline.dataset.features import FeatureStore


class ViewGuidance(SelectionGuidance):
    """Guidance by features of tiles that were seen in another size or through a view."""

    def __init__(self, dataset: Dataset, selection: Selection, store: FeatureStore) -> None:
        super().__init__(dataset, selection, store)

    @property
    def tile_px(self) -> int:
        """Side of the tiles whose features guide, in pixels."""
        return int(self.store.record["tile_px"])

    def identity(self) -> dict[str, Any]:
        """As of any selection, and the view where there is one."""
        view = self.store.record.get("view", "")
        return super().identity() | ({"guidance_view": view} if view else {})


class TileGuidance:
    """The tiles of a selection as conditions: float32 [n, px * px * 3], values 0 to 255."""

    encoder_record: dict[str, Any] | None = None

    def __init__(self, dataset: Dataset, selection: Selection, tile_px: int) -> None:
        self.name, self.count, self.end = selection.name, selection.rows, selection.rows
        self.tile_px, self.mpp = tile_px, read_identity(dataset).get("mpp")
        self._selection, self._store = selection, TileStore(dataset, tile_px)
        self._mark = guiding_mark(dataset)
        order = source_order(selection.rows, selection.content_hash)
        slides = np.repeat(np.arange(len(selection.slide_ids)), np.diff(selection.offsets))
        self._slides, self._ranks = slides[order], selection.ranks[order]

    def identity(self) -> dict[str, Any]:
        """Which tiles."""
        return {
            "guidance": "the tiles themselves",
            "guidance_selection_sha256": self._selection.content_hash,
            GUIDING_MARK: self._mark,
        }

    def sources(self, positions: npt.NDArray[np.int64]) -> Sources:
        """The tiles at these positions of the order of guidance."""
        names = self._selection.slide_ids
        slide_ids: list[str | None] = [names[slide] for slide in self._slides[positions]]
        return Sources(slide_ids, self._ranks[positions].astype(np.int32))

    def features(self, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """The tiles' values."""
        names = self._selection.slide_ids
        tiles = [
            self._store.read(names[slide], [int(rank)])[0]
            for slide, rank in zip(self._slides[positions], self._ranks[positions], strict=True)
        ]
        return np.stack(tiles).reshape(len(tiles), -1).astype(np.float32)

    def attachments(self) -> dict[str, bytes]:
        """Nothing to keep."""
        return {}


class Reconstruction:
    """A `Generator` that encodes a tile to the posterior's mean and decodes it."""

    mpp: float | None = None
    condition_dim: int | None = None
    encoder_record: dict[str, Any] | None = None

    def __init__(self, model: CytoSyn, tile_px: int) -> None:
        self._model, self.tile_px = model, tile_px
        self._sum = tensors_sha256(model.vae.state_dict())

    def identity(self) -> dict[str, Any]:
        """The autoencoder's sum; no sampler."""
        return {"model_sha256": self._sum, "solver": "reconstruction", "compute_dtype": "float32"}

    def sample(
        self,
        features: npt.NDArray[np.float32] | None,
        seeds: npt.NDArray[np.int64],
        progress: Callable[[int, int], None] | None = None,
    ) -> npt.NDArray[np.uint8]:
        """Tiles uint8 [B, px, px, 3] from their own values [B, px * px * 3]."""
        assert features is not None
        tiles = features.astype(np.uint8).reshape(-1, self.tile_px, self.tile_px, 3)
        return self._model.decode(self._model.encode(tiles))
