"""Encoded tiles between reading order and rank order: some memory, then a file."""

import os
import tempfile
from pathlib import Path

from common.errors import UserError

MEMORY_BYTES = 64 << 20


class Spool:
    """Byte strings by number; what does not fit in `memory_bytes` waits in an unnamed file.

    The file is created in `folder` when first needed and has no name there: it goes with the
    process, whatever ends it. Raises `UserError` where the folder is full or not writable.
    """

    def __init__(self, folder: Path, memory_bytes: int = MEMORY_BYTES) -> None:
        self._folder, self._room = folder, memory_bytes
        self._kept: dict[int, bytes] = {}
        self._placed: dict[int, tuple[int, int]] = {}
        self._file = -1
        self.file_bytes = 0

    def put_bytes(self, key: int, data: bytes) -> None:
        """Keep the bytes."""
        # Memory first: small slides never need the file.
        if len(data) <= self._room:
            self._room -= len(data)
            self._kept[key] = data
            return
        try:
            if self._file < 0:
                self._folder.mkdir(parents=True, exist_ok=True)
                # Without a name from the start, so that nothing is left of a killed worker.
                self._file, name = tempfile.mkstemp(prefix="spool-", dir=self._folder)
                os.unlink(name)
            _write_all(self._file, data, self.file_bytes)
        except OSError as error:
            raise UserError(
                f"cannot write the spool in {self._folder}: {error.strerror}; free space or "
                "choose another folder with --spool"
            ) from error
        self._placed[key] = (self.file_bytes, len(data))
        self.file_bytes += len(data)

    def take_bytes(self, key: int) -> bytes:
        """Give the bytes back, once; raises KeyError for what was never put."""
        kept = self._kept.pop(key, None)
        if kept is not None:
            self._room += len(kept)
            return kept
        offset, size = self._placed.pop(key)
        data = os.pread(self._file, size, offset)
        if len(data) != size:
            raise UserError(f"the spool in {self._folder} lost bytes; is its disk sound?")
        return data

    def __enter__(self) -> "Spool":
        return self

    def __exit__(self, *_: object) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
        self._kept.clear()
        self._placed.clear()


def _write_all(file: int, data: bytes, offset: int) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(file, data[done:], offset + done)
