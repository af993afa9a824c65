"""A recipe: a YAML file of steps, each one command of a room with its options.

```yaml
dataset: dataset            # for every step that names no other
workers: 8                  # or cluster: FILE.yaml, or scheduler: ADDRESS
slide_timeout: 3600         # seconds; of --slide-timeout, which every step may have as well
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

import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from common.config import MOST_YAML_BYTES
from common.errors import UserError
from common.files import read_regular
from common.plain_yaml import load_yaml
from common.text import find_nearest, one_line

_ENGINE_KEYS = ("workers", "cluster", "scheduler")
_TIMEOUT_KEY = "slide_timeout"
_KNOWN_KEYS = ("dataset", *_ENGINE_KEYS, _TIMEOUT_KEY, "steps")
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
"""Steps with the keys that are no options: positional arguments, in this order."""
_WITHOUT_DATASET = ("train", "train export", "evaluate generate", "evaluate measure",
                    "evaluate report")  # fmt: skip
_LAUNCHED = ("train", "evaluate generate")
"""Steps that may be several processes (`common.launch`)."""


@dataclass(frozen=True)
class Step:
    """One command: its name, its values as the file states them, its arguments."""

    name: str
    values: Mapping[str, object] = field(default_factory=dict)
    arguments: tuple[str, ...] = ()

    @property
    def room(self) -> str:
        """`pipeline`, `train` or `evaluate`."""
        first = self.name.split()[0]
        return first if first in ("train", "evaluate") else "pipeline"

    @property
    def processes(self) -> int:
        """How many processes the step is."""
        return int(str(self.values.get("processes", 1)))

    @property
    def dataset(self) -> Path | None:
        """The dataset that the step works on, where it is one of the pipeline's."""
        text = self.values.get("dataset")
        return Path(str(text)) if text is not None and self.room == "pipeline" else None

    def option_texts(self, key: str) -> tuple[str, ...]:
        """The values of an option, given once or as a list; () where it is not given."""
        value = self.values.get(key, [])
        return tuple(map(str, value if isinstance(value, list) else [value]))

    def command(self) -> list[str]:
        """The whole command line, Python first."""
        launcher = ["-m", self.room]
        if self.processes > 1:
            launcher = ["-m", "common.launch", str(self.processes), self.room]
        return [sys.executable, *launcher, *self.arguments]

    def __str__(self) -> str:
        return " ".join(["python", *self.command()[1:]])


@dataclass(frozen=True)
class Recipe:
    """All steps, in their order."""

    path: Path
    steps: tuple[Step, ...]


def load_recipe(path: Path, engine: Mapping[str, object] | None = None) -> Recipe:
    """The recipe of a file; `engine` (workers, cluster or scheduler) overrides the file's own.

    Every step of the pipeline is checked against its command's options. Raises `UserError`
    naming file, step and key.
    """
    try:
        document = load_yaml(read_regular(path, MOST_YAML_BYTES).decode())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({one_line(error)})") from None
    if not (isinstance(document, dict) and document.get("steps")):
        document = {}
    if not isinstance(document.get("steps"), list):
        raise UserError(f"{path}: expected a key 'steps' with a list of steps (docs/operations.md)")
    # Nothing of a recipe runs before all of it was checked.
    try:
        for key in document:
            if key not in _KNOWN_KEYS:
                raise UserError(f"unknown key '{key}'{_suggest_word(key, _KNOWN_KEYS)}")
        engine = engine or {key: document.get(key) for key in _ENGINE_KEYS}
        timeout = document.get(_TIMEOUT_KEY)
        shared = {"dataset": document.get("dataset"), _TIMEOUT_KEY: timeout, **engine}
        steps = tuple(_parse_step(value, shared) for value in document["steps"])
        _check_options(steps)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return Recipe(path, steps)


def _suggest_word(word: object, known: Iterable[str]) -> str:
    close = find_nearest(str(word), known)
    return f" (did you mean {close}?)" if close else f"; known are {', '.join(known)}"


def _parse_step(step: object, shared: Mapping[str, object]) -> Step:
    values: object = {}
    if isinstance(step, str):
        name = step
    elif isinstance(step, dict) and len(step) == 1:
        name, values = next(iter(step.items()))
    else:
        raise UserError(f"step {str(step)[:80]!r}: expected one command, such as 'scan: {{...}}'")
    if name not in _STEPS:
        raise UserError(f"step '{name}' is no command{_suggest_word(name, _STEPS)}")
    values = {} if values is None else values
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise UserError(f"step '{name}': expected options as 'key: value'")
    merged = dict(values)
    if name not in _WITHOUT_DATASET:
        merged.setdefault("dataset", shared["dataset"])
    # A step that states where it runs is not given the shared place as well.
    if name in _ON_ENGINE and not any(key in merged for key in _ENGINE_KEYS):
        merged |= {key: value for key, value in shared.items() if key in _ENGINE_KEYS}
    if name in _ON_ENGINE and "slide-timeout" not in merged:
        merged.setdefault(_TIMEOUT_KEY, shared[_TIMEOUT_KEY])
    merged = {key: value for key, value in merged.items() if value is not None}
    return Step(name, merged, tuple(_make_arguments(name, merged)))


def _make_arguments(name: str, values: Mapping[str, object]) -> list[str]:
    """The command's words, its options, its positional arguments."""
    positional = _STEPS[name]
    words = name.split()
    words = words[1:] if words[0] in ("train", "evaluate") else words
    for key, value in values.items():
        if key == "processes":
            if name not in _LAUNCHED:
                raise UserError(f"step '{name}' is one process: leave 'processes' out")
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise UserError(f"step '{name}': processes is {value!r}, expected 1 or more")
        elif key not in positional:
            words += _make_option(name, key, value)
    if missing := [key for key in positional if key not in values]:
        raise UserError(f"step '{name}' has no '{missing[0]}'")
    placed = [text for key in positional for text in _texts_of(name, key, values[key])]
    return [*words, *(["--", *placed] if placed else [])]


def _make_option(name: str, key: str, value: object) -> list[str]:
    if name == "train" and key not in ("config", "resume", "device"):
        return [f"{key}={_text_of(name, key, value)}"]
    if isinstance(value, bool):
        return [f"--{key.replace('_', '-')}"] if value else []
    # One word each: a value that begins with '-' is a value all the same.
    return [f"--{key.replace('_', '-')}={text}" for text in _texts_of(name, key, value)]


def _texts_of(name: str, key: str, value: object) -> list[str]:
    parts = value if isinstance(value, list) else [value]
    return [_text_of(name, key, part) for part in parts]


def _text_of(name: str, key: str, value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float | str) and "\0" not in str(value):
        return str(value)
    if isinstance(value, list | dict) and name == "train":
        return yaml.safe_dump(value, default_flow_style=True, width=10**6).strip()
    raise UserError(f"step '{name}': {key} is {str(value)[:80]!r}, expected a text or a number")


def _check_options(steps: tuple[Step, ...]) -> None:
    """Let the commands' own parser check the steps of this room, before any of them runs."""
    from pipeline.__main__ import make_parser

    parser = make_parser()
    for number, step in enumerate(steps, 1):
        if step.room == "pipeline":
            try:
                parser.parse_args(list(step.arguments))
            except UserError as error:
                raise UserError(f"step {number} ({step.name}): {error}") from None
            except SystemExit:
                raise UserError(f"step {number} ({step.name}): 'help' is no option here") from None
