"""Files that appear under their final name whole and synced, or not at all."""

import ctypes
import errno
import hashlib
import io
import json
import os
import secrets
import shutil
import stat
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from common.errors import UserError

MOST_TEXT_BYTES = 256 << 20
"""Of a configuration, record, results or GeoJSON file; parsed it takes about ten times that."""
MOST_LINE = 16 << 20
"""Characters of a line of a journal or a log."""


def sync_directory(path: Path) -> None:
    """Make the names inside a folder survive a power loss."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def make_directory(path: Path) -> None:
    """Make a folder and its parents, each with its name synced.

    The name of one that is there is synced as well, once per process and up to its file system's
    root: whoever made it may not have done so. Raises `OSError`.
    """
    path = path.absolute()
    if path.is_dir():
        _sync_names(path)
        return
    if path.parent != path:
        make_directory(path.parent)
    path.mkdir(exist_ok=True)
    # Without this a power loss takes the folder, and all synced files in it, with it.
    sync_directory(path.parent)
    _SYNCED.add(path)


_SYNCED: set[Path] = set()
"""Folders whose names this process has synced, up to their file system's root."""


def _sync_names(path: Path) -> None:
    """Sync the names by which a folder is reached, where this process has not done so yet."""
    if path in _SYNCED:
        return
    real = Path(os.path.realpath(path))
    for folder in (real, *real.parents):
        if folder in _SYNCED or folder.is_mount():
            break
        # Others' folders, which may not be opened, or are of read-only file systems.
        with suppress(OSError):
            sync_directory(folder.parent)
        _SYNCED.add(folder)
    _SYNCED.add(path)


def find_link(root: Path, path: Path) -> Path | None:
    """The first link on the way from a folder to a path below it, itself included.

    None without any, and for a path outside; the folder itself may be a link, and so may what is
    above it.
    """
    way = Path(os.path.relpath(os.path.abspath(path), os.path.abspath(root))).parts
    place = root
    for part in way if way[:1] != ("..",) else ():
        place = place / part
        if place.is_symlink():
            return place
    return None


def open_regular(path: Path) -> io.BufferedReader:
    """A regular file, open to be read; a pipe, device, socket or folder is refused at once.

    Raises `OSError`, whose `strerror` says what the path is.
    """
    return os.fdopen(open_descriptor(path), "rb")


def open_descriptor(path: Path) -> int:
    """The descriptor of a regular file, to be read from; raises what `open_regular` raises."""
    # Without O_NONBLOCK the opening of a pipe waits for a writer, for ever.
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    mode = os.fstat(handle).st_mode
    if not stat.S_ISREG(mode):
        os.close(handle)
        what = f"it is {_kind_of_file(mode)}, expected a regular file"
        raise OSError(errno.EINVAL, what, str(path))
    os.set_blocking(handle, True)
    return handle


def require_regular(path: Path) -> None:
    """Refuse, with an `OSError`, what `open_regular` refuses: for libraries that open by name."""
    os.close(open_descriptor(path))


@contextmanager
def naming_errors(path: Path) -> Iterator[None]:
    """Errors of reading say of which file they are, as those of opening do."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def open_text(
    path: Path, *, encoding: str = "utf-8", errors: str = "strict", newline: str | None = None
) -> IO[str]:
    """A regular file, open to be read as text; the keywords are those of `open`."""
    return io.TextIOWrapper(open_regular(path), encoding, errors, newline=newline)


def read_regular(path: Path, most_bytes: int = MOST_TEXT_BYTES) -> bytes:
    """The bytes of a regular file; one of more than `most_bytes` is refused before it is read.

    Raises `OSError`, whose `strerror` says what is wrong with the file.
    """
    with naming_errors(path), open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        # The size is no promise: another process may be writing.
        data = file.read(most_bytes + 1) if size <= most_bytes else b""
    if max(size, len(data)) > most_bytes:
        what = f"it has {max(size, len(data)):,} bytes, expected at most {most_bytes:,}"
        raise OSError(errno.EFBIG, what, str(path))
    return data


def read_lines(file: IO[str], most_characters: int = MOST_LINE) -> Iterator[str]:
    """The lines of an open text; a longer one comes in pieces, so that none takes all memory."""
    while line := file.readline(most_characters):
        yield line


def _kind_of_file(mode: int) -> str:
    kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket",
             stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}  # fmt: skip
    return kinds.get(stat.S_IFMT(mode), "no file")


@contextmanager
def replacing_file(final: Path, staged: Path | None = None) -> Iterator[IO[bytes]]:
    """A binary file to write; it gets its final name, synced, when the block ends well.

    Args:
        final: the name to write under; an existing file is replaced, missing folders are made.
        staged: where the bytes are written meanwhile, on the same file system; next to `final`
            by default.

    Raises:
        UserError: the disk is full or not writable; the message names `final`.
    """
    staged = staged or _staged_name(final)
    with _renaming(staged, final), staged.open("wb") as file:
        yield file
        # Bytes before the name: a power loss must not leave the final name on an empty file.
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def replacing_path(final: Path) -> Iterator[Path]:
    """The path of an empty file for a library to write, or to replace by one of its own.

    When the block ends well, the file is synced and gets its final name, and the mode that the
    umask and the folder give to new files: libraries make files that only their owner may read.
    Errors are those of `replacing_file`.
    """
    staged = _staged_name(final)
    with _renaming(staged, final):
        with staged.open("xb") as empty:
            mode = os.fstat(empty.fileno()).st_mode
        yield staged
        with staged.open("rb") as file:
            # Not where it is right: some file systems refuse any change of modes.
            if os.fstat(file.fileno()).st_mode != mode:
                os.fchmod(file.fileno(), stat.S_IMODE(mode))
            os.fsync(file.fileno())


def _staged_name(final: Path) -> Path:
    return final.with_name(f".{final.name}.{secrets.token_hex(4)}")


@contextmanager
def _renaming(staged: Path, final: Path) -> Iterator[None]:
    """Make the folders; rename `staged`, which the block has written and synced, to `final`."""
    try:
        make_directory(staged.parent)
        yield
        make_directory(final.parent)
        staged.replace(final)
        # A rename survives a power loss only once its folder is synced.
        sync_directory(final.parent)
    except OSError as error:
        staged.unlink(missing_ok=True)
        raise _write_error(final, error) from error
    except BaseException:
        staged.unlink(missing_ok=True)
        raise


@contextmanager
def replacing_folder(final: Path, *, last: str) -> Iterator[Path]:
    """An empty folder to write files to, which are those of `final` when the block ends well.

    At every moment `final` has the old files or the new ones: the two folders change places in one
    step. Where that is not possible (other files are in it, which stay; a file system that cannot
    do it), the new files replace the old ones by renames, and `last` is not there meanwhile, whose
    readers must refuse a folder without it. Errors are those of `replacing_file`.
    """
    final = Path(os.path.realpath(final))  # of a link, what it leads to
    staged = _staged_name(final)
    if final.is_dir() and (final.is_mount() or not os.access(final.parent, os.W_OK)):
        staged = final / staged.name
    try:
        make_directory(staged.parent)
        staged.mkdir()
        yield staged
        sync_directory(staged)
        _put_folder(staged, final, last)
    except OSError as error:
        raise _write_error(final, error) from error
    except UserError as error:  # of a file in it, under a name that nobody knows
        if not isinstance(error.__cause__, OSError):
            raise
        raise _write_error(final, error.__cause__) from error
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def _write_error(final: Path, error: OSError) -> UserError:
    return UserError(
        f"cannot write {final}: {error.strerror or error}; free space or choose another folder"
    )


def _put_folder(staged: Path, final: Path, last: str) -> None:
    """Give the files of `staged` to `final`; what `staged` is afterwards can go."""
    names = {path.name for path in staged.iterdir()}
    if not final.is_dir():
        make_directory(final.parent)
        staged.rename(final)
        sync_directory(final.parent)
        return
    there = {path.name for path in final.iterdir()} - {staged.name}
    if there <= names and staged.parent == final.parent:
        staged.chmod(stat.S_IMODE(final.stat().st_mode))
        if _exchange(staged, final):
            sync_directory(final.parent)
            return
    (final / last).unlink(missing_ok=True)
    sync_directory(final)
    for name in sorted(names, key=lambda name: (name == last, name)):
        # What makes the others valid comes when they are there, after a power loss, too.
        if name == last:
            sync_directory(final)
        (staged / name).replace(final / name)
    sync_directory(final)


_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


def _exchange(one: Path, other: Path) -> bool:
    """Let two paths change places in one step, with Linux's renameat2; whether it could."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    names = os.fsencode(one), os.fsencode(other)
    return bool(rename(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0)


def hash_file(path: Path, algorithm: str = "sha256") -> str:
    """The hex digest of a file's bytes, such as "sha256" or "md5"; raises `OSError`."""
    with naming_errors(path), open_regular(path) as file:
        # Not for security: machines that forbid MD5 for that still compare copies by it.
        digest = hashlib.file_digest(file, lambda: hashlib.new(algorithm, usedforsecurity=False))
    return digest.hexdigest()


def write_bytes(final: Path, data: bytes) -> None:
    """Write bytes as a whole file; see `replacing_file`.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     write_bytes(Path(folder, "tiles", "index"), b"v1.2 0")
    ...     Path(folder, "tiles", "index").read_bytes()
    b'v1.2 0'
    """
    with replacing_file(final) as file:
        file.write(data)


def write_files(contents: Mapping[Path, bytes]) -> None:
    """Write whole files that belong together: all are on the disk before the first is replaced.

    The first one named is replaced last. Errors are those of `replacing_file`; none is replaced
    where one does not fit.
    """
    with ExitStack() as stack:
        for final, data in contents.items():
            file = stack.enter_context(replacing_file(final))
            file.write(data)
            file.flush()
            os.fsync(file.fileno())


def write_text(final: Path, text: str) -> None:
    """Write the UTF-8 bytes of a text as a whole file; see `replacing_file`."""
    write_bytes(final, text.encode())


def append_text(path: Path, text: str) -> None:
    """Append to a file that grows now and then; text and name survive a power loss afterwards.

    Raises `OSError`.
    """
    with path.open("a", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    sync_directory(path.parent)


def json_bytes(value: Any) -> bytes:
    """UTF-8 bytes of a JSON document with sorted keys: one form for one value.

    >>> json_bytes({"tiles": 3, "mpp": 0.5})
    b'{\\n  "mpp": 0.5,\\n  "tiles": 3\\n}\\n'
    """
    text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    return text.encode()


def write_json(final: Path, value: Any) -> None:
    """Write the bytes that `json_bytes` gives as a whole file; see `replacing_file`."""
    write_bytes(final, json_bytes(value))
