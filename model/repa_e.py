"""Training checkpoints of the public REPA-E code (arXiv 2504.10483), read as plain tensors."""

import argparse
import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import isqrt
from pathlib import Path
from typing import Any

from torch import Tensor

from common.errors import UserError
from model.interpolant import PathName
from model.sit import SIT_PRESETS, SiTConfig
from model.vae import VAEConfig
from model.weights import Tensors, WeightsError, load_archive

# What reading a network's shape off foreign tensors can end in: an absent key, tensors of other
# ranks, a shape that no configuration has.
_MISFITS = (KeyError, ValueError, IndexError, ZeroDivisionError, UserError)

_NUM_CLASSES = 1000  # the code's default, ImageNet's
_HEADS = {size["hidden_size"]: size["num_heads"] for size in SIT_PRESETS.values()}


@dataclass(frozen=True)
class RepaECheckpoint:
    """The networks of a checkpoint and what it says of them."""

    sit_config: SiTConfig
    sit: Tensors
    vae_config: VAEConfig
    vae: Tensors
    path: PathName
    encoder: str | None
    step: int | None


def read_repa_e(checkpoint: str | Path, *, use_ema: bool = True) -> RepaECheckpoint:
    """Read SiT (averaged or not) and VAE of a checkpoint; shapes are taken from the tensors.

    What tensors do not show (heads, alignment depth, path, whether the table of classes ends with
    the null class) comes from the run's arguments in the file, else from the published size of
    that width and the code's defaults. `sit_config.conditioning` says which table it is: "label",
    or "label-only" of training without label drop, which has no null class. Raises `WeightsError`
    for a missing or damaged file or one of another kind.
    """
    # The checkpoint names no sizes: all but heads and tap can be read off the tensors' shapes.
    path = Path(checkpoint)
    if not path.is_file():
        raise WeightsError(f"weights {path}: no such file; give a checkpoint (.pt) of REPA-E")
    content = load_archive(path, safe_types=[argparse.Namespace])
    sit = _read_part(content, "ema" if use_ema else "model", path)
    vae = _read_part(content, "vae", path)
    given = content.get("args")
    namespace = vars(given) if isinstance(given, argparse.Namespace) else given
    arguments: Mapping[str, Any] = namespace if isinstance(namespace, Mapping) else {}
    return RepaECheckpoint(
        sit_config=_sit_config(sit, arguments, path),
        sit=sit,
        vae_config=_vae_config(vae, path),
        vae=vae,
        path="cosine" if arguments.get("path_type") == "cosine" else "linear",
        encoder=arguments.get("enc_type"),
        step=content.get("steps"),
    )


def _read_part(content: Any, name: str, path: Path) -> Tensors:
    part = content.get(name) if isinstance(content, Mapping) else None
    tensors_only = isinstance(part, Mapping) and all(isinstance(v, Tensor) for v in part.values())
    if not tensors_only or part is None:
        found = ", ".join(map(str, content)) if isinstance(content, Mapping) else type(content)
        raise WeightsError(
            f"weights {path}: no tensors under {name!r}, so no checkpoint of REPA-E "
            f"(expected model, ema, vae; found {found})"
        )
    return dict(part)


def _sit_config(tensors: Tensors, arguments: Mapping[str, Any], path: Path) -> SiTConfig:
    try:
        _, num_tokens, width = tensors["pos_embed"].shape
        patch = tensors["x_embedder.proj.weight"].shape
        depth = _count_indices(tensors, r"blocks\.(\d+)\.")
        projector = tensors["projectors.0.4.weight"].shape
        rows = len(tensors["y_embedder.embedding_table.weight"])
        has_null = _has_null_class(rows, arguments)
        return SiTConfig(
            latent_size=isqrt(num_tokens) * patch[-1],
            patch_size=patch[-1],
            latent_channels=patch[1],
            hidden_size=width,
            depth=depth,
            num_heads=_HEADS[width],
            mlp_ratio=tensors["blocks.0.mlp.fc1.weight"].shape[0] / width,
            encoder_depth=min(arguments.get("encoder_depth", 8), depth),
            projector_dim=projector[1],
            token_dim=projector[0],
            conditioning="label" if has_null else "label-only",
            num_classes=rows - has_null,
            qk_norm="blocks.0.attn.q_norm.weight" in tensors,
        )
    except _MISFITS as error:
        raise WeightsError(f"weights {path}: the SiT in it lacks or misshapes {error}") from error


def _has_null_class(rows: int, arguments: Mapping[str, Any]) -> bool:
    """Whether the last row of a table of classes is the null one.

    The public code makes it only where labels are dropped with a probability above 0.
    """
    num_classes = arguments.get("num_classes", _NUM_CLASSES)
    if rows in (num_classes, num_classes + 1):
        return bool(rows == num_classes + 1)
    return bool(arguments.get("cfg_prob", 0.1) > 0)


def _vae_config(tensors: Tensors, path: Path) -> VAEConfig:
    try:
        base = tensors["encoder.conv_in.weight"].shape[0]
        levels = _count_indices(tensors, r"encoder\.down\.(\d+)\.")
        widths = [
            tensors[f"encoder.down.{level}.block.0.conv1.weight"].shape[0]
            for level in range(levels)
        ]
        return VAEConfig(
            base_channels=base,
            channel_multipliers=tuple(width // base for width in widths),
            num_res_blocks=_count_indices(tensors, r"encoder\.down\.0\.block\.(\d+)\."),
            latent_channels=tensors["post_quant_conv.weight"].shape[0],
            attention_levels=tuple(
                level
                for level in range(levels)
                if f"encoder.down.{level}.attn.0.q.weight" in tensors
            ),
        )
    except _MISFITS as error:
        raise WeightsError(f"weights {path}: the VAE in it lacks or misshapes {error}") from error


def _count_indices(tensors: Tensors, pattern: str) -> int:
    """How many numbers, from 0, the keys have where the pattern's group is."""
    return 1 + max((int(m[1]) for key in tensors if (m := re.match(pattern, key))), default=-1)
