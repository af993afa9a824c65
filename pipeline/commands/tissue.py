"""`pipeline tissue`."""

import argparse

from common.options import add_config_options, config_from_options
from pipeline.commands.options import add_dataset, add_engine, engine_config
from pipeline.tissue.config import TissueConfig

HELP = "find tissue, draw overlays, rank the candidate tiles"


def add_options(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    add_config_options(parser, TissueConfig)
    add_dataset(parser)
    add_engine(parser, array=True)


def run(options: argparse.Namespace) -> int:
    """Run the stage."""
    from pipeline.dataset import open_dataset
    from pipeline.tissue.stage import tissue

    config = config_from_options(TissueConfig, options)
    return tissue(open_dataset(options.dataset), config, engine_config(options))
