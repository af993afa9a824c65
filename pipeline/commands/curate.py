"""`pipeline curate`."""

import argparse

from common.options import add_config_options, config_from_options
from pipeline.commands.options import add_dataset, add_engine, engine_config
from pipeline.selection.config import CurateConfig

HELP = "find tiles with artifacts by a linear classifier on cached features"


def add_options(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    add_config_options(parser, CurateConfig)
    add_dataset(parser)
    add_engine(parser)


def run(options: argparse.Namespace) -> int:
    """Run the stage."""
    from pipeline.dataset import open_dataset
    from pipeline.selection.curate import curate

    config = config_from_options(CurateConfig, options)
    return curate(open_dataset(options.dataset), config, engine_config(options))
