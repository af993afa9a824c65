"""A lock file that works on network file systems; a killed holder blocks it for a minute."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from common.errors import UserError

STALE_S = 60.0
"""A holder writes one small file: who has not let go after so long was killed."""
PATIENCE_S = 600.0
_LOOK_S = 0.05


@contextmanager
def hold_lock(path: Path) -> Iterator[None]:
    """Hold `path`, which must not be there, as a lock; made with O_EXCL.

    A lock that a waiter sees unchanged for 60 s by the waiter's clock is broken: neither the clocks
    of other machines nor process ids, which each container numbers anew, are trusted. Raises
    `UserError` where it cannot be made, or stays held by others for 600 s.
    """
    if path.parent.is_symlink():
        raise UserError(f"cannot lock {path}: {path.parent} is a link; put a folder in its place")
    _acquire_lock(path)
    # A lock that was broken meanwhile is another's now, and must not be removed.
    mine = _holder_text(path)
    try:
        yield
    finally:
        if _holder_text(path) == mine:
            path.unlink(missing_ok=True)


def _acquire_lock(path: Path) -> None:
    began = since = time.monotonic()
    seen = ""
    while not _create_lock(path):
        now, holder = time.monotonic(), _holder_text(path)
        if holder != seen:
            seen, since = holder, now
        elif holder and now - since > STALE_S:
            _break_lock(path, holder)
        if now - began > PATIENCE_S:
            raise UserError(
                f"{path} is held by others for {PATIENCE_S:.0f} s: if no stage runs on the "
                "dataset, remove it"
            )
        time.sleep(_LOOK_S)


def _create_lock(path: Path) -> bool:
    try:
        with suppress(FileExistsError):  # by a file, which opening tells from a lock that is held
            path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    except FileExistsError:
        return False
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror}; free space or fix the folder's permissions"
        ) from error
    return True


def _holder_text(path: Path) -> str:
    """What tells one holder's lock from the next one's; "" where there is none."""
    try:
        # Opened, for a network file system may answer a mere stat from memory.
        handle = os.open(path, os.O_RDONLY)
    except OSError:
        return ""
    try:
        stat = os.fstat(handle)
    except OSError:
        return ""
    finally:
        os.close(handle)
    return f"{stat.st_ino:x}-{stat.st_mtime_ns:x}"


def _break_lock(path: Path, holder: str) -> None:
    """Remove a dead holder's lock, and never its successor's.

    Of several waiters only the one that makes the file named after that very lock may remove it,
    and only after it has looked again.
    """
    right = path.with_name(f"{path.name}.{holder}")
    if _create_lock(right):
        if _holder_text(path) == holder:
            # Where another user's may not be removed, the waiter's patience ends with a message.
            with suppress(OSError):
                path.unlink()
        right.unlink(missing_ok=True)
