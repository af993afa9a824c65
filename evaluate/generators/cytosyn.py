"""This project's own models as generators."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from model import CytoSyn
from model.sampler import Guidance, Solver, time_nodes
from model.weights import tensors_sha256

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class SamplerSettings:
    """How images are drawn; the defaults are CytoSyn's (arXiv 2603.18089).

    Raises `UserError` for a setting out of its range.
    """

    solver: Solver = "sde"
    steps: int = 250
    guidance_scale: float = 2.5
    guidance_low: float = 0.0
    guidance_high: float = 0.75

    def __post_init__(self) -> None:
        Guidance(self.guidance_scale, self.guidance_low, self.guidance_high)
        time_nodes(self.solver, self.steps)


class CytoSynGenerator:
    """A `model.CytoSyn` that draws with fixed settings on one device.

    `dtype` is "float32", "bfloat16" or "auto": bfloat16 on a GPU, float32 on a CPU.
    """

    def __init__(
        self, model: CytoSyn, settings: SamplerSettings, *, device: torch.device, dtype: str
    ) -> None:
        self._model, self._settings = model.to(device), settings
        automatic = "bfloat16" if device.type == "cuda" else "float32"
        self._dtype = automatic if dtype == "auto" else dtype

    @classmethod
    def open(
        cls, source: str, settings: SamplerSettings, *, device: torch.device, dtype: str
    ) -> "CytoSynGenerator":
        """Load an exported model from a folder or a hub id."""
        return cls(CytoSyn.from_pretrained(source), settings, device=device, dtype=dtype)

    @property
    def tile_px(self) -> int:
        """Side of the tiles in pixels."""
        return self._model.tile_px

    @property
    def mpp(self) -> float | None:
        """Micrometres per pixel of the tiles that the model was trained on, where it is known."""
        return self._model.records.mpp

    @property
    def condition_dim(self) -> int | None:
        """Width of the conditioning features, or None for a model that takes none."""
        config = self._model.sit.config
        return config.condition_dim if config.conditioning == "feature" else None

    @property
    def encoder_record(self) -> dict[str, Any] | None:
        """What the model records of the encoder that it was trained on."""
        records = self._model.records
        if records.encoder_weights_sha256 is None:
            return None
        return {
            "encoder": records.encoder,
            "weights": records.encoder_weights,
            "weights_sha256": records.encoder_weights_sha256,
            "random_weights": records.encoder_is_random,
        }

    @cached_property
    def _model_sha256(self) -> str:
        """Sum of the weights and of what else decides what the networks compute."""
        model = self._model
        shape = {
            "path": model.interpolant.path,
            "sit": model.sit.config.to_dict(),
            "vae": model.vae.config.to_dict(),
            "weights": tensors_sha256(model.state_dict()),
        }
        return hashlib.sha256(json.dumps(shape, sort_keys=True).encode()).hexdigest()

    def identity(self) -> dict[str, Any]:
        """The model's sum, the sampler's settings and the arithmetic."""
        return {
            "model_sha256": self._model_sha256,
            **asdict(self._settings),
            "compute_dtype": self._dtype,
        }

    def sample(
        self,
        features: npt.NDArray[np.float32] | None,
        seeds: npt.NDArray[np.int64],
        progress: Callable[[int, int], None] | None = None,
    ) -> npt.NDArray[np.uint8]:
        """Tiles uint8 [B, px, px, 3] for features [B, d] (None: unconditional), seeds [B]."""
        settings = self._settings
        return self._model.generate(
            features,
            num_images_per_prompt=len(seeds) if features is None else 1,
            num_inference_steps=settings.steps,
            guidance_scale=settings.guidance_scale,
            guidance_low=settings.guidance_low,
            guidance_high=settings.guidance_high,
            solver=settings.solver,
            seed=torch.from_numpy(seeds),
            batch_size=len(seeds),
            dtype=None if self._dtype == "float32" else _DTYPES[self._dtype],
            progress=progress,
        )
