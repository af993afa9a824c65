"""The encoders, one entry each. Adding an encoder is adding an entry here."""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Protocol

import timm
import torch
from timm.layers import SwiGLUPacked
from torch import Tensor, nn

from model.errors import UserError


class Construction(Protocol):
    """How an encoder's network is made."""

    def from_hub(self, hub_id: str) -> nn.Module:
        """Build the network as the hub page prescribes, with its published weights."""
        ...

    def local(self) -> nn.Module:
        """Build the same network without a network connection, freshly initialised."""
        ...


class Readout(Protocol):
    """What of a network's output is the encoder's feature."""

    def __call__(self, output: Tensor) -> tuple[Tensor, Tensor | None]:
        """Split the output into CLS [B, dim] and native patch tokens [B, T, token_dim]."""
        ...


def _frozen(options: Mapping[str, Any]) -> Mapping[str, Any]:
    return MappingProxyType(dict(options))


@dataclass(frozen=True)
class TimmConstruction:
    """A timm network: the hub call of its model card, and an equal local construction."""

    architecture: str
    hub_options: Mapping[str, Any] = field(default_factory=lambda: _frozen({}))
    local_options: Mapping[str, Any] = field(default_factory=lambda: _frozen({}))

    def from_hub(self, hub_id: str) -> nn.Module:
        """Build from `hf-hub:<hub_id>` with published weights."""
        return timm.create_model(f"hf-hub:{hub_id}", pretrained=True, **self.hub_options)

    def local(self) -> nn.Module:
        """Build the local equivalent; no weights are fetched."""
        options = {**self.hub_options, **self.local_options}
        return timm.create_model(self.architecture, pretrained=False, **options)


@dataclass(frozen=True)
class TokenReadout:
    """CLS is token 0; the patch tokens follow `prefix_tokens` CLS and register tokens."""

    prefix_tokens: int

    def __call__(self, output: Tensor) -> tuple[Tensor, Tensor | None]:
        """Split [B, prefix + T, D] into CLS [B, D] and patch tokens [B, T, D]."""
        return output[:, 0], output[:, self.prefix_tokens :]


@dataclass(frozen=True)
class EncoderSpec:
    """Everything that fixes an encoder's features but its weights.

    `dim` is the width of the CLS feature, `token_dim` that of a patch token;
    `native_grid` is the side of the network's patch grid and `token_grid` the side it is
    resized to (both 0 for an encoder without patch tokens). `mean` and `std` are for RGB in
    [0, 1]. `parameters` counts the network that `construction.local()` builds.
    """

    name: str
    hub_id: str
    construction: Construction
    readout: Readout
    dim: int
    token_dim: int
    native_grid: int
    token_grid: int
    input_px: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    parameters: int
    licence: str

    @property
    def num_tokens(self) -> int:
        """Patch tokens after resizing, `token_grid` squared."""
        return self.token_grid**2


H0_MINI = EncoderSpec(
    name="h0-mini",
    hub_id="bioptimus/H0-mini",
    construction=TimmConstruction(
        "vit_base_patch14_reg4_dinov2",
        hub_options=_frozen({"mlp_layer": SwiGLUPacked, "act_layer": torch.nn.SiLU}),
        # The hub's own configuration carries these; the width (5.33334 · 768 = 4096 for gate
        # and value together) is inferred from its published size of 86 M parameters.
        local_options=_frozen(
            {
                "img_size": 224,
                "init_values": 1e-5,
                "num_classes": 0,
                "global_pool": "",
                "mlp_ratio": 5.33334,
                "reg_tokens": 4,
                "no_embed_class": True,
            }
        ),
    ),
    readout=TokenReadout(prefix_tokens=5),
    dim=768,
    token_dim=768,
    native_grid=16,
    token_grid=14,
    input_px=224,
    mean=(0.707223, 0.578729, 0.703617),
    std=(0.211883, 0.230117, 0.177517),
    parameters=85_739_520,
    licence="CC BY-NC-ND 4.0, gated",
)

ENCODERS: Mapping[str, EncoderSpec] = MappingProxyType({spec.name: spec for spec in (H0_MINI,)})


def encoder_spec(name: str) -> EncoderSpec:
    """Look an encoder up by name; `UserError` names the nearest known one."""
    if name in ENCODERS:
        return ENCODERS[name]
    near = difflib.get_close_matches(name, ENCODERS, n=1, cutoff=0.0)
    raise UserError(
        f"encoder {name!r} is not known; did you mean {near[0]!r}? Known: {', '.join(ENCODERS)}"
    )
