"""`pipeline tile`."""

import argparse

from common.options import add_config_options, config_from_options
from pipeline.commands.options import add_dataset, add_engine, engine_config
from pipeline.tiles.config import TileConfig

HELP = "write the tile shards that selections need"


def add_options(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    add_config_options(parser, TileConfig)
    add_dataset(parser)
    add_engine(parser, array=True)


def run(options: argparse.Namespace) -> int:
    """Run the stage."""
    from pipeline.dataset import open_dataset
    from pipeline.tiles.stage import tile

    config = config_from_options(TileConfig, options)
    return tile(open_dataset(options.dataset), config, engine_config(options))
