"""Normalisation of the VAE's latents: a BatchNorm without affine parameters, inside the SiT.

Source: REPA-E (Leng et al., arXiv 2504.10483, section 3.3). While the VAE trains, its latents
move; the running statistics follow them and take the place of a fixed latent scale.
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn


class LatentStatistics(NamedTuple):
    """Moments of a batch of latents over batch and space: mean [C], biased variance [C], number
    of values per channel [] (float64)."""

    mean: Tensor
    variance: Tensor
    num_values: Tensor


class _SumOverProcesses(torch.autograd.Function):
    """Sum of a tensor over all processes; its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        total = gradient.clone()
        dist.all_reduce(total)
        return total


def latent_statistics(z: Tensor) -> LatentStatistics:
    """Moments of latents z [B, C, H, W] over the batches of all processes, in float32.

    Batches of the processes may differ in size: each counts by its number of values. Gradients
    flow through the moments, across processes too.
    """
    local_variance, local_mean = torch.var_mean(z.float(), dim=(0, 2, 3), correction=0)
    count = torch.full_like(local_mean, z.numel() // z.shape[1], dtype=torch.float64)
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return LatentStatistics(local_mean, local_variance, count[0])
    # The raw second moment cancels when mean >> std, so the C-vectors travel in float64.
    mean, variance = local_mean.double(), local_variance.double()
    moments = torch.stack([count, count * mean, count * (variance + mean.square())])
    total, first, second = _SumOverProcesses.apply(moments).unbind()
    mean = first / total
    variance = second / total - mean.square()
    return LatentStatistics(mean.float(), variance.clamp(min=0).float(), total[0])


class LatentNorm(nn.Module):
    """BatchNorm of latents [B, C, H, W] without affine parameters: eps 1e-4, momentum 0.1.

    Buffers `running_mean` [C] (starts at 0), `running_var` [C] (unbiased, starts at 1) and
    `num_batches_tracked` [] are those of `torch.nn.BatchNorm2d`, so its state loads here.
    In training mode the batch's statistics, over all processes, normalise and move the running
    ones; in evaluation mode the running ones normalise and do not move.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(self, channels: int, *, eps: float = 1e-4, momentum: float = 0.1) -> None:
        super().__init__()
        self.eps = eps
        self.momentum = momentum
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self.register_buffer("num_batches_tracked", torch.tensor(0, dtype=torch.long))

    def forward(self, z: Tensor) -> Tensor:
        """`normalise(z)` of latents [B, C, H, W] in the module's mode."""
        return self.normalise(z)

    def normalise(self, z: Tensor, *, use_batch: bool | None = None) -> Tensor:
        """Normalise raw latents z [B, C, H, W] to float32 of mean 0 and variance 1 per channel.

        `use_batch` chooses between the batch's statistics (and moving the running ones) and the
        running ones, and defaults to the module's mode: REPA-E's alignment pass and its SiT pass
        differ in this alone, and an argument spares a compiled step the change of mode.
        A step of several micro-batches takes `latent_statistics` of all its latents, calls
        `update` once and `normalise_with` for each.
        """
        if not (self.training if use_batch is None else use_batch):
            return self.normalise_with(z, self.running_mean, self.running_var)
        statistics = latent_statistics(z)
        self.update(statistics)
        return self.normalise_with(z, statistics.mean, statistics.variance)

    @property
    def running_statistics(self) -> LatentStatistics:
        """The running ones for `normalise_with`, of a number of values that is not known (NaN).

        A step on a frozen VAE takes them: its latents do not move.
        """
        unknown = self.running_mean.new_full((), float("nan"), dtype=torch.float64)
        return LatentStatistics(self.running_mean, self.running_var, unknown)

    def normalise_with(self, z: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
        """(z - mean) / sqrt(variance + eps) in float32; z [B, C, H, W], mean and variance [C]."""
        inverse_std = torch.rsqrt(variance.float() + self.eps)
        return (z.float() - _per_channel(mean.float())) * _per_channel(inverse_std)

    @torch.no_grad()
    def update(self, statistics: LatentStatistics) -> None:
        """Move the running statistics towards a batch's by the momentum, variance unbiased."""
        unbias = statistics.num_values / (statistics.num_values - 1).clamp(min=1)
        dtype = self.running_mean.dtype
        self.running_mean.lerp_(statistics.mean.to(dtype), self.momentum)
        self.running_var.lerp_((statistics.variance * unbias).to(dtype), self.momentum)
        self.num_batches_tracked.add_(1)

    def denormalise(self, x: Tensor) -> Tensor:
        """Raw latents, float32, of normalised x [B, C, H, W]: x sqrt(running_var) + running_mean.

        Without eps, as in REPA-E's sampler.
        """
        std = self.running_var.float().sqrt()
        return x.float() * _per_channel(std) + _per_channel(self.running_mean.float())


def _per_channel(values: Tensor) -> Tensor:
    return values[:, None, None]
