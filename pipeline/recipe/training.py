"""What is left of a training run, from what it wrote itself."""

import json
from pathlib import Path
from typing import Any

from common.plain_yaml import load_yaml
from pipeline.recipe.cost import Cost
from pipeline.recipe.steps import Step

_TAIL_BYTES = 1 << 16


def training_cost(step: Step) -> Cost:
    """GPU-seconds left at the run's own measured rate; unknown for a run that has not begun."""
    folder = Path(str(step.values.get("run.dir", "")))
    last = last_line(folder / "metrics.jsonl")
    config = _config(folder / "config.yaml")
    try:
        steps, batch = int(config["run"]["steps"]), int(config["data"]["batch_size"])
        done, rate = int(last["step"]), float(last["images_per_s"])
    except (KeyError, TypeError, ValueError):
        return Cost("train", gpu_s=None, known="no rate yet: it has not begun")
    left = max(0, steps - done)
    seconds = left * batch / rate * step.processes if rate > 0 else None
    known = f"step {done:,} of {steps:,}, measured {rate:.3g} tiles/s"
    return Cost("train", gpu_s=seconds, known=known)


def last_line(path: Path) -> dict[str, Any]:
    """The last line of a metrics file that is whole and has a rate; {} where there is none."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - _TAIL_BYTES))
            lines = file.read().splitlines()
    except OSError:
        return {}
    for line in reversed(lines):
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and "images_per_s" in row:
            return row
    return {}


def _config(path: Path) -> dict[str, Any]:
    try:
        read = load_yaml(path.read_text())
    except (OSError, ValueError):
        return {}
    return read if isinstance(read, dict) else {}
