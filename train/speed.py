"""What a run reaches of its machine: counted operations, the measured matrix rate, memory.

Operations are those of the mathematics, a multiply-add counted as two: what recomputation, padding
or a slower kernel adds is not counted, so that the share of the matrix rate (MFU) shows what a
step costs more than it must.
"""

import copy
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from model.discriminator import Discriminator
from model.interpolant import Interpolant
from model.latent_norm import LatentStatistics
from model.sit import SiT
from model.vae import VAE
from train.config import Config
from train.losses import (
    Draws,
    Networks,
    StepInputs,
    discriminator_loss,
    sit_losses,
    vae_alignment,
    vae_losses,
)

if TYPE_CHECKING:
    from model.perceptual import PerceptualLoss

_SIDES = {"cuda": 8192, "cpu": 768}  # of the matrix product
_SECONDS = {"cuda": 0.2, "cpu": 0.03}  # so long it is repeated, three times


def step_flop(config: Config, perceptual: "PerceptualLoss | None" = None) -> dict[str, int]:
    """Operations of one tile in a training step, forward and backward: `vae`, `align` (of the
    VAE), `discriminator` and `sit`, those that the configuration runs.

    The step's loss functions run on shapes without values. `perceptual` is the run's LPIPS network.
    The paper's sizes give 2,843 GFLOP in all; an encoder that runs online
    is not counted.
    """
    run, data = replace(config.run, dir="", seed=0), replace(config.data, dataset="")
    return dict(_count_operations(replace(config, run=run, data=data), perceptual))


@lru_cache(maxsize=4)  # counting takes most of a second
def _count_operations(config: Config, perceptual: "PerceptualLoss | None") -> dict[str, int]:
    sit_config, px, path = config.model.sit, config.data.tile_px, Interpolant(config.model.path)
    with torch.device("meta"):
        # The networks, and one tile with its features and randomness, all without values.
        sit, vae = SiT(sit_config), VAE(config.model.vae)
        judge = Discriminator(config.model.discriminator) if config.uses_loss("generator") else None
        lpips = copy.deepcopy(perceptual).to("meta") if perceptual is not None else None
        networks = Networks(sit, vae, judge, lpips)
        z = torch.empty(1, sit_config.latent_channels, *[sit_config.latent_size] * 2)
        tokens = torch.empty(1, sit_config.num_tokens, sit_config.token_dim)
        inputs = StepInputs(
            torch.empty(1, 3, px, px),
            torch.empty(1, sit_config.condition_dim) if config.uses_condition else None,
            tokens if config.uses_alignment else None,
            Draws(torch.empty(1), z.clone(), z.clone(), torch.empty(1, dtype=torch.bool)),
        )
        # Given statistics: those of the batch would ask the other processes.
        statistics = LatentStatistics(sit.bn.running_mean, sit.bn.running_var, torch.empty(()))

        counted: dict[str, Callable[[], Tensor]] = {}
        if config.mode.trains_vae:
            counted["vae"] = lambda: vae_losses(
                inputs.images,
                vae(inputs.images, inputs.draws.posterior_noise),
                networks,
                config.loss,
                generate=judge is not None,
            )[0]
        else:
            vae.requires_grad_(False)
            counted["vae"] = lambda: vae.encode(inputs.images).mean.sum()
        if config.uses_loss("vae_align"):
            latents = z.clone().requires_grad_()
            counted["align"] = lambda: vae_alignment(sit, path, latents, inputs)
        if judge is not None:
            counted["discriminator"] = lambda: discriminator_loss(
                judge, inputs.images, inputs.images
            )
        align = config.uses_loss("sit_align")
        counted["sit"] = lambda: sit_losses(
            sit, sit, path, z, inputs, config.loss, align=align, statistics=statistics
        )[0]

        operations = {}
        for name, loss in counted.items():
            with FlopCounterMode(display=False) as counter:
                value = loss()
                if value.requires_grad:
                    value.backward()
            operations[name] = int(counter.get_total_flops())
        return operations


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large square matrix product on the device, the best of three short rounds.

    On a CPU it is by CPU time and for all of PyTorch's threads: what an idle machine would reach.
    """
    side, seconds = _SIDES[device.type], _SECONDS[device.type]
    a, b = (torch.ones(side, side, device=device, dtype=dtype) for _ in range(2))
    a @ b  # the first product also loads the library
    best = 0.0
    for _ in range(3):
        calls, started = 0, _read_clock(device)
        while (spent := _read_clock(device) - started) < seconds:
            a @ b
            calls += 1
        best = max(best, calls * 2 * side**3 / spent)
    return best


def peak_memory_gb(device: torch.device) -> float:
    """The most memory this process has had at a time, in GB (1e9 bytes): of the GPU, or of the
    machine on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def _read_clock(device: torch.device) -> float:
    if device.type != "cuda":
        return time.process_time() / torch.get_num_threads()
    torch.cuda.synchronize(device)
    return time.perf_counter()
