"""Our exported model behind the call of the released CytoSyn: its users change one line.

    pipeline = CytoSynPipeline.from_pretrained("runs/x/model", torch_dtype=torch.bfloat16)
    images = pipeline.to("cuda")(h0_mini_embeds=cls, num_images_per_prompt=4)["images"]

diffusers need not be installed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from common.errors import UserError
from model import CytoSyn
from model.sampler_settings import SamplerSettings, Solver

OutputType = Literal["pil", "np", "pt"]
_PUBLISHED = SamplerSettings()


@dataclass(frozen=True)
class PipelineOutput:
    """What a call returns: `output.images`, `output["images"]` and `output[0]` are the same."""

    images: Any

    def __getitem__(self, key: str | int) -> Any:
        if key not in ("images", 0):
            raise KeyError(key)
        return self.images


class CytoSynPipeline:
    """A `model.CytoSyn` with the call signature of the released CytoSyn's diffusers pipeline."""

    def __init__(self, model: CytoSyn, *, dtype: torch.dtype = torch.float32) -> None:
        self.model, self.dtype = model, dtype

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        torch_dtype: torch.dtype = torch.float32,
        custom_pipeline: str | None = None,
        trust_remote_code: bool = False,
    ) -> Self:
        """Load what `train export` wrote, from a folder or a hub id.

        `torch_dtype` is that of the networks' arithmetic; weights stay in float32.
        `custom_pipeline` and `trust_remote_code` are accepted so that an existing call works,
        and ignored: no code is loaded.
        """
        return cls(CytoSyn.from_pretrained(source), dtype=torch_dtype)

    @property
    def device(self) -> torch.device:
        """Where the networks are."""
        return self.model.device

    def to(self, device: torch.device | str) -> Self:
        """Move the networks, and return the pipeline."""
        self.model.to(device)
        return self

    def __call__(
        self,
        h0_mini_embeds: Tensor | np.ndarray | None = None,
        *,
        num_images_per_prompt: int = 1,
        num_inference_steps: int = _PUBLISHED.steps,
        guidance_scale: float = _PUBLISHED.guidance_scale,
        guidance_low: float = _PUBLISHED.guidance_low,
        guidance_high: float = _PUBLISHED.guidance_high,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        seed: int | None = None,
        output_type: OutputType = "pil",
        solver: Solver = _PUBLISHED.solver,
        batch_size: int = 32,
    ) -> PipelineOutput:
        """Generate images: PIL, or in [0, 1] as "np" [N, H, W, 3] or "pt" [N, 3, H, W].

        `h0_mini_embeds` is [B, d], [d] or [B, 1, d]; each guides `num_images_per_prompt`
        consecutive images. None generates that many without condition. Seeds are drawn from
        `generator` (one, or one per image), which advances, or from a new one of `seed`; without
        either, from PyTorch's global generator. Raises `UserError` for both at once, features of
        another width and numbers out of range.
        """
        if seed is not None:
            if generator is not None:
                raise UserError("give generator= or seed=, not both")
            generator = torch.Generator().manual_seed(seed)
        features = None if h0_mini_embeds is None else _as_rows(torch.as_tensor(h0_mini_embeds))
        # Seeds are drawn for all images at once, so that batch_size does not change them.
        count = num_images_per_prompt * (1 if features is None else len(features))
        images = self.model.generate(
            features,
            num_images_per_prompt=num_images_per_prompt,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            guidance_low=guidance_low,
            guidance_high=guidance_high,
            seed=_draw_seeds(generator, count),
            solver=solver,
            batch_size=batch_size,
            dtype=None if self.dtype == torch.float32 else self.dtype,
        )
        return PipelineOutput(_convert_images(images, output_type))


def _as_rows(embeds: Tensor) -> Tensor:
    """Features float32 [B, d] of those in any shape that the published call takes."""
    if embeds.ndim == 3 and embeds.shape[1] == 1:
        embeds = embeds[:, 0]
    return (embeds[None] if embeds.ndim == 1 else embeds).float()


def _draw_seeds(
    generator: torch.Generator | Sequence[torch.Generator] | None, count: int
) -> Tensor:
    """Seeds int64 [count], from one generator or from one per image."""
    if isinstance(generator, Sequence):
        if len(generator) != count:
            raise UserError(
                f"{len(generator)} generators for {count} images; pass one, or one each"
            )
        return torch.cat([_draw_seeds(single, 1) for single in generator])
    device = "cpu" if generator is None else generator.device
    return torch.randint(2**63 - 1, (count,), generator=generator, device=device).cpu()


def _convert_images(images: np.ndarray, output_type: OutputType) -> Any:
    """Images uint8 [N, H, W, 3] in the form that the caller chose."""
    if output_type == "pil":
        return [Image.fromarray(image) for image in images]
    if output_type not in ("np", "pt"):
        raise UserError(f"output_type is {output_type!r}; expected pil, np or pt")
    scaled = images.astype(np.float32) / 255
    return scaled if output_type == "np" else torch.from_numpy(scaled).permute(0, 3, 1, 2)
