"""The processes that were started for one command, or a single one, and their devices.

They exchange tensors and JSON, never pickles: those run code of whoever reaches a process's port.
"""

import contextlib
import hashlib
import json
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, NoReturn, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

from common.console import (
    EXIT_FAILURES,
    EXIT_USAGE,
    ExplainedExit,
    print_line,
    print_traceback,
    report_error,
    stderr,
    stdout,
)
from common.errors import UserError, describe_machine_error
from common.json_text import parse_json
from common.launch import STORE_VARIABLE

Json: TypeAlias = "bool | int | float | str | Sequence[Json] | Mapping[str, Json] | None"
_CPU = torch.device("cpu")

_LEFT = "histogen/left"
"""The key in the store under which a process that leaves on purpose has its exit status."""
_MOST_MESSAGE_BYTES = 1 << 30
"""Of a JSON value that the main one tells the others; a plan of 100 million images has 20 MB."""
_LOOPBACK = ("127.0.0.1", "localhost", "::1")

_STORE_OUTLIVES_S = 1.0
"""How long the first process stays after its error, if the others' store ends with it."""
_LOST = ("gloo", "Connection closed by peer", "Connection reset by peer")
"""Words in gloo's plain RuntimeErrors when another process has gone."""


class ReportedElsewhereError(Exception):
    """Ends this process of several: the main one reports the mistake."""


@dataclass(frozen=True)
class Processes:
    """This process, number `rank` (from 0 to `size` - 1), and the device that it computes on."""

    rank: int = 0
    size: int = 1
    device: torch.device = _CPU

    @property
    def is_main(self) -> bool:
        """Whether this process prepares the work, writes shared files and reports."""
        return self.rank == 0

    def agree_on_any(self, flags: Sequence[bool | Tensor]) -> list[bool]:
        """Whether each flag (bool or 0-dim tensor) is set on any process; waits for the device."""
        # All flags in one exchange: each costs a round trip.
        values = torch.stack(
            [torch.as_tensor(flag, device=self.device).to(torch.float32) for flag in flags]
        )
        if self.size > 1:
            dist.all_reduce(values, op=dist.ReduceOp.MAX)
        return [value > 0 for value in values.tolist()]

    def sum_values(self, values: Tensor) -> Tensor:
        """The sum over processes, in place; on the CPU for gloo, on `device` for nccl."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def wait_for_all(self) -> None:
        """Wait for all processes."""
        if self.size > 1:
            dist.barrier()

    def on_main(self, work: Callable[[], Json]) -> Any:
        """The JSON value that `work` returns on the main process, on every process.

        The others wait for it, and check what they get. Its `UserError` ends all of them; the
        others raise `ReportedElsewhereError`.
        """
        if self.size == 1:
            return work()
        mistake: UserError | None = None
        message: dict[str, Any] = {}
        if self.is_main:
            try:
                message = {"value": work()}
            except UserError as error:
                mistake = error
            except (OSError, MemoryError) as error:
                if not (text := describe_machine_error(error)):
                    raise
                mistake = UserError(text)
        # An empty message tells of a failure: without one the others would wait for days.
        received = self._tell_all(json.dumps(message).encode())
        if mistake is not None:
            raise mistake
        try:
            message = parse_json(received)
            if not isinstance(message, dict) or not message.keys() <= {"value"}:
                raise ValueError("it is no message of this program")
        except ValueError as error:
            raise _foreign_message(str(error)) from error
        if not message:
            raise ReportedElsewhereError
        return message["value"]

    def _tell_all(self, data: bytes) -> bytes:
        """The main process's bytes, on every process; each gives some."""
        device = self.device if dist.get_backend() == "nccl" else _CPU
        count = torch.tensor([len(data)], device=device)
        dist.broadcast(count, src=0)
        length = int(count.item())
        if not 0 < length <= _MOST_MESSAGE_BYTES:
            raise _foreign_message(f"its length is {length:,} bytes")
        message = torch.empty(length, dtype=torch.uint8, device=device)
        if self.is_main:
            message.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
        dist.broadcast(message, src=0)
        return message.cpu().numpy().tobytes()


def _foreign_message(reason: str) -> UserError:
    return UserError(
        f"a message from process 0 cannot be read ({reason}): start all processes with the same "
        "release, on machines and a network that others do not reach"
    )


ALONE = Processes()
"""A single process on the CPU."""


@contextmanager
def joined_processes(
    device: str,
    *,
    setting: str = "--device ",
    gpu_backend: Literal["gloo", "nccl"] = "gloo",
    patience: timedelta = timedelta(days=7),
) -> Iterator[Processes]:
    """Join the processes that torchrun's environment describes; alone where it describes none.

    `device` and `setting` are those of `choose_device`. Processes on GPUs talk through
    `gpu_backend`, those on CPUs through gloo, and wait `patience` for each other: generating a
    large set takes days. An error inside the block ends one of several processes at once.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    chosen = choose_device(device, int(os.environ.get("LOCAL_RANK", "0")), setting=setting)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if size == 1:
        yield Processes(device=chosen)
        return
    backend = gpu_backend if chosen.type == "cuda" else "gloo"
    # By hand, to keep the store: in it the processes agree on who reports an error.
    store, rank = _open_store(size, patience)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=patience)
    try:
        yield Processes(rank, size, chosen)
    except BaseException as error:
        _exit_at_once(error, store, rank)
    dist.destroy_process_group()


def _keeps_store() -> bool:
    """Whether the store is a server of the first process, which ends with it."""
    return STORE_VARIABLE not in os.environ and "TORCHELASTIC_RUN_ID" not in os.environ


def _open_store(size: int, patience: timedelta) -> tuple[dist.Store, int]:
    """Where the processes find one another, and this one's rank.

    torch.distributed knows no passwords: on one machine its sockets are on loopback, and the store
    is a file of the owner's, or a server on loopback. torchrun's own server is not ours to choose.
    """
    rank, address = int(os.environ.get("RANK", "-1")), os.environ.get("MASTER_ADDR", "")
    path = os.environ.get(STORE_VARIABLE)
    is_local = path or address in _LOOPBACK or os.environ.get("LOCAL_WORLD_SIZE") == str(size)
    if is_local and "lo" in (name for _, name in socket.if_nameindex()):
        # Otherwise gloo listens where the host's name leads, NCCL on all networks.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
    if path:
        store: dist.Store = dist.FileStore(path, size)
        store.set_timeout(patience)
        return store, rank
    if rank == 0 and address in _LOOPBACK and _keeps_store():
        # By itself the store would listen on all networks.
        with socket.create_server(("127.0.0.1", int(os.environ["MASTER_PORT"]))) as server:
            store = dist.TCPStore(
                "127.0.0.1", server.getsockname()[1], size, is_master=True, timeout=patience,
                master_listen_fd=server.detach(),
            )  # fmt: skip
        return store, rank
    store, rank, _ = next(dist.rendezvous("env://", timeout=patience))
    return store, rank


def choose_device(name: str, local_rank: int = 0, *, setting: str = "--device ") -> torch.device:
    """The device for `auto`, `cpu` or `cuda`: GPU `local_rank`, from 0 up, of this machine.

    Raises `UserError` where that GPU is missing; `setting` is how the user chose the device
    (`--device `, `run.device=`).
    """
    available = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "cpu" or (name == "auto" and available == 0):
        return _CPU
    if local_rank >= available:
        raise UserError(
            f"{setting}{name}: process {local_rank} of this machine needs a GPU, but PyTorch "
            f"{torch.__version__} sees {available}: set {setting}cpu, start one process per GPU, "
            "or install a CUDA build of PyTorch with a driver that `nvidia-smi` shows working"
        )
    return torch.device("cuda", local_rank)


def make_sums_independent_of_threads() -> None:
    """Make a CPU's matrix products the same bits for any number of threads.

    torchrun gives each of several processes one thread, a single process has all cores: without
    this a SiT-S/2 in float32 differed between 1 and 2 threads. It is Intel MKL's switch, read at
    its first product, so call this before any; a value the user has set is kept.
    """
    os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute in one thread of a CPU: sums whose order depends on their number are then equal."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _exit_at_once(error: BaseException, store: dist.Store, rank: int) -> NoReturn:
    """Report an error and end at once, so that torchrun ends the other processes.

    To leave the group in order would wait for processes that are themselves waiting for this one.
    The first process reports what several meet alike, and what merely follows from another's end
    is not reported, or it would bury the line that matters.
    """
    status = EXIT_FAILURES
    lost = isinstance(error, RuntimeError) and any(word in str(error) for word in _LOST)
    if isinstance(error, ReportedElsewhereError):
        status = EXIT_USAGE
    elif isinstance(error, SystemExit):
        status = error.code if isinstance(error.code, int) else EXIT_FAILURES
        with contextlib.suppress(RuntimeError):  # the process that kept the store has ended
            store.set(_LEFT, str(status))
        if isinstance(error, ExplainedExit) and _is_first(store, "reported"):
            print_line(error.line)
    elif lost or isinstance(error, dist.DistError):
        if (left := _status_of_others(store)) is not None:
            status = left
        # `common.launch` reports one that was killed; others report themselves.
        elif STORE_VARIABLE not in os.environ and _is_first(store, "reported"):
            reason = str(error).splitlines()[0][-200:]
            stderr.print(f"error: process {rank} lost another process: {reason}")
    else:
        first = _is_first(store, hashlib.sha256(repr(error).encode()).hexdigest())
        _is_first(store, "reported")
        if isinstance(error, UserError | KeyboardInterrupt):
            status = report_error(error) if first else EXIT_USAGE
        elif text := describe_machine_error(error):
            status = report_error(UserError(text)) if first else EXIT_USAGE
        elif first:
            print_traceback(error)
    if rank == 0 and _keeps_store():
        # The others ask it whether they are the first to report what they meet alike.
        time.sleep(_STORE_OUTLIVES_S)
    # What follows flushes nothing by itself.
    for stream in (stdout.file, stderr.file, sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(status)


def _status_of_others(store: dist.Store) -> int | None:
    """The status of a process that left on purpose, None where there is none."""
    try:
        return int(store.get(_LEFT)) if store.check([_LEFT]) else None
    except RuntimeError:  # the process that kept the store has ended
        return None


def _is_first(store: dist.Store, key: str) -> bool:
    """Whether no process has reported the key before; true where the store has gone."""
    try:
        return bool(store.add(f"histogen/{key}", 1) == 1)
    except RuntimeError:  # the process that kept the store has ended
        return True
