"""A protocol's configuration: what is compared with what, by which encoders and metrics.

`NAME.yaml` in this folder is the protocol as the paper has it; the user's YAML (where datasets
and models are) and `key=value` texts override it. What they change of the protocol itself is
recorded as its deviations, so that no number passes for the paper's that is not.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from common.config import build_config, read_yaml, to_plain_values, with_overrides
from common.errors import UserError
from evaluate.metrics.metric import MetricSettings
from evaluate.metrics.registry import METRICS

HERE = Path(__file__).parent
Control = Literal["floor-tile", "floor-patient", "vae", "neighbour"]
SWEPT_KEYS = ("steps", "solver", "seed")
"""Keys of a generation that are lists: one dataset for each point of their grid."""
Deviation = tuple[object, object]
"""A value as shipped and as used."""

_PLACES = frozenset(
    {"dataset", "out", "device", "launcher", "cache_options", "leave_out", "weights",
     "encoder_weights", "top", "tiles", "published_model", "published_table"}
)  # fmt: skip
"""Keys that say where and how, not what: changing them is no deviation."""
_SPEC_PLACES = frozenset(
    {
        "dataset",
        "selection",
        "model",
        "trust_remote_code",
        "pipeline_code",
        "vae",
        "batch",
        "revision",
        "subfolder",
    }
)
_FEWEST_TILES = 8


@dataclass(frozen=True)
class TileSet:
    """Real tiles: a selection of a dataset ("": the protocol's), of which `count` are used.

    `count` 0 is the protocol's, -1 is all. `tile_px` chooses another size
    in pixels than the dataset's.
    """

    dataset: str = ""
    selection: str = ""
    tile_px: int | None = None
    count: int = 0


@dataclass(frozen=True)
class ModelSpec:
    """Which model makes images; `encoder` is whose features condition it."""

    generator: Literal["own", "cytosyn", "pixcell"] = "own"
    model: str = ""
    encoder: str = "h0-mini"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    trust_remote_code: bool = False
    pipeline_code: str = ""
    vae: str = ""
    vae_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    revision: str = ""
    subfolder: str = ""


@dataclass(frozen=True)
class GenerationSpec:
    """Images to make: by which model, guided by which set ("": unconditional), how.

    `steps`, `solver` and `seed` are lists; more than one value makes a dataset for each point of
    their grid. `guidance_view` and `guidance_px` choose the features of the guiding tiles.
    `dataset` names an existing synthetic dataset instead; how it was made is compared with the
    rest, and each difference is a deviation.
    """

    takes_single_values: ClassVar[bool] = True

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
class TableRow:
    """One row of the tables: what is compared with every column's real tiles, by which metrics.

    `generated` names a generation or a set; `{column}` in it is replaced by the column's set.
    The views are those of the features; `real_px` is the size of the real tiles, if not their
    dataset's. `columns` and `encoders` limit the row to some of the protocol's (empty: all).
    `published` is what the report calls the row; `{model}` in it is `published_model`, `{steps}`
    the steps of the images.
    """

    takes_single_values: ClassVar[bool] = True

    label: str
    generated: str
    metrics: tuple[str, ...] = ()
    generated_view: str = ""
    real_view: str = ""
    real_px: int | None = None
    columns: tuple[str, ...] = ()
    encoders: tuple[str, ...] = ()
    published: str = ""
    note: str = ""

    def source_in(self, column: str) -> str:
        """The row's images in a column. Raises `UserError` for other text in braces.

        >>> TableRow("Model", "from-{column}").source_in("val-in")
        'from-val-in'
        """
        try:
            return self.generated.format(column=column)
        except (LookupError, ValueError, AttributeError):
            raise UserError(
                f"row '{self.label}': generated is '{self.generated}'; in braces only {{column}} "
                "may stand, for the column's set"
            ) from None


@dataclass(frozen=True)
class Protocol:
    """A whole protocol. `columns` are the sets that everything is compared with."""

    takes_single_values: ClassVar[bool] = True

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
    rows: tuple[TableRow, ...] = ()
    settings: MetricSettings = field(default_factory=MetricSettings)
    published_model: str = ""
    published_table: str = ""
    deviations: dict[str, Deviation] = field(default_factory=dict, metadata={"derived": True})

    def weights_of(self, encoder: str) -> str:
        """Where an encoder's weights are: its entry NAME=WHERE, or `weights`."""
        by_encoder = dict(text.partition("=")[::2] for text in self.encoder_weights)
        return by_encoder.get(encoder, self.weights)

    def row_sources(self) -> list[str]:
        """The sets and generations that the rows compare, in order of their first use."""
        named = [row.source_in(column) for row in self.rows for column in self.columns_of(row)]
        return list(dict.fromkeys(named))

    def columns_of(self, row: TableRow) -> list[str]:
        """The columns that a row has numbers in: the protocol's, of its own where it names any."""
        return [one for one in self.columns if not row.columns or one in row.columns]


def protocol_names() -> list[str]:
    """The protocols that exist.

    >>> "table2" in protocol_names()
    True
    """
    return sorted(path.stem for path in HERE.glob("*.yaml"))


def load_protocol(name: str, config: Path | None = None, overrides: Sequence[str] = ()) -> Protocol:
    """The protocol of that name, overridden by the user's YAML and `key=value` texts.

    Raises `UserError` naming the key for an unknown one, a value of another type, or a name that
    does not exist.

    >>> load_protocol("table2", None, ["count=1000"]).deviations
    {'count': (100000, 1000)}
    """
    if name not in protocol_names():
        raise UserError(f"no protocol '{name}'; there are {', '.join(protocol_names())} and all")
    return build_protocol(name, read_yaml(config) if config else {}, overrides)


def build_protocol(name: str, values: Mapping[str, Any], overrides: Sequence[str] = ()) -> Protocol:
    """The shipped protocol of that name under the user's values and `key=value` texts."""
    # Both are built alike, so that a deviation is a difference of values and not of spelling.
    shipped = read_shipped(name)
    merged = _merge_values(shipped, values)
    protocol = build_config(Protocol, with_overrides(merged, _expand_stars(overrides, merged)))
    as_shipped = build_config(Protocol, shipped)
    _check_names(protocol, as_shipped)
    deviations = _find_deviations(as_shipped, protocol)
    columns = tuple(name for name in protocol.columns if name not in protocol.leave_out)
    return replace(protocol, columns=columns, deviations=deviations)


def _expand_stars(overrides: Sequence[str], values: Mapping[str, Any]) -> list[str]:
    """`generations.*.steps=3` means that override of every generation."""
    expanded: list[str] = []
    for text in overrides:
        section, star, rest = text.partition(".*.")
        if star and "=" not in section:
            expanded += [f"{section}.{name}.{rest}" for name in values.get(section, {})]
        else:
            expanded.append(text)
    return expanded


def read_shipped(name: str) -> dict[str, Any]:
    """A shipped YAML, over the one that its `base` names."""
    values = read_yaml(HERE / f"{name}.yaml")
    base = values.pop("base", None)
    return {**(_merge_values(read_shipped(str(base)), values) if base else values), "name": name}


def _merge_values(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Nested mappings merged key by key; lists and values are replaced whole."""
    result = dict(below)
    for key, value in above.items():
        old = result.get(key)
        both = isinstance(old, Mapping) and isinstance(value, Mapping)
        result[key] = _merge_values(old, value) if both else value  # type: ignore[arg-type]
    return result


def _check_names(protocol: Protocol, shipped: Protocol) -> None:
    """Refuse names that do not exist, before anything is computed."""
    if protocol.count < _FEWEST_TILES:
        raise UserError(f"count is {protocol.count}; expected {_FEWEST_TILES} tiles or more")
    columns = (*protocol.columns, *([protocol.train] if protocol.train else []))
    _require_names(columns, protocol.sets, "columns and train", "set")
    models_and_columns = [*protocol.models, *protocol.columns]
    _require_names(protocol.leave_out, models_and_columns, "leave_out", "model or column")
    for name, spec in protocol.generations.items():
        where = f"generations.{name}"
        _require_names([spec.model], protocol.models, f"{where}.model", "model")
        _require_names([spec.guidance] if spec.guidance else [], protocol.sets,
                 f"{where}.guidance", "set")  # fmt: skip
        # An existing dataset is a single point: it cannot be swept.
        for key in SWEPT_KEYS if spec.dataset else ():
            values = getattr(spec, key)
            if len(values) > 1:
                raise UserError(
                    f"{where}.dataset is one set of images, {key} has {len(values)} values; name "
                    "the one that they were made with"
                )
    sources = protocol.sets | protocol.generations
    for row in protocol.rows:
        where = f"row '{row.label}'"
        named = [row.source_in(column) for column in protocol.columns]
        _require_names(named, sources, where, "set or generation")
        _require_names(row.metrics, METRICS, where, "metric")
        _require_names(row.columns, protocol.sets, f"{where}.columns", "set")
        # Of those that are shipped some may not be used now.
        encoders = dict.fromkeys((*protocol.encoders, *shipped.encoders))
        _require_names(row.encoders, encoders, f"{where}.encoders", "encoder of this protocol")


def _require_names(named: Iterable[str], known: Collection[str], where: str, kind: str) -> None:
    for name in named:
        if name not in known:
            there = ", ".join(known) or "none"
            raise UserError(f"{where}: no {kind} '{name}'; there are {there}")


def _find_deviations(shipped: Protocol, used: Protocol) -> dict[str, Deviation]:
    """What was changed of the protocol itself: key to (as shipped, as used)."""
    first, second = (
        _flatten_values(to_plain_values(shipped)),
        _flatten_values(to_plain_values(used)),
    )
    return {
        key: (first.get(key), second.get(key))
        for key in sorted(first.keys() | second.keys())
        if first.get(key) != second.get(key) and not _is_place(key)
    }


def _is_place(key: str) -> bool:
    sections = key.split(".")
    is_spec = sections[0] in ("sets", "models", "generations")
    return sections[0] in _PLACES or (is_spec and sections[-1] in _SPEC_PLACES)


def _flatten_values(values: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for key, value in values.items():
        nested = isinstance(value, Mapping)
        flat |= _flatten_values(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}  # type: ignore[arg-type]
    return flat
