"""The released CytoSyn (arXiv 2603.18089) as a generator, by its published call signature."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from evaluate.generators.cytosyn import SamplerSettings
from evaluate.generators.released import (
    UNTESTED,
    automatic_dtype,
    call_pipeline,
    check_tile,
    load_pipeline,
    pipeline_sha256,
    rows_of,
)

HUB_ID = "Owkin-Bioptimus/CytoSyn"


@dataclass(frozen=True)
class LoadedCytoSyn:
    """The pipeline on its device, with what costs time to find out about it."""

    pipeline: Any
    dtype: str

    @classmethod
    def open(
        cls, source: str, *, device: torch.device, dtype: str, trust_remote_code: bool
    ) -> "LoadedCytoSyn":
        """Load it from the hub or a downloaded copy; float32, as it is published, on "auto"."""
        chosen = automatic_dtype(dtype, device, "float32")
        pipeline = load_pipeline(
            source,
            custom_pipeline=source,
            trust_remote_code=trust_remote_code,
            dtype=chosen,
            device=device,
        )
        return cls(pipeline, chosen)

    @cached_property
    def sha256(self) -> str:
        """The sum of its weights."""
        return pipeline_sha256(self.pipeline)


class ReleasedCytoSyn:
    """CytoSyn's pipeline with fixed settings. Its solver is its own: none can be chosen."""

    tile_px = 224
    mpp: float | None = 0.5
    condition_dim: int | None = 768
    # The sum of the gated H0-mini weights that it was trained with is not known here.
    encoder_record: dict[str, Any] | None = {  # noqa: RUF012 - the protocol's type
        "encoder": "h0-mini",
        "weights": "hub",
        "weights_sha256": None,
        "random_weights": False,
    }

    def __init__(self, loaded: LoadedCytoSyn, settings: SamplerSettings) -> None:
        self._loaded, self._settings = loaded, settings

    def identity(self) -> dict[str, Any]:
        """The weights' sum and the call's arguments, and that the weights were never at hand."""
        settings = self._settings
        return {
            "generator": "released CytoSyn",
            "generator_note": UNTESTED,
            "model_sha256": self._loaded.sha256,
            "solver": "the pipeline's own",
            "steps": settings.steps,
            "guidance_scale": settings.guidance_scale,
            "guidance_low": settings.guidance_low,
            "guidance_high": settings.guidance_high,
            "compute_dtype": self._loaded.dtype,
        }

    def sample(
        self,
        features: npt.NDArray[np.float32] | None,
        seeds: npt.NDArray[np.int64],
        progress: Callable[[int, int], None] | None = None,
    ) -> npt.NDArray[np.uint8]:
        """Tiles uint8 [B, 224, 224, 3] for H0-mini features [B, 768], or none, and seeds [B].

        Without features the argument is left out, as the published call for it does.
        """
        settings, loaded = self._settings, self._loaded
        arguments: dict[str, Any] = {
            "num_images_per_prompt": len(seeds) if features is None else 1,
            "num_inference_steps": settings.steps,
            "guidance_scale": settings.guidance_scale,
        }
        if features is not None:
            arguments |= {
                "h0_mini_embeds": rows_of(features, loaded.pipeline, loaded.dtype),
                "guidance_low": settings.guidance_low,
                "guidance_high": settings.guidance_high,
            }
        tiles = call_pipeline(loaded.pipeline, len(seeds), seeds, **arguments)
        return check_tile(tiles, self.tile_px, "CytoSyn")
