"""Nothing half-written under a final name: stage, sync, rename."""

import hashlib
import os
import secrets
import shutil
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from common.files import json_bytes, replacing_file
from pipeline.dataset.layout import Dataset


@dataclass(frozen=True)
class FileRecord:
    """A committed file as its journal line names it: path, size in bytes, hex digest."""

    path: str
    bytes: int
    sha256: str


def new_run_id() -> str:
    """An id that sorts by time and that no other process on any machine makes."""
    # One look at the clock: a second that ends between two would sort the run before its elders.
    seconds, nanoseconds = divmod(time.time_ns(), 10**9)
    stamp = time.strftime("%Y%m%dT%H%M%S", time.gmtime(seconds))
    host = "".join(c if c.isalnum() else "-" for c in socket.gethostname())[:24]
    return f"{stamp}-{nanoseconds:09d}-{host}-{os.getpid()}-{secrets.token_hex(3)}"


class HashingFile:
    """A write-only file that takes its sha256 and its size in bytes on the way."""

    def __init__(self, raw: IO[bytes]) -> None:
        self._raw = raw
        self._sha = hashlib.sha256()
        self.bytes = 0

    def write(self, data: bytes) -> int:
        """Append the bytes."""
        self._sha.update(data)
        self.bytes += len(data)
        return self._raw.write(data)

    def tell(self) -> int:
        """Bytes written so far."""
        return self.bytes

    def flush(self) -> None:
        """Flush to the operating system."""
        self._raw.flush()

    @property
    def closed(self) -> bool:
        """Whether the file below is closed (pyarrow asks)."""
        return self._raw.closed

    @property
    def sha256(self) -> str:
        """Hex digest (64 characters) of the bytes written."""
        return self._sha.hexdigest()


def commit_file(
    dataset: Dataset, run_id: str, final: Path, write: Callable[[HashingFile], None]
) -> FileRecord:
    """Write a file under `.tmp/<run_id>/`, sync it, rename it to its final name.

    The record has the size in bytes. Raises `UserError` naming the file when the disk is full or
    not writable, or a folder on the way is a link.
    """
    staging = dataset.staging_dir(run_id)
    for path in (final, staging / final.name):
        dataset.refuse_linked_folders(path)
    # A random prefix: two workers of a run may write files of one name.
    staged = staging / f"{secrets.token_hex(4)}-{final.name}"
    with replacing_file(final, staged) as raw:
        file = HashingFile(raw)
        write(file)
    return FileRecord(dataset.relative_path(final), file.bytes, file.sha256)


def commit_bytes(dataset: Dataset, run_id: str, final: Path, data: bytes) -> FileRecord:
    """Commit bytes already in memory."""

    def write(file: HashingFile) -> None:
        file.write(data)

    return commit_file(dataset, run_id, final, write)


def commit_json(dataset: Dataset, run_id: str, final: Path, value: Any) -> FileRecord:
    """Commit a JSON document with sorted keys, as UTF-8 bytes."""
    return commit_bytes(dataset, run_id, final, json_bytes(value))


def clean_staging(dataset: Dataset, run_id: str) -> None:
    """Remove the run's staging folder; leftovers of a killed worker go with it."""
    folder = dataset.staging_dir(run_id)
    if folder.exists():
        shutil.rmtree(folder, ignore_errors=True)
