"""The two key layouts of published SD-VAE weights, CompVis (native here) and diffusers.

Sources: the public checkpoints of Latent Diffusion (Rombach et al., arXiv 2112.10752) and of
diffusers' AutoencoderKL.
"""

import re
from collections.abc import Mapping
from typing import Literal

from torch import Tensor

from common.errors import UserError

VAELayout = Literal["compvis", "diffusers"]

_COMPVIS_PREFIX = "first_stage_model."  # in a whole latent diffusion model's file
_TRAINING_ONLY = "loss."  # discriminator and perceptual network of an autoencoder's training file

_ATTENTION = {
    "norm": "group_norm",
    "q": "to_q",
    "k": "to_k",
    "v": "to_v",
    "proj_out": "to_out.0",
}
# diffusers' older names, still in widely used files
_ATTENTION_OLD = {"query": "q", "key": "k", "value": "v", "proj_attn": "proj_out"}
_ATTENTION_BACK = {new: old for old, new in _ATTENTION.items()} | _ATTENTION_OLD


def from_native(tensors: Mapping[str, Tensor], layout: VAELayout) -> dict[str, Tensor]:
    """Rename native (CompVis) VAE tensors to `layout`; values are shared, not copied."""
    if layout == "compvis":
        return dict(tensors)
    if layout != "diffusers":
        raise UserError(f"VAE layout is {layout!r}; expected compvis or diffusers")
    # diffusers counts the decoder's levels from the coarsest, CompVis from the finest.
    depth = 1 + max(int(key.split(".")[2]) for key in tensors if key.startswith("decoder.up."))
    return {
        _to_diffusers(key, depth): value.flatten(1) if _is_projection(key) else value
        for key, value in tensors.items()
    }


def to_native(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename VAE tensors of either layout to the native one, recognised by the keys.

    Keys that belong to neither pass unchanged, for the fit to name them.
    """
    if any(key.startswith(_COMPVIS_PREFIX) for key in tensors):
        tensors = {
            key.removeprefix(_COMPVIS_PREFIX): value
            for key, value in tensors.items()
            if key.startswith(_COMPVIS_PREFIX)
        }
    tensors = {k: v for k, v in tensors.items() if not k.startswith(_TRAINING_ONLY)}
    # CompVis calls the decoder's levels `up`, diffusers `up_blocks`.
    up_blocks = [int(k.split(".")[2]) for k in tensors if re.match(r"decoder\.up_blocks\.\d+\.", k)]
    if not up_blocks:
        return tensors
    depth = 1 + max(up_blocks)
    renamed = {_to_compvis(key, depth): value for key, value in tensors.items()}
    return {
        key: value[:, :, None, None] if _is_projection(key) and value.ndim == 2 else value
        for key, value in renamed.items()
    }


def _is_projection(native_key: str) -> bool:
    """Whether the key is an attention's 1x1 convolution, which diffusers stores as a matrix."""
    return bool(re.search(r"\.attn(_1|\.\d+)\.(q|k|v|proj_out)\.weight$", native_key))


def _to_diffusers(key: str, depth: int) -> str:
    key = re.sub(
        r"\.attn(?:_1|\.(\d+))\.(\w+)\.",
        lambda m: f".attentions.{m[1] or 0}.{_ATTENTION[m[2]]}.",
        key,
    )
    key = re.sub(r"\.mid\.block_(\d)", lambda m: f".mid_block.resnets.{int(m[1]) - 1}", key)
    key = key.replace(".mid.", ".mid_block.")
    key = re.sub(r"\.down\.(\d+)\.", r".down_blocks.\1.", key)
    key = re.sub(r"\.up\.(\d+)\.", lambda m: f".up_blocks.{depth - 1 - int(m[1])}.", key)
    key = key.replace(".block.", ".resnets.").replace(".nin_shortcut.", ".conv_shortcut.")
    key = key.replace(".downsample.", ".downsamplers.0.").replace(".upsample.", ".upsamplers.0.")
    return key.replace(".norm_out.", ".conv_norm_out.")


def _to_compvis(key: str, depth: int) -> str:
    in_middle = ".mid_block." in key
    key = re.sub(
        r"\.attentions\.(\d+)\.(to_out\.0|\w+)\.",
        lambda m: f".attn{'_1' if in_middle else '.' + m[1]}.{_ATTENTION_BACK.get(m[2], m[2])}.",
        key,
    )
    key = re.sub(r"\.mid_block\.resnets\.(\d)", lambda m: f".mid.block_{int(m[1]) + 1}", key)
    key = key.replace(".mid_block.", ".mid.")
    key = re.sub(r"\.down_blocks\.(\d+)\.", r".down.\1.", key)
    key = re.sub(r"\.up_blocks\.(\d+)\.", lambda m: f".up.{depth - 1 - int(m[1])}.", key)
    key = key.replace(".resnets.", ".block.").replace(".conv_shortcut.", ".nin_shortcut.")
    key = key.replace(".downsamplers.0.", ".downsample.").replace(".upsamplers.0.", ".upsample.")
    return key.replace(".conv_norm_out.", ".norm_out.")
