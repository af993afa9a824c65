"""A lock file that works on network file systems; a killed holder does not block it for long."""

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from common.console import print_line
from common.errors import UserError
from common.processes import ProcessIdentity, identify_process

RENEW_S = 10.0
"""A holder renews its lock this often, for as long as it holds it."""
STALE_S = 60.0
"""A holder elsewhere that has not renewed its lock for so long was killed, or lost the machine."""
PATIENCE_S = 600.0
"""How long to wait for one and the same holder that lives."""
_MENTION_S = 3.0
_LOOK_S = 0.05
_MOST_BYTES = 4096


@dataclass(frozen=True)
class _Sight:
    """What a waiter sees of a lock: its file, when that was renewed, and who wrote it."""

    inode: int
    renewed_ns: int
    holder: str

    @property
    def name(self) -> str:
        """What tells this lock at this moment from every other one."""
        return f"{self.inode:x}-{self.renewed_ns:x}"

    def describe_holder(self) -> str:
        """The holder in words."""
        process = ProcessIdentity.from_json(self.holder)
        return f" by process {process.pid} on {process.host}" if process else " by others"


class _Watch:
    """For how long a waiter has seen each lock unchanged, by the waiter's own clock."""

    def __init__(self) -> None:
        self._seen: dict[Path, tuple[_Sight, float]] = {}

    def is_dead(self, path: Path, sight: _Sight) -> bool:
        """Whether the holder of a lock, as it is seen now, is dead."""
        now = time.monotonic()
        if path not in self._seen or self._seen[path][0] != sight:
            self._seen[path] = (sight, now)
        process = ProcessIdentity.from_json(sight.holder)
        is_alive = process.is_alive() if process else None
        return now - self._seen[path][1] > STALE_S if is_alive is None else not is_alive


class HeldLock:
    """A lock that is held; ask `is_held` before what must not be done by two at once."""

    def __init__(self, path: Path, handle: int) -> None:
        self._path, self._handle = path, handle
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._renew_often, daemon=True)
        self._thread.start()

    def is_held(self) -> bool:
        """Renew the lock; False where it is another's by now.

        A holder on another machine or in another container that is stopped (SIGSTOP, a suspended
        job) for 60 s loses its lock.
        """
        try:
            # The server's clock, at once, and without taking space on a full disk. By the open
            # file: where another removed it this must not renew its successor.
            os.utime(self._handle)
            return _is_file_of(self._handle, self._path)
        except OSError:
            return False

    def release(self) -> None:
        """Stop renewing, and remove the lock unless it is another's."""
        self._ended.set()
        self._thread.join()
        if self.is_held():
            # Where it cannot be removed the next one breaks it: we are gone by then.
            with suppress(OSError):
                self._path.unlink()
        os.close(self._handle)

    def _renew_often(self) -> None:
        while not self._ended.wait(RENEW_S):
            with suppress(OSError):
                os.utime(self._handle)


@contextmanager
def hold_lock(path: Path, waiting: str = "") -> Iterator[HeldLock]:
    """Hold `path`, which must not be there, as a lock; made with O_EXCL and renewed every 10 s.

    A lock is broken where its holder was a process of this machine and container that is gone, and
    where a waiter sees it not renewed for 60 s by the waiter's clock; a holder that the waiter can
    see alive keeps it, however slow or stopped it is. Clocks of other machines and process ids of
    other containers are not trusted. After three seconds of waiting one line says so, and who
    holds it; `waiting` is how that line begins. Raises `UserError` where it cannot be made, or
    stays held by one other for 600 s.
    """
    if path.parent.is_symlink():
        raise UserError(f"cannot lock {path}: {path.parent} is a link; put a folder in its place")
    lock = HeldLock(path, _acquire_lock(path, waiting or f"waiting for {path}"))
    try:
        yield lock
    finally:
        lock.release()


def _acquire_lock(path: Path, waiting: str) -> int:
    """The open file of the lock, which is ours now."""
    began, watch = time.monotonic(), _Watch()
    seen: _Sight | None = None
    is_mentioned = False
    while (handle := _create_lock(path)) is None:
        now, sight = time.monotonic(), _look_at(path)
        if sight is not None:
            if seen is not None and sight.holder != seen.holder:
                began = now
            seen = sight
            if watch.is_dead(path, sight):
                _break_lock(path, sight, watch)
        holder = sight.describe_holder() if sight else " by others"
        if now - began > PATIENCE_S:
            raise UserError(
                f"{path} is held{holder} for {PATIENCE_S:.0f} s: if no stage runs on the dataset, "
                "remove it"
            )
        if now - began > _MENTION_S and not is_mentioned:
            print_line(f"{waiting}, held{holder}")
            is_mentioned = True
        time.sleep(_LOOK_S)
    return handle


def _create_lock(path: Path) -> int | None:
    """The open file of a lock that was made; None where there is one already."""
    try:
        with suppress(FileExistsError):  # by a file, which opening tells from a lock that is held
            path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    except FileExistsError:
        return None
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror}; free space or fix the folder's permissions"
        ) from error
    # Without its holder's name, as on a full disk, it is a lock all the same.
    with suppress(OSError):
        os.write(handle, identify_process().to_json().encode())
        # A network file system shows others what was written when a file is closed, and any of its
        # handles will do.
        os.close(os.dup(handle))
    return handle


def _look_at(path: Path) -> _Sight | None:
    """The lock as it is now, None where there is none."""
    holder = ""
    try:
        # Opened, for a network file system may answer a mere stat from memory.
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except PermissionError:
        with suppress(OSError):
            stat = path.stat()
            return _Sight(stat.st_ino, stat.st_mtime_ns, holder)
        return None
    except OSError:
        return None
    try:
        stat = os.fstat(handle)
        with suppress(OSError):
            holder = os.read(handle, _MOST_BYTES).decode(errors="replace")
        return _Sight(stat.st_ino, stat.st_mtime_ns, holder)
    except OSError:
        return None
    finally:
        os.close(handle)


def _break_lock(path: Path, sight: _Sight, watch: _Watch) -> None:
    """Remove a dead holder's lock, and never its successor's.

    Of several waiters only the one that makes the file named after that very lock may remove it,
    and only after it has looked again. That file is a lock, too: where who made it was killed, it
    is broken as any other.
    """
    right = path.with_name(f"{path.name}.{sight.name}")
    handle = _create_lock(right)
    if handle is None:
        other = _look_at(right)
        if other is not None and watch.is_dead(right, other):
            _break_lock(right, other, watch)
        return
    try:
        # Where another user's may not be removed, the waiter's patience ends with a message.
        with suppress(OSError):
            if _look_at(path) == sight and _is_file_of(handle, right):
                path.unlink()
            if _is_file_of(handle, right):
                right.unlink()
    finally:
        os.close(handle)


def _is_file_of(handle: int, path: Path) -> bool:
    """Whether an open file is the one that has this name; raises `OSError` where none has it."""
    return os.path.samestat(os.fstat(handle), path.stat())
