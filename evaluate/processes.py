"""The processes of one `torchrun`, or the single process that stands alone."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from common.errors import UserError

_TIMEOUT = timedelta(days=7)
"""Ranks wait for the slowest one at the end: generation of a large set takes days."""


@dataclass(frozen=True)
class Processes:
    """Which process this is, of how many."""

    rank: int
    size: int
    local_rank: int

    @classmethod
    def join(cls) -> "Processes":
        """Join the group that torchrun's environment names; alone where there is none."""
        size = int(os.environ.get("WORLD_SIZE", "1"))
        rank = int(os.environ.get("RANK", "0"))
        if size > 1:
            dist.init_process_group("gloo", timeout=_TIMEOUT)
        return cls(rank, size, int(os.environ.get("LOCAL_RANK", "0")))

    @property
    def is_first(self) -> bool:
        """Whether this process prepares the work and speaks to the person."""
        return self.rank == 0

    def agree(self, prepare: Callable[[], list[tuple[int, ...]]]) -> list[tuple[int, ...]]:
        """Rank 0's rows of integers, for every rank.

        Where `prepare` fails on rank 0 it raises there, and the other ranks exit silently with
        status 2, so that one message is seen and not one a process.
        """
        if self.size == 1:
            return prepare()
        rows: list[tuple[int, ...]] = []
        failure: Exception | None = None
        if self.is_first:
            try:
                rows = prepare()
            except Exception as error:
                failure = error
        shape = torch.tensor([-1 if failure else len(rows), len(rows[0]) if rows else 0])
        dist.broadcast(shape, 0)
        if failure is not None:
            raise failure
        count, width = (int(value) for value in shape)
        if count < 0:
            sys.exit(2)
        table = torch.empty(count, width, dtype=torch.int64)
        if rows:
            table = torch.tensor(rows, dtype=torch.int64)
        dist.broadcast(table, 0)
        return [tuple(row) for row in table.tolist()]

    def total(self, *values: int) -> list[int]:
        """Sums over all ranks; returns when every rank has come this far."""
        if self.size == 1:
            return list(values)
        sums = torch.tensor(values, dtype=torch.int64)
        dist.all_reduce(sums)
        return [int(value) for value in sums]

    def leave(self) -> None:
        """Leave the group."""
        if self.size > 1 and dist.is_initialized():
            dist.destroy_process_group()


def same_sums_for_any_threads() -> None:
    """Let a CPU's matrix products be the same bits for any number of threads.

    torchrun gives each of several processes one thread, a lone process has all cores: without
    this a SiT-S/2 in float32 differed between 1 and 2 threads. It is Intel MKL's own switch, read
    at its first product, so it is called before any; a setting that stands is kept.
    """
    os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")


@contextmanager
def joined_processes() -> Iterator[Processes]:
    """The processes of this run; the group is left whatever happens."""
    processes = Processes.join()
    try:
        yield processes
    finally:
        processes.leave()


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """The device for `auto`, `cpu` or `cuda`; one GPU a local rank.

    Raises `UserError` where CUDA was asked for and is not there.
    """
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError("--device cuda: no CUDA device is visible here; use --device cpu or auto")
    if local_rank >= torch.cuda.device_count():
        raise UserError(
            f"process {local_rank} of this node has no GPU of its own: {torch.cuda.device_count()} "
            "visible; start as many processes as GPUs (torchrun --nproc-per-node)"
        )
    return torch.device("cuda", local_rank)
