"""One training per run directory: the main process holds a lock on RUN/.lock while it lives."""

import contextlib
import errno
import fcntl
import json
import os
import time
from pathlib import Path
from typing import IO, Self

from common import leases
from common.console import print_line
from common.errors import UserError
from common.json_text import read_json
from common.leases import Lease, file_server_time, is_lease_alive, read_holder
from common.processes import identify_process
from pipeline.dataset.lock import hold_lock

LOCK_FILE, LEASE_FILE = ".lock", ".lease"
_HERE_S = 10.0
_ELSEWHERE_S = 120.0
"""How long to wait for a holder that may be dying: on this machine, and on another, whose lock an
NFS server keeps for its lease (90 s) after the machine was lost and the job put back."""
_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)


class RunLock:
    """The lock of a run directory, released when the `with` block or the process ends.

    The kernel holds it, not the file's presence: a killed run leaves nothing to clear away. On a
    file system that has no locks a lease that is renewed takes its place (`common.leases`).
    """

    def __init__(self, run_dir: Path) -> None:
        self.path = run_dir / LOCK_FILE
        self._file: IO[str] | None = None
        self._lease: Lease | None = None
        self._has_locks = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._lease is not None:
            self._lease.end()
        if self._file is not None:
            self._file.close()

    def acquire(self) -> None:
        """Acquire the lock, waiting 10 s for a holder on this machine and 120 s for one elsewhere.

        Where leases take the place of locks, one that is not seen from here is waited for until its
        lease would have run out, 300 s.
        Raises `UserError` naming the process that still has it.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # To append, since opening must not erase the holder's name.
            self._file = self.path.open("a+", encoding="utf-8")
        except OSError as error:
            raise UserError(f"cannot write {self.path}: {error.strerror}") from error
        started, reported = time.monotonic(), False
        while not self._try_lock(self._file):
            holder, is_here = self._describe_holder()
            if time.monotonic() - started >= self._patience(is_here):
                raise UserError(
                    f"{self.path.parent} is being trained by {holder}: wait for that, stop it, or "
                    "use another run.dir"
                )
            if not reported:
                print_line(f"waiting for {holder} to release {self.path.parent}")
                reported = True
            time.sleep(0.2)

    def require(self) -> None:
        """Raise `UserError` where another training has taken over the run directory.

        That is where leases take the place of locks, and this process was stopped for 300 s.
        """
        if self._lease is not None and self._lease.is_lost():
            holder, _ = self._describe_holder()
            raise UserError(
                f"{self.path.parent} was taken over by {holder} while this process was stopped or "
                "its file system was away: ended without writing"
            )

    def _try_lock(self, file: IO[str]) -> bool:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise UserError(f"cannot lock {self.path}: {error.strerror}") from error
            self._has_locks = False
            if not self._try_lease():
                return False
        # Only for messages and patience: the lock decides, not what is written here.
        here = identify_process()
        holder: dict[str, object] = {"host": here.host, "pid": here.pid, "boot": here.boot}
        if job := os.environ.get("SLURM_JOB_ID"):
            holder["job"] = job
        with contextlib.suppress(OSError):  # a full disk is met where something matters
            file.truncate(0)
            os.write(file.fileno(), f"{json.dumps(holder)}\n".encode())
        return True

    def _try_lease(self) -> bool:
        """Take the run directory's lease, unless its holder may live."""
        path = self.path.with_name(LEASE_FILE)
        with hold_lock(path.with_name(f"{LEASE_FILE}.lock")):
            if path.exists() and is_lease_alive(path, lambda: file_server_time(path.parent)):
                return False
            self._lease = Lease(path, shared=True)
            if read_holder(path) != identify_process():
                # Elsewhere a lease is only for judging; here it is all that keeps a second one out.
                raise UserError(f"cannot write {path}: free space or fix the folder's permissions")
        return True

    def _patience(self, is_here: bool) -> float:
        """Seconds to wait for the holder."""
        if not self._has_locks:
            holder = read_holder(self.path.with_name(LEASE_FILE))
            return _HERE_S if holder and holder.is_alive() else leases.DEAD_S
        return _HERE_S if is_here else _ELSEWHERE_S

    def _describe_holder(self) -> tuple[str, bool]:
        """The process that has the lock, in words, and whether it is on this machine."""
        # A holder that is just starting may not have written its name yet.
        try:
            holder = read_json(self.path)
        except (OSError, ValueError):
            holder = {}
        if not isinstance(holder, dict):
            holder = {}
        name = f"process {holder.get('pid', '?')} on {holder.get('host', 'an unknown machine')}"
        name += f" (SLURM job {holder['job']})" if "job" in holder else ""
        # By the boot where it is known: containers of two machines may have one name.
        here = identify_process()
        if here.boot and holder.get("boot"):
            return name, holder["boot"] == here.boot
        return name, holder.get("host") == here.host
