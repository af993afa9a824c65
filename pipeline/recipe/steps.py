"""A recipe: a YAML file of steps, each one command of a room with its options.

```yaml
dataset: dataset            # for every step that names no other
workers: 8                  # or cluster: FILE.yaml, or scheduler: ADDRESS
steps:
  - scan: {slides: /data/slides}
  - tissue
  - select: {name: train, tiles: 40_000_000}
  - tile: {selection: train}
  - cache: {selection: train, encoder: h0-mini, weights: weights/h0-mini.safetensors}
  - train: {config: single-gpu, data.selection: train, run.dir: runs/first, processes: 8}
  - train export: {run: runs/first, out: runs/first/model}
```

A step's keys are its command's options without `--`. Nothing else is ever run than the doors of
`pipeline`, `train` and `evaluate`, and none through a shell.
"""

import difflib
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from common.errors import UserError
from common.plain_yaml import load_yaml

_ENGINE_KEYS = ("workers", "cluster", "scheduler")
_KNOWN_KEYS = ("dataset", *_ENGINE_KEYS, "steps")
_ON_ENGINE = ("scan", "tissue", "tile", "cache", "curate", "import tiles", "import masks")
_STEPS: Mapping[str, tuple[str, ...]] = {
    "scan": ("slides",),
    "import coordinates": ("files",),
    "import h5": ("folder",),
    "import tiles": ("source",),
    "import masks": ("folder",),
    "tissue": (),
    "select": (),
    "tile": (),
    "cache": (),
    "curate": (),
    "verify": (),
    "report": (),
    "train": (),
    "train export": ("run", "out"),
    "evaluate generate": (),
    "evaluate measure": (),
    "evaluate report": (),
}
"""Steps with the keys that are no options: they stand bare on the command line, in this order."""
_WITHOUT_DATASET = ("train", "train export", "evaluate generate", "evaluate measure",
                    "evaluate report")  # fmt: skip
_LAUNCHED = ("train", "evaluate generate")
"""Steps that may be several processes, by torchrun."""


@dataclass(frozen=True)
class Step:
    """One command: its name, its values as the file states them, its arguments."""

    name: str
    values: Mapping[str, Any] = field(default_factory=dict)
    arguments: tuple[str, ...] = ()

    @property
    def room(self) -> str:
        """`pipeline`, `train` or `evaluate`."""
        first = self.name.split()[0]
        return first if first in ("train", "evaluate") else "pipeline"

    @property
    def processes(self) -> int:
        """How many processes torchrun starts; 1 is one without torchrun."""
        return int(self.values.get("processes", 1))

    @property
    def dataset(self) -> Path | None:
        """The dataset that the step works on, where it is one of the pipeline's."""
        text = self.values.get("dataset")
        return Path(str(text)) if text is not None and self.room == "pipeline" else None

    def command(self) -> list[str]:
        """The whole command line, Python first."""
        launcher = ["-m", self.room]
        if self.processes > 1:
            launcher = ["-m", "torch.distributed.run", "--standalone",
                        f"--nproc-per-node={self.processes}", *launcher]  # fmt: skip
        return [sys.executable, *launcher, *self.arguments]

    def __str__(self) -> str:
        launcher = f"torchrun --nproc-per-node={self.processes}" if self.processes > 1 else "python"
        return " ".join([launcher, "-m", self.room, *self.arguments])


@dataclass(frozen=True)
class Recipe:
    """All steps, in their order."""

    path: Path
    steps: tuple[Step, ...]


def load_recipe(path: Path, engine: Mapping[str, Any] | None = None) -> Recipe:
    """The recipe of a file; `engine` (workers, cluster or scheduler) comes over the file's own.

    Every step of the pipeline is checked against its command's options. Raises `UserError`
    naming file, step and key.
    """
    try:
        read = load_yaml(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        text = " ".join(str(error).split())[:200]
        raise UserError(f"{path}: cannot be read ({text})") from None
    if not isinstance(read, dict) or not isinstance(read.get("steps"), list) or not read["steps"]:
        raise UserError(f"{path}: expected a key 'steps' with a list of steps (docs/operations.md)")
    for key in read:
        if key not in _KNOWN_KEYS:
            raise UserError(f"{path}: unknown key '{key}'{_nearest(key, _KNOWN_KEYS)}")
    own = {k: v for k, v in read.items() if k in _ENGINE_KEYS and v is not None}
    shared = {"dataset": read.get("dataset")} | (dict(engine) if engine else own)
    try:
        steps = tuple(_step(one, shared) for one in read["steps"])
        _check(steps)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return Recipe(path, steps)


def _nearest(key: object, known: Any) -> str:
    near = difflib.get_close_matches(str(key), list(known), 1)
    return f" (did you mean {near[0]}?)" if near else f"; known are {', '.join(known)}"


def _step(one: object, shared: Mapping[str, Any]) -> Step:
    values: Any = {}
    if isinstance(one, str):
        name = one
    elif isinstance(one, dict) and len(one) == 1:
        name, values = next(iter(one.items()))
    else:
        raise UserError(f"step {str(one)[:80]!r}: expected one command, such as 'scan: {{...}}'")
    if name not in _STEPS:
        raise UserError(f"step '{name}' is no command{_nearest(name, _STEPS)}")
    if values is None:
        values = {}
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise UserError(f"step '{name}': expected options as 'key: value'")
    merged = dict(values)
    if name not in _WITHOUT_DATASET:
        merged.setdefault("dataset", shared["dataset"])
    if name in _ON_ENGINE and not any(key in merged for key in _ENGINE_KEYS):
        merged |= {key: value for key, value in shared.items() if key in _ENGINE_KEYS}
    merged = {key: value for key, value in merged.items() if value is not None}
    return Step(name, merged, tuple(_arguments(name, merged)))


def _arguments(name: str, values: Mapping[str, Any]) -> list[str]:
    """The command's words, its bare values, its options."""
    bare = _STEPS[name]
    words = name.split()
    words = words[1:] if words[0] in ("train", "evaluate") else words
    options: list[str] = []
    for key, value in values.items():
        if key == "processes":
            _check_processes(name, value)
        elif key not in bare:
            options += _option(name, key, value)
    placed = []
    for key in bare:
        if key not in values:
            raise UserError(f"step '{name}' has no '{key}'")
        placed += _texts(name, key, values[key])
    return [*words, *options, *(["--", *placed] if placed else [])]


def _option(name: str, key: str, value: Any) -> list[str]:
    if name == "train" and key not in ("config", "resume", "device"):
        return [f"{key}={_one_text(name, key, value)}"]
    # One word each: a value that begins with '-' is a value all the same.
    flag = f"--{key.replace('_', '-')}"
    if value is True:
        return [flag]
    if value is False:
        return []
    return [f"{flag}={text}" for text in _texts(name, key, value)]


def _texts(name: str, key: str, value: Any) -> list[str]:
    parts = value if isinstance(value, list) else [value]
    return [_one_text(name, key, part) for part in parts]


def _one_text(name: str, key: str, value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float | str):
        text = str(value)
        if "\0" not in text:
            return text
    if isinstance(value, list | dict) and name == "train":
        return yaml.safe_dump(value, default_flow_style=True, width=10**6).strip()
    raise UserError(f"step '{name}': {key} is {str(value)[:80]!r}, expected a text or a number")


def _check_processes(name: str, value: Any) -> None:
    if name not in _LAUNCHED:
        raise UserError(f"step '{name}' is one process: leave 'processes' out")
    if type(value) is not int or value < 1:
        raise UserError(f"step '{name}': processes is {value!r}, expected 1 or more")


def _check(steps: tuple[Step, ...]) -> None:
    """Let the commands' own parser judge the steps of this room, before any of them runs."""
    from pipeline.__main__ import make_parser

    parse: Callable[[list[str]], object] = make_parser().parse_args
    for number, step in enumerate(steps, 1):
        if step.room == "pipeline":
            try:
                parse(list(step.arguments))
            except UserError as error:
                raise UserError(f"step {number} ({step.name}): {error}") from None
            except SystemExit:
                raise UserError(f"step {number} ({step.name}): 'help' is no option here") from None
