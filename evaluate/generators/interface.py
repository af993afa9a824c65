"""What generation asks of a model, whoever made it."""

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt


class Generator(Protocol):
    """Makes tiles from conditioning features and seeds; one a process.

    An image must depend on its own feature and seed, on the number of rows and on its row, and on
    nothing else, so that generation may be split and resumed anywhere.
    """

    @property
    def tile_px(self) -> int:
        """Side of the tiles in pixels."""
        ...

    @property
    def mpp(self) -> float | None:
        """Micrometres per pixel of the tiles that it was trained on, where it is known."""
        ...

    @property
    def condition_dim(self) -> int | None:
        """Width of the conditioning features, or None for a model that takes none."""
        ...

    @property
    def encoder_record(self) -> dict[str, Any] | None:
        """encoder.json of the features that the model was trained on, where it is known."""
        ...

    def identity(self) -> dict[str, Any]:
        """What fixes the images beside features and seeds: weights, sampler, dtype, as JSON."""
        ...

    def sample(
        self,
        features: npt.NDArray[np.float32] | None,
        seeds: npt.NDArray[np.int64],
        progress: Callable[[int, int], None] | None = None,
    ) -> npt.NDArray[np.uint8]:
        """Tiles uint8 [B, px, px, 3] for features [B, d] (None: unconditional), seeds [B].

        `progress` is told of the steps done and of all steps.
        """
        ...
