"""The configuration of a training run: typed, complete, written into the run directory.

Defaults are REPA-E's (arXiv 2504.10483 and its public training script), which the CytoSyn
report (arXiv 2603.18089, section 3.3) follows. Every key can be set in YAML or as
`section.key=value` on the command line.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from common.config import (
    build_config,
    check_setting,
    keys_given,
    read_yaml,
    to_plain_values,
    with_overrides,
    write_yaml,
)
from common.errors import UserError
from model.discriminator import DiscriminatorConfig
from model.interpolant import PathName
from model.sit import SiTConfig
from model.vae import VAEConfig
from train.losses import LossConfig, LossName
from train.modes import MODES, Mode, ModeName
from train.sizes import encoder_widths

CONFIG_VERSION = 1

Weights = Literal["ema", "raw"]
Compile = Literal["off", "inductor", "aot_eager", "eager"]


def _check_at_least(
    least: int, config: object, section: str, *names: str, expected: str = "{} or more"
) -> None:
    for name in names:
        value = getattr(config, name)
        check_setting(value >= least, f"{section}.{name}", value, expected.format(least))


@dataclass(frozen=True)
class RunConfig:
    """Where, how long and on what the run trains, in float32 or with bfloat16 networks."""

    dir: str = ""  # the run directory
    mode: ModeName = "repa-e"  # repa: frozen VAE, aligned; ldm: frozen VAE, no alignment
    seed: int = 0
    steps: int = 400_000
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["fp32", "bf16"] = "fp32"  # of the networks; losses and statistics are fp32
    recompute: bool = False  # compute activations again in the backward pass: slower, less memory
    compile: Compile = "off"  # torch.compile of each part; the others than inductor are for tests
    sync_discriminator: bool = False  # its batch norm over all processes; REPA-E: each process's

    def __post_init__(self) -> None:
        check_setting(0 <= self.seed < 2**64, "run.seed", self.seed, "a whole number in [0, 2^64)")
        check_setting(
            0 < self.steps < 2**32, "run.steps", self.steps, "a whole number in [1, 2^32)"
        )


@dataclass(frozen=True)
class DataConfig:
    """Which tiles and features, and how they are read; each count is at least 1."""

    dataset: str = ""  # a dataset directory
    selection: str = "train"
    tile_px: int = 224
    encoder: str = "h0-mini"
    view: str = ""  # preprocessing view of the features; empty is none
    tokens: Literal["float16", "int8"] = "float16"  # how the cache stores patch tokens
    batch_size: int = 256  # of all processes together
    cursors: int = 4  # places of the epoch that a slot reads in turn: more mix slides better
    threads: int = 4  # reader threads of a process
    prefetch: int = 2  # batches read ahead
    on_error: Literal["stop", "skip"] = "stop"  # what a damaged tile does

    def __post_init__(self) -> None:
        names = ("tile_px", "batch_size", "cursors", "threads", "prefetch")
        _check_at_least(1, self, "data", *names, expected="a whole number of {} or more")


@dataclass(frozen=True)
class AlignmentConfig:
    """Where the patch tokens of the alignment come from; online ones in float32 or bfloat16."""

    source: Literal["cache", "online"] = "cache"  # online: data.encoder runs in every step
    weights: str = "hub"  # of the online encoder: hub, hub:ID, a file or random:SEED
    dtype: Literal["float32", "bfloat16"] = "float32"  # in which the online encoder computes


@dataclass(frozen=True)
class ModelConfig:
    """The networks and the path between data and noise."""

    sit: SiTConfig = field(default_factory=SiTConfig)
    vae: VAEConfig = field(default_factory=VAEConfig)
    discriminator: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)
    path: PathName = "linear"

    def __post_init__(self) -> None:
        same = self.sit.latent_channels == self.vae.latent_channels
        expected = f"model.vae.latent_channels, {self.vae.latent_channels}"
        check_setting(same, "model.sit.latent_channels", self.sit.latent_channels, expected)


@dataclass(frozen=True)
class InitConfig:
    """Weights on disk to begin with; empty is from scratch, as in the report.

    Latent statistics are those of `init.sit` where it is given. With `init.vae` alone they are of
    the run's own tiles, or those that the VAE's files bring.
    """

    vae: str = ""
    sit: str = ""
    statistics: Literal["tiles", "vae"] = "tiles"  # of init.vae's latents: computed, or its own
    statistics_tiles: int = 10_000  # spread evenly over the selection; all where it has fewer

    def __post_init__(self) -> None:
        _check_at_least(1, self, "init", "statistics_tiles")


@dataclass(frozen=True)
class OptimConfig:
    """AdamW for each network, at a constant learning rate > 0 and betas in [0, 1)."""

    lr_vae: float = 1e-4
    lr_discriminator: float = 1e-4
    lr_sit: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip: float = 1.0  # largest gradient norm of each network
    accumulate: int = 1  # parts in which a process takes its tiles of a step, to save memory
    max_bad_steps: int = 10  # so many non-finite steps in a row stop the run

    def __post_init__(self) -> None:
        for name in ("lr_vae", "lr_discriminator", "lr_sit", "eps", "clip"):
            value = getattr(self, name)
            check_setting(value > 0, f"optim.{name}", value, "a number above 0")
        _check_at_least(0, self, "optim", "weight_decay", expected="a number of {} or more")
        good = all(0 <= beta < 1 for beta in self.betas)
        check_setting(good, "optim.betas", list(self.betas), "two numbers in [0, 1)")
        _check_at_least(1, self, "optim", "accumulate", "max_bad_steps")


@dataclass(frozen=True)
class EmaConfig:
    """Moving averages of the SiT (with its latent statistics) and of the VAE: decays < 1."""

    sit: float = 0.9999
    vae: float = 0.9999
    warmup: bool = False  # decay min(d, (1 + n) / (10 + n)) at update n

    def __post_init__(self) -> None:
        for name in ("sit", "vae"):
            value = getattr(self, name)
            check_setting(0 <= value < 1, f"ema.{name}", value, "a number in [0, 1)")


@dataclass(frozen=True)
class LogConfig:
    """What the run reports, and how often in steps: at least 1; `samples_every` = 0 draws none."""

    every: int = 50  # steps between lines of metrics.jsonl
    tensorboard: bool = True
    wandb: str = ""  # project of Weights & Biases to log to as well (package wandb); empty is none
    matrix_tflop_per_s: float = 0.0  # of one process's device, what MFU is of; 0 measures it
    samples_every: int = 10_000  # steps between sample grids
    samples: int = 8  # tiles of the fixed set that guide the grid
    sample_steps: int = 50
    guidance_scale: float = 2.5
    fixed_tiles: int = 16  # tiles on which the reconstruction is measured before and after
    fixed_selection: str = ""  # where they come from; empty is data.selection
    validation: tuple[str, ...] = ()  # selections whose loss on fixed noise is measured
    validation_every: int = 2_500  # steps between measurements; one before the first step as well
    validation_tiles: int = 64  # of each selection, spread evenly over it
    validation_draws: int = 4  # times and noises per tile

    def __post_init__(self) -> None:
        _check_at_least(1, self, "log", "every", "samples", "sample_steps", "fixed_tiles")
        _check_at_least(1, self, "log", "validation_every", "validation_tiles", "validation_draws")
        numbers = ("matrix_tflop_per_s", "guidance_scale")
        _check_at_least(0, self, "log", *numbers, expected="a number of {} or more")
        _check_at_least(0, self, "log", "samples_every")


@dataclass(frozen=True)
class CheckpointConfig:
    """How often, at least 1 step apart, the state is saved; always at the end and on signals."""

    every: int = 5_000  # steps
    keep: int = 3  # newest checkpoints that stay

    def __post_init__(self) -> None:
        _check_at_least(1, self, "checkpoint", "every", "keep")


@dataclass(frozen=True)
class ExportConfig:
    """Which weights the sample grids and, by default, `python -m train export` take."""

    sit: Weights = "ema"
    vae: Weights = "raw"


@dataclass(frozen=True)
class Config:
    """A training run, complete."""

    config_version: int = CONFIG_VERSION
    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    alignment: AlignmentConfig = field(default_factory=AlignmentConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    init: InitConfig = field(default_factory=InitConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    log: LogConfig = field(default_factory=LogConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    export: ExportConfig = field(default_factory=ExportConfig)

    def __post_init__(self) -> None:
        version = self.config_version
        check_setting(version == CONFIG_VERSION, "config_version", version, str(CONFIG_VERSION))
        # Sizes that do not fit would fail in the first step only, as a tensor's shape.
        latent, down = self.model.sit.latent_size, self.model.vae.downsampling
        expected = f"data.tile_px / VAE downsampling = {self.data.tile_px} / {down}"
        good = self.data.tile_px == latent * down
        check_setting(good, "model.sit.latent_size", latent, expected)
        if self.model.sit.conditioning in ("label", "label-only"):
            raise UserError(
                "configuration key 'model.sit.conditioning': datasets have no labels; "
                "expected feature or none"
            )
        flat = _flatten_keys(self.to_dict())
        for key, meaning in self.mode.required.items():
            if not flat[key]:
                raise UserError(f"run.mode={self.run.mode}: set {key} to {meaning}")

    @property
    def mode(self) -> Mode:
        """Which networks train, and by which losses."""
        return MODES[self.run.mode]

    def uses_loss(self, name: LossName) -> bool:
        """Whether the mode has that loss and its weight is > 0."""
        return name in self.mode.losses and getattr(self.loss, name, 1.0) > 0

    @property
    def fixed_selection(self) -> str:
        """The selection of the fixed tiles."""
        return self.log.fixed_selection or self.data.selection

    @property
    def uses_alignment(self) -> bool:
        """Whether a loss needs the encoder's patch tokens."""
        return self.uses_loss("vae_align") or self.uses_loss("sit_align")

    @property
    def reads_tokens(self) -> bool:
        """Whether those tokens come from the cache."""
        return self.uses_alignment and self.alignment.source == "cache"

    @property
    def tokens_kind(self) -> str:
        """The kind of features that has them."""
        return f"tokens-{self.data.tokens}"

    @property
    def uses_condition(self) -> bool:
        """Whether the run reads the encoder's CLS tokens."""
        return self.model.sit.conditioning == "feature"

    def to_dict(self) -> dict[str, Any]:
        """Nested plain values."""
        return to_plain_values(self)

    def to_yaml(self) -> str:
        """The complete configuration; `load_config` reads it back unchanged."""
        return write_yaml(self.to_dict())

    @property
    def hash(self) -> str:
        """sha256 of what decides the weights: two runs of one hash and one selection are one.

        Left out is what may change when a run is continued: its length, its machine, its dataset's
        folder (the selection's hash is compared instead), logging and checkpoints.
        """
        values = self.to_dict()
        for section in _FREE_SECTIONS:
            del values[section]
        for section, keys in _FREE_KEYS.items():
            for key in keys:
                del values[section][key]
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


_FREE_SECTIONS = ("log", "checkpoint", "export")
_FREE_KEYS = {
    "run": ("dir", "steps", "device", "recompute", "compile"),
    "data": ("dataset", "selection", "threads", "prefetch"),
    "optim": ("max_bad_steps",),
}


def load_config(path: Path | None, overrides: Iterable[str] = ()) -> Config:
    """The configuration of a YAML file with `section.key=value` overrides.

    `model.sit.condition_dim` and `token_dim` are the encoder's where they are not given. Raises
    `UserError` in one line for an unknown key (naming the nearest), a value of a wrong type or
    range, and values that do not fit together.

    Example:
        >>> load_config(None, ["run.steps=10", "optim.betas=[0.9, 0.95]"]).optim.betas
        (0.9, 0.95)
    """
    values = with_overrides(read_yaml(path) if path is not None else {}, overrides)
    config = build_config(Config, values)
    given = keys_given(values, "model", "sit")
    if given >= {"condition_dim", "token_dim"}:  # of a run's own file, which needs no dataset
        return config
    widths: dict[str, Any] = encoder_widths(config)
    missing = {key: width for key, width in widths.items() if key not in given}
    sit = replace(config.model.sit, **missing)
    return replace(config, model=replace(config.model, sit=sit))


def differing_keys(ours: Config, theirs: Config) -> list[str]:
    """Dotted keys by which two configurations are different runs, with both values."""
    free = {f"{section}.{key}" for section, keys in _FREE_KEYS.items() for key in keys}
    here, there = _flatten_keys(ours.to_dict()), _flatten_keys(theirs.to_dict())
    return [
        f"{key} is {there[key]!r} there, {value!r} here"
        for key, value in here.items()
        if value != there.get(key)
        and key not in free
        and key.partition(".")[0] not in _FREE_SECTIONS
    ]


def has_same_keys(config: Config, values: Mapping[str, object]) -> bool:
    """Whether a configuration's file has the very keys that this release writes."""
    return _flatten_keys(config.to_dict()).keys() == _flatten_keys(values).keys()


def _flatten_keys(values: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= _flatten_keys(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
