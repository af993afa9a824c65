"""`pipeline scan`."""

import argparse

from common.options import add_config_options, config_from_options
from pipeline.commands.options import add_dataset, add_engine, engine_config
from pipeline.slides.config import ScanConfig

HELP = "open slides and record them in slides.parquet"


def add_options(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    add_config_options(parser, ScanConfig)
    add_dataset(parser)
    add_engine(parser, array=True)


def run(options: argparse.Namespace) -> int:
    """Run the stage."""
    from pipeline.dataset import Dataset
    from pipeline.slides.scan import scan

    config = config_from_options(ScanConfig, options)
    return scan(Dataset(options.dataset), config, engine_config(options))
