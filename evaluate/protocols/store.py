"""Results that are kept: one file each, named by everything that went into it."""

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from common.json_text import read_json
from evaluate.compare.results import write_results

VERSION = 1
"""Raised where a metric's definition changes: older files are then computed again."""


def digest_array(array: npt.NDArray[Any] | None) -> str:
    """A sum of an array's values, shape and type; "" for None."""
    if array is None:
        return ""
    sha = hashlib.sha256(f"{array.shape} {array.dtype}".encode())
    if array.dtype.kind == "U":
        sha.update("\0".join(array.tolist()).encode())
    else:
        sha.update(np.ascontiguousarray(array).data)
    return sha.hexdigest()


class ResultStore:
    """A folder of JSON files; what was computed from the same inputs is read, not made again.

    `computed` and `reused` count the results of each kind.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.computed = self.reused = 0

    def get_or_compute(self, inputs: Mapping[str, object], compute: Callable[[], object]) -> Any:
        """The result of these inputs, computed where no file has it. Files appear whole."""
        text = json.dumps({"version": VERSION, **inputs}, sort_keys=True)
        path = self._folder / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.json"
        try:
            result = read_json(path)["result"]
            self.reused += 1
            return result
        except (OSError, ValueError, KeyError):
            pass  # absent, or cut short by a full disk: made anew
        write_results(path, {"inputs": inputs, "result": compute()})
        self.computed += 1
        # Read back, so that a first run and a resumed one have the same values and types.
        return read_json(path)["result"]
