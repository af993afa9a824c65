"""The options of `python -m evaluate generate`; nothing heavy is imported for them."""

import argparse
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from common.errors import UserError
from common.options import add_config_options, config_from_options, option_field, option_metadata
from model.sampler_settings import SamplerSettings


@dataclass(frozen=True)
class GenerateOptions:
    """The options of `generate` with their types, but for the sampler's settings."""

    out: Path = field(metadata=option_metadata("synthetic dataset, new or begun"))
    model: str | None = option_field(
        None,
        "exported model: a directory or a hub id; with --generator cytosyn or pixcell a downloaded "
        "copy, else the published one",
    )
    generator: Literal["own", "cytosyn", "pixcell"] = option_field(
        "own",
        "whose model: this project's, the released CytoSyn or PixCell-256 (both untested on their "
        "gated weights)",
    )
    trust_remote_code: bool = option_field(
        False, "run the code that a released model brings with it"
    )
    pipeline_code: str | None = option_field(
        None, "PixCell's code, if a local copy", metavar="WHERE"
    )
    vae: str | None = option_field(
        None, "PixCell's VAE, if a local copy; none: bundled", metavar="WHERE"
    )
    vae_dtype: Literal["auto", "float32", "bfloat16", "float16"] = option_field(
        "auto", "dtype of PixCell's VAE; auto is float32, as published"
    )
    revision: str | None = option_field(
        None, "branch, tag or commit of the released CytoSyn's repository"
    )
    subfolder: str | None = option_field(
        None, "folder of the released CytoSyn within its repository", metavar="FOLDER"
    )
    guidance: Path | None = option_field(None, "real dataset that guides", metavar="DATASET")
    selection: str | None = option_field(None, "its selection that guides", metavar="NAME")
    encoder: str | None = option_field(
        None, "whose features guide, if not the model's own or h0-mini"
    )
    slide: Path | None = option_field(None, "slide whose tiles guide", metavar="FILE")
    at: tuple[str, ...] = option_field(
        (),
        "upper left corner of a tile on the slide, in level-0 pixels; may be repeated",
        metavar="X,Y",
    )
    slide_mpp: float | None = option_field(
        None, "µm per pixel of a slide that does not record them", metavar="MPP"
    )
    images: tuple[str, ...] = option_field(
        (), "image files of the model's tile size that guide", metavar="FILE", many=True
    )
    images_mpp: float | None = option_field(None, "µm per pixel of the image files", metavar="MPP")
    weights: str | None = option_field(
        None,
        "the encoder's weights for --slide and --images, if not those that the model records: hub, "
        "a file or random:SEED",
    )
    unconditional: bool = option_field(False, "guide by nothing, with --count")
    count: int | None = option_field(None, "number of images, with --unconditional", metavar="N")
    limit: int | None = option_field(
        None,
        "use only the first N conditions (images are made in whole blocks of 16)",
        metavar="N",
    )
    variations: int = option_field(1, "images per condition", metavar="K")
    # The places of the CytoSyn report's Figure 3 (arXiv 2603.18089).
    factors: str = option_field("0.2,0.4,0.6,0.8", "places between A (0) and B (1)")
    kind: Literal["slerp", "lerp"] = option_field(
        "slerp", "way from A to B: along the arc or the straight line"
    )
    force: bool = option_field(False, "let features guide that do not fit the model")
    seed: int = option_field(0, "seed of the dataset; each image's derives from it")
    batch: int = option_field(16, "images per call; part of the dataset's identity")
    sweep: tuple[str, ...] = option_field(
        (),
        "a grid of settings with the same seeds, one dataset per point under --out, and a table: "
        "steps=20,50 solver=sde,ode scale=1.5,2.5 low= high=",
        metavar="KEY=A,B",
        many=True,
    )
    device: Literal["auto", "cpu", "cuda"] = option_field(
        "auto", "where the networks run; auto is a GPU where there is one"
    )
    dtype: Literal["auto", "float32", "bfloat16"] = option_field(
        "auto",
        "dtype of the network; auto is bfloat16 on a GPU and float32 on a CPU (released models: as "
        "published)",
    )
    compiles: bool = option_field(
        False, "compile the network first; pays on a GPU", flag="--compile"
    )
    mean: Literal["all", "slide"] | None = None
    interpolate: tuple[tuple[str, str], ...] = ()
    sampler: dict[str, Any] = field(default_factory=dict)
    """The sampler's settings by field; None where the model's published one is used."""


_GUIDANCE = ("guidance", "selection", "encoder", "slide", "at", "slide_mpp", "images",
             "images_mpp", "weights", "unconditional", "count", "limit", "variations", "factors",
             "kind", "force")  # fmt: skip
_SAMPLER = ("seed", "batch", "sweep")
_MACHINE = ("device", "dtype", "compiles")
_SETTINGS = [setting.name for setting in fields(SamplerSettings)]


def add_generate_options(command: argparse.ArgumentParser) -> None:
    """Add the command's options to its parser."""
    grouped = (*_GUIDANCE, *_SAMPLER, *_MACHINE)
    model = [setting.name for setting in fields(GenerateOptions) if setting.name not in grouped]
    add_config_options(command, GenerateOptions, only=model)
    guidance = command.add_argument_group(
        "guidance: one of --guidance, --slide, --images, --unconditional"
    )
    add_config_options(guidance, GenerateOptions, only=_GUIDANCE)
    guidance.add_argument(
        "--mean",
        nargs="?",
        const="all",
        choices=("all", "slide"),
        help="guide by the mean feature of the selection or tiles; `slide`: of each of its slides",
    )
    guidance.add_argument(
        "--interpolate",
        nargs=2,
        action="append",
        metavar=("A", "B"),
        help="guide by points between two tiles: SLIDE_ID:RANK of --guidance, x,y on --slide, or "
        "two image files; may be repeated",
    )
    sampler = command.add_argument_group("sampler (by default as published)")
    add_config_options(sampler, SamplerSettings)
    command.set_defaults(**dict.fromkeys(_SETTINGS))  # those of a released model are others
    add_config_options(sampler, GenerateOptions, only=_SAMPLER)
    machine = command.add_argument_group("machine")
    add_config_options(machine, GenerateOptions, only=_MACHINE)


def read_generate_options(options: argparse.Namespace) -> GenerateOptions:
    """The parsed options with their types."""
    return config_from_options(
        GenerateOptions,
        options,
        mean=options.mean,
        interpolate=tuple((first, second) for first, second in options.interpolate or ()),
        sampler={name: getattr(options, name) for name in _SETTINGS},
    )


def parse_factors(text: str) -> tuple[float, ...]:
    """Read "0.2,0.4", numbers in [0, 1]. Raises `UserError` with what was expected.

    >>> parse_factors("0.2,0.4")
    (0.2, 0.4)
    """
    try:
        factors = tuple(float(part) for part in text.split(","))
    except ValueError:
        factors = ()
    if not factors or not all(0 <= factor <= 1 for factor in factors):
        raise UserError(f"--factors {text}: expected numbers from 0 to 1, such as 0.2,0.4,0.6,0.8")
    return factors
