"""Where the `cache` stage computes: what `--device` means, and which GPU a worker takes."""

import os
import socket
from collections.abc import Sequence
from functools import lru_cache
from itertools import product

from common.errors import UserError
from pipeline.run.tasks import UnfitWorkerError, report_note
from pipeline.run.workers import EngineConfig

_MOST_SHARES = 64
"""Workers that may share one GPU and still be counted."""

_claims: list[socket.socket] = []
"""What this process has claimed, held open until it ends."""


def stage_device(device: str, engine: EngineConfig) -> str:
    """What `--device` means for a stage: `cuda`, `cpu`, or `auto` where only workers can see.

    This machine's CUDA counts only where the workers are here: a login node has none. Jobs that
    request GPUs are to compute on them. Raises `UserError` for a local `cuda` that is missing.
    """
    # A running scheduler's workers are elsewhere: they see what this machine cannot.
    if device == "cpu" or engine.scheduler:
        return device
    if engine.cluster:
        return "cuda" if device == "cuda" or engine.cluster.asks_for_gpus else "auto"
    if _has_cuda():
        return "cuda"
    if device == "cuda":
        raise UserError("--device cuda: no CUDA device here; use --device cpu, or a GPU node")
    return "cpu"


def gpu_count() -> int:
    """GPUs that this process may use: from 0 up."""
    import torch

    return torch.cuda.device_count()


@lru_cache(maxsize=1)
def worker_device(device: str) -> str:
    """The device of this worker process, for as long as it lives.

    Workers of one host take different GPUs while there are any. Where this host shows none,
    `cuda` raises `UnfitWorkerError`, and `auto` takes the CPU and reports it.
    """
    if device == "cpu":
        return "cpu"
    import torch

    if _has_cuda():
        gpus = [torch.cuda.get_device_properties(index).uuid for index in range(gpu_count())]
        return f"cuda:{claim_gpu([str(uuid) for uuid in gpus])}"
    if device == "cuda":
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "not set")
        raise UnfitWorkerError(
            f"no CUDA device for the worker on {socket.gethostname()} (PyTorch "
            f"{torch.__version__}, CUDA_VISIBLE_DEVICES: {visible}): its job must request a GPU, "
            "its node have a driver that `nvidia-smi` shows working; or use --device cpu"
        )
    report_note(f"cache: the worker on {socket.gethostname()} sees no CUDA device, uses its CPU")
    return "cpu"


def claim_gpu(gpus: Sequence[str]) -> int:
    """Index, from 0 up, of the GPU with the fewest claims, of those that this process sees (UUIDs).

    Not by the worker's name: dask-jobqueue's end in the worker's number within its job, or in
    the job's where a job has one worker, others choose their own, and jobs that share a node may
    see the same GPUs in another order. The claim is an abstract Unix socket: the kernel gives a
    name to one process of the host, and takes it back however the process ends.
    """
    for share, (index, gpu) in product(range(_MOST_SHARES), enumerate(gpus)):
        claim = socket.socket(socket.AF_UNIX)
        try:
            claim.bind(f"\0histogen/{gpu}/{share}")
        except OSError:
            claim.close()
            continue
        _claims.append(claim)
        return index
    return 0


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()
