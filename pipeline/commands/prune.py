"""`pipeline prune`."""

import argparse

from pipeline.commands.options import add_dataset

HELP = "remove what no selection needs and what crashes left behind, or an encoder's features"


def add_options(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    add_dataset(parser)
    parser.add_argument(
        "--keep-selection", nargs="+", default=[], action="extend", metavar="NAME",
        help="only what these need stays (default: all selections count)",
    )  # fmt: skip
    parser.add_argument(
        "--features", default="", metavar="ENCODER",
        help="instead: all features of that encoder, to make them with other weights; "
        "ENCODER+VIEW takes those of one view",
    )  # fmt: skip
    parser.add_argument(
        "--damaged", action="store_true",
        help="also what `verify --repair` moved to .damaged and was not made again since",
    )  # fmt: skip
    way = parser.add_mutually_exclusive_group()
    way.add_argument("--dry-run", action="store_true", help="only list what would go (default)")
    way.add_argument("--yes", action="store_true", help="remove it")


def run(options: argparse.Namespace) -> int:
    """Run the command."""
    from pipeline.dataset import open_dataset
    from pipeline.upkeep.prune import prune

    return prune(
        open_dataset(options.dataset), options.keep_selection, options.yes, options.features,
        options.damaged,
    )  # fmt: skip
