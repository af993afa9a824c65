"""`pipeline scan`."""

import argparse

from pipeline.commands.options import (
    add_dataset,
    add_engine,
    add_stage_in,
    count,
    engine_config,
    mpp,
    mpp_tolerance,
    stage_in,
)

HELP = "open slides and record them in slides.parquet"


def add_options(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument(
        "inputs", nargs="+", metavar="SLIDES",
        help="folders, files, globs, a CSV with a path column, or a GDC manifest",
    )  # fmt: skip
    add_dataset(parser)
    parser.add_argument("--mpp", type=mpp, default=0.5, help="target µm per pixel (0.5)")
    parser.add_argument("--mpp-tolerance", type=mpp_tolerance, default=0.02, help="relative (0.02)")
    parser.add_argument("--tile-px", type=count, default=224, help="tile side in pixels (224)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the rank order (0)")
    parser.add_argument("--assume-mpp", type=mpp, help="µm per pixel where a slide states none")
    parser.add_argument(
        "--reader", default="auto", choices=("auto", "native", "openslide", "tiffslide"),
        help="auto: native where its pixels are OpenSlide's, else OpenSlide, else tiffslide",
    )  # fmt: skip
    parser.add_argument("--sha256", action="store_true", help="recognise slides by their sha256")
    add_stage_in(parser)
    add_engine(parser, array=True)


def run(options: argparse.Namespace) -> int:
    """Run the stage."""
    from pipeline.dataset import Dataset
    from pipeline.slides.scan import ScanConfig, scan

    config = ScanConfig(
        inputs=tuple(options.inputs),
        mpp=options.mpp,
        mpp_tolerance=options.mpp_tolerance,
        tile_px=options.tile_px,
        seed=options.seed,
        assume_mpp=options.assume_mpp,
        reader=options.reader,
        sha256=options.sha256,
        stage_in=stage_in(options),
    )
    return scan(Dataset(options.dataset), config, engine_config(options))
