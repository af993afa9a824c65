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

    `module` is a copy in evaluation mode that begins at the network's weights. Integer buffers
    (counters) are copied, and with `copy_buffers` all: statistics of what does not move need no
    average over tens of thousands of steps. Source: REPA-E's training loop.
    """

    def __init__(
        self, network: Network, decay: float, *, warmup: bool = False, copy_buffers: bool = False
    ) -> None:
        self.module: Network = copy.deepcopy(network).requires_grad_(False).eval()
        self.decay, self.warmup = decay, warmup
        self._copied = {name for name, _ in network.named_buffers()} if copy_buffers else set()

    @torch.no_grad()
    def update(self, network: Network, step: int) -> None:
        """average <- d average + (1 - d) network, with the decay of that update."""
        # Floats move in one fused operation; counters have no average and are copied.
        weight = 1 - ema_decay(self.decay, step, warmup=self.warmup)
        averages = dict(self.module.state_dict(keep_vars=True))
        floats, sources = [], []
        for name, value in network.state_dict(keep_vars=True).items():
            if value.is_floating_point() and name not in self._copied:
                floats.append(averages[name].detach())
                sources.append(value.detach())
            else:
                averages[name].copy_(value)
        torch._foreach_lerp_(floats, sources, weight)
