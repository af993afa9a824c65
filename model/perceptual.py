"""LPIPS: the distance of two images in the feature maps of a VGG16.

Source: Zhang et al., "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric"
(arXiv 1801.03924, equation 1), version 0.1 with VGG16 and learned linear heads.
"""

import importlib.util
from collections.abc import Mapping
from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn

from model.weights import (
    Tensors,
    WeightsError,
    assign_tensors,
    parse_weights,
    read_tensors,
    seeded_init,
    tensors_sha256,
)

_STAGES = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))  # channels and convolutions
# The last ReLU of each stage (1_2, 2_2, 3_3, 4_3, 5_3), as indices into VGG16's layers.
_TAPS = (3, 8, 15, 22, 29)
# ImageNet's mean and standard deviation, carried over from [0, 1] to [-1, 1].
_SHIFT = (-0.030, -0.088, -0.188)
_SCALE = (0.458, 0.448, 0.450)
_EPS = 1e-10


class PerceptualLoss(nn.Module):
    """LPIPS with VGG16, frozen; symmetric in its two inputs.

    `weights` is one of

    - "hub": VGG16 from torchvision's cache (fetched if absent) and the heads that the `lpips`
      package carries;
    - a file with torchvision's VGG16 (`features.*`), alone or with the heads
      (`lin0.model.1.weight` to `lin4...`);
    - "random:SEED": VGG16's initialisation and equal heads, for runs without meaning;
    - "none": no network, the distance is 0.

    `legacy_lpips_range` maps inputs by 2x - 1 once more, as the first release of REPA-E did
    although its images were in [-1, 1] already; wrong, but it is what such runs trained with.

    Raises UserError when the weights cannot be had or do not fit.
    """

    def __init__(self, weights: str = "hub", *, legacy_lpips_range: bool = False) -> None:
        super().__init__()
        source = parse_weights(weights)
        if source.kind == "package":
            raise WeightsError(
                "perceptual weights 'package': VGG16 is in no package; give hub, a file, "
                "random:SEED (no meaning), or none (the term off)"
            )
        self.weights = weights
        self.legacy_lpips_range = legacy_lpips_range
        self.is_random = source.kind == "random"
        self.is_off = source.kind == "none"
        self.register_buffer("shift", torch.tensor(_SHIFT).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor(_SCALE).view(1, 3, 1, 1), persistent=False)
        self.features = nn.Sequential()
        self.heads = nn.ParameterList()
        # Without values where a file has them: a random initialisation would be thrown away.
        if self.is_random:
            with seeded_init(source.seed):
                self._build_network()
        elif not self.is_off:
            from_file = source.kind == "file"
            tensors = _from_published(read_tensors(weights) if from_file else _read_vgg16())
            with torch.device("meta"):
                self._build_network()
            assign_tensors(self, tensors, source=weights if from_file else "torchvision's VGG16")
        self.weights_sha256 = tensors_sha256(self.state_dict())
        self.requires_grad_(False).eval()

    shift: Tensor
    scale: Tensor

    def _build_network(self) -> None:
        """VGG16 as it is initialised, and heads that weigh all channels alike."""
        self.features = _vgg16_features()
        self.heads.extend(torch.full((width,), 1.0 / width) for width, _ in _STAGES)

    def forward(self, images: Tensor, others: Tensor) -> Tensor:
        """Distance [B], float32, of images [B, 3, H, W] in [-1, 1]; sides of 16 px or more.

        Gradients reach the input that requires them; for the other no graph is kept. The
        convolutions run in the caller's autocast dtype, the normalisation and the sums in
        float32.
        """
        if self.is_off:
            return images.new_zeros(len(images), dtype=torch.float32)
        # Sum over the stages of the mean over positions (equation 1).
        features = zip(
            self._unit_features(images), self._unit_features(others), self.heads, strict=True
        )
        distances = [
            ((ours - theirs).square() * head.view(1, -1, 1, 1)).sum(dim=1).mean(dim=(1, 2))
            for ours, theirs, head in features
        ]
        return torch.stack(distances).sum(dim=0)

    def _unit_features(self, images: Tensor) -> list[Tensor]:
        """The tapped feature maps, each position scaled to unit length over the channels."""
        if self.legacy_lpips_range:
            images = 2 * images - 1
        x = (images - self.shift) / self.scale
        taps = []
        for index, layer in enumerate(self.features):
            x = layer(x)
            if index in _TAPS:
                tapped = x.float()
                # The clamp changes no value; without it features that are all 0 have gradient NaN.
                norm = tapped.square().sum(dim=1, keepdim=True).clamp(min=_EPS**2).sqrt()
                taps.append(tapped / (norm + _EPS))
        return taps


def _vgg16_features() -> nn.Sequential:
    """VGG16's layers up to relu5_3, numbered as torchvision's, with its initialisation.

    Built here because torchvision initialises the classifier's 124 M parameters with them.
    """
    layers: list[nn.Module] = []
    channels = 3
    for width, convolutions in _STAGES:
        layers += [nn.MaxPool2d(2)] if layers else []
        for _ in range(convolutions):
            convolution = nn.Conv2d(channels, width, 3, padding=1)
            nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
            assert convolution.bias is not None
            nn.init.zeros_(convolution.bias)
            layers += [convolution, nn.ReLU(inplace=True)]
            channels = width
    return nn.Sequential(*layers)


def _from_published(tensors: Mapping[str, Tensor]) -> Tensors:
    """Published names to ours; the classifier is left out, absent heads come from `lpips`."""
    # A file of VGG16 alone: LPIPS's heads come with its package.
    if not any(key.startswith("lin") for key in tensors):
        package = importlib.util.find_spec("lpips")
        if package is None or package.origin is None:
            raise WeightsError(
                "LPIPS heads: the lpips package is not installed; pip install lpips, or give a "
                "perceptual weights file with lin0.model.1.weight to lin4.model.1.weight"
            )
        heads = Path(package.origin).parent / "weights" / "v0.1" / "vgg.pth"
        tensors = {**tensors, **read_tensors(heads)}
    ours: Tensors = {}
    for key, value in tensors.items():
        if key.startswith("lin") and key.endswith(".model.1.weight"):
            ours[f"heads.{key.removeprefix('lin').split('.')[0]}"] = value.flatten()
        elif not key.startswith("classifier."):
            ours[key] = value
    return ours


def _read_vgg16() -> Tensors:
    published = torchvision.models.VGG16_Weights.IMAGENET1K_V1
    cached = Path(torch.hub.get_dir()) / "checkpoints" / published.url.rsplit("/", 1)[1]
    # The cache first: compute nodes often have no network.
    if cached.is_file():
        return read_tensors(cached)
    try:
        tensors: Tensors = dict(
            published.get_state_dict(progress=False, check_hash=True, weights_only=True)
        )
        return tensors
    except (OSError, RuntimeError) as error:
        raise WeightsError(
            f"perceptual weights: VGG16 is not at {cached} and cannot be fetched from "
            f"{published.url}; download it there on a machine with a network, or give its path, "
            "or random:SEED (no meaning), or none (the term off)"
        ) from error
