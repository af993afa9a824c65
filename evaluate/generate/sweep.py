"""A grid of sampler settings under the same seeds: one dataset per point, and one table of all."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import get_args

from common.errors import UserError
from common.escape import csv_text
from common.files import write_text
from evaluate.generate.write import count_planned_images
from model.sampler_settings import FIELD_OF_OPTION, SamplerSettings, Solver
from pipeline.dataset import Dataset, read_journal

TABLE_FILE = "sweep.csv"
_COLUMNS = ("steps", "solver", "scale", "low", "high")
"""The order of the options in the table, which is that of the first tables."""
_FIELD_TYPES = {item.name: item.type for item in fields(SamplerSettings)}
_TYPES = {option: _FIELD_TYPES[name] for option, name in FIELD_OF_OPTION.items()}
Value = int | float | str


@dataclass(frozen=True)
class SweepPoint:
    """One point of the grid: the options that it sets, by name."""

    options: Mapping[str, Value]

    @property
    def name(self) -> str:
        """A folder's name, such as steps-20_solver-ode."""
        return "_".join(f"{key}-{value:g}" if isinstance(value, float) else f"{key}-{value}"
                        for key, value in self.options.items())  # fmt: skip

    def sampler_settings(self) -> dict[str, Value]:
        """The same under the sampler's names."""
        return {FIELD_OF_OPTION[key]: value for key, value in self.options.items()}


def parse_sweep(texts: Sequence[str]) -> list[SweepPoint]:
    """The points of a grid such as ["steps=20,50", "solver=sde,ode"]; the last key turns fastest.

    Raises `UserError` for an unknown key, one given twice, or a value of another kind.

    >>> [point.name for point in parse_sweep(["steps=20", "scale=1.5,2"])]
    ['steps-20_scale-1.5', 'steps-20_scale-2']
    """
    axes: dict[str, list[Value]] = {}
    for text in texts:
        key, _, values = text.partition("=")
        if key not in _COLUMNS:
            raise UserError(f"--sweep {text}: expected KEY=A,B with KEY of {', '.join(_COLUMNS)}")
        if key in axes:
            raise UserError(f"--sweep: {key} is given twice; write {key}=A,B")
        try:
            axes[key] = [_parse_value(key, value) for value in values.split(",")]
        except ValueError:
            raise UserError(f"--sweep {text}: '{values}' are no values of {key}") from None
        # Two points of one name would write into the same folder.
        if len(set(axes[key])) != len(axes[key]):
            raise UserError(f"--sweep {text}: a value is given twice")
    return [
        SweepPoint(dict(zip(axes, values, strict=True)))
        for values in itertools.product(*axes.values())
    ]


def _parse_value(key: str, text: str) -> Value:
    if _TYPES[key] in (int, float):
        return int(text) if _TYPES[key] is int else float(text)
    if text not in get_args(Solver):
        raise ValueError(text)
    return text


def write_table(root: Path, rows: Sequence[tuple[str, Mapping[str, object]]]) -> Path:
    """Write sweep.csv: a row for each (sub-dataset, its identity section).

    Times are those of the journals, in seconds, summed over processes and restarts, so that a
    repeated run writes the same table.
    """
    head = ("dataset", *_COLUMNS, "images", "sampling_seconds", "seconds_per_image")
    table: list[Sequence[object]] = [head]
    for name, identity in rows:
        dataset = Dataset(root / name)
        entries = [entry for entry in read_journal(dataset, "tile") if entry.outcome == "done"]
        seconds = sum(entry.seconds for entry in entries)
        made = sum(entry.counts["tiles"] for entry in entries)
        values = [identity[FIELD_OF_OPTION[option]] for option in _COLUMNS]
        # Of the journals and not of this run, which may have made nothing.
        images = count_planned_images(dataset)
        row = [name, *values, images, f"{seconds:.2f}", f"{seconds / max(made, 1):.4g}"]
        table.append(row)
    path = root / TABLE_FILE
    write_text(path, csv_text(table))
    return path
