"""PatchGAN, the convolutional discriminator of overlapping patches.

Sources: pix2pix (Isola et al., arXiv 1611.07004, section 3.2.2), as used by VQGAN (Esser et al.,
arXiv 2012.09841). Names of the state are those of the published weights.
"""

from dataclasses import dataclass
from typing import Any, Self

from torch import Tensor, nn
from torch.func import functional_call

from common.errors import UserError

DISCRIMINATOR_PRESETS: dict[str, dict[str, int]] = {
    "patchgan": {},
    "tiny": {"base_channels": 8},
}


@dataclass(frozen=True)
class DiscriminatorConfig:
    """The width of the PatchGAN; the default has 2,765,633 parameters."""

    base_channels: int = 64

    def __post_init__(self) -> None:
        if not (type(self.base_channels) is int and self.base_channels >= 1):
            raise UserError(
                f"discriminator base_channels is {self.base_channels!r}; "
                "expected an integer of 1 or more"
            )

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> Self:
        """A named width ("patchgan", "tiny"), with fields replaced by overrides."""
        if name not in DISCRIMINATOR_PRESETS:
            known = ", ".join(DISCRIMINATOR_PRESETS)
            raise UserError(f"discriminator preset is {name!r}; expected one of {known}")
        return cls(**{**DISCRIMINATOR_PRESETS[name], **overrides})


class Discriminator(nn.Module):
    """PatchGAN: images [B, 3, H, W] in [-1, 1] to logits [B, 1, h, w], high for real.

    At 224 px a logit sees 70 px and there are 26 x 26. Its batch norms are meant to stay in
    training mode: real and generated batches go through separate calls, each normalised by its
    statistics, which are not shared between processes.
    """

    def __init__(self, config: DiscriminatorConfig | None = None) -> None:
        super().__init__()
        self.config = config or DiscriminatorConfig()
        width = self.config.base_channels
        self.main = nn.Sequential(
            nn.Conv2d(3, width, 4, stride=2, padding=1),
            nn.LeakyReLU(0.2),
            *_normed_layer(width, 2 * width, stride=2),
            *_normed_layer(2 * width, 4 * width, stride=2),
            *_normed_layer(4 * width, 8 * width, stride=1),
            nn.Conv2d(8 * width, 1, 4, stride=1, padding=1),
        )
        # The initialisation of pix2pix, whose discriminator this is.
        for module in self.main:
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)
            elif isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight, 1.0, 0.02)

    def forward(self, images: Tensor, *, frozen: bool = False) -> Tensor:
        """Logits [B, 1, h, w] of images [B, 3, H, W]; `frozen` keeps gradients from the parameters.

        Freezing by the call, and not by switching `requires_grad` between steps, keeps
        compiled graphs valid. The batch norms' running statistics move either way.
        """
        if not frozen:
            logits: Tensor = self.main(images)
            return logits
        constants = {name: parameter.detach() for name, parameter in self.main.named_parameters()}
        logits = functional_call(self.main, constants, (images,))
        return logits


def _normed_layer(channels_in: int, channels_out: int, *, stride: int) -> list[nn.Module]:
    # No bias: the batch norm would take it off again.
    return [
        nn.Conv2d(channels_in, channels_out, 4, stride=stride, padding=1, bias=False),
        nn.BatchNorm2d(channels_out),
        nn.LeakyReLU(0.2),
    ]
