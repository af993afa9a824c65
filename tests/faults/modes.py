"""Modes of files: what the umask says, and nothing else."""

import stat
from pathlib import Path


def other_modes(folder: Path, umask: int) -> list[str]:
    """Files and folders in a folder of another mode than 666 and 777 less the umask.

    Folders have the set-group-id bit where the folder above has it.
    """
    found = []
    for path in sorted(folder.rglob("*")):
        wanted = (0o777 if path.is_dir() else 0o666) & ~umask
        if path.is_dir():
            wanted |= path.parent.stat().st_mode & stat.S_ISGID
        mode = stat.S_IMODE(path.stat().st_mode)
        found += [f"{path}: {mode:o}, expected {wanted:o}"] if mode != wanted else []
    return found
