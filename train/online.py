"""The frozen encoder inside the training loop: patch tokens without a cache of terabytes."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from common.errors import UserError
from train.config import Config
from train.step import Encode

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_AT_ONCE = 64  # tiles of a forward pass


def open_encoder(
    config: Config, record: Mapping[str, Any], device: torch.device | str
) -> Encode | None:
    """The encoder of `alignment.source=online`, as a function from tiles uint8 [n, px, px, 3] to
    patch tokens float32 [n, t, d]; None where the cache is read.

    `record` is the encoder.json of the cached CLS tokens, empty where none are used. Raises
    `UserError` for weights that are missing, and for others than those of the CLS tokens: the
    condition and the alignment would then be of two encoders.
    """
    if config.alignment.source == "cache" or not config.uses_alignment:
        return None
    from model.encoders import load_encoder  # timm takes seconds to import

    check_online(config)
    alignment, name = config.alignment, config.data.encoder
    dtype = _DTYPES[alignment.dtype]
    encoder = load_encoder(name, alignment.weights, device=device, dtype=dtype)
    # The condition and the alignment must come from one encoder.
    cached = record.get("weights_sha256", encoder.weights_sha256)
    if cached != encoder.weights_sha256:
        raise UserError(
            f"alignment.weights={alignment.weights}: the cached CLS tokens of {name} were made "
            f"with other weights ({record.get('weights')}, sha256 {cached[:12]}, here "
            f"{encoder.weights_sha256[:12]}): give those"
        )

    def encode_tokens(tiles: Tensor) -> Tensor:
        parts = [encoder.encode(part).tokens for part in tiles.split(_AT_ONCE)]
        return torch.cat([tokens for tokens in parts if tokens is not None])

    return encode_tokens


def check_online(config: Config) -> None:
    """Refuse what online tokens cannot serve, before any weights are read."""
    from model.encoders import encoder_spec

    spec, sit = encoder_spec(config.data.encoder), config.model.sit
    # Cached CLS tokens of a view and tokens of the tiles would be of two images.
    if config.data.view:
        raise UserError(
            f"data.view={config.data.view}: alignment.source=online computes tokens of the tiles "
            "as they are; use alignment.source=cache with a view"
        )
    if (spec.num_tokens, spec.token_dim) != (sit.num_tokens, sit.token_dim):
        raise UserError(
            f"patch tokens of {spec.name} are {[spec.num_tokens, spec.token_dim]}, but the SiT "
            f"aligns {[sit.num_tokens, sit.token_dim]}: leave model.sit.token_dim out to take the "
            "encoder's, and set latent_size and patch_size to match, or run.mode=ldm"
        )
