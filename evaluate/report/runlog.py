"""Reading what training left behind: its log and its summary."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from common.errors import UserError

Series = tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]
"""Steps and values."""


@dataclass(frozen=True)
class RunLog:
    """A training run: its named series over steps, and summary.json ({} where it has none)."""

    path: Path
    series: dict[str, Series] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)


def read_run(path: Path) -> RunLog:
    """Read RUN/metrics.jsonl and RUN/summary.json; a line torn by a kill is left out.

    Raises `UserError` where `path` is no run directory.
    """
    log = path / "metrics.jsonl"
    if not log.exists():
        raise UserError(f"{path} is no run directory (no metrics.jsonl); give --run RUN of train")
    rows = [row for line in log.read_text().splitlines() if (row := _parsed(line)) is not None]
    return RunLog(path, _series(rows), _summary(path / "summary.json"))


def _parsed(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and "step" in row else None


def _series(rows: list[dict[str, Any]]) -> dict[str, Series]:
    """Finite numbers by name; of two rows for a step (what training says of it and what was
    measured after it; a resumed run) the later one holds where both name a thing."""
    by_step: dict[int, dict[str, Any]] = {}
    for row in rows:
        by_step.setdefault(int(row["step"]), {}).update(row)
    found: dict[str, list[tuple[int, float]]] = {}
    for step, row in sorted(by_step.items()):
        for name, value in row.items():
            if name != "step" and isinstance(value, int | float) and np.isfinite(value):
                found.setdefault(name, []).append((step, float(value)))
    return {
        name: (
            np.array([step for step, _ in points], np.float64),
            np.array([value for _, value in points], np.float64),
        )
        for name, points in found.items()
    }


def _summary(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        summary = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}; run training to its end again") from error
    return summary if isinstance(summary, dict) else {}
