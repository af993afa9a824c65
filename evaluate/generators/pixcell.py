"""PixCell-256 as a generator, by its published call signature.

Source: PixCell (Yellapragada et al., arXiv 2506.05127) and the usage on its model card: one
UNI2-h feature per image, [B, 1, 1536]; guidance needs the pipeline's unconditional embedding.
"""

from dataclasses import replace
from functools import partial
from typing import Any

import torch

from common.terms import Terms
from evaluate.generators.interface import (
    Features,
    MakeGenerator,
    ModelSource,
    Seeds,
    StepProgress,
    Tiles,
)
from evaluate.generators.released import (
    ReleasedGenerator,
    choose_dtype,
    explain_pipeline_errors,
    load_pipeline,
)

HUB_ID = "StonyBrook-CVLab/PixCell-256"
CODE_ID = "StonyBrook-CVLab/PixCell-pipeline"
VAE_ID = "stabilityai/stable-diffusion-3.5-large"
"""PixCell's repository has no VAE: it is published in this gated one."""


def load_model(source: ModelSource) -> MakeGenerator:
    """Load it under DPM-Solver; "auto" is as published: float16 on a GPU, the VAE in float32.

    On a CPU all of it is float32, since float16 is slow there and for some layers absent.
    `source.vae` is a repository or folder whose `vae/` contains the VAE; "none" where the model's
    own folder has it.
    """
    dtype = choose_dtype(source.dtype, source.device, "float16")
    vae_dtype = "float32" if source.vae_dtype == "auto" else source.vae_dtype
    components: dict[str, Any] = {}
    # An untrusted pipeline is refused below, before gigabytes of its VAE are fetched here.
    if source.vae != "none" and source.trust_remote_code:
        vae = source.vae or VAE_ID
        with explain_pipeline_errors(vae):
            from diffusers import AutoencoderKL

            components["vae"] = AutoencoderKL.from_pretrained(
                vae, subfolder="vae", torch_dtype=getattr(torch, vae_dtype)
            )
    loaded = load_pipeline(
        source.model or HUB_ID,
        custom_pipeline=source.pipeline_code or CODE_ID,
        trust_remote_code=source.trust_remote_code,
        dtype=dtype,
        device=source.device,
        **components,
    )
    loaded.pipeline.vae.to(getattr(torch, vae_dtype))  # one that is bundled, too
    from diffusers import DPMSolverMultistepScheduler

    scheduler = loaded.pipeline.scheduler
    if not isinstance(scheduler, DPMSolverMultistepScheduler):
        loaded.pipeline.scheduler = DPMSolverMultistepScheduler.from_config(scheduler.config)
    # Left out where all is of one dtype, so that datasets from before it was chosen go on.
    chosen = {} if vae_dtype == dtype else {"vae_dtype": vae_dtype}
    return partial(PixCell, replace(loaded, chosen=chosen, terms=_vae_terms(source.vae)))


def _vae_terms(vae: str | None) -> tuple[Terms, ...]:
    """Of the VAE that is borrowed; of another one than the published only where it is from."""
    if vae == "none":
        return ()
    if vae:
        return (Terms("VAE of PixCell-256", "", vae),)
    link = f"https://huggingface.co/{VAE_ID}"
    return (Terms("VAE of PixCell-256", "Stability AI Community License", VAE_ID, None, link),)


class PixCell(ReleasedGenerator):
    """PixCell-256's pipeline with fixed settings: DPM-Solver, guidance at all times."""

    name = title = "PixCell-256"
    tile_px, condition_dim, encoder = 256, 1536, "uni2-h"
    # Its licence is on its page.
    model_terms = Terms("model PixCell-256", "", HUB_ID, None, f"https://huggingface.co/{HUB_ID}")

    def generate_tiles(
        self, features: Features | None, seeds: Seeds, progress: StepProgress | None = None
    ) -> Tiles:
        """Tiles uint8 [B, 256, 256, 3] for UNI2-h features [B, 1536], or none, and seeds [B].

        Without features the unconditional embedding itself is the condition, unguided.
        """
        pipeline = self.loaded.pipeline
        null = pipeline.get_unconditional_embedding(len(seeds)).to(pipeline.device)
        # The published pipeline takes no None: without a condition it is given its null.
        embeds = null
        if features is not None:
            embeds = self.to_tensor(features)[:, None]
            null = null.to(embeds.dtype)
        return self.draw_tiles(
            seeds,
            uni_embeds=embeds,
            negative_uni_embeds=null,
            guidance_scale=1.0 if features is None else self.settings.guidance_scale,
            num_inference_steps=self.settings.steps,
        )
