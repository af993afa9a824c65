"""Processes that end with the one that started them, however that one ends."""

import contextlib
import os
import signal
import stat
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

_VARIABLE = "HISTOGEN_STARTER"
"""The number and inode of the pipe whose end says that the starting process has ended."""
_PATIENCE_S = 30.0


@dataclass(frozen=True)
class Tie:
    """What `subprocess` gives to a child that is to end with this process."""

    handle: int

    def options(self, environ: dict[str, str] | None = None) -> dict[str, Any]:
        """The keywords of `Popen` or `run`; `environ` is this process's by default."""
        # A child may start others, in which that number is another file.
        pipe = f"{self.handle}:{os.fstat(self.handle).st_ino}"
        variables = dict(os.environ if environ is None else environ) | {_VARIABLE: pipe}
        return {"env": variables, "pass_fds": (self.handle,)}


@contextmanager
def tied_children() -> Iterator[Tie]:
    """Children that are started with the tie's options inside the block end with this process.

    By a pipe of which this process alone has the writing end: the kernel closes it, also after
    SIGKILL. The children must enter by `run_door`.
    """
    reading, writing = os.pipe()
    try:
        yield Tie(reading)
    finally:
        os.close(reading)
        os.close(writing)


def follow_starter() -> None:
    """Have this process asked to stop (SIGTERM) once the one that tied it has ended.

    One that has not ended `shutdown_patience` later is ended without being asked.
    """
    number, _, inode = os.environ.pop(_VARIABLE, "").partition(":")
    try:
        handle = int(number)
        found = os.fstat(handle)
        if not stat.S_ISFIFO(found.st_mode) or f"{found.st_ino}" != inode:
            return
        os.set_inheritable(handle, False)
    except (ValueError, OSError, OverflowError):
        return
    threading.Thread(target=_end_with_starter, args=(handle,), daemon=True).start()


def shutdown_patience() -> float:
    """Seconds that processes get to end once they are asked to.

    As for torchrun, whose variable this is: a large checkpoint takes long.
    """
    try:
        return float(os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", _PATIENCE_S))
    except ValueError:
        return _PATIENCE_S


def _end_with_starter(handle: int) -> None:
    while os.read(handle, 1):
        pass
    patience = shutdown_patience()
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(patience)
    if os.environ.get("RANK", "0") == "0":
        line = f"ended: what started this process has ended, and it did not stop in {patience:g} s"
        # The console may be locked by what does not stop.
        with contextlib.suppress(OSError):
            os.write(2, f"{line}\n".encode())
    os._exit(128 + signal.SIGTERM)
