"""metrics.jsonl of a run, with the same values as TensorBoard events and in Weights & Biases."""

import json
import os
import re
import secrets
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from common.console import print_line
from common.errors import UserError
from common.files import MOST_TEXT_BYTES, read_regular, sync_directory, write_text
from common.json_text import parse_json
from train.config import Config

METRICS_FILE, SKIPPED_FILE = "metrics.jsonl", "skipped_tiles.jsonl"


class MetricsLog:
    """metrics.jsonl, with TensorBoard events and Weights & Biases where the configuration says.

    A step has one line of training, written before its checkpoint, and one of what was measured
    on the networks after it. A run that goes on from step n repeats none: what was logged after
    its checkpoint is cut, also of the list of skipped tiles.
    """

    def __init__(self, run_dir: Path, config: Config, *, step: int) -> None:
        self.path = run_dir / METRICS_FILE
        # A run that continues from `step` measures again what follows.
        for path in (self.path, run_dir / SKIPPED_FILE):
            if path.exists():
                kept = [line for line in _read_lines(path) if 0 < step >= line["step"]]
                write_text(path, "".join(json.dumps(line) + "\n" for line in kept))
        try:
            self._file = self.path.open("a", encoding="utf-8")
            # Its name; its lines are synced before each checkpoint.
            sync_directory(run_dir)
        except OSError as error:
            raise UserError(f"cannot write {self.path}: {error.strerror}") from error
        self._events: Any = None
        self._wandb = open_wandb(run_dir, config) if config.log.wandb else None
        if config.log.tensorboard:
            with self._tolerate_events():
                self._events = _open_events(run_dir / "tensorboard", step)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        with suppress(OSError):  # of lines whose loss has been reported
            self._file.close()
        with self._tolerate_events():
            if self._events is not None:
                self._events.close()
        if self._wandb is not None:
            self._wandb.finish(exit_code=0 if error is None else 1)

    def write_line(self, step: int, values: Mapping[str, float]) -> None:
        """One line of metrics.jsonl, and the same values as events."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        # At once, for those who follow the file while the run goes on.
        self._file.flush()
        with self._tolerate_events():
            if self._events is not None:
                for name, value in values.items():
                    self._events.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(dict(values), step=step)

    def sync_file(self) -> None:
        """Let what was written survive a power loss, as the checkpoint that follows it will."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def write_picture(self, step: int, name: str, pixels: npt.NDArray[np.uint8]) -> None:
        """Show an RGB picture uint8 [h, w, 3] in TensorBoard and Weights & Biases."""
        with self._tolerate_events():
            if self._events is not None:
                self._events.add_image(name, pixels, step, dataformats="HWC")
        if self._wandb is not None:
            import wandb

            self._wandb.log({name: wandb.Image(pixels)}, step=step)

    @contextmanager
    def _tolerate_events(self) -> Iterator[None]:
        """Go on without events once they cannot be written: metrics.jsonl has the same values."""
        try:
            yield
        except OSError as error:
            self._events = None
            print_line(
                f"warning: TensorBoard's events cannot be written ({error.strerror or error}): "
                f"training goes on without them; {METRICS_FILE} has the same values"
            )


def _open_events(folder: Path, step: int) -> Any:
    """A writer of TensorBoard events; what was logged after `step` is hidden."""
    from torch.utils.tensorboard import SummaryWriter

    report = threading.excepthook

    def report_unknown(failure: threading.ExceptHookArgs) -> None:
        # The writer's own thread ends with the error that its next call here raises as well.
        module = type(failure.thread).__module__
        if not (issubclass(failure.exc_type, OSError) and module.startswith("tensorboard")):
            report(failure)

    threading.excepthook = report_unknown
    return SummaryWriter(str(folder), purge_step=step + 1)


def open_wandb(run_dir: Path, config: Config) -> Any:
    """Begin or resume the Weights & Biases run of a run directory.

    Raises `UserError` where the package is missing or refuses (no login: WANDB_MODE=offline).
    """
    # Of others it could name another server, which would get the user's key.
    if os.path.lexists(settings := run_dir / "wandb" / "settings"):
        raise UserError(f"{settings} would change where Weights & Biases sends the log: remove it")
    try:
        import wandb
    except ImportError as error:
        raise UserError(
            f"log.wandb={config.log.wandb}: the package wandb is not installed: pip install "
            "wandb, or set log.wandb= (metrics.jsonl and TensorBoard have the same values)"
        ) from error
    # The id is kept with the run, so that a restart continues the same curves.
    key = run_dir / "wandb_id.txt"
    if not key.exists() or not re.fullmatch("[0-9a-f]{16}", read_regular(key).decode("latin-1")):
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
    """The values of metrics.jsonl merged per step, by step, each with its `step`.

    A torn line (the run was killed), and one with a value that is no number, is left out.
    """
    steps: dict[float, dict[str, float]] = {}
    for line in _read_lines(run_dir / METRICS_FILE):
        if not all(type(value) in (int, float) for value in line.values()):
            continue
        steps.setdefault(line["step"], {}).update(line)
    return [steps[step] for step in sorted(steps)]


def _read_lines(path: Path) -> Iterator[dict[str, Any]]:
    if not path.exists():
        return
    for text in read_regular(path, 4 * MOST_TEXT_BYTES).decode(errors="replace").splitlines():
        with suppress(ValueError):
            line = parse_json(text)
            # What is no line of ours, which a damaged disk or others left, is left out as well.
            if _is_line(line):
                yield line


def _is_line(line: object) -> bool:
    return isinstance(line, dict) and type(line.get("step")) is int and 0 <= line["step"] < 1 << 32
