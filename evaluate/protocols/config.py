"""A protocol's configuration: what is compared with what, by which encoders and metrics.

`NAME.yaml` in this folder is the protocol as the paper has it; a person's own YAML (where the
datasets and models are) and `key=value` texts lie over it. What they change of the protocol
itself is kept as its deviations, so that no number is taken for the paper's that is not.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from common.config import build, plain, read_yaml, with_overrides
from common.errors import UserError
from common.plain_yaml import load_yaml
from evaluate.metrics.metric import MetricSettings
from evaluate.metrics.registry import METRICS

HERE = Path(__file__).parent
Control = Literal["floor-tile", "floor-patient", "vae", "neighbour"]
T = TypeVar("T")

_SECTIONS = ("sets", "models", "generations", "rows", "settings", "published")
_PLACES = frozenset(
    {"dataset", "out", "device", "launcher", "cache_options", "leave_out", "weights",
     "encoder_weights", "top", "tiles"}
)  # fmt: skip
"""Keys that say where and how, not what: changing them is no deviation."""
_SPEC_PLACES = frozenset(
    {"dataset", "selection", "model", "trust_remote_code", "pipeline_code", "vae", "batch"}
)


@dataclass(frozen=True)
class TileSet:
    """Real tiles: a selection of a dataset ("": the protocol's), of which `count` are taken.

    `count` 0 is the protocol's, -1 is all. `tile_px` asks for another size than the dataset's own.
    """

    dataset: str = ""
    selection: str = ""
    tile_px: int | None = None
    count: int = 0


@dataclass(frozen=True)
class ModelSpec:
    """Who makes images; `encoder` is whose features condition it."""

    generator: Literal["own", "cytosyn", "pixcell"] = "own"
    model: str = ""
    encoder: str = "h0-mini"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    trust_remote_code: bool = False
    pipeline_code: str = ""
    vae: str = ""


@dataclass(frozen=True)
class GenerationSpec:
    """Images to make: by which model, guided by which set ("": unconditional), how.

    `steps`, `solver` and `seed` are lists; more than one value makes a dataset for each point of
    their grid. `guidance_view` and `guidance_px` say how the guiding tiles were seen. `dataset`
    names a synthetic dataset that exists already instead; how it was made is compared with
    the rest, and each difference is a deviation.
    """

    model: str = "model"
    guidance: str = ""
    guidance_view: str = ""
    guidance_px: int | None = None
    count: int = 0
    solver: tuple[str, ...] = ()
    steps: tuple[int, ...] = ()
    seed: tuple[int, ...] = (0,)
    scale: float | None = None
    low: float | None = None
    high: float | None = None
    batch: int = 16
    dataset: str = ""


@dataclass(frozen=True)
class Row:
    """One row of the tables: what is held against every column's real tiles, by which metrics.

    `generated` names a generation or a set; `{column}` in it stands for the column's set. The
    views are those of the features; `real_px` is the size of the real tiles, if not their
    dataset's own.
    """

    label: str
    generated: str
    metrics: tuple[str, ...] = ()
    generated_view: str = ""
    real_view: str = ""
    real_px: int | None = None
    note: str = ""


@dataclass(frozen=True)
class Protocol:
    """A whole protocol. `columns` are the sets that everything is held against."""

    name: str
    title: str = ""
    source: str = ""
    dataset: str = ""
    out: str = "protocols"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    launcher: str = ""
    cache_options: tuple[str, ...] = ()
    leave_out: tuple[str, ...] = ()
    count: int = 100_000
    encoders: tuple[str, ...] = ()
    weights: str = "hub"
    encoder_weights: tuple[str, ...] = ()
    dtype: Literal["float32", "bfloat16"] = "float32"
    columns: tuple[str, ...] = ()
    train: str = ""
    relative_to: str = ""
    controls: tuple[Control, ...] = ("floor-tile", "floor-patient", "vae", "neighbour")
    tables: tuple[str, ...] = ()
    varies: tuple[str, ...] = ()
    plots: tuple[str, ...] = ()
    groups: tuple[str, ...] = ("project", "site")
    group_tiles: int = 500
    kind: Literal["tables", "memorisation"] = "tables"
    top: int = 50
    tiles: int = 12
    sets: dict[str, TileSet] = field(default_factory=dict)
    models: dict[str, ModelSpec] = field(default_factory=dict)
    generations: dict[str, GenerationSpec] = field(default_factory=dict)
    rows: tuple[Row, ...] = ()
    settings: MetricSettings = field(default_factory=MetricSettings)
    published: dict[str, Any] = field(default_factory=dict)
    deviations: dict[str, tuple[Any, Any]] = field(default_factory=dict)

    def weights_of(self, encoder: str) -> str:
        """Where an encoder's weights are: its own entry NAME=WHERE, or `weights`."""
        own = dict(text.partition("=")[::2] for text in self.encoder_weights)
        return own.get(encoder, self.weights)


def names() -> list[str]:
    """The protocols that there are."""
    return sorted(path.stem for path in HERE.glob("*.yaml"))


def load(name: str, config: Path | None = None, overrides: Sequence[str] = ()) -> Protocol:
    """The protocol of that name with a person's YAML and `key=value` texts over it.

    Raises `UserError` naming the key for an unknown one, a value of another type, or a name that
    nothing bears.
    """
    if name not in names():
        raise UserError(f"no protocol '{name}'; there are {', '.join(names())}")
    base: dict[str, Any] = _with_base(name)
    mine = read_yaml(config) if config else {}
    published = _built(base)
    merged = _merged(base, mine)
    changed = _built(with_overrides(merged, _expanded(overrides, merged)))
    _check(changed)
    return replace(changed, deviations=_deviations(published, changed))


def _expanded(overrides: Sequence[str], values: Mapping[str, Any]) -> list[str]:
    """`generations.*.steps=3` stands for that override of every generation."""
    found: list[str] = []
    for text in overrides:
        section, star, rest = text.partition(".*.")
        if star and "=" not in section:
            found += [f"{section}.{name}.{rest}" for name in values.get(section, {})]
        else:
            found.append(text)
    return found


def _with_base(name: str) -> dict[str, Any]:
    """A shipped YAML over the one that its `base` names."""
    values = read_yaml(HERE / f"{name}.yaml")
    base = values.pop("base", None)
    return {**(_merged(_with_base(str(base)), values) if base else values), "name": name}


def _merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Nested mappings laid over each other; lists and values are replaced whole."""
    result = dict(below)
    for key, value in above.items():
        old = result.get(key)
        if isinstance(old, Mapping) and isinstance(value, Mapping):
            value = _merged(old, value)
        result[key] = value
    return result


def _built(values: Mapping[str, Any]) -> Protocol:
    flat = {key: value for key, value in values.items() if key not in _SECTIONS}
    rows = values.get("rows", [])
    if not isinstance(rows, list):
        raise UserError("configuration key 'rows': expected a list of rows")
    return replace(
        build(Protocol, flat),
        sets=_section(TileSet, values, "sets"),
        models=_section(ModelSpec, values, "models"),
        generations=_section(GenerationSpec, values, "generations"),
        rows=tuple(_one(Row, row, f"rows[{i}]") for i, row in enumerate(rows)),
        settings=_one(MetricSettings, values.get("settings", {}), "settings"),
        published=dict(values.get("published", {})),
    )


def _section(cls: type[T], values: Mapping[str, Any], key: str) -> dict[str, T]:
    found = values.get(key, {})
    if not isinstance(found, Mapping):
        raise UserError(f"configuration key '{key}': expected names and their values")
    return {name: _one(cls, one, f"{key}.{name}") for name, one in found.items()}


def _one(cls: type[T], values: Any, where: str) -> T:
    if not isinstance(values, Mapping):
        raise UserError(f"configuration key '{where}': expected a section of keys")
    try:
        return build(cls, {key: _listed(cls, key, value) for key, value in values.items()})
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def _listed(cls: type, key: str, value: Any) -> Any:
    """A single value where a list is meant becomes a list of one."""
    kind = {one.name: str(one.type) for one in fields(cls)}.get(key, "")
    if not kind.startswith("tuple["):
        return value
    try:
        parsed = load_yaml(value) if isinstance(value, str) else value
    except ValueError as error:
        raise UserError(f"{key}={value}: not a YAML value: {error}") from None
    return parsed if isinstance(parsed, list) else [parsed]


def _check(protocol: Protocol) -> None:
    """Refuse names that nothing bears, before anything is computed."""
    for column in (*protocol.columns, *([protocol.train] if protocol.train else [])):
        _known(column, protocol.sets, "columns and train", "set")
    for name, one in protocol.generations.items():
        _known(one.model, protocol.models, f"generations.{name}.model", "model")
        if one.guidance:
            _known(one.guidance, protocol.sets, f"generations.{name}.guidance", "set")
        swept = [key for key in ("steps", "solver", "seed") if len(getattr(one, key)) > 1]
        if one.dataset and swept:
            raise UserError(
                f"generations.{name}.dataset is one set of images, {swept[0]} has "
                f"{len(getattr(one, swept[0]))} values; name the one that they were made with"
            )
    either = {**protocol.sets, **protocol.generations}
    for row in protocol.rows:
        for column in protocol.columns:
            name = _filled(row, column)
            _known(name, either, f"row '{row.label}'", "set or generation")
        for metric in row.metrics:
            _known(metric, METRICS, f"row '{row.label}'", "metric")
    for model in protocol.leave_out:
        _known(model, protocol.models, "leave_out", "model")
    if protocol.count < 8:
        raise UserError(f"count is {protocol.count}; expected 8 tiles or more")


def _filled(row: Row, column: str) -> str:
    """The row's images of a column. Raises `UserError` for braces that hold something else."""
    try:
        return row.generated.format(column=column)
    except (LookupError, ValueError, AttributeError):
        raise UserError(
            f"row '{row.label}': generated is '{row.generated}'; in braces only {{column}} may "
            "stand, for the column's set"
        ) from None


def _known(name: str, there: Mapping[str, Any], where: str, kind: str) -> None:
    if name not in there:
        raise UserError(f"{where}: no {kind} '{name}'; there are {', '.join(there) or 'none'}")


def _deviations(shipped: Protocol, used: Protocol) -> dict[str, tuple[Any, Any]]:
    """What was changed of the protocol itself: key to (as shipped, as used)."""
    first, second = _flat(plain(shipped)), _flat(plain(used))
    return {
        key: (first.get(key), second.get(key))
        for key in sorted(first.keys() | second.keys())
        if first.get(key) != second.get(key) and not _is_place(key)
    }


def _is_place(key: str) -> bool:
    sections = key.split(".")
    if sections[0] in _PLACES or sections[0] in ("deviations", "published"):
        return True
    return sections[0] in ("sets", "models", "generations") and sections[-1] in _SPEC_PLACES


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found
