"""What a run writes about itself: metrics.jsonl, TensorBoard events, summary.json."""

import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from common.errors import UserError
from common.torch_processes import Processes
from train.config import Config
from train.processes import batch_slots


class Averages:
    """Means of metrics over steps, kept on the device so that no step waits for the host.

    Every process must add the same names in the same order.
    """

    def __init__(self, processes: Processes, batch_size: int) -> None:
        self._processes = processes
        self._share = len(batch_slots(processes, batch_size)) / batch_size
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def add(self, metrics: Mapping[str, Tensor]) -> None:
        """Add one step's local batch means (0-dim)."""
        for name, value in metrics.items():
            value = value.detach().float()
            self._sums[name] = self._sums[name] + value if name in self._sums else value
            self._counts[name] = self._counts.get(name, 0) + 1

    def take(self) -> dict[str, float]:
        """The means since the last call, weighted over processes by their tiles; starts again."""
        if not self._sums:
            return {}
        means = torch.stack([self._sums[n] / self._counts[n] for n in self._sums])
        values = self._processes.total(means * self._share).tolist()
        result = dict(zip(self._sums, values, strict=True))
        self._sums, self._counts = {}, {}
        return result


class RunLog:
    """metrics.jsonl, and beside it TensorBoard events and Weights & Biases as asked for.

    A step has one line of training, written before its checkpoint, and one of what was measured
    on the networks after it. A run that goes on from step n repeats none: what was logged after
    its checkpoint is cut.
    """

    def __init__(self, run_dir: Path, config: Config, *, step: int) -> None:
        self.path = run_dir / "metrics.jsonl"
        _cut_after(self.path, step)
        self._file = self.path.open("a", encoding="utf-8")
        self._events: Any = None
        self._wandb = open_wandb(run_dir, config) if config.log.wandb else None
        if config.log.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._events = SummaryWriter(str(run_dir / "tensorboard"), purge_step=step + 1)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()
        if self._events is not None:
            self._events.close()
        if self._wandb is not None:
            self._wandb.finish(exit_code=0 if error is None else 1)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """One line of metrics.jsonl, and the same values as events."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        if self._events is not None:
            for name, value in values.items():
                self._events.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(dict(values), step=step)

    def sync(self) -> None:
        """Let what was written outlive the machine, as the checkpoint that follows it will."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def write_picture(self, step: int, name: str, pixels: npt.NDArray[np.uint8]) -> None:
        """An RGB picture uint8 [h, w, 3] where pictures are shown."""
        if self._events is not None:
            self._events.add_image(name, pixels, step, dataformats="HWC")
        if self._wandb is not None:
            import wandb

            self._wandb.log({name: wandb.Image(pixels)}, step=step)


def open_wandb(run_dir: Path, config: Config) -> Any:
    """The run of Weights & Biases that belongs to a run directory, begun or gone on with.

    Raises `UserError` where the package is missing or refuses (no login: WANDB_MODE=offline).
    """
    try:
        import wandb
    except ImportError as error:
        raise UserError(
            f"log.wandb={config.log.wandb}: the package wandb is not installed: pip install "
            "wandb, or set log.wandb= (metrics.jsonl and TensorBoard hold the same)"
        ) from error
    key = run_dir / "wandb_id.txt"
    if not key.exists():
        write_text(key, secrets.token_hex(8))
    try:
        return wandb.init(
            project=config.log.wandb,
            name=run_dir.name,
            id=key.read_text().strip(),
            resume="allow",
            dir=str(run_dir),
            config=config.to_dict(),
        )
    except wandb.errors.Error as error:
        raise UserError(
            f"log.wandb={config.log.wandb}: {error}; log in, or set WANDB_MODE=offline"
        ) from error


def read_metrics(run_dir: Path) -> list[dict[str, float]]:
    """What metrics.jsonl says of each step, by step; a torn line (the run was killed) is left
    out."""
    steps: dict[float, dict[str, float]] = {}
    for line in _lines(run_dir / "metrics.jsonl"):
        steps.setdefault(line["step"], {}).update(line)
    return [steps[step] for step in sorted(steps)]


def _lines(path: Path) -> list[dict[str, float]]:
    lines: list[dict[str, float]] = []
    if path.exists():
        for text in path.read_text(encoding="utf-8").splitlines():
            try:
                lines.append(json.loads(text))
            except ValueError:
                continue
    return lines


def write_json(path: Path, value: Any) -> None:
    """A JSON file with sorted keys, whole or not at all."""
    write_text(path, json.dumps(value, indent=2, sort_keys=True) + "\n")


def write_text(path: Path, text: str) -> None:
    """A text file, whole or not at all."""
    staged = path.with_name(f".{path.name}.{os.getpid()}")
    staged.write_text(text, encoding="utf-8")
    staged.replace(path)


def _cut_after(path: Path, step: int) -> None:
    kept = [line for line in _lines(path) if 0 < step >= line["step"]]
    if path.exists():
        write_text(path, "".join(json.dumps(line) + "\n" for line in kept))
