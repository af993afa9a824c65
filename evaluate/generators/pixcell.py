"""PixCell-256 as a generator, by its published call signature.

Source: PixCell (Yellapragada et al., arXiv 2506.05127) and the usage on its model card: one
UNI2-h feature an image, [B, 1, 1536]; guidance needs the pipeline's own unconditional embedding.
"""

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
    explain_pipeline_errors,
    load_pipeline,
    pipeline_sha256,
    rows_of,
)

HUB_ID = "StonyBrook-CVLab/PixCell-256"
CODE_ID = "StonyBrook-CVLab/PixCell-pipeline"
VAE_ID = "stabilityai/stable-diffusion-3.5-large"
"""The VAE is not in PixCell's repository: it is another gated one's."""


@dataclass(frozen=True)
class LoadedPixCell:
    """The pipeline on its device under DPM-Solver."""

    pipeline: Any
    dtype: str

    @classmethod
    def open(
        cls,
        source: str,
        *,
        device: torch.device,
        dtype: str,
        trust_remote_code: bool,
        custom_pipeline: str = CODE_ID,
        vae: str | None = VAE_ID,
    ) -> "LoadedPixCell":
        """Load it from the hub or downloaded copies; float16 on a GPU, as published, on "auto".

        `vae` is a repository or folder whose `vae/` holds the VAE; None where `source` has it.
        """
        chosen = automatic_dtype(dtype, device, "float16")
        options: dict[str, Any] = {
            "custom_pipeline": custom_pipeline,
            "trust_remote_code": trust_remote_code,
            "dtype": chosen,
            "device": device,
        }
        if vae is not None and trust_remote_code:
            options["vae"] = _load_vae(vae, chosen)
        pipeline = load_pipeline(source, **options)
        from diffusers import DPMSolverMultistepScheduler

        if not isinstance(pipeline.scheduler, DPMSolverMultistepScheduler):
            config = pipeline.scheduler.config
            pipeline.scheduler = DPMSolverMultistepScheduler.from_config(config)
        return cls(pipeline, chosen)

    @cached_property
    def sha256(self) -> str:
        """The sum of its weights, the VAE's among them."""
        return pipeline_sha256(self.pipeline)


def _load_vae(source: str, dtype: str) -> Any:
    with explain_pipeline_errors(source):
        from diffusers import AutoencoderKL

        return AutoencoderKL.from_pretrained(
            source, subfolder="vae", torch_dtype=getattr(torch, dtype)
        )


class PixCell:
    """PixCell-256's pipeline with fixed settings: DPM-Solver, guidance at all times."""

    tile_px = 256
    mpp: float | None = 0.5
    condition_dim: int | None = 1536
    encoder_record: dict[str, Any] | None = {  # noqa: RUF012 - the protocol's type
        "encoder": "uni2-h",
        "weights": "hub",
        "weights_sha256": None,
        "random_weights": False,
    }

    def __init__(self, loaded: LoadedPixCell, settings: SamplerSettings) -> None:
        self._loaded, self._settings = loaded, settings

    def identity(self) -> dict[str, Any]:
        """The weights' sum and the call's arguments, and that the weights were never at hand."""
        return {
            "generator": "PixCell-256",
            "generator_note": UNTESTED,
            "model_sha256": self._loaded.sha256,
            "solver": "dpm",
            "steps": self._settings.steps,
            "guidance_scale": self._settings.guidance_scale,
            "guidance_low": 0.0,
            "guidance_high": 1.0,
            "compute_dtype": self._loaded.dtype,
        }

    def sample(
        self,
        features: npt.NDArray[np.float32] | None,
        seeds: npt.NDArray[np.int64],
        progress: Callable[[int, int], None] | None = None,
    ) -> npt.NDArray[np.uint8]:
        """Tiles uint8 [B, 256, 256, 3] for UNI2-h features [B, 1536], or none, and seeds [B].

        Without features the unconditional embedding itself is the condition, unguided.
        """
        loaded, pipeline = self._loaded, self._loaded.pipeline
        null = pipeline.get_unconditional_embedding(len(seeds)).to(pipeline.device)
        embeds = null
        if features is not None:
            embeds = rows_of(features, pipeline, loaded.dtype)[:, None]
            null = null.to(embeds.dtype)
        tiles = call_pipeline(
            pipeline,
            len(seeds),
            seeds,
            uni_embeds=embeds,
            negative_uni_embeds=null,
            guidance_scale=1.0 if features is None else self._settings.guidance_scale,
            num_inference_steps=self._settings.steps,
        )
        return check_tile(tiles, self.tile_px, "PixCell-256")
