"""The networks, optimizers and averages of a run, built from its configuration."""

from dataclasses import dataclass

import torch
from torch import nn

from common.errors import UserError
from model.discriminator import Discriminator
from model.sit import SiT
from model.vae import VAE
from model.weights import seeded_init
from train.checkpoint import Trainees
from train.config import Config
from train.ema import Ema
from train.initial import load_initial_weights
from train.losses import Networks
from train.sync_norm import synchronise_norms


@dataclass(frozen=True)
class Parts:
    """What a step works on: networks, an AdamW per trained one in the order of the updates, and
    moving averages."""

    networks: Networks
    optimizers: dict[str, torch.optim.Optimizer]
    sit_average: Ema[SiT]
    vae_average: Ema[VAE] | None  # None where the VAE is frozen

    @property
    def trainees(self) -> Trainees:
        """All that a checkpoint contains: `vae` is in it even where it is frozen."""
        kept: dict[str, nn.Module] = {"sit": self.networks.sit, "vae": self.networks.vae}
        if self.networks.discriminator is not None:
            kept["discriminator"] = self.networks.discriminator
        kept["sit_ema"] = self.sit_average.module
        if self.vae_average is not None:
            kept["vae_ema"] = self.vae_average.module
        return Trainees(kept, self.optimizers)


def build_parts(config: Config, device: torch.device) -> Parts:
    """Networks at their first weights: from the seed, or from `init.vae` and `init.sit`.

    Latent statistics are those of `init.sit`, else 0 and 1: `train.latents` sets others. Raises
    `UserError` for weights that are missing or do not fit.
    """
    networks, optim = build_networks(config, device), config.optim
    optimizers = {}
    if config.mode.trains_vae:
        optimizers["vae"] = _build_adamw(config, networks.vae, optim.lr_vae)
    if networks.discriminator is not None:
        optimizers["discriminator"] = _build_adamw(
            config, networks.discriminator, optim.lr_discriminator
        )
    optimizers["sit"] = _build_adamw(config, networks.sit, optim.lr_sit)
    trains_vae, warmup = config.mode.trains_vae, config.ema.warmup
    sit_average = Ema(networks.sit, config.ema.sit, warmup=warmup)
    vae_average = Ema(networks.vae, config.ema.vae, warmup=warmup) if trains_vae else None
    return Parts(networks, optimizers, sit_average, vae_average)


def build_networks(config: Config, device: torch.device) -> Networks:
    """SiT and VAE, and the discriminator and LPIPS where the run uses their losses.

    On the device, in float32; frozen parameters do not require gradients.
    """
    # The seed decides the weights by the order in which networks are built.
    with seeded_init(config.run.seed):
        sit, vae = SiT(config.model.sit), VAE(config.model.vae)
        discriminator = None
        if config.uses_loss("generator"):
            discriminator = Discriminator(config.model.discriminator).to(device)
            if config.run.sync_discriminator:
                synchronise_norms(discriminator)
    perceptual = None
    if config.uses_loss("perceptual") and config.loss.perceptual_weights != "none":
        from model.perceptual import PerceptualLoss  # torchvision takes seconds to import

        weights, legacy = config.loss.perceptual_weights, config.loss.legacy_lpips_range
        try:
            perceptual = PerceptualLoss(weights, legacy_lpips_range=legacy).to(device)
        except UserError as error:
            raise UserError(f"loss.perceptual_weights: {error}") from error
    load_initial_weights(sit, vae, config)
    # AdamW and data-parallel gradients take what requires gradients, and only that.
    sit.projectors.requires_grad_(config.uses_loss("sit_align"))
    vae.requires_grad_(config.mode.trains_vae)
    sit.recompute = vae.recompute = config.run.recompute
    vae = vae.to(device).to(memory_format=torch.channels_last)
    if device.type == "cuda":  # where channels last is what the tensor cores read
        for network in (discriminator, perceptual):
            if network is not None:
                network.to(memory_format=torch.channels_last)
    return Networks(sit.to(device), vae, discriminator, perceptual)


def _build_adamw(config: Config, network: nn.Module, rate: float) -> torch.optim.Optimizer:
    optim = config.optim
    return torch.optim.AdamW(
        [parameter for parameter in network.parameters() if parameter.requires_grad],
        lr=rate,
        betas=optim.betas,
        eps=optim.eps,
        weight_decay=optim.weight_decay,
        fused=True,
    )
