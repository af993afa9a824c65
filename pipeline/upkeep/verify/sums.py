"""Sizes and sha256 of many files at once: hashing releases the GIL, so threads are enough."""

import hashlib
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from common.files import open_regular
from pipeline.dataset import FileRecord

_CHUNK_BYTES = 1 << 22


@dataclass(frozen=True)
class FileDamage:
    """What is wrong with a file that a journal line names.

    `altered` is a file that was read to its end; one that is `unreadable` may be sound.
    """

    kind: Literal["missing", "unreadable", "altered"]
    words: str


def damaged_files(
    root: Path,
    expected: Mapping[str, Sequence[FileRecord]],
    workers: int,
    advance: Callable[[int], None],
) -> dict[str, FileDamage]:
    """Path and what is wrong, for each file that is not as one of its records says.

    `advance` is called, from several threads, with bytes read. A thread has one buffer of
    4 MiB, however large and many the files are.
    """
    stop, lock = threading.Event(), threading.Lock()
    paths = iter(sorted(expected))
    damaged: dict[str, FileDamage] = {}

    # Each thread takes the next path: files differ in size by a factor of a million.
    def check_files() -> None:
        buffer = bytearray(_CHUNK_BYTES)
        while not stop.is_set():
            with lock:
                path = next(paths, None)
            if path is None:
                return
            damage = _check_file(root / path, expected[path], buffer, advance, stop)
            if damage:
                damaged[path] = damage

    with ThreadPoolExecutor(workers, "verify") as pool:
        tasks = [pool.submit(check_files) for _ in range(workers)]
        try:
            for task in tasks:
                task.result()
        finally:
            stop.set()
    return dict(sorted(damaged.items()))


def sha256_of(
    path: Path,
    buffer: bytearray,
    advance: Callable[[int], None] = lambda count: None,
    stop: threading.Event | None = None,
) -> tuple[int, str]:
    """Bytes and sha256 of a file, read through `buffer`; raises OSError."""
    sha, size = hashlib.sha256(), 0
    with open_regular(path) as file, memoryview(buffer) as view:
        raw = file.raw
        while not (stop and stop.is_set()) and (count := raw.readinto(view)):
            sha.update(view[:count])
            size += count
            advance(count)
    return size, sha.hexdigest()


def describe_unreadable(error: OSError) -> str:
    """Why a file cannot be read."""
    return f"cannot be read: {error.strerror or error}"


def _check_file(
    path: Path,
    records: Sequence[FileRecord],
    buffer: bytearray,
    advance: Callable[[int], None],
    stop: threading.Event,
) -> FileDamage | None:
    try:
        size, sha256 = sha256_of(path, buffer, advance, stop)
        size_now = path.stat().st_size
    except (FileNotFoundError, NotADirectoryError):
        return FileDamage("missing", "missing")
    except OSError as error:
        return FileDamage("unreadable", describe_unreadable(error))
    if any((record.bytes, record.sha256) == (size, sha256) for record in records):
        return None
    # Written to while it was read: its sum is of no moment.
    if size_now != size:
        return FileDamage("unreadable", "cannot be read: it changed meanwhile")
    if all(record.bytes != size for record in records):
        return FileDamage("altered", f"{size:,} bytes, expected {records[-1].bytes:,}")
    return FileDamage("altered", "altered: its sha256 is another than when it was written")
