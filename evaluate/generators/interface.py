"""What generation requires of a model, whatever its origin."""

from collections.abc import Callable
from typing import Protocol, TypedDict

import numpy as np
import numpy.typing as npt

Tiles = npt.NDArray[np.uint8]
"""RGB tiles [B, px, px, 3], 0 to 255."""
Features = npt.NDArray[np.float32]
Seeds = npt.NDArray[np.int64]
StepProgress = Callable[[int, int], None]
"""Called with the number of sampler steps done and of all steps."""


class EncoderRecord(TypedDict, total=False):
    """The part of encoder.json that says which features condition a model."""

    encoder: str
    weights: str | None
    weights_sha256: str | None
    random_weights: bool | None
    dim: int
    view: str
    compute_dtype: str
    tile_px: int


class Generator(Protocol):
    """Makes tiles from conditioning features and seeds; one per process.

    An image must depend on its feature and seed, on the number of rows and on its row, and on
    nothing else, so that generation may be split and resumed anywhere.
    """

    @property
    def tile_px(self) -> int:
        """Side of the tiles in pixels."""
        ...

    @property
    def mpp(self) -> float | None:
        """Micrometres per pixel of the training tiles, where it is known."""
        ...

    @property
    def condition_dim(self) -> int | None:
        """Width of the conditioning features, or None for a model that takes none."""
        ...

    @property
    def encoder_record(self) -> EncoderRecord | None:
        """The encoder whose features the model was trained on, where it is known."""
        ...

    def identity(self) -> dict[str, object]:
        """What fixes the images besides features and seeds: weights, sampler, dtype, as JSON."""
        ...

    def sample(
        self, features: Features | None, seeds: Seeds, progress: StepProgress | None = None
    ) -> Tiles:
        """Tiles uint8 [B, px, px, 3] for features [B, d] (None: unconditional), seeds [B]."""
        ...
