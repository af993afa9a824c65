"""`pipeline cache`."""

import argparse

from common.options import add_config_options, config_from_options
from pipeline.commands.options import add_dataset, add_engine, engine_config
from pipeline.features.config import CacheConfig
from pipeline.options import CACHE_TIMEOUT_S

HELP = "write an encoder's CLS and patch tokens for selections"


def add_options(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    add_config_options(parser, CacheConfig)
    parser.add_argument(
        "--dry-run", action="store_true", help="print files, bytes and hours, compute nothing"
    )
    add_dataset(parser)
    add_engine(parser, array=True, slide_timeout_s=CACHE_TIMEOUT_S)


def run(options: argparse.Namespace) -> int:
    """Run the stage."""
    from pipeline.dataset import open_dataset
    from pipeline.features.stage import cache

    config = config_from_options(CacheConfig, options)
    return cache(
        open_dataset(options.dataset), config, engine_config(options), dry_run=options.dry_run
    )
