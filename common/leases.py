"""Leases: who holds something says so by renewing a file, for as long as he lives.

Process ids say nothing to another machine or container, and clocks of machines are not compared: a
lease's age is by the clock of the server that has its file, which also stamps the judge's own file.
"""

import errno
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

from common.files import make_directory, open_regular
from common.processes import ProcessIdentity, identify_process

RENEW_S = 20.0
DEAD_S = 300.0
"""A holder elsewhere that has not renewed its lease for so long is dead: 15 renewals."""
_MOST_BYTES = 4096
_MOST_CLEARED = 20


class Lease:
    """A file that names this process, renewed every 20 s by a thread until `end`.

    A lease that cannot be written stops nothing: what its holder does is then judged by its age.
    One that is `shared` by all who want the same thing may be another's after this process was
    stopped for so long that it counted as dead: `is_lost` then, and left alone.
    """

    def __init__(self, path: Path, *, shared: bool = False) -> None:
        self.path, self._shared = path, shared
        self._ended = threading.Event()
        self._write()
        self._thread = threading.Thread(target=self._renew_often, daemon=True)
        self._thread.start()

    def end(self) -> None:
        """Stop renewing and remove the file."""
        self._ended.set()
        self._thread.join()
        if not self.is_lost():
            with suppress(OSError):
                self.path.unlink()

    def is_lost(self) -> bool:
        """Whether a shared lease names another process, or none."""
        if not self._shared or not self._was_written:
            return False
        if (holder := read_holder(self.path)) is not None:
            return holder != identify_process()
        try:
            self.path.lstat()
        except FileNotFoundError:
            return True
        except OSError:  # the file server may be away for a moment
            return False
        return False

    def _write(self) -> None:
        self._was_written = False
        with suppress(OSError):
            make_directory(self.path.parent)
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_NONBLOCK
            handle = os.open(self.path, flags, 0o666)
            try:
                os.write(handle, identify_process().to_json().encode())
                self._was_written = True
            finally:
                os.close(handle)

    def _renew_often(self) -> None:
        while not self._ended.wait(RENEW_S):
            if self.is_lost():
                return
            try:
                # The server's time, at once, and without taking space on a full disk.
                os.utime(self.path, follow_symlinks=False)
            except FileNotFoundError:
                # Removed while we were stopped, by one who took us for dead: we are not.
                self._write()
            except OSError:
                continue


def clear_leases(paths: Iterable[Path], own: Path) -> None:
    """Remove leases of which nobody asks any more: dead, and not renewed for 300 s.

    `own` is a lease that was just written: its time is the server's.
    """
    try:
        now = own.stat().st_mtime
    except OSError:
        return
    # A thousand elements of a job array begin at once: each looks at a few.
    for path in sorted(paths)[:_MOST_CLEARED]:
        with suppress(OSError):
            is_old = now - path.lstat().st_mtime >= DEAD_S
            if is_old and not is_lease_alive(path, lambda: now):
                path.unlink()


def read_holder(path: Path) -> ProcessIdentity | None:
    """The process that a lease or lock file names, None where there is none to be read."""
    try:
        with open_regular(path) as file:
            return ProcessIdentity.from_json(file.read(_MOST_BYTES).decode(errors="replace"))
    except OSError:
        return None


def is_lease_alive(path: Path, server_time: Callable[[], float | None]) -> bool:
    """Whether the holder of a lease may live; `server_time` is asked where its process is not seen.

    A process of this machine and container decides at once, also one that is stopped. Of others the
    lease must have been renewed within 300 s; where the server's time is unknown they may live.
    """
    holder = read_holder(path)
    if holder and (alive := holder.is_alive()) is not None:
        return alive
    try:
        # Opened, for a network file system may answer a mere stat from memory.
        with open_regular(path) as file:
            renewed = os.fstat(file.fileno()).st_mtime
    except FileNotFoundError:
        return False
    except OSError:
        return True
    now = server_time()
    return now is None or now - renewed < DEAD_S


def file_server_time(folder: Path) -> float | None:
    """Seconds since the epoch by the clock that stamps files in a folder.

    Where nobody may write it is this machine's, for want of a better one; None where it cannot be
    known, as on a full disk. A file is made, without a name if the file system can do that.
    """
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            return os.fstat(file.fileno()).st_mtime
    except OSError as error:
        is_closed = error.errno in (errno.EACCES, errno.EPERM, errno.EROFS)
        return time.time() if is_closed else None
