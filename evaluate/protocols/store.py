"""Results that stand: a file each, named by everything that went into it."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from evaluate.compare.results import write_results

VERSION = 1
"""Raised where a metric's definition changes: older files are then computed again."""


def digest(array: npt.NDArray[Any] | None) -> str:
    """A sum of an array's values, shape and type; "" of none."""
    if array is None:
        return ""
    found = hashlib.sha256(f"{array.shape} {array.dtype}".encode())
    if array.dtype.kind == "U":
        found.update("\0".join(array.tolist()).encode())
    else:
        found.update(np.ascontiguousarray(array).data)
    return found.hexdigest()


class ResultStore:
    """A folder of JSON files; what was computed from the same inputs is read, not made again."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.computed = self.reused = 0

    def get(self, inputs: dict[str, Any], compute: Callable[[], Any]) -> Any:
        """The result of these inputs, computed where no file has it. Files appear whole."""
        text = json.dumps({"version": VERSION, **inputs}, sort_keys=True)
        path = self._folder / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.json"
        try:
            found = json.loads(path.read_text(encoding="utf-8"))["result"]
            self.reused += 1
            return found
        except (OSError, ValueError, KeyError):
            pass  # absent, or cut short by a full disk: made anew
        result = compute()
        write_results(path, {"inputs": inputs, "result": result})
        self.computed += 1
        return json.loads(path.read_text(encoding="utf-8"))["result"]
