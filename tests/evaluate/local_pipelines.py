"""Small diffusers pipelines on disk with the published call signatures of the released models.

What is published of them is their call, not their insides: these draw noise from the generators
they are given, colour it by the embedding, and decode it with a real, tiny AutoencoderKL.
"""

from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDPMScheduler, DiffusionPipeline

_HEAD = """
import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.schedulers import DDPMScheduler, DPMSolverMultistepScheduler
from diffusers.utils.torch_utils import randn_tensor


def draw(pipe, embeds, count, generator, side):
    latents = randn_tensor((count, 4, side, side), generator=generator, dtype=pipe.vae.dtype)
    latents = latents + embeds.float().mean(dim=-1).reshape(-1, 1, 1, 1).to(latents.dtype)
    image = pipe.vae.decode(latents.to(pipe.device)).sample
    return VaeImageProcessor().postprocess(image.float(), output_type="pil")

"""

_CYTOSYN = """
class Pipeline(DiffusionPipeline):
    def __init__(self, vae: AutoencoderKL):
        super().__init__()
        self.register_modules(vae=vae)

    @torch.no_grad()
    def __call__(self, h0_mini_embeds=None, num_images_per_prompt=1, num_inference_steps=250,
                 guidance_scale=2.5, guidance_low=0.0, guidance_high=0.75{generator}):
        if h0_mini_embeds is None:
            h0_mini_embeds = torch.zeros(1, 768)
        assert h0_mini_embeds.shape[1:] == (768,), h0_mini_embeds.shape
        embeds = h0_mini_embeds.repeat_interleave(num_images_per_prompt, dim=0) * guidance_scale
        images = draw(self, embeds, len(embeds), {given}, 28)
        return {{"images": images}}
"""

_PIXCELL = """
class Pipeline(DiffusionPipeline):
    def __init__(self, vae: AutoencoderKL, scheduler: DDPMScheduler):
        super().__init__()
        self.register_modules(vae=vae, scheduler=scheduler)

    def get_unconditional_embedding(self, batch_size=1):
        return torch.zeros(batch_size, 1, 1536)

    @torch.no_grad()
    def __call__(self, uni_embeds, negative_uni_embeds=None, guidance_scale=4.5,
                 num_inference_steps=20, num_images_per_prompt=1, generator=None):
        assert uni_embeds.ndim == 3 and uni_embeds.shape[1:] == (1, 1536), uni_embeds.shape
        assert isinstance(self.scheduler, DPMSolverMultistepScheduler)
        if guidance_scale > 1:
            if negative_uni_embeds is None:
                raise ValueError("guidance needs negative_uni_embeds")
            assert negative_uni_embeds.shape == uni_embeds.shape
        embeds = torch.lerp(negative_uni_embeds, uni_embeds, float(guidance_scale))
        return ImagePipelineOutput(draw(self, embeds, len(embeds), generator, 32))
"""


def _vae() -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=(4, 4, 4, 4),
        norm_num_groups=2,
        latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
    )


def _save(folder: Path, code: str, **components: object) -> Path:
    """A folder as the hub's repositories are: components, model_index.json, pipeline.py."""
    folder.mkdir()
    (folder / "pipeline.py").write_text(_HEAD + code)
    namespace: dict[str, type[DiffusionPipeline]] = {}
    exec(compile(_HEAD + code, "pipeline.py", "exec"), namespace)
    namespace["Pipeline"](**components).save_pretrained(folder)
    return folder


def save_cytosyn(folder: Path, *, takes: str) -> Path:
    """CytoSyn's published call; how it is seeded is not published: `generator`, `seed`, or not."""
    extra, given = {
        "generator": (", generator=None", "generator"),
        "seed": (", seed=0", "torch.Generator().manual_seed(seed)"),
        "": ("", "None"),
    }[takes]
    return _save(folder, _CYTOSYN.format(generator=extra, given=given), vae=_vae())


def save_pixcell(folder: Path) -> Path:
    """PixCell-256's published call, under the DDPM scheduler that it comes with."""
    return _save(folder, _PIXCELL, vae=_vae(), scheduler=DDPMScheduler())
