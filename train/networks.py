"""The networks, optimizers and averages of a run, built from its configuration."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from common.errors import UserError
from model.discriminator import Discriminator
from model.sit import SiT
from model.vae import VAE
from model.weights import seeded_init
from train.checkpoint import Trainees
from train.config import Config
from train.ema import Ema
from train.initial import initialise, set_latent_statistics
from train.step import Networks
from train.sync_norm import synchronise_norms

if TYPE_CHECKING:
    from model.perceptual import PerceptualLoss


@dataclass(frozen=True)
class Parts:
    """What a step works on: the networks, an AdamW a trained one, and the moving averages."""

    networks: Networks
    optimizers: dict[str, torch.optim.Optimizer]
    sit_average: Ema[SiT]
    vae_average: Ema[VAE] | None  # None where the VAE is frozen

    @property
    def trainees(self) -> Trainees:
        """All that a checkpoint holds: `vae` is in it even where it is frozen."""
        kept: dict[str, nn.Module] = {"sit": self.networks.sit, "vae": self.networks.vae}
        if self.networks.discriminator is not None:
            kept["discriminator"] = self.networks.discriminator
        kept["sit_ema"] = self.sit_average.module
        if self.vae_average is not None:
            kept["vae_ema"] = self.vae_average.module
        return Trainees(kept, self.optimizers)


def build_parts(config: Config, device: torch.device, tiles: Tensor | None = None) -> Parts:
    """Networks at their first weights: from the seed, or from `init.vae` and `init.sit`.

    With `init.vae` alone the latent statistics begin at those of `tiles` uint8 [n, px, px, 3].
    Raises `UserError` for weights that are missing or do not fit.
    """
    networks = build_networks(config, device)
    rates = {"vae": config.optim.lr_vae, "discriminator": config.optim.lr_discriminator}
    rates["sit"] = config.optim.lr_sit
    optimizers = {
        name: _adamw(config, network, rates[name])
        for name in ("vae", "discriminator", "sit")  # the order of the updates
        if (network := getattr(networks, name)) is not None
        and any(parameter.requires_grad for parameter in network.parameters())
    }
    if config.init.vae and not config.init.sit and tiles is not None:
        set_latent_statistics(networks.sit.bn, networks.vae, tiles)
    warmup = config.ema.warmup
    frozen = "vae" not in optimizers  # then the latents' statistics do not move
    sit_average = Ema(networks.sit, config.ema.sit, warmup=warmup, copy_buffers=frozen)
    vae_average = None if frozen else Ema(networks.vae, config.ema.vae, warmup=warmup)
    return Parts(networks, optimizers, sit_average, vae_average)


def build_networks(config: Config, device: torch.device) -> Networks:
    """SiT and VAE, and in mode repa-e the discriminator and LPIPS where their terms are on."""
    end_to_end = config.run.mode == "repa-e"
    with seeded_init(config.run.seed):
        sit, vae = SiT(config.model.sit), VAE(config.model.vae)
        discriminator = None
        if end_to_end and config.loss.generator > 0:
            discriminator = Discriminator(config.model.discriminator).to(device)
            if config.run.sync_discriminator:
                synchronise_norms(discriminator)
    perceptual = None
    if end_to_end and config.loss.perceptual > 0 and config.loss.perceptual_weights != "none":
        perceptual = _perceptual(config).to(device)
    initialise(sit, vae, config)
    sit.projectors.requires_grad_(config.trains_alignment)
    vae.requires_grad_(end_to_end)
    sit.recompute = vae.recompute = config.run.recompute
    vae = vae.to(device).to(memory_format=torch.channels_last)
    if device.type == "cuda":  # where channels last is what the tensor cores read
        for network in (discriminator, perceptual):
            if network is not None:
                network.to(memory_format=torch.channels_last)
    return Networks(sit.to(device), vae, discriminator, perceptual)


def _perceptual(config: Config) -> "PerceptualLoss":
    from model.perceptual import PerceptualLoss  # torchvision takes seconds to import

    loss = config.loss
    try:
        return PerceptualLoss(loss.perceptual_weights, legacy_lpips_range=loss.legacy_lpips_range)
    except UserError as error:
        raise UserError(f"loss.perceptual_weights: {error}") from error


def _adamw(config: Config, network: nn.Module, rate: float) -> torch.optim.Optimizer:
    optim = config.optim
    return torch.optim.AdamW(
        [parameter for parameter in network.parameters() if parameter.requires_grad],
        lr=rate,
        betas=optim.betas,
        eps=optim.eps,
        weight_decay=optim.weight_decay,
        fused=True,
    )
