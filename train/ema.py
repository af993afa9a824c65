"""Exponential moving averages of networks, as foreach operations."""

import copy
from typing import Generic, TypeVar

import torch
from torch import nn

Network = TypeVar("Network", bound=nn.Module)


def ema_decay(decay: float, step: int, *, warmup: bool) -> float:
    """The decay at update `step` = 0, 1, ...: d, or min(d, (1 + n) / (10 + n)) with warm-up.

    Without warm-up, 300 steps at 0.9999 leave 97 % of the initial weights in the average.

    Example:
        >>> ema_decay(0.9999, 0, warmup=True), ema_decay(0.9999, 0, warmup=False)
        (0.1, 0.9999)
    """
    return min(decay, (1 + step) / (10 + step)) if warmup else decay


class Ema(Generic[Network]):
    """A network's moving average: parameters and floating-point buffers.

    `decay` is in [0, 1). `module` is a copy in evaluation mode that begins at the network's
    weights; integer buffers (counters) are copied. What does not move has its own value as its
    average, to the last bit. Source: REPA-E's training loop.
    """

    def __init__(self, network: Network, decay: float, *, warmup: bool = False) -> None:
        self.module: Network = copy.deepcopy(network).requires_grad_(False).eval()
        self.decay, self.warmup = decay, warmup

    @torch.no_grad()
    def update(self, network: Network, step: int) -> None:
        """average <- d average + (1 - d) network, with the decay of update `step`, from 0 up."""
        # Floats move in one fused operation; counters have no average and are copied.
        weight = 1 - ema_decay(self.decay, step, warmup=self.warmup)
        averages = dict(self.module.state_dict(keep_vars=True))
        floats, sources = [], []
        for name, value in network.state_dict(keep_vars=True).items():
            if value.is_floating_point():
                floats.append(averages[name].detach())
                sources.append(value.detach())
            else:
                averages[name].copy_(value)
        torch._foreach_lerp_(floats, sources, weight)
