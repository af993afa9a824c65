"""The processes of a run: one a GPU under torchrun, or a single one."""

import hashlib
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from common.console import EXIT_FAILURES, EXIT_USAGE, stderr, stdout, tell
from common.errors import UserError
from train.slurm import slurm_ranks
from train.stream import slots_of_rank

_PATIENCE = timedelta(hours=1)
"""How long processes wait for each other: the main one validates, samples and writes alone."""


_LOST = ("gloo", "Connection closed by peer", "Connection reset by peer")
"""What gloo's errors say, which are plain RuntimeErrors, where another process has gone."""


class ToldElsewhereError(Exception):
    """Ends this process of several: the main one tells of the mistake."""


@dataclass(frozen=True)
class Ranks:
    """This process among the `size` processes of the run, and its device."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this process writes the run directory."""
        return self.rank == 0

    def slots(self, batch_size: int) -> range:
        """The slots of the global batch that this process trains on."""
        if self.size > batch_size:
            raise UserError(
                f"{self.size} processes, but data.batch_size is {batch_size}: "
                "start at most one process a tile of the batch"
            )
        return slots_of_rank(self.rank, self.size, batch_size)

    def loss_weight(self, batch_size: int) -> float:
        """n_local R / B: local mean losses so weighted average over ranks to the global mean."""
        return len(self.slots(batch_size)) * self.size / batch_size

    def parallel(self, network: nn.Module) -> nn.Module:
        """The network with gradients averaged over processes; itself in a single process.

        Buffers are not broadcast: the latent norm sees all ranks by itself, and the
        discriminator's batch norm is meant to be local.
        """
        if self.size == 1 or not any(p.requires_grad for p in network.parameters()):
            return network
        return DistributedDataParallel(
            network, broadcast_buffers=False, gradient_as_bucket_view=True
        )

    def agree(self, flags: Sequence[bool | Tensor]) -> list[bool]:
        """Whether each flag is set on any process; the one point a step where the host waits."""
        values = torch.stack(
            [torch.as_tensor(flag, device=self.device).to(torch.float32) for flag in flags]
        )
        if self.size > 1:
            dist.all_reduce(values, op=dist.ReduceOp.MAX)
        return [value > 0 for value in values.tolist()]

    def total(self, values: Tensor) -> Tensor:
        """The sum over processes."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def from_main(self, number: int) -> int:
        """The main process's number, on every process."""
        value = torch.tensor(number, device=self.device)
        if self.size > 1:
            dist.broadcast(value, src=0)
        return int(value.item())

    def wait(self) -> None:
        """Wait for all processes."""
        if self.size > 1:
            dist.barrier()

    def main_does(self, work: Callable[[], object]) -> None:
        """Have the main process do something while the others wait for it.

        Its `UserError` ends all of them; the others raise `ToldElsewhereError`.
        """
        mistake: UserError | None = None
        if self.is_main:
            try:
                work()
            except UserError as error:
                mistake = error
        failed = self.from_main(int(mistake is not None))
        if mistake is not None:
            raise mistake
        if failed:
            raise ToldElsewhereError


@contextmanager
def joined_ranks(device: str) -> Iterator[Ranks]:
    """Join the run's processes as torchrun's environment says, or srun's; alone without either.

    `device` is auto, cpu or cuda. Raises `UserError` for cuda without a usable GPU. One of several
    processes does not come back from an error inside the block: see `_leave`.
    """
    tasks = slurm_ranks(os.environ)
    if tasks and torch.cuda.device_count() == 1:
        tasks["LOCAL_RANK"] = "0"  # srun --gpus-per-task=1 shows each task its own GPU alone
    os.environ.update(tasks)
    size = int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    chosen = choose_device(device, local_rank)
    if size == 1:
        yield Ranks(0, 1, chosen)
        return
    backend = "nccl" if chosen.type == "cuda" else "gloo"
    store, rank, _ = next(dist.rendezvous("env://", timeout=_PATIENCE))
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=_PATIENCE)
    try:
        yield Ranks(rank, size, chosen)
    except BaseException as error:
        _leave(error, store, rank)
    dist.destroy_process_group()


def _leave(error: BaseException, store: dist.Store, rank: int) -> NoReturn:
    """Tell of an error and end at once, so that torchrun ends the other processes.

    To leave the group in order would wait for processes that are themselves waiting for this one.
    What several meet alike is told by the first, and what merely follows from another's end not
    at all, or it would bury the line that matters.
    """
    status = EXIT_FAILURES
    if isinstance(error, ToldElsewhereError):
        status = EXIT_USAGE
    elif _lost_another(error):
        if _is_first(store, "told"):
            reason = str(error).splitlines()[0][-200:]
            stderr.print(f"error: process {rank} lost another process: {reason}", markup=False)
    else:
        first = _is_first(store, hashlib.sha256(repr(error).encode()).hexdigest())
        _is_first(store, "told")
        if isinstance(error, UserError | KeyboardInterrupt):
            status = tell(error) if first else EXIT_USAGE
        elif first:
            traceback.print_exception(error)
    for stream in (stdout.file, stderr.file, sys.stdout, sys.stderr):
        stream.flush()
    os._exit(status)


def _lost_another(error: BaseException) -> bool:
    said = isinstance(error, RuntimeError) and any(word in str(error) for word in _LOST)
    return said or isinstance(error, dist.DistError)


def _is_first(store: dist.Store, key: str) -> bool:
    """Whether no process has said so of the key before; true where nobody can be asked."""
    try:
        return bool(store.add(f"histogen/{key}", 1) == 1)
    except RuntimeError:  # the process that kept the store has gone
        return True


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """The device for auto, cpu or cuda; raises `UserError` where the GPU asked for is missing."""
    available = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "cpu" or (name == "auto" and available == 0):
        return torch.device("cpu")
    if local_rank >= available:
        raise UserError(
            f"run.device={name}, but PyTorch {torch.__version__} sees {available} CUDA GPUs and "
            f"process {local_rank} of this machine needs one: set run.device=cpu, or install a "
            "CUDA build of PyTorch with a driver that `nvidia-smi` shows working"
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    # Shapes never change; float32 products and convolutions (LPIPS, discriminator) in TF32, as in
    # REPA-E's public script. Losses and statistics hold neither and stay float32.
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = True
    torch.set_float32_matmul_precision("high")
    return device
