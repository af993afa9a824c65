"""One training in a run directory: the main process holds RUN/.lock while it lives."""

import errno
import fcntl
import json
import os
import socket
import time
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from common.console import say
from common.errors import UserError

LOCK_FILE = ".lock"
_HERE_S = 10.0
_ELSEWHERE_S = 120.0
"""How long to wait for a holder that may be dying: on this machine, and on another, whose lock an
NFS server keeps for its lease (90 s) after the machine was lost and the job put back."""
_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)


class RunLock:
    """The lock of a run directory, let go of when the `with` block or the process ends.

    The kernel holds it, not the file's presence: a killed run leaves nothing to clear away.
    """

    def __init__(self, run_dir: Path) -> None:
        self.path = run_dir / LOCK_FILE
        self._file: IO[str] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._file is not None:
            self._file.close()

    def take(self) -> None:
        """Hold the lock; raises `UserError` naming the process that does."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("a+", encoding="utf-8")
        except OSError as error:
            raise UserError(f"cannot write {self.path}: {error.strerror}") from error
        started, told = time.monotonic(), False
        while not self._try():
            holder = _holder(self.path)
            here = holder.get("host") == socket.gethostname()
            if time.monotonic() - started >= (_HERE_S if here else _ELSEWHERE_S):
                raise UserError(
                    f"{self.path.parent} is being trained by {_named(holder)}: wait for that, stop "
                    "it, or use another run.dir"
                )
            if not told:
                say(f"waiting for {_named(holder)} to let go of {self.path.parent}")
                told = True
            time.sleep(0.2)

    def _try(self) -> bool:
        assert self._file is not None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise UserError(f"cannot lock {self.path}: {error.strerror}") from error
            say(f"warning: no locks at {self.path}: never start a second training there")
            return True
        holder = {"host": socket.gethostname(), "pid": os.getpid()}
        if job := os.environ.get("SLURM_JOB_ID"):
            holder["job"] = job
        self._file.truncate(0)
        self._file.write(json.dumps(holder) + "\n")
        self._file.flush()
        return True


def _holder(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _named(holder: dict[str, Any]) -> str:
    name = f"process {holder.get('pid', '?')} on {holder.get('host', 'an unknown machine')}"
    return name + (f" (SLURM job {holder['job']})" if "job" in holder else "")
