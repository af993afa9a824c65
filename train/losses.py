"""The losses of a training step, as pure functions of networks, a batch and its randomness.

Source: REPA-E (Leng et al., arXiv 2504.10483, section 3 and its public training script). What
reaches what: the diffusion loss never the VAE (it sees z detached); the alignment loss of the VAE
never the SiT nor the projector (they run with detached parameters); the generator's loss never
the discriminator (detached too).

To add a loss: its weight in `LossConfig`, its name in `VAE_LOSSES` or `SIT_LOSSES`, and its term
in `vae_losses` or `sit_losses`.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from common.config import check_setting
from model.discriminator import Discriminator
from model.interpolant import Interpolant
from model.latent_norm import LatentStatistics
from model.losses import (
    alignment_loss,
    denoising_loss,
    generator_loss,
    hinge_discriminator_loss,
    l1_reconstruction,
)
from model.noise import RandomStream, normal, uniform
from model.sit import SiT
from model.vae import VAE, Posterior, VAEOutput

if TYPE_CHECKING:
    from model.perceptual import PerceptualLoss
    from train.config import Config

Metrics = dict[str, Tensor]
LossName = Literal[
    "reconstruction", "perceptual", "kl", "generator", "vae_align", "denoise", "sit_align"
]
VAE_LOSSES: tuple[LossName, ...] = ("reconstruction", "perceptual", "kl", "generator", "vae_align")
SIT_LOSSES: tuple[LossName, ...] = ("denoise", "sit_align")


@dataclass(frozen=True)
class LossConfig:
    """Weights, from 0 up, of the loss terms (REPA-E, arXiv 2504.10483); `denoise` has weight 1."""

    reconstruction: float = 1.0  # mean |x - reconstruction| in [-1, 1]
    perceptual: float = 1.0
    perceptual_weights: str = "hub"  # hub, a file, random:SEED, or none to switch the term off
    legacy_lpips_range: bool = False  # REPA-E's first release scaled LPIPS' input twice
    kl: float = 1e-6
    generator: float = 0.1
    generator_start: int = 0  # step at which the discriminator and its loss begin
    vae_align: float = 1.5
    sit_align: float = 0.5
    condition_dropout: float = 0.1
    time: Literal["uniform", "lognormal"] = "uniform"

    def __post_init__(self) -> None:
        names = {field.name for field in fields(self)}
        for name in (*VAE_LOSSES, *SIT_LOSSES):
            if name in names:
                value = getattr(self, name)
                check_setting(value >= 0, f"loss.{name}", value, "a number of 0 or more")
        dropout = self.condition_dropout
        check_setting(0 <= dropout <= 1, "loss.condition_dropout", dropout, "a number in [0, 1]")


class Draws(NamedTuple):
    """The randomness of a batch: functions of (seed, step, slot) alone.

    `t` [n] in (0, 1), `noise` and `posterior_noise` [n, C, h, w] standard normal, `drop` [n] bool.
    """

    t: Tensor
    noise: Tensor
    posterior_noise: Tensor
    drop: Tensor


@dataclass(frozen=True)
class StepInputs:
    """A batch on the device: images [n, 3, H, W] in [-1, 1], condition [n, d] and tokens
    [n, t, d] of the encoder (None where the run does not use them), and its randomness."""

    images: Tensor
    condition: Tensor | None
    tokens: Tensor | None
    draws: Draws

    def select_part(self, places: slice) -> "StepInputs":
        """The tiles [start, stop) of the batch, each tensor [stop - start, ...]."""
        return StepInputs(
            self.images[places],
            None if self.condition is None else self.condition[places],
            None if self.tokens is None else self.tokens[places],
            Draws(*(value[places] for value in self.draws)),
        )


@dataclass(frozen=True)
class Networks:
    """The networks of a run; `discriminator` and `perceptual` are None where they are off."""

    sit: SiT
    vae: VAE
    discriminator: Discriminator | None
    perceptual: "PerceptualLoss | None"


def draw_randomness(
    config: "Config", step: int, slots: range, device: torch.device | str = "cpu"
) -> Draws:
    """The randomness of the n slots of a step, float32 [n, ...] on the device.

    It depends on the seed, the step and the slot alone: not on processes, parts or restarts.
    """
    sit = config.model.sit
    shape = (sit.latent_channels, sit.latent_size, sit.latent_size)
    # Counted on the device: a list copied there would make the host wait, for each of the four.
    numbers = torch.arange(slots.start, slots.stop, device=device)
    normals = partial(normal, config.run.seed, step=step, slot=numbers, device=device)
    uniforms = partial(uniform, config.run.seed, step=step, slot=numbers, device=device)
    if config.loss.time == "lognormal":
        path = Interpolant(config.model.path)
        t = path.time_from_normal(normals(shape=(), stream=RandomStream.TIME))
    else:
        t = uniforms(shape=(), stream=RandomStream.TIME)
    return Draws(
        t,
        normals(shape=shape, stream=RandomStream.NOISE),
        normals(shape=shape, stream=RandomStream.POSTERIOR),
        uniforms(shape=(), stream=RandomStream.DROPOUT) < config.loss.condition_dropout,
    )


def vae_losses(
    images: Tensor,
    output: VAEOutput,
    networks: Networks,
    weights: LossConfig,
    *,
    generate: bool,
) -> tuple[Tensor, Metrics]:
    """L1 + LPIPS + KL (+ generator) of a VAE pass, weighted, and each term; all 0-dim float32.

    `images` [n, 3, H, W] in [-1, 1]. `generate` adds the generator's hinge loss, which reaches
    the reconstruction but not the discriminator. The discriminator stays in training mode: this
    pass, too, moves its running statistics, as in the reference.
    """
    reconstruction = output.reconstruction.float()
    terms = {
        "l1": l1_reconstruction(reconstruction, images),
        "kl": output.posterior.kl().mean(),
    }
    total = weights.reconstruction * terms["l1"] + weights.kl * terms["kl"]
    if networks.perceptual is not None:
        terms["lpips"] = networks.perceptual(reconstruction, images).mean()
        total = total + weights.perceptual * terms["lpips"]
    if generate and networks.discriminator is not None:
        logits = networks.discriminator(reconstruction, frozen=True)
        terms["generator"] = generator_loss(logits)
        total = total + weights.generator * terms["generator"]
    return total, terms


def encode_frozen(vae: VAE, images: Tensor, noise: Tensor) -> tuple[Posterior, Tensor]:
    """Posterior and sampled latents [n, C, h, w] of a VAE that does not train: no decoder runs."""
    posterior = vae.encode(images)
    return posterior, posterior.sample(noise)


def vae_alignment(sit: SiT, path: Interpolant, z: Tensor, inputs: StepInputs) -> Tensor:
    """The alignment loss (0-dim) that trains the VAE: z [n, C, h, w] through a frozen SiT's start.

    Latents are normalised by the *running* statistics and no condition is dropped; parameters
    are detached, so that gradients reach z alone.
    """
    assert inputs.tokens is not None
    t, noise = inputs.draws.t, inputs.draws.noise
    x_t = path.x_t(sit.bn.normalise(z, use_batch=False), noise, t)
    return alignment_loss(sit.align_tokens(x_t, t, inputs.condition), inputs.tokens)


def discriminator_loss(discriminator: nn.Module, images: Tensor, fake: Tensor) -> Tensor:
    """Hinge loss (0-dim) of real images and detached reconstructions, both [n, 3, H, W]."""
    real_logits = discriminator(images)
    return hinge_discriminator_loss(real_logits, discriminator(fake.detach()))


def sit_losses(
    sit: SiT,
    forward: Callable[..., Any],
    path: Interpolant,
    z: Tensor,
    inputs: StepInputs,
    weights: LossConfig,
    *,
    align: bool,
    statistics: LatentStatistics | None = None,
) -> tuple[Tensor, Metrics]:
    """Denoising on detached latents z [n, C, h, w] (+ the SiT's alignment), weighted, and each
    term; all 0-dim float32.

    Latents are normalised by the *batch's* statistics, over all processes, which also moves the
    running ones; where z is a part of the batch, `statistics` are the whole batch's and the
    running ones have moved; with a frozen VAE they are the running ones, which stay. The condition
    is dropped where the draws say so. `forward` is the SiT, its data-parallel wrapper or what
    compiles either.
    """
    # The SiT learns on latents of mean 0 and variance 1 while the VAE moves them.
    draws = inputs.draws
    if statistics is None:
        x0 = sit.bn.normalise(z.detach(), use_batch=True)
    else:
        x0 = sit.bn.normalise_with(z.detach(), statistics.mean, statistics.variance)
    x_t = path.x_t(x0, draws.noise, draws.t)
    # One pass gives the velocity and, from an inner block, the tokens to align.
    drop = draws.drop if inputs.condition is not None else None
    result = forward(x_t, draws.t, inputs.condition, drop=drop, return_tokens=align)
    velocity, tokens = result if align else (result, None)
    target = path.velocity(x0, draws.noise, draws.t)
    terms = {"denoise": denoising_loss(velocity, target)}
    total = terms["denoise"]
    if tokens is not None and inputs.tokens is not None:
        terms["align"] = alignment_loss(tokens, inputs.tokens)
        total = total + weights.sit_align * terms["align"]
    return total, terms
