"""From the names and shapes of a published checkpoint to those of the network that runs it.

A layout renames, joins and drops only what its docstring says. Whatever else is missing or
unexpected is left for the strict fit, which names it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from timm.layers import resample_abs_pos_embed
from torch import Tensor

from model.weights import Tensors, WeightsError


class Layout(Protocol):
    """Published tensors to the network's; `source` names them in errors."""

    def __call__(self, tensors: Tensors, *, source: str) -> Tensors:
        """Convert; tensors that need no change are passed on, not copied."""
        ...


def without_prefix(tensors: Tensors, prefixes: Sequence[str]) -> Tensors:
    """Take off the prefixes that every key has, as training wrappers leave them."""
    for prefix in prefixes:
        if tensors and all(key.startswith(prefix) for key in tensors):
            tensors = {key.removeprefix(prefix): value for key, value in tensors.items()}
    return tensors


def as_published(tensors: Tensors, *, source: str) -> Tensors:
    """The names are the network's: nothing changes."""
    return tensors


@dataclass(frozen=True)
class Dinov2Layout:
    """A ViT trained by DINOv2, for an input of `grid` x `grid` patches.

    Takes timm's names, those of the original repository (the same but for `mask_token`, which
    inference does not use: dropped) and those of transformers' Dinov2Model (query, key and value
    joined, names changed, `mask_token` dropped). Position embeddings of another grid are
    resampled as the original repository does at every forward pass.
    """

    grid: int

    def __call__(self, tensors: Tensors, *, source: str) -> Tensors:
        """Convert to timm's names and the network's grid."""
        if "embeddings.cls_token" in tensors:
            tensors = _from_transformers(tensors)
        tensors = {key: value for key, value in tensors.items() if key != "mask_token"}
        position = tensors.get("pos_embed")
        if position is not None and position.ndim == 3:
            tensors["pos_embed"] = resample_positions(position, self.grid)
        return tensors


_TRANSFORMERS_NAMES = (
    ("embeddings.patch_embeddings.projection.", "patch_embed.proj."),
    ("embeddings.position_embeddings", "pos_embed"),
    ("embeddings.", ""),
    ("encoder.layer.", "blocks."),
    (".attention.output.dense.", ".attn.proj."),
    (".layer_scale1.lambda1", ".ls1.gamma"),
    (".layer_scale2.lambda1", ".ls2.gamma"),
    ("layernorm.", "norm."),
)
_QKV = [f".attention.attention.{part}." for part in ("query", "key", "value")]


def _from_transformers(tensors: Mapping[str, Tensor]) -> Tensors:
    """transformers' Dinov2Model to timm's VisionTransformer."""
    # timm has one projection for query, key and value.
    joined = dict(tensors)
    for key in [key for key in tensors if _QKV[0] in key]:
        parts = [key.replace(_QKV[0], part) for part in _QKV]
        if all(part in joined for part in parts):
            joined[key.replace(_QKV[0], ".attn.qkv.")] = torch.cat([joined.pop(p) for p in parts])
    renamed = {}
    for name, value in joined.items():
        for theirs, ours in _TRANSFORMERS_NAMES:
            name = name.replace(theirs, ours, 1)
        renamed[name] = value
    return renamed


_DINOV2_OFFSET = 0.1  # the original adds it to the grid before it divides, and so shifts samples


def resample_positions(position: Tensor, grid: int) -> Tensor:
    """Position embeddings [1, 1 + g², D] of a g x g grid as [1, 1 + grid², D].

    The original repository's bicubic, without antialiasing and with its offset, so that features
    equal those of `torch.hub`'s DINOv2; timm would resample with antialiasing.
    """
    side = round((position.shape[1] - 1) ** 0.5)
    if side == grid or side * side != position.shape[1] - 1:
        return position
    patches = position[:, 1:].float().reshape(1, side, side, -1).permute(0, 3, 1, 2)
    scale = (grid + _DINOV2_OFFSET) / side
    resampled = F.interpolate(patches, scale_factor=(scale, scale), mode="bicubic")
    flat = resampled.permute(0, 2, 3, 1).reshape(1, grid * grid, -1)
    return torch.cat([position[:, :1].float(), flat], dim=1)


@dataclass(frozen=True)
class InceptionLayout:
    """Torchvision's names with a classifier of `classes`, which shows whose weights they are.

    Drops the classifier and, if there, the auxiliary one (`AuxLogits`); the normalisations'
    `num_batches_tracked`, which some files lack, is 0. Raises `WeightsError` for the weights of
    the other network, whose features are not comparable though every shape fits.
    """

    classes: int
    other: str

    def __call__(self, tensors: Tensors, *, source: str) -> Tensors:
        """Convert, or refuse the other network's weights."""
        classifier = tensors.get("fc.weight")
        if classifier is None or len(classifier) != self.classes:
            found = "none" if classifier is None else len(classifier)
            raise WeightsError(
                f"weights {source}: expected a classifier of {self.classes} classes, which tells "
                f"this network from {self.other}, found {found}; features of the two are not "
                f"comparable: give this network's published file or use --encoder {self.other}"
            )
        # Neither classifier is part of the network that gives pool3.
        kept = {k: v for k, v in tensors.items() if not k.startswith(("fc.", "AuxLogits."))}
        counters = {
            key.replace("running_mean", "num_batches_tracked"): torch.zeros((), dtype=torch.long)
            for key in kept
            if key.endswith("bn.running_mean")
        }
        return {**kept, **counters}


@dataclass(frozen=True)
class ConchLayout:
    """CONCH's image tower for `grid` x `grid` patches.

    The text tower, the decoder and the temperature are dropped; position embeddings of another
    grid are resampled as CONCH's package does (bilinear, without antialiasing).
    """

    grid: int

    def __call__(self, tensors: Tensors, *, source: str) -> Tensors:
        """Take the image tower out of a whole checkpoint."""
        image = {key: value for key, value in tensors.items() if key.startswith("visual.")}
        position = image.get("visual.trunk.pos_embed")
        if position is not None:
            image["visual.trunk.pos_embed"] = resample_abs_pos_embed(
                position, [self.grid, self.grid], interpolation="bilinear", antialias=False
            )
        return image
