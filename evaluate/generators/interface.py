"""What generation requires of a model, whatever its origin."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypedDict

import numpy as np
import numpy.typing as npt
import torch

from common.terms import Terms
from model.sampler_settings import SamplerSettings

Tiles = npt.NDArray[np.uint8]
"""RGB tiles [B, px, px, 3], 0 to 255."""
Features = npt.NDArray[np.float32]
Seeds = npt.NDArray[np.int64]
StepProgress = Callable[[int, int], None]
"""Called with the number of sampler steps done and of all steps."""


class EncoderRecord(TypedDict, total=False):
    """The part of encoder.json on the features ``[n, dim]`` that condition a model."""

    encoder: str
    weights: str | None
    weights_sha256: str | None
    random_weights: bool | None
    dim: int
    view: str
    compute_dtype: str
    tile_px: int
    terms: list[dict[str, object]]


class Generator(Protocol):
    """Makes tiles uint8 [B, px, px, 3] from features [B, d] and seeds [B]; one per process.

    An image must depend on its feature and seed, on the number of rows and on its row, and on
    nothing else, so that generation may be split and resumed anywhere.
    """

    @property
    def tile_px(self) -> int:
        """Side of the tiles in pixels."""

    @property
    def mpp(self) -> float | None:
        """Resolution of the training tiles (mpp, micrometres per pixel), where it is known."""

    @property
    def condition_dim(self) -> int | None:
        """Width d of the features ``[n, d]``, or None for a model that takes none."""

    @property
    def encoder_record(self) -> EncoderRecord | None:
        """The encoder whose features the model was trained on, where it is known."""

    @property
    def terms(self) -> tuple[Terms, ...]:
        """The terms of the model and of what it descends from, where they are known."""

    def identity(self) -> dict[str, object]:
        """What fixes the images besides features and seeds: weights, sampler, dtype, as JSON."""

    def generate_tiles(
        self, features: Features | None, seeds: Seeds, progress: StepProgress | None = None
    ) -> Tiles:
        """Tiles uint8 [B, px, px, 3] for features [B, d] (None: unconditional), seeds [B]."""


MakeGenerator = Callable[[SamplerSettings], Generator]
"""Makes a generator of a loaded model for any settings."""


@dataclass(frozen=True)
class ModelSource:
    """Which model, where it runs, and what loading it may do.

    `dtype` is "auto", "float32" or "bfloat16".
    `kind` is "own", "cytosyn" or "pixcell"; `pipeline_code` and `vae` are the places of PixCell's
    parts, if they are not where they were published, and `vae_dtype` that of its VAE ("auto":
    float32, as published). `revision` and `subfolder` choose one of several models in a repository.
    """

    kind: str
    model: str | None
    device: torch.device
    dtype: str = "auto"
    compiles: bool = False
    trust_remote_code: bool = False
    pipeline_code: str | None = None
    vae: str | None = None
    vae_dtype: str = "auto"
    revision: str | None = None
    subfolder: str | None = None
