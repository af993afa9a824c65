"""What training left behind: its curves from metrics.jsonl, and its summary."""

from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from common.errors import UserError
from common.files import MOST_TEXT_BYTES, read_regular
from common.json_text import parse_json, read_json
from common.record import Record

_MOST_STEPS, _LARGEST = 1 << 53, 1e300
"""What a series of floats has exactly, or at all; JSON's whole numbers have no end."""

Series = tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]
"""Steps ``[n]`` and values ``[n]``."""


@dataclass(frozen=True)
class RunCurves:
    """A training run: series (steps ``[n]``, values ``[n]``) by name; summary.json or empty."""

    path: Path
    series: dict[str, Series] = field(default_factory=dict)
    summary: Record = field(default_factory=lambda: Record({}))


def read_run(path: Path) -> RunCurves:
    """Read RUN/metrics.jsonl and RUN/summary.json; a line torn by a kill is left out.

    Raises `UserError` where `path` is no run directory.
    """
    log = path / "metrics.jsonl"
    if not log.exists():
        raise UserError(f"{path} is no run directory (no metrics.jsonl); give --run RUN of train")
    # A line that is no JSON was torn by a kill; one without a step is none of training.
    rows = []
    for line in read_regular(log, 4 * MOST_TEXT_BYTES).decode(errors="replace").splitlines():
        with suppress(ValueError):
            row = parse_json(line)
            step = row.get("step") if isinstance(row, dict) else None
            if type(step) is int and 0 <= step < _MOST_STEPS:
                rows.append(Record(row, str(log)))
    return RunCurves(path, _series_by_name(rows), _read_summary(path / "summary.json"))


def _series_by_name(rows: list[Record]) -> dict[str, Series]:
    """Finite numbers by name.

    A step has several rows where training logged it and measured after it, or where a run was
    resumed: of a name in two of them the later row counts.
    """
    # Later rows of a step complete or replace the earlier ones.
    by_step: dict[int, dict[str, object]] = {}
    for row in rows:
        by_step.setdefault(row.count("step"), {}).update(row)
    points: dict[str, list[tuple[int, float]]] = {}
    for step, values in sorted(by_step.items()):
        for name, value in values.items():
            # Not NaN either, which is below nothing.
            if name != "step" and isinstance(value, int | float) and abs(value) < _LARGEST:
                points.setdefault(name, []).append((step, float(value)))
    arrays = {name: np.array(pairs, np.float64).T for name, pairs in points.items()}
    return {name: (array[0], array[1]) for name, array in arrays.items()}


def _read_summary(path: Path) -> Record:
    if not path.exists():
        return Record({})
    try:
        summary = read_json(path)
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}; run training to its end again") from error
    return Record(summary if isinstance(summary, dict) else {}, str(path))
