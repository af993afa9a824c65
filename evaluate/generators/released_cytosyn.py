"""The released CytoSyn (arXiv 2603.18089) as a generator, by its published call signature."""

from dataclasses import replace
from functools import partial
from typing import Any

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
    load_pipeline,
)

HUB_ID = "Owkin-Bioptimus/CytoSyn"


def load_model(source: ModelSource) -> MakeGenerator:
    """Load it from the hub or a downloaded copy; "auto" is float32, as it is published."""
    loaded = load_pipeline(
        source.model or HUB_ID,
        custom_pipeline=None,
        trust_remote_code=source.trust_remote_code,
        dtype=choose_dtype(source.dtype, source.device, "float32"),
        device=source.device,
        revision=source.revision,
        subfolder=source.subfolder,
    )
    places = {"revision": source.revision, "subfolder": source.subfolder}
    chosen = {key: value for key, value in places.items() if value is not None}
    return partial(ReleasedCytoSyn, replace(loaded, chosen=chosen))


class ReleasedCytoSyn(ReleasedGenerator):
    """CytoSyn's pipeline with fixed settings; it has one solver, which cannot be chosen."""

    name, title = "released CytoSyn", "CytoSyn"
    tile_px, condition_dim, encoder = 224, 768, "h0-mini"
    model_terms = Terms(
        "model CytoSyn", "CC BY-NC-ND 4.0", HUB_ID, True, f"https://huggingface.co/{HUB_ID}"
    )

    def identity(self) -> dict[str, object]:
        """The weights' sum, the call's arguments, and that the weights were never available."""
        return super().identity() | {"solver": "the pipeline's own"}

    def generate_tiles(
        self, features: Features | None, seeds: Seeds, progress: StepProgress | None = None
    ) -> Tiles:
        """Tiles uint8 [B, 224, 224, 3] for H0-mini features [B, 768], or none, and seeds [B].

        Without features the argument is left out, as the published call for it does.
        """
        settings = self.settings
        arguments: dict[str, Any] = {
            "num_images_per_prompt": len(seeds) if features is None else 1,
            "num_inference_steps": settings.steps,
            "guidance_scale": settings.guidance_scale,
        }
        # Bounds of guidance mean nothing without a condition to guide by.
        if features is not None:
            arguments |= {
                "h0_mini_embeds": self.to_tensor(features),
                "guidance_low": settings.guidance_low,
                "guidance_high": settings.guidance_high,
            }
        return self.draw_tiles(seeds, **arguments)
