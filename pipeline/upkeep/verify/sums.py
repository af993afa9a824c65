"""Sizes and sha256 of many files at once: hashing releases the GIL, so threads are enough."""

import hashlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pipeline.dataset import FileRecord

_CHUNK_BYTES = 1 << 22


@dataclass(frozen=True)
class Problem:
    """What is wrong with a file that a journal line names.

    `altered` is a file that was read to its end; of one that is `unreadable` nobody knows whether
    it is sound.
    """

    kind: Literal["missing", "unreadable", "altered", "outside"]
    words: str


def damaged_files(
    root: Path,
    expected: Mapping[str, Sequence[FileRecord]],
    workers: int,
    advance: Callable[[int], None],
) -> dict[str, Problem]:
    """Path and what is wrong, for each file that is not as one of its records says.

    `advance` is called, from several threads, with bytes read. A thread holds one buffer of
    4 MiB, whatever the size and number of the files.
    """
    stop = threading.Event()
    paths = _Shared(iter(sorted(expected)))

    def lane() -> dict[str, Problem]:
        buffer = bytearray(_CHUNK_BYTES)
        found = {}
        for path in paths:
            if stop.is_set():
                break
            problem = _problem(root / path, expected[path], buffer, advance, stop)
            if problem:
                found[path] = problem
        return found

    with ThreadPoolExecutor(workers, "verify") as pool:
        lanes = [pool.submit(lane) for _ in range(workers)]
        try:
            parts = [one.result() for one in lanes]
        finally:
            stop.set()
    return {path: part[path] for part in parts for path in part}


def sha256_of(
    path: Path,
    buffer: bytearray,
    advance: Callable[[int], None] = lambda count: None,
    stop: threading.Event | None = None,
) -> tuple[int, str]:
    """Bytes and sha256 of a file, read through `buffer`; raises OSError."""
    sha, size = hashlib.sha256(), 0
    with path.open("rb", buffering=0) as file, memoryview(buffer) as view:
        while not (stop and stop.is_set()) and (count := file.readinto(buffer)):
            sha.update(view[:count])
            size += count
            advance(count)
    return size, sha.hexdigest()


def _problem(
    path: Path,
    records: Sequence[FileRecord],
    buffer: bytearray,
    advance: Callable[[int], None],
    stop: threading.Event,
) -> Problem | None:
    try:
        size, sha256 = sha256_of(path, buffer, advance, stop)
        there = path.stat().st_size
    except (FileNotFoundError, NotADirectoryError):
        return Problem("missing", "missing")
    except OSError as error:
        return Problem("unreadable", f"cannot be read: {error.strerror or error}")
    if any((record.bytes, record.sha256) == (size, sha256) for record in records):
        return None
    if there != size:
        return Problem("unreadable", "cannot be read: it changed meanwhile")
    if all(record.bytes != size for record in records):
        return Problem("altered", f"{size:,} bytes, expected {records[-1].bytes:,}")
    return Problem("altered", "altered: its sha256 is another than when it was written")


class _Shared(Iterator[str]):
    """An iterator that several threads may draw from."""

    def __init__(self, inner: Iterator[str]) -> None:
        self._inner, self._lock = inner, threading.Lock()

    def __next__(self) -> str:
        with self._lock:
            return next(self._inner)
