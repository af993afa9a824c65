"""The options of `python -m evaluate generate`; nothing heavy is imported for them."""

import argparse
from dataclasses import fields
from pathlib import Path
from typing import get_args

from common.errors import UserError
from model.sampler_settings import SamplerSettings, Solver


def add_generate_options(command: argparse.ArgumentParser) -> None:
    """Add the command's options to its parser."""
    _add_model(command)
    _add_guidance(command)
    _add_sampler(command)
    machine = command.add_argument_group("machine").add_argument
    machine("--device", choices=("auto", "cpu", "cuda"), default="auto",
            help="where the networks run; auto is a GPU where there is one")  # fmt: skip
    machine("--dtype", choices=("auto", "float32", "bfloat16"), default="auto",
            help="dtype of the network; auto is bfloat16 on a GPU and float32 on a CPU (released "
            "models: as published)")  # fmt: skip
    machine("--compile", action="store_true", help="compile the network first; pays on a GPU")


def _add_model(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("--model", help="exported model: a directory or a hub id; with --generator cytosyn or "
        "pixcell a downloaded copy, else the published one")  # fmt: skip
    add("--out", type=Path, required=True, help="synthetic dataset, new or begun")
    add("--generator", choices=("own", "cytosyn", "pixcell"), default="own",
        help="whose model: this project's, the released CytoSyn or PixCell-256 (both untested on "
        "their gated weights)")  # fmt: skip
    add("--trust-remote-code", action="store_true",
        help="run the code that a released model brings with it")  # fmt: skip
    add("--pipeline-code", metavar="WHERE", help="PixCell's code, if a local copy")
    add("--vae", metavar="WHERE", help="PixCell's VAE, if a local copy; none: bundled")


def _add_guidance(command: argparse.ArgumentParser) -> None:
    add = command.add_argument_group(
        "guidance: one of --guidance, --slide, --images, --unconditional"
    ).add_argument
    add("--guidance", type=Path, metavar="DATASET", help="real dataset that guides")
    add("--selection", metavar="NAME", help="its selection that guides")
    add("--encoder", help="whose features guide: the model's own, or h0-mini")
    add("--slide", type=Path, metavar="FILE", help="slide whose tiles guide")
    add("--at", action="append", metavar="X,Y",
        help="upper left corner of a tile on the slide, in level-0 pixels; may be repeated",
        )  # fmt: skip
    add("--slide-mpp", type=float, metavar="MPP",
        help="µm per pixel of a slide that does not record them")  # fmt: skip
    add("--images", nargs="+", metavar="FILE",
        help="image files of the model's tile size that guide")  # fmt: skip
    add("--images-mpp", type=float, metavar="MPP", help="µm per pixel of the image files")
    add("--weights", help="the encoder's weights for --slide and --images, if not those that the "
        "model records: hub, a file or random:SEED")  # fmt: skip
    add("--unconditional", action="store_true", help="guide by nothing, with --count")
    add("--count", type=int, metavar="N", help="number of images, with --unconditional")
    add("--limit", type=int, metavar="N", help="use only the first N conditions")
    add("--variations", type=int, default=1, metavar="K", help="images per condition")
    add("--mean", nargs="?", const="all", choices=("all", "slide"),
        help="guide by the mean feature of the selection or tiles; `slide`: of each of its slides",
        )  # fmt: skip
    add("--interpolate", nargs=2, action="append", metavar=("A", "B"),
        help="guide by points between two tiles: SLIDE_ID:RANK of --guidance, x,y on --slide, or "
        "two image files; may be repeated")  # fmt: skip
    # The places of the CytoSyn report's Figure 3 (arXiv 2603.18089).
    add("--factors", default="0.2,0.4,0.6,0.8", help="places between A (0) and B (1)")
    add("--kind", choices=("slerp", "lerp"), default="slerp",
        help="way from A to B: along the arc or the straight line")  # fmt: skip
    add("--force", action="store_true", help="let features guide that do not fit the model")


def _add_sampler(command: argparse.ArgumentParser) -> None:
    add = command.add_argument_group("sampler (by default as published)").add_argument
    for setting in fields(SamplerSettings):
        is_number = setting.type in (int, float)
        add(
            f"--{setting.metadata['option']}",
            type=setting.type if is_number else str,
            choices=None if is_number else get_args(Solver),
            help=setting.metadata["help"],
        )
    add("--seed", type=int, default=0, help="seed of the dataset; each image's derives from it")
    add("--batch", type=int, default=16, help="images per call; part of the dataset's identity")
    add("--sweep", nargs="+", metavar="KEY=A,B",
        help="a grid of settings with the same seeds, one dataset per point under --out, and a "
        "table: steps=20,50 solver=sde,ode scale=1.5,2.5 low= high=")  # fmt: skip


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
