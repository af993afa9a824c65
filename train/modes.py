"""The ways to train, one entry each: adding a mode is adding an entry and a name here."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from train.losses import SIT_LOSSES, VAE_LOSSES, LossName

ModeName = Literal["repa-e", "repa", "ldm"]


@dataclass(frozen=True)
class Mode:
    """What a mode trains, by which losses, and what it needs.

    A mode may leave out `perceptual`, `generator`, `vae_align` and `sit_align`. The others belong
    to their network: `reconstruction` and `kl` to the VAE, `denoise` to the SiT.
    The SiT always trains, the VAE with `trains_vae`, and the discriminator where the generator's
    loss is among `losses` and its weight is above 0. `required` are dotted configuration keys
    that must not be empty, each with what to set it to.
    """

    trains_vae: bool
    losses: tuple[LossName, ...]
    required: Mapping[str, str]


_FROZEN_VAE = MappingProxyType(
    {"init.vae": "a VAE's weights, which stay frozen (an exported model's vae folder or file)"}
)

MODES: Mapping[ModeName, Mode] = MappingProxyType(
    {
        # End to end, both networks aligned (REPA-E, Leng et al., arXiv 2504.10483).
        "repa-e": Mode(True, (*VAE_LOSSES, *SIT_LOSSES), {}),
        # Frozen VAE, aligned SiT (REPA, Yu et al., arXiv 2410.06940).
        "repa": Mode(False, SIT_LOSSES, _FROZEN_VAE),
        # Frozen VAE, no alignment: plain latent diffusion.
        "ldm": Mode(False, ("denoise",), _FROZEN_VAE),
    }
)
