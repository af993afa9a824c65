"""What the tests of faults share: datasets compared byte by byte, stages run as a user does."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def contents(root: Path) -> dict[str, str]:
    """sha256 by path of everything but the journals and what is being written."""
    return {
        path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file() and path.relative_to(root).parts[0] not in ("status", ".tmp")
    }


def pipeline(*arguments: str, under: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """`python -m pipeline ...` in a process of its own, by the command `under`, output kept."""
    command = [*under, sys.executable, "-m", "pipeline", *arguments]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=300,
        check=False, env=os.environ | {"PYTHONSAFEPATH": "1", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
