"""How the encoders' networks are made: timm where timm has them."""

import importlib.util
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import timm
import torch
from torch import Tensor, nn

from common.errors import UserError
from model.encoders.inception import InceptionV3, Variant


class MissingPackageError(UserError):
    """An encoder's package is not installed here; its weights may still be fetched."""


class Construction(Protocol):
    """How an encoder's network is made."""

    def build_network(self) -> nn.Module:
        """Build the network, freshly initialised; no weights are fetched."""
        ...


def frozen(**options: Any) -> Mapping[str, Any]:
    """Options as a mapping that cannot be changed."""
    return MappingProxyType(options)


@dataclass(frozen=True)
class TimmConstruction:
    """A timm network: `timm.create_model(architecture, **options)`.

    The options are those of the model's card and of the hub's configuration together, written
    out, so that the network depends on neither a connection nor what a hub says today; the
    strict fit of the published weights is what proves them.
    """

    architecture: str
    options: Mapping[str, Any]

    def build_network(self) -> nn.Module:
        """Build it; [B, 3, px, px] to all tokens after the last normalisation, [B, N, D]."""
        every_token = {"num_classes": 0, "global_pool": ""}
        return timm.create_model(
            self.architecture, pretrained=False, **{**every_token, **self.options}
        )


@dataclass(frozen=True)
class EfficientNetConstruction:
    """A timm EfficientNet: pooled features, and the map at a sixteenth of the input's side."""

    architecture: str

    def build_network(self) -> nn.Module:
        """Build it; [B, 3, px, px] to features [B, D] and the map [B, C, px / 16, px / 16]."""
        return _EfficientNet(timm.create_model(self.architecture, pretrained=False, num_classes=0))


class _EfficientNet(nn.Module):
    """timm's modules under their own names, with a second output between the stages."""

    _STRIDE_16 = 5  # the map of the fifth of seven stages

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.conv_stem: nn.Module = network.conv_stem
        self.bn1: nn.Module = network.bn1
        self.blocks: nn.Sequential = network.blocks
        self.conv_head: nn.Module = network.conv_head
        self.bn2: nn.Module = network.bn2
        self.global_pool: nn.Module = network.global_pool

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.blocks[: self._STRIDE_16](self.bn1(self.conv_stem(x)))
        top = self.bn2(self.conv_head(self.blocks[self._STRIDE_16 :](x)))
        return self.global_pool(top), x


@dataclass(frozen=True)
class InceptionConstruction:
    """InceptionV3 up to pool3."""

    variant: Variant

    def build_network(self) -> nn.Module:
        """Build it; [B, 3, px, px] to [B, 2048]."""
        return InceptionV3(self.variant)


@dataclass(frozen=True)
class ConchConstruction:
    """CONCH's image tower through its package, which must be installed.

    `image_px` is the input it is built for; 448 is the published one. Raises
    `MissingPackageError` without the package.
    """

    image_px: int

    def build_network(self) -> nn.Module:
        """Build it; [B, 3, px, px] to [B, 512], neither projected nor normalised."""
        return _ConchImage(self.image_px)


class _ConchImage(nn.Module):
    """CONCH's `encode_image(x, proj_contrast=False, normalize=False)`."""

    def __init__(self, image_px: int) -> None:
        super().__init__()
        self.visual = _conch_model(image_px).visual

    def forward(self, x: Tensor) -> Tensor:
        features: Tensor = self.visual.forward_no_head(x, normalize=False)
        return features


def _conch_model(image_px: int) -> Any:
    # A package that is absent and one that fails to import need different advice.
    if importlib.util.find_spec("conch") is None:
        raise MissingPackageError(
            "encoder conch-v1 needs its package, which is not installed: "
            "pip install git+https://github.com/mahmoodlab/CONCH.git"
        )
    try:
        from conch.open_clip_custom import coca_model
    except ImportError as error:
        raise MissingPackageError(
            f"encoder conch-v1: its package does not import here ({error}); install the versions "
            "of timm and transformers that it asks for"
        ) from error
    folder = Path(coca_model.__file__).parent / "model_configs"
    config = json.loads((folder / "conch_ViT-B-16.json").read_text())
    config.pop("custom_text", None)
    config["vision_cfg"]["image_size"] = image_px
    return coca_model.CoCa(**config)


SWIGLU = frozen(mlp_layer=timm.layers.SwiGLUPacked, act_layer=torch.nn.SiLU)
"""Gated feed-forward layers; `mlp_ratio` then counts gate and value together."""
