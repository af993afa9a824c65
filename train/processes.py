"""Training on several processes: SLURM steps, the share of each in a batch, gradients."""

import inspect
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from common.errors import UserError
from common.torch_processes import Processes, joined_processes
from train.stream import slots_of_rank

_PATIENCE = timedelta(hours=1)
"""How long processes wait for each other: the main one validates, samples and writes alone."""


@contextmanager
def joined_training(device: str) -> Iterator[Processes]:
    """Join the run's processes, of torchrun or of a SLURM step; `device` is auto, cpu or cuda.

    Raises `UserError` for cuda without a usable GPU.
    """
    variables = slurm_variables(os.environ)
    if variables and torch.cuda.device_count() == 1:
        variables["LOCAL_RANK"] = "0"  # srun --gpus-per-task=1 shows each task only its GPU
    os.environ.update(variables)
    with joined_processes(
        device, setting="run.device=", gpu_backend="nccl", patience=_PATIENCE
    ) as processes:
        prepare_device(processes.device)
        yield processes


def prepare_device(device: torch.device) -> None:
    """Let a GPU pick its fastest convolutions and compute float32 products in TF32.

    Shapes never change; LPIPS and the discriminator run in TF32 as in REPA-E's public script.
    Losses and statistics contain neither products nor convolutions and stay float32.
    """
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True
        torch.backends.cudnn.allow_tf32 = True
        torch.set_float32_matmul_precision("high")


def batch_slots(processes: Processes, batch_size: int) -> range:
    """The slots of the global batch that this process trains on.

    Example:
        >>> batch_slots(Processes(rank=1, size=2), batch_size=5)
        range(2, 5)
    """
    if processes.size > batch_size:
        raise UserError(
            f"{processes.size} processes, but data.batch_size is {batch_size}: "
            "start at most one process per tile of the batch"
        )
    return slots_of_rank(processes.rank, processes.size, batch_size)


def loss_weight(processes: Processes, batch_size: int) -> float:
    """n_local R / B, about 1: local means so weighted average over R processes to the batch's."""
    return len(batch_slots(processes, batch_size)) * processes.size / batch_size


def data_parallel(processes: Processes, network: nn.Module) -> nn.Module:
    """The network with gradients averaged over processes; itself in a single process.

    Buffers are not broadcast: the latent norm sees all processes by itself, and the
    discriminator's batch norm is meant to be local.
    """
    if processes.size == 1 or not any(p.requires_grad for p in network.parameters()):
        return network
    # PyTorch 2.13 renamed the option, and warns of the old name. The new one still broadcasts them
    # once, here, where all processes have the same.
    known = inspect.signature(DistributedDataParallel).parameters
    name = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    options: dict[str, Any] = {name: False, "gradient_as_bucket_view": True}
    return DistributedDataParallel(network, **options)


def slurm_variables(environ: Mapping[str, str]) -> dict[str, str]:
    """torchrun's variables for a task of `srun --ntasks=N python -m train`; {} if none apply.

    None apply under torchrun (which sets WORLD_SIZE), outside a step (a batch script that starts
    one process, whatever its job's --ntasks), and in a step of one task. A port that is not set is
    one from 20000 to 39999, by job and step.
    """
    size = environ.get("SLURM_STEP_NUM_TASKS", "1")
    if "WORLD_SIZE" in environ or "SLURM_STEP_ID" not in environ or size == "1":
        return {}
    nodes = environ.get("SLURM_STEP_NODELIST") or environ["SLURM_JOB_NODELIST"]
    is_alone = environ.get("SLURM_STEP_NUM_NODES") == "1"
    # Jobs on one node, and steps of one job, must not meet on a port.
    step = int(environ["SLURM_JOB_ID"]) + 97 * int(environ["SLURM_STEP_ID"])
    return {
        "RANK": environ["SLURM_PROCID"],
        "WORLD_SIZE": size,
        "LOCAL_RANK": environ["SLURM_LOCALID"],
        "MASTER_ADDR": environ.get("MASTER_ADDR", "127.0.0.1" if is_alone else first_host(nodes)),
        "MASTER_PORT": environ.get("MASTER_PORT", str(20000 + step % 20000)),
    }


def first_host(nodes: str) -> str:
    """The first host of a SLURM node list: `gpu03` of `gpu[03-05,09],cpu1`.

    Example:
        >>> first_host("gpu[03-05,09],cpu1")
        'gpu03'
    """
    first = re.split(r",(?![^\[]*\])", nodes)[0]
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first)
