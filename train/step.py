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

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from common.errors import UserError
from common.torch_processes import Processes
from model.discriminator import Discriminator
from model.images import from_uint8
from model.interpolant import Interpolant
from model.latent_norm import LatentStatistics, latent_statistics
from model.losses import (
    alignment_loss,
    denoising_loss,
    generator_loss,
    hinge_discriminator_loss,
    l1_reconstruction,
)
from model.noise import Stream, normal, uniform
from model.sit import SiT
from model.vae import VAE, Posterior, VAEOutput
from train.config import Config, LossConfig
from train.ema import Ema
from train.processes import batch_slots, data_parallel, loss_weight
from train.reader import Batch

if TYPE_CHECKING:
    from model.perceptual import PerceptualLoss

Metrics = dict[str, Tensor]
Encode = Callable[[Tensor], Tensor]


class Draws(NamedTuple):
    """The randomness of a batch: functions of (seed, step, slot) alone.

    `t` [n] in (0, 1), `noise` and `posterior_noise` [n, C, h, w] standard normal, `drop` [n] bool.
    """

    t: Tensor
    noise: Tensor
    posterior_noise: Tensor
    drop: Tensor

    def part(self, places: slice) -> "Draws":
        """Those of some tiles of the batch."""
        return Draws(*(value[places] for value in self))


@dataclass(frozen=True)
class Inputs:
    """A batch on the device: images [n, 3, H, W] in [-1, 1], condition [n, d] and tokens
    [n, t, d] of the encoder (None where the run does not use them), and its randomness."""

    images: Tensor
    condition: Tensor | None
    tokens: Tensor | None
    draws: Draws

    def part(self, places: slice) -> "Inputs":
        """Some tiles of the batch."""
        return Inputs(
            self.images[places],
            None if self.condition is None else self.condition[places],
            None if self.tokens is None else self.tokens[places],
            self.draws.part(places),
        )


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
    # Counted on the device: a list copied there would make the host wait, for each of the four.
    numbers = torch.arange(slots.start, slots.stop, device=device)
    at = partial(_address, config.run.seed, step, numbers, device)
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
    slots: Tensor,
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


def frozen_latents(vae: VAE, images: Tensor, noise: Tensor) -> tuple[Posterior, Tensor]:
    """Posterior and sampled latents [n, C, h, w] of a VAE that does not train: no decoder runs."""
    posterior = vae.encode(images)
    return posterior, posterior.sample(noise)


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
    sit: SiT,
    forward: Callable[..., Any],
    path: Interpolant,
    z: Tensor,
    inputs: Inputs,
    *,
    align: bool,
    statistics: LatentStatistics | None = None,
) -> Metrics:
    """The denoising loss on detached latents, and with `align` the SiT's own alignment loss.

    Latents are normalised by the *batch's* statistics, over all processes, which also moves the
    running ones; where z is a part of the batch, `statistics` are the whole batch's and the
    running ones have moved. The condition is dropped where the draws say so. `forward` is the
    SiT, its data-parallel wrapper or what compiles either.
    """
    draws = inputs.draws
    if statistics is None:
        x0 = sit.bn.normalise(z.detach(), use_batch=True)
    else:
        x0 = sit.bn.normalise_with(z.detach(), statistics.mean, statistics.variance)
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
    """Runs steps: owns the order of passes, the updates and the averages.

    With `optim.accumulate` = m a process takes its tiles in m parts, one after the other. Every
    loss is a mean over tiles, and the latent norm takes the statistics of all parts (and
    processes) before the first SiT pass, so that gradients are those of the whole batch. The one
    exception is the discriminator's batch norm: a part is normalised by itself, as a process's
    tiles are without `run.sync_discriminator`, and its running statistics move once a part.

    With `run.compile` each part of the step is a graph of its own, of fixed shapes: parts of one
    size mean no compilation after the first step (and one where the discriminator begins).

    `encode` computes the patch tokens of tiles uint8 [n, px, px, 3] where they are not read from
    the cache.
    """

    def __init__(
        self,
        config: Config,
        processes: Processes,
        networks: Networks,
        optimizers: Mapping[str, torch.optim.Optimizer],
        *,
        sit_average: Ema[SiT],
        vae_average: Ema[VAE] | None,
        encode: Encode | None = None,
    ) -> None:
        self.config, self.processes, self.networks = config, processes, networks
        self.optimizers, self._encode_tokens = optimizers, encode
        self.sit_average, self.vae_average = sit_average, vae_average
        self.path = Interpolant(config.model.path)
        self._weight = loss_weight(processes, config.data.batch_size)
        self._trains_vae = config.run.mode == "repa-e"
        self._sit = data_parallel(processes, networks.sit)
        self._vae = data_parallel(processes, networks.vae)
        self._discriminator = (
            data_parallel(processes, networks.discriminator)
            if networks.discriminator is not None
            else None
        )
        self._parts = parts_of(
            len(batch_slots(processes, config.data.batch_size)), config.optim.accumulate
        )
        if config.run.recompute and processes.size > 1:
            # PyTorch's cutting of compiled graphs at gradient buckets refuses recomputation.
            torch._dynamo.config.optimize_ddp = False
        self._call_vae = self._compiled(self._vae)
        self._frozen_latents = self._compiled(frozen_latents)
        self._call_sit = self._compiled(self._sit)
        self._vae_losses = self._compiled(vae_losses)
        self._vae_alignment = self._compiled(vae_alignment)
        self._discriminator_loss = self._compiled(discriminator_loss)

    def _compiled(self, call: Callable[..., Any]) -> Callable[..., Any]:
        backend = self.config.run.compile
        return call if backend == "off" else torch.compile(call, backend=backend, dynamic=False)

    def inputs(self, batch: Batch) -> Inputs:
        """The batch on the device, with its randomness."""
        device = self.processes.device

        def moved(values: Tensor | None) -> Tensor | None:
            return None if values is None else values.to(device, non_blocking=True)

        tiles = batch.tiles.to(device, non_blocking=True)
        tokens = moved(batch.tokens)
        if self._encode_tokens is not None:
            tokens = torch.cat([self._encode_tokens(tiles[places]) for places in self._parts])
        draws = draw(self.config, batch.step, batch.slots, device)
        return Inputs(from_uint8(tiles), moved(batch.cls), tokens, draws)

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
        skipped, stopping = self.processes.agree_on_any([bad, stop])
        if skipped:
            torch._foreach_copy_(buffers, before)
        else:
            self._update(batch.step)
        for optimizer in self.optimizers.values():
            optimizer.zero_grad(set_to_none=True)
        return metrics | norms, skipped, stopping

    def _gradients(self, inputs: Inputs, step: int) -> Metrics:
        """The three backward passes, each over the parts of the batch."""
        total = len(inputs.images)
        shares = [(p.stop - p.start) / total for p in self._parts]
        terms: list[Metrics] = []
        latents: list[Tensor] = []
        for places, share in zip(self._parts, shares, strict=True):
            with self._reducing(self._vae, self._discriminator, when=places.stop == total):
                metrics, z = self._autoencoder_backward(inputs.part(places), step, share)
            terms.append(metrics)
            latents.append(z)
        statistics = self._whole_statistics(latents)
        for index, (places, share) in enumerate(zip(self._parts, shares, strict=True)):
            with self._reducing(self._sit, when=places.stop == total):
                part, z = inputs.part(places), latents[index]
                terms[index] |= self._sit_backward(z, part, statistics, share)
        z = torch.cat(latents).float()
        return _weighted(terms, shares) | {"latent/mean": z.mean(), "latent/std": z.std()}

    def _whole_statistics(self, latents: Sequence[Tensor]) -> LatentStatistics | None:
        """The latent statistics of several parts, moving the running ones; None for a single."""
        if len(latents) == 1:
            return None
        statistics = latent_statistics(torch.cat(list(latents)))
        self.networks.sit.bn.update(statistics)
        return statistics

    @contextmanager
    def _reducing(self, *networks: nn.Module | None, when: bool) -> Iterator[None]:
        """Gradients are averaged over processes by the last part's backward pass alone."""
        with ExitStack() as stack:
            for network in networks:
                if isinstance(network, nn.parallel.DistributedDataParallel) and not when:
                    stack.enter_context(network.no_sync())
            yield

    def _autoencoder_backward(
        self, inputs: Inputs, step: int, share: float
    ) -> tuple[Metrics, Tensor]:
        """The VAE's and the discriminator's passes: their metrics, and the latents detached."""
        adversarial = (
            self._trains_vae
            and self._discriminator is not None
            and step >= self.config.loss.generator_start
        )
        output = self._encode(inputs)
        metrics: Metrics = {}
        if self._trains_vae:
            metrics |= self._vae_backward(output, inputs, share, generate=adversarial)
        if adversarial:
            metrics |= self._discriminator_backward(output, inputs, share)
        return metrics, output.latents.detach()

    def _encode(self, inputs: Inputs) -> VAEOutput:
        if self._trains_vae:
            with self._precision():
                output: VAEOutput = self._call_vae(inputs.images, inputs.draws.posterior_noise)
            return output
        with torch.no_grad(), self._precision():
            noise = inputs.draws.posterior_noise
            posterior, z = self._frozen_latents(self.networks.vae, inputs.images, noise)
        return VAEOutput(inputs.images, z, posterior)

    def _vae_backward(
        self, output: VAEOutput, inputs: Inputs, share: float, *, generate: bool
    ) -> Metrics:
        weights = self.config.loss
        total, terms = self._vae_losses(
            inputs.images, output, self.networks, weights, generate=generate
        )
        if self.config.uses_alignment and weights.vae_align > 0:
            with self._precision():
                terms["align"] = self._vae_alignment(
                    self.networks.sit, self.path, output.latents, inputs
                )
            total = total + weights.vae_align * terms["align"]
        (total * (self._weight * share)).backward()
        return _named("vae", terms | {"total": total})

    def _discriminator_backward(self, output: VAEOutput, inputs: Inputs, share: float) -> Metrics:
        assert self._discriminator is not None
        fake = output.reconstruction.detach().float()
        loss = self._discriminator_loss(self._discriminator, inputs.images, fake)
        (loss * (self._weight * share)).backward()
        return _named("discriminator", {"total": loss})

    def _sit_backward(
        self, z: Tensor, inputs: Inputs, statistics: LatentStatistics | None, share: float
    ) -> Metrics:
        align = self.config.trains_alignment
        with self._precision():
            terms = sit_losses(
                self.networks.sit,
                self._call_sit,
                self.path,
                z,
                inputs,
                align=align,
                statistics=statistics,
            )
        total = terms["denoise"]
        if align:
            total = total + self.config.loss.sit_align * terms["align"]
        (total * (self._weight * share)).backward()
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
        return torch.autocast(self.processes.device.type, torch.bfloat16)


def _named(network: str, terms: Metrics) -> Metrics:
    return {f"{network}/{name}": value.detach() for name, value in terms.items()}


def _weighted(terms: Sequence[Metrics], shares: Sequence[float]) -> Metrics:
    """Means over the parts of a batch, by their shares of it."""
    if len(terms) == 1:
        return terms[0]
    return {
        name: torch.stack(
            [share * part[name] for part, share in zip(terms, shares, strict=True)]
        ).sum(dim=0)
        for name in terms[0]
    }


def parts_of(count: int, parts: int) -> list[slice]:
    """`count` tiles cut in so many parts, of sizes that differ by one at most.

    Raises `UserError` where there are fewer tiles than parts.
    """
    if parts > count:
        raise UserError(
            f"optim.accumulate={parts}, but a process has {count} tiles of a step: lower it to "
            f"{count}, or raise data.batch_size"
        )
    return [slice(k * count // parts, (k + 1) * count // parts) for k in range(parts)]
