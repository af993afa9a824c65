"""One training step of REPA-E: the order, the stop-gradients and the weights of its losses.

Source: REPA-E (Leng et al., arXiv 2504.10483, section 3 and its public training script). The
three backward passes run in the order VAE, discriminator, SiT, on the latents and the
reconstruction of one VAE pass, with one t and noise a sample; then the three updates in the same
order. No pass reads what another's update changes, so updating last equals updating in between,
and lets a step be all or nothing: a non-finite gradient in one network updates none.

What reaches what: the diffusion loss never the VAE (it sees z detached); the alignment loss of
the VAE never the SiT nor the projector (they run with detached parameters); the generator's loss
never the discriminator (detached too).
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from model.discriminator import Discriminator
from model.images import from_uint8
from model.interpolant import Interpolant
from model.losses import (
    alignment_loss,
    denoising_loss,
    generator_loss,
    hinge_discriminator_loss,
    l1_reconstruction,
)
from model.noise import Stream, normal, uniform
from model.sit import SiT
from model.vae import VAE, VAEOutput
from train.config import Config, LossConfig
from train.ema import Ema
from train.ranks import Ranks
from train.reader import Batch

if TYPE_CHECKING:
    from model.perceptual import PerceptualLoss

Metrics = dict[str, Tensor]


class Draws(NamedTuple):
    """The randomness of a batch: functions of (seed, step, slot) alone.

    `t` [n] in (0, 1), `noise` and `posterior_noise` [n, C, h, w] standard normal, `drop` [n] bool.
    """

    t: Tensor
    noise: Tensor
    posterior_noise: Tensor
    drop: Tensor


@dataclass(frozen=True)
class Inputs:
    """A batch on the device: images [n, 3, H, W] in [-1, 1], condition [n, d] and tokens
    [n, t, d] of the encoder (None where the run does not use them), and its randomness."""

    images: Tensor
    condition: Tensor | None
    tokens: Tensor | None
    draws: Draws


@dataclass(frozen=True)
class Networks:
    """The networks of a run; `discriminator` and `perceptual` are None where they are off."""

    sit: SiT
    vae: VAE
    discriminator: Discriminator | None
    perceptual: "PerceptualLoss | None"


def draw(config: Config, step: int, slots: range, device: torch.device | str = "cpu") -> Draws:
    """The randomness of the slots of a step; no other state than the step and the seed."""
    sit = config.model.sit
    shape = (sit.latent_channels, sit.latent_size, sit.latent_size)
    at = partial(_address, config.run.seed, step, list(slots), device)
    if config.loss.time == "lognormal":
        t = Interpolant(config.model.path).time_from_normal(at(normal, (), Stream.TIME))
    else:
        t = at(uniform, (), Stream.TIME)
    return Draws(
        t,
        at(normal, shape, Stream.NOISE),
        at(normal, shape, Stream.POSTERIOR),
        at(uniform, (), Stream.DROPOUT) < config.loss.condition_dropout,
    )


def _address(
    seed: int,
    step: int,
    slots: list[int],
    device: torch.device | str,
    distribution: Callable[..., Tensor],
    shape: tuple[int, ...],
    stream: Stream,
) -> Tensor:
    return distribution(seed, shape, stream=stream, step=step, slot=slots, device=device)


def vae_losses(
    images: Tensor,
    output: VAEOutput,
    networks: Networks,
    weights: LossConfig,
    *,
    generate: bool,
) -> tuple[Tensor, Metrics]:
    """L1 + LPIPS + KL (+ generator) of a VAE pass, weighted, and each term; all in float32.

    `generate` adds the generator's hinge loss, which reaches the reconstruction but not the
    discriminator. The discriminator stays in training mode: this pass, too, moves its running
    statistics, as in the reference.
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


def vae_alignment(sit: SiT, path: Interpolant, z: Tensor, inputs: Inputs) -> Tensor:
    """The alignment loss that trains the VAE: z through the first blocks of a frozen SiT.

    Latents are normalised by the *running* statistics and no condition is dropped; parameters
    are detached, so that gradients reach z alone.
    """
    assert inputs.tokens is not None
    t, noise = inputs.draws.t, inputs.draws.noise
    x_t = path.x_t(sit.bn.normalise(z, use_batch=False), noise, t)
    return alignment_loss(sit.align_tokens(x_t, t, inputs.condition), inputs.tokens)


def discriminator_loss(discriminator: nn.Module, images: Tensor, fake: Tensor) -> Tensor:
    """Hinge loss of the discriminator on real images and detached reconstructions."""
    real_logits = discriminator(images)
    return hinge_discriminator_loss(real_logits, discriminator(fake.detach()))


def sit_losses(
    sit: SiT, forward: nn.Module, path: Interpolant, z: Tensor, inputs: Inputs, *, align: bool
) -> Metrics:
    """The denoising loss on detached latents, and with `align` the SiT's own alignment loss.

    Latents are normalised by the *batch's* statistics, over all processes, which also moves the
    running ones; the condition is dropped where the draws say so. `forward` is the SiT or its
    data-parallel wrapper.
    """
    draws = inputs.draws
    x0 = sit.bn.normalise(z.detach(), use_batch=True)
    x_t = path.x_t(x0, draws.noise, draws.t)
    drop = draws.drop if inputs.condition is not None else None
    result = forward(x_t, draws.t, inputs.condition, drop=drop, return_tokens=align)
    velocity, tokens = result if align else (result, None)
    target = path.velocity(x0, draws.noise, draws.t)
    terms = {"denoise": denoising_loss(velocity, target)}
    if tokens is not None and inputs.tokens is not None:
        terms["align"] = alignment_loss(tokens, inputs.tokens)
    return terms


class TrainingStep:
    """Runs steps: owns the order of passes, the updates and the averages."""

    def __init__(
        self,
        config: Config,
        ranks: Ranks,
        networks: Networks,
        optimizers: Mapping[str, torch.optim.Optimizer],
        *,
        sit_average: Ema[SiT],
        vae_average: Ema[VAE] | None,
    ) -> None:
        self.config, self.ranks, self.networks = config, ranks, networks
        self.optimizers = optimizers
        self.sit_average, self.vae_average = sit_average, vae_average
        self.path = Interpolant(config.model.path)
        self._weight = ranks.loss_weight(config.data.batch_size)
        self._trains_vae = config.run.mode == "repa-e"
        self._sit = ranks.parallel(networks.sit)
        self._vae = ranks.parallel(networks.vae)
        self._discriminator = (
            ranks.parallel(networks.discriminator) if networks.discriminator is not None else None
        )

    def inputs(self, batch: Batch) -> Inputs:
        """The batch on the device, with its randomness."""
        device = self.ranks.device

        def moved(values: Tensor | None) -> Tensor | None:
            return None if values is None else values.to(device, non_blocking=True)

        return Inputs(
            from_uint8(batch.tiles.to(device, non_blocking=True)),
            moved(batch.cls),
            moved(batch.tokens),
            draw(self.config, batch.step, batch.slots, device),
        )

    def __call__(self, batch: Batch, *, stop: bool = False) -> tuple[Metrics, bool, bool]:
        """Train on one batch: its local metrics, whether it was skipped as non-finite, and
        whether any process asked to `stop` (asked for here to spare a second round trip).

        A skipped step leaves weights, moments, averages and statistics as they were.
        """
        buffers = self._buffers()
        before = [value.clone() for value in buffers]
        metrics = self._gradients(self.inputs(batch), batch.step)
        norms = self._clipped_norms()
        bad = ~torch.stack(list(norms.values())).isfinite().all()
        skipped, stopping = self.ranks.agree([bad, stop])
        if skipped:
            torch._foreach_copy_(buffers, before)
        else:
            self._update(batch.step)
        for optimizer in self.optimizers.values():
            optimizer.zero_grad(set_to_none=True)
        return metrics | norms, skipped, stopping

    def _gradients(self, inputs: Inputs, step: int) -> Metrics:
        """The three backward passes."""
        adversarial = (
            self._trains_vae
            and self._discriminator is not None
            and step >= self.config.loss.generator_start
        )
        output = self._encode(inputs)
        metrics: Metrics = {}
        if self._trains_vae:
            metrics |= self._vae_backward(output, inputs, generate=adversarial)
        if adversarial and self._discriminator is not None:
            metrics |= self._discriminator_backward(output, inputs)
        metrics |= self._sit_backward(output.latents, inputs)
        latents = output.latents.detach().float()
        return metrics | {"latent/mean": latents.mean(), "latent/std": latents.std()}

    def _encode(self, inputs: Inputs) -> VAEOutput:
        if self._trains_vae:
            with self._precision():
                output: VAEOutput = self._vae(inputs.images, inputs.draws.posterior_noise)
            return output
        with torch.no_grad(), self._precision():
            posterior = self.networks.vae.encode(inputs.images)
            z = posterior.sample(inputs.draws.posterior_noise)
        return VAEOutput(inputs.images, z, posterior)

    def _vae_backward(self, output: VAEOutput, inputs: Inputs, *, generate: bool) -> Metrics:
        weights = self.config.loss
        total, terms = vae_losses(inputs.images, output, self.networks, weights, generate=generate)
        if self.config.uses_alignment and weights.vae_align > 0:
            with self._precision():
                terms["align"] = vae_alignment(self.networks.sit, self.path, output.latents, inputs)
            total = total + weights.vae_align * terms["align"]
        (total * self._weight).backward()
        return _named("vae", terms | {"total": total})

    def _discriminator_backward(self, output: VAEOutput, inputs: Inputs) -> Metrics:
        assert self._discriminator is not None
        fake = output.reconstruction.float()
        loss = discriminator_loss(self._discriminator, inputs.images, fake)
        (loss * self._weight).backward()
        return _named("discriminator", {"total": loss})

    def _sit_backward(self, z: Tensor, inputs: Inputs) -> Metrics:
        align = self.config.uses_alignment and self.config.loss.sit_align > 0
        with self._precision():
            terms = sit_losses(self.networks.sit, self._sit, self.path, z, inputs, align=align)
        total = terms["denoise"]
        if align:
            total = total + self.config.loss.sit_align * terms["align"]
        (total * self._weight).backward()
        return _named("sit", terms | {"total": total})

    def _clipped_norms(self) -> Metrics:
        """Gradient norms before clipping, of the networks that have gradients."""
        norms: Metrics = {}
        for name, optimizer in self.optimizers.items():
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            if any(parameter.grad is not None for parameter in parameters):
                clip = self.config.optim.clip
                norms[f"grad_norm/{name}"] = nn.utils.clip_grad_norm_(parameters, clip)
        return norms

    def _update(self, step: int) -> None:
        for optimizer in self.optimizers.values():
            optimizer.step()  # parameters without a gradient stay, moments and all
        self.sit_average.update(self.networks.sit, step)
        if self.vae_average is not None:
            self.vae_average.update(self.networks.vae, step)

    def _buffers(self) -> list[Tensor]:
        """Running statistics that a step moves in its forward passes."""
        networks = (self.networks.sit, self.networks.discriminator)
        return [b for network in networks if network is not None for b in network.buffers()]

    def _precision(self) -> AbstractContextManager[object]:
        if self.config.run.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.ranks.device.type, torch.bfloat16)


def _named(network: str, terms: Metrics) -> Metrics:
    return {f"{network}/{name}": value.detach() for name, value in terms.items()}
