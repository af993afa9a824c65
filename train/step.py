"""One training step of REPA-E: the order of its passes, its updates and its averages.

Source: REPA-E (Leng et al., arXiv 2504.10483, section 3 and its public training script). The
three backward passes run in the order VAE, discriminator, SiT, on the latents and the
reconstruction of one VAE pass, with one t and one noise per sample; then the three updates in the
same order. No pass reads what another's update changes, so updating last equals updating in
between, and lets a step be all or nothing: a non-finite gradient in one network updates none.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from common.errors import UserError
from common.torch_processes import Processes
from model.images import from_uint8
from model.interpolant import Interpolant
from model.latent_norm import LatentStatistics, latent_statistics
from model.vae import VAEOutput
from train.config import Config
from train.losses import (
    Metrics,
    StepInputs,
    discriminator_loss,
    draw_randomness,
    encode_frozen,
    sit_losses,
    vae_alignment,
    vae_losses,
)
from train.networks import Parts
from train.processes import batch_slots, data_parallel, loss_weight
from train.reader import Batch

Encode = Callable[[Tensor], Tensor]
"""Patch tokens [n, t, d] of tiles uint8 [n, px, px, 3]."""


class TrainingStep:
    """Runs steps: owns the order of passes, the updates and the averages.

    With `optim.accumulate` = m a process takes its tiles in m parts, one after the other. Every
    loss is a mean over tiles, and the latent norm takes the statistics of all parts (and
    processes) before the first SiT pass, so that gradients are those of the whole batch. With a
    frozen VAE it takes those that the run began with, which stay as they are. The one
    exception is the discriminator's batch norm: a part is normalised by itself, as a process's
    tiles are without `run.sync_discriminator`, and its running statistics move once per part.

    With `run.compile` each part of the step is a separate graph of fixed shapes: parts of one
    size mean no compilation after the first step (and one where the discriminator begins).

    `encode` computes the patch tokens where they are not read from the cache.
    """

    def __init__(
        self,
        config: Config,
        processes: Processes,
        parts: Parts,
        *,
        encode: Encode | None = None,
    ) -> None:
        self.config, self.processes, self.parts = config, processes, parts
        self.networks, self._encode_tokens = parts.networks, encode
        self.path = Interpolant(config.model.path)
        self._trains_vae = config.mode.trains_vae

        batch_size = config.data.batch_size
        self._weight = loss_weight(processes, batch_size)
        self._parts = parts_of(len(batch_slots(processes, batch_size)), config.optim.accumulate)
        self._sit = data_parallel(processes, self.networks.sit)
        self._vae = data_parallel(processes, self.networks.vae)
        judge = self.networks.discriminator
        self._discriminator = None if judge is None else data_parallel(processes, judge)

        if config.run.recompute and processes.size > 1:
            # PyTorch's cutting of compiled graphs at gradient buckets refuses recomputation.
            torch._dynamo.config.optimize_ddp = False
        self._call_vae = self._compile_call(self._vae)
        self._encode_frozen = self._compile_call(encode_frozen)
        self._call_sit = self._compile_call(self._sit)
        self._vae_losses = self._compile_call(vae_losses)
        self._vae_alignment = self._compile_call(vae_alignment)
        self._discriminator_loss = self._compile_call(discriminator_loss)

    def _compile_call(self, call: Callable[..., Any]) -> Callable[..., Any]:
        backend = self.config.run.compile
        return call if backend == "off" else torch.compile(call, backend=backend, dynamic=False)

    def prepare_inputs(self, batch: Batch) -> StepInputs:
        """The batch on the device, with its randomness: images float32 [n, 3, px, px]."""
        device = self.processes.device

        def move_to_device(values: Tensor | None) -> Tensor | None:
            return None if values is None else values.to(device, non_blocking=True)

        tiles = batch.tiles.to(device, non_blocking=True)
        tokens = move_to_device(batch.tokens)
        if self._encode_tokens is not None:
            # In the parts of the step, since the whole batch may not fit into memory.
            tokens = torch.cat([self._encode_tokens(tiles[places]) for places in self._parts])
        draws = draw_randomness(self.config, batch.step, batch.slots, device)
        return StepInputs(from_uint8(tiles), move_to_device(batch.cls), tokens, draws)

    def __call__(self, batch: Batch, *, stop: bool = False) -> tuple[Metrics, bool, bool]:
        """Train on one batch: its local metrics (0-dim), whether it was skipped as non-finite,
        and whether any process wants to `stop` (exchanged here to spare a second round trip).

        A skipped step leaves weights, moments, averages and statistics as they were.
        """
        # Forward passes move running statistics; a skipped step puts them back.
        moving = (self.networks.sit, self.networks.discriminator)
        buffers = [
            buffer for network in moving if network is not None for buffer in network.buffers()
        ]
        before = [value.clone() for value in buffers]
        metrics = self._compute_gradients(self.prepare_inputs(batch), batch.step)
        norms = self._clip_gradients()

        # The host waits for the device here, once per step.
        bad = ~torch.stack(list(norms.values())).isfinite().all()
        skipped, stopping = self.processes.agree_on_any([bad, stop])
        if skipped:
            torch._foreach_copy_(buffers, before)
        else:
            self._update_networks(batch.step)
        for optimizer in self.parts.optimizers.values():
            optimizer.zero_grad(set_to_none=True)
        return metrics | norms, skipped, stopping

    def _compute_gradients(self, inputs: StepInputs, step: int) -> Metrics:
        """The three backward passes, each over the parts of the batch."""
        total = len(inputs.images)
        shares = [(places.stop - places.start) / total for places in self._parts]
        terms: list[Metrics] = []
        latents: list[Tensor] = []
        for places, share in zip(self._parts, shares, strict=True):
            with self._reduce_gradients(self._vae, self._discriminator, on=places.stop == total):
                metrics, z = self._autoencoder_backward(inputs.select_part(places), step, share)
            terms.append(metrics)
            latents.append(z)

        # Every SiT pass needs the latents' statistics over all parts, so it comes second. Those
        # of a frozen VAE do not move: a batch's own would give a tile another loss in each batch.
        statistics = None if self._trains_vae else self.networks.sit.bn.running_statistics
        if self._trains_vae and len(latents) > 1:
            statistics = latent_statistics(torch.cat(latents))
            self.networks.sit.bn.update(statistics)
        for index, (places, share) in enumerate(zip(self._parts, shares, strict=True)):
            with self._reduce_gradients(self._sit, on=places.stop == total):
                part, z = inputs.select_part(places), latents[index]
                terms[index] |= self._sit_backward(z, part, statistics, share)
        z = torch.cat(latents).float()
        return _weighted_means(terms, shares) | {"latent/mean": z.mean(), "latent/std": z.std()}

    @contextmanager
    def _reduce_gradients(self, *networks: nn.Module | None, on: bool) -> Iterator[None]:
        """Gradients are averaged over processes by the last part's backward pass alone."""
        with ExitStack() as stack:
            for network in networks:
                if isinstance(network, nn.parallel.DistributedDataParallel) and not on:
                    stack.enter_context(network.no_sync())
            yield

    def _autoencoder_backward(
        self, inputs: StepInputs, step: int, share: float
    ) -> tuple[Metrics, Tensor]:
        """The VAE's and the discriminator's passes: their metrics, and the latents detached."""
        if not self._trains_vae:
            with torch.no_grad(), self._autocast():
                noise = inputs.draws.posterior_noise
                _, z = self._encode_frozen(self.networks.vae, inputs.images, noise)
            return {}, z.detach()

        # One pass of the VAE serves its losses, the discriminator and, detached, the SiT.
        adversarial = self._discriminator is not None and step >= self.config.loss.generator_start
        with self._autocast():
            output: VAEOutput = self._call_vae(inputs.images, inputs.draws.posterior_noise)
        metrics = self._vae_backward(output, inputs, share, generate=adversarial)
        if adversarial:
            fake = output.reconstruction.detach().float()
            loss = self._discriminator_loss(self._discriminator, inputs.images, fake)
            (loss * (self._weight * share)).backward()
            metrics |= _with_prefix("discriminator", {"total": loss})
        return metrics, output.latents.detach()

    def _vae_backward(
        self, output: VAEOutput, inputs: StepInputs, share: float, *, generate: bool
    ) -> Metrics:
        weights = self.config.loss
        total, terms = self._vae_losses(
            inputs.images, output, self.networks, weights, generate=generate
        )
        if self.config.uses_loss("vae_align"):
            with self._autocast():
                terms["align"] = self._vae_alignment(
                    self.networks.sit, self.path, output.latents, inputs
                )
            total = total + weights.vae_align * terms["align"]
        # Weighted so that sums over parts and means over processes give the batch's mean.
        (total * (self._weight * share)).backward()
        return _with_prefix("vae", terms | {"total": total})

    def _sit_backward(
        self, z: Tensor, inputs: StepInputs, statistics: LatentStatistics | None, share: float
    ) -> Metrics:
        with self._autocast():
            total, terms = sit_losses(
                self.networks.sit,
                self._call_sit,
                self.path,
                z,
                inputs,
                self.config.loss,
                align=self.config.uses_loss("sit_align"),
                statistics=statistics,
            )
        (total * (self._weight * share)).backward()
        return _with_prefix("sit", terms | {"total": total})

    def _clip_gradients(self) -> Metrics:
        """Gradient norms (0-dim) before clipping, of the networks that have gradients."""
        norms: Metrics = {}
        for name, optimizer in self.parts.optimizers.items():
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            if any(parameter.grad is not None for parameter in parameters):
                clip = self.config.optim.clip
                norms[f"grad_norm/{name}"] = nn.utils.clip_grad_norm_(parameters, clip)
        return norms

    def _update_networks(self, step: int) -> None:
        for optimizer in self.parts.optimizers.values():
            optimizer.step()  # parameters without a gradient stay, moments and all
        self.parts.sit_average.update(self.networks.sit, step)
        if self.parts.vae_average is not None:
            self.parts.vae_average.update(self.networks.vae, step)

    def _autocast(self) -> AbstractContextManager[object]:
        if self.config.run.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.processes.device.type, torch.bfloat16)


def _with_prefix(network: str, terms: Metrics) -> Metrics:
    return {f"{network}/{name}": value.detach() for name, value in terms.items()}


def _weighted_means(terms: Sequence[Metrics], shares: Sequence[float]) -> Metrics:
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

    Example:
        >>> parts_of(5, 2)
        [slice(0, 2, None), slice(2, 5, None)]
    """
    if parts > count:
        raise UserError(
            f"optim.accumulate={parts}, but a process has {count} tiles of a step: lower it to "
            f"{count}, or raise data.batch_size"
        )
    return [slice(index * count // parts, (index + 1) * count // parts) for index in range(parts)]
