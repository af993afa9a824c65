"""A grid of sampler settings under the same seeds: a dataset each, and one table of all."""

import csv
import io
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from common.errors import UserError
from common.files import write_text
from evaluate.generate.write import planned_images
from model.sampler import Solver
from pipeline.dataset import Dataset, read_journal

TABLE_FILE = "sweep.csv"
_COLUMNS = ("dataset", "steps", "solver", "scale", "low", "high", "images", "sampling_seconds",
            "seconds_per_image")  # fmt: skip


def _solver(text: str) -> str:
    if text not in get_args(Solver):
        raise ValueError
    return text


_KEYS: dict[str, Callable[[str], Any]] = {
    "steps": int,
    "solver": _solver,
    "scale": float,
    "low": float,
    "high": float,
}
SETTINGS = {
    "steps": "steps",
    "solver": "solver",
    "scale": "guidance_scale",
    "low": "guidance_low",
    "high": "guidance_high",
}
"""The sampler's names of the options."""


@dataclass(frozen=True)
class Point:
    """One point of the grid: the options that it sets, by name."""

    options: dict[str, Any]

    @property
    def name(self) -> str:
        """A folder's name, such as steps-20_solver-ode."""
        return "_".join(f"{key}-{value:g}" if isinstance(value, float) else f"{key}-{value}"
                        for key, value in self.options.items())  # fmt: skip

    def settings(self) -> dict[str, Any]:
        """The same under the sampler's names."""
        return {SETTINGS[key]: value for key, value in self.options.items()}


def parse_sweep(texts: Sequence[str]) -> list[Point]:
    """The points of a grid such as ["steps=20,50", "solver=sde,ode"]; the last key turns fastest.

    Raises `UserError` for an unknown key, one given twice, or a value of another kind.
    """
    axes: dict[str, list[Any]] = {}
    for text in texts:
        key, _, values = text.partition("=")
        if key not in _KEYS:
            raise UserError(f"--sweep {text}: expected KEY=A,B with KEY of {', '.join(_KEYS)}")
        if key in axes:
            raise UserError(f"--sweep: {key} is given twice; write {key}=A,B")
        try:
            axes[key] = [_KEYS[key](value) for value in values.split(",")]
        except ValueError:
            raise UserError(f"--sweep {text}: '{values}' are no values of {key}") from None
        if len(set(axes[key])) != len(axes[key]):
            raise UserError(f"--sweep {text}: a value is given twice")
    return [
        Point(dict(zip(axes, values, strict=True))) for values in itertools.product(*axes.values())
    ]


def write_table(root: Path, rows: Sequence[tuple[str, dict[str, Any]]]) -> Path:
    """Write sweep.csv: a row for each (sub-dataset, its options in full).

    Times are those of the journals, summed over processes and restarts, so that a run again
    writes the same table.
    """
    buffer = io.StringIO()
    table = csv.writer(buffer, lineterminator="\n")
    table.writerow(_COLUMNS)
    for name, options in rows:
        dataset = Dataset(root / name)
        images = planned_images(dataset)
        entries = [one for one in read_journal(dataset, "tile") if one.outcome == "done"]
        seconds = sum(one.seconds for one in entries)
        made = sum(one.counts["tiles"] for one in entries)
        values = [options[key] for key in ("steps", "solver", "scale", "low", "high")]
        each = f"{seconds / max(made, 1):.4g}"
        table.writerow([name, *values, images, f"{seconds:.2f}", each])
    path = root / TABLE_FILE
    write_text(path, buffer.getvalue())
    return path
