"""The options of `python -m evaluate generate`; nothing heavy is imported for them."""

import argparse
from pathlib import Path

from common.errors import UserError


def add_generate_options(it: argparse.ArgumentParser) -> None:
    """Add the command's options to its parser."""
    _add_model(it)
    _add_guidance(it)
    _add_sampler(it)
    where = it.add_argument_group("machine")
    where.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help=" ")
    where.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16"),
        default="auto",
        help="of the network; auto is bfloat16 on a GPU and float32 on a CPU (the released "
        "models': as published)",
    )
    where.add_argument(
        "--compile", action="store_true", help="compile the network first; pays on a GPU"
    )


def _add_model(it: argparse.ArgumentParser) -> None:
    it.add_argument("--model", help="exported model: a directory or a hub id; with --generator "
                    "cytosyn or pixcell a downloaded copy, else the published one")  # fmt: skip
    it.add_argument("--out", type=Path, required=True, help="synthetic dataset, new or begun")
    it.add_argument(
        "--generator",
        choices=("own", "cytosyn", "pixcell"),
        default="own",
        help="whose model: this project's, the released CytoSyn or PixCell-256 (both untested on "
        "their gated weights)",
    )
    it.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run the code that a released model brings with it",
    )
    it.add_argument("--pipeline-code", metavar="WHERE", help="PixCell's code, if a local copy")
    it.add_argument("--vae", metavar="WHERE", help="PixCell's VAE, if a local copy; none: bundled")


def _add_guidance(it: argparse.ArgumentParser) -> None:
    what = it.add_argument_group("guidance: one of --guidance, --slide, --images, --unconditional")
    what.add_argument("--guidance", type=Path, metavar="DATASET", help="real dataset that guides")
    what.add_argument("--selection", metavar="NAME", help="its selection that guides")
    what.add_argument("--encoder", help="whose features guide: the model's own, or h0-mini")
    what.add_argument("--slide", type=Path, metavar="FILE", help="slide whose tiles guide")
    what.add_argument(
        "--at",
        action="append",
        metavar="X,Y",
        help="upper left corner of a tile on the slide, in level-0 pixels; may be repeated",
    )
    what.add_argument("--slide-mpp", type=float, metavar="MPP", help="where the slide says none")
    what.add_argument("--images", nargs="+", metavar="FILE", help="image files of the model's tile "
                      "size that guide")  # fmt: skip
    what.add_argument("--images-mpp", type=float, metavar="MPP", help="resolution of image files")
    what.add_argument("--weights", help="the encoder's weights for --slide and --images, if not "
                      "where the model says: hub, a file or random:SEED")  # fmt: skip
    what.add_argument("--unconditional", action="store_true", help="guide by nothing, with --count")
    what.add_argument("--count", type=int, metavar="N", help="images, with --unconditional")
    what.add_argument("--limit", type=int, metavar="N", help="use only the first N conditions")
    what.add_argument("--variations", type=int, default=1, metavar="K", help="images per condition")
    what.add_argument(
        "--mean",
        nargs="?",
        const="all",
        choices=("all", "slide"),
        help="guide by the mean feature of the selection or tiles; `slide`: of each of its slides",
    )
    what.add_argument(
        "--interpolate",
        nargs=2,
        action="append",
        metavar=("A", "B"),
        help="guide by points between two tiles: SLIDE_ID:RANK of --guidance, x,y on --slide, or "
        "two image files; may be repeated",
    )
    what.add_argument("--factors", default="0.2,0.4,0.6,0.8", help="places between A and B")
    what.add_argument("--kind", choices=("slerp", "lerp"), default="slerp", help="way from A to B")
    what.add_argument("--force", action="store_true", help="let features guide that do not fit")


def _add_sampler(it: argparse.ArgumentParser) -> None:
    how = it.add_argument_group("sampler (where nothing is given, as published)")
    how.add_argument("--steps", type=int, help="solver steps: 250, PixCell 50")
    how.add_argument("--solver", choices=("sde", "ode", "heun", "dpm"), help="sde")
    how.add_argument("--scale", type=float, help="guidance scale: 2.5, PixCell 2.0; 1 is none")
    how.add_argument("--low", type=float, help="guide from this time on: 0")
    how.add_argument("--high", type=float, help="guide up to this time: 0.75; 1 is noise")
    how.add_argument("--seed", type=int, default=0, help="of all images; each has its own from it")
    how.add_argument("--batch", type=int, default=16, help="images a call; part of the identity")
    how.add_argument(
        "--sweep",
        nargs="+",
        metavar="KEY=A,B",
        help="a grid of settings with the same seeds, a dataset each under --out, and a table: "
        "steps=20,50 solver=sde,ode scale=1.5,2.5 low= high=",
    )


def parse_factors(text: str) -> tuple[float, ...]:
    """Read "0.2,0.4". Raises `UserError` with what was expected."""
    try:
        factors = tuple(float(part) for part in text.split(","))
    except ValueError:
        factors = ()
    if not factors or not all(0 <= factor <= 1 for factor in factors):
        raise UserError(f"--factors {text}: expected numbers from 0 to 1, such as 0.2,0.4,0.6,0.8")
    return factors
