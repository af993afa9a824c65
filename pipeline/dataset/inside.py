"""Removing and moving what is in a dataset: by open folders, so that no link is ever followed.

A path that was checked and then is used may be another by then. Here every folder on the way is
opened in the one before it and refused if it is a link (O_NOFOLLOW); the last name is removed or
renamed in the folder that is open.
"""

import os
import shutil
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

from common.files import make_directory
from pipeline.dataset.layout import DAMAGED_DIR, Dataset

_FOLDER_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC


def file_state(status: os.stat_result) -> tuple[int, int, int]:
    """What tells a file from another that takes its name: inode, bytes, modification time (ns)."""
    return status.st_ino, status.st_size, status.st_mtime_ns


@contextmanager
def open_folder(dataset: Dataset, parts: Sequence[str]) -> Iterator[int]:
    """A folder below the dataset's, open for the block; raises `OSError` at a link on the way."""
    handle = os.open(dataset.root, _FOLDER_FLAGS)
    try:
        for part in parts:
            inner = os.open(part, _FOLDER_FLAGS | os.O_NOFOLLOW, dir_fd=handle)
            os.close(handle)
            handle = inner
        yield handle
    finally:
        os.close(handle)


def remove_file(dataset: Dataset, path: str, state: tuple[int, int, int] | None = None) -> bool:
    """Remove a file, or a link as such, and the folders that are empty then.

    With `state` (see `file_state`) only the file that has it. Returns whether it was removed;
    raises `OSError`.
    """
    *folders, name = path.split("/")
    with open_folder(dataset, folders) as folder:
        status = os.stat(name, dir_fd=folder, follow_symlinks=False)
        if state is not None and file_state(status) != state:
            return False
        os.unlink(name, dir_fd=folder)
    remove_empty_folders(dataset, folders)
    return True


def remove_empty_folders(dataset: Dataset, folders: Sequence[str]) -> None:
    """Remove a folder, and those above it, as far as they are empty; never the dataset's own."""
    with suppress(OSError):
        for depth in range(len(folders), 0, -1):
            with open_folder(dataset, folders[: depth - 1]) as parent:
                os.rmdir(folders[depth - 1], dir_fd=parent)


def remove_tree(dataset: Dataset, path: str) -> None:
    """Remove a folder with all that is in it, or a file, or a link as such; raises `OSError`."""
    *folders, name = path.split("/")
    with open_folder(dataset, folders) as folder:
        if stat.S_ISDIR(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode):
            # Of these systems' own: it opens folder in folder, and follows no link.
            shutil.rmtree(name, dir_fd=folder)
        else:
            os.unlink(name, dir_fd=folder)


def move_inside(
    dataset: Dataset, path: str, new: str, state: tuple[int, int, int] | None = None
) -> bool:
    """Rename a file or folder to a place where nothing is, and sync both folders.

    It needs no room but for new folders' names, and so nothing is lost on a full disk. With
    `state` only the file that has it. Returns whether it was moved; raises `OSError`, also where
    something has the new name, and `UserError` where a link is on its way.
    """
    *folders, name = path.split("/")
    *new_folders, new_name = new.split("/")
    dataset.refuse_linked_folders(dataset.root / new)
    make_directory(dataset.root.joinpath(*new_folders))
    with open_folder(dataset, folders) as source, open_folder(dataset, new_folders) as target:
        status = os.stat(name, dir_fd=source, follow_symlinks=False)
        if state is not None and file_state(status) != state:
            return False
        with suppress(FileNotFoundError):
            os.stat(new_name, dir_fd=target, follow_symlinks=False)
            raise FileExistsError(f"{dataset.root / new} is there already")
        os.rename(name, new_name, src_dir_fd=source, dst_dir_fd=target)
        os.fsync(target)
        os.fsync(source)
    remove_empty_folders(dataset, folders)
    return True


def free_place(dataset: Dataset, path: str) -> str:
    """Where in `.damaged` a file or folder of that path goes: nothing has that place yet."""
    place, number = f"{DAMAGED_DIR}/{path}", 2
    while os.path.lexists(dataset.root / place):
        place, number = f"{DAMAGED_DIR}/{number}/{path}", number + 1
    return place
