"""`pipeline tile`."""

import argparse

from pipeline.commands.options import (
    add_dataset,
    add_engine,
    add_selections,
    add_stage_in,
    count,
    engine_config,
    stage_in,
)

HELP = "write the tile shards that selections need"


def add_options(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    add_dataset(parser)
    add_selections(parser)
    parser.add_argument("--format", default="png", choices=("png", "zarr"), help="default: png")
    parser.add_argument(
        "--png", default="small", choices=("small", "fast"),
        help="fast encodes five times as fast, 3 to 7%% larger (small)",
    )  # fmt: skip
    parser.add_argument("--resampler", default="area", choices=("area", "lanczos", "bicubic"))
    parser.add_argument(
        "--icc", default="ignore", choices=("ignore", "srgb"),
        help="srgb: apply the slide's colour profile to its tiles (ignore)",
    )  # fmt: skip
    parser.add_argument(
        "--tile-px", type=count, help="larger tiles around the same ranks (default: the dataset's)"
    )
    parser.add_argument(
        "--spool", default="", metavar="DIR", help="where tiles wait (default: in the dataset)"
    )
    add_stage_in(parser)
    add_engine(parser, array=True)


def run(options: argparse.Namespace) -> int:
    """Run the stage."""
    from pipeline.dataset import open_dataset
    from pipeline.tiles.stage import TileConfig, tile

    config = TileConfig(
        selections=tuple(options.selections),
        resampler=options.resampler,
        icc=options.icc,
        format=options.format,
        png=options.png,
        tile_px=options.tile_px,
        spool=options.spool,
        stage_in=stage_in(options),
    )
    return tile(open_dataset(options.dataset), config, engine_config(options))
