"""`pipeline status`."""

import argparse

from pipeline.commands.options import add_dataset

HELP = "what is done, refused and missing, its bytes, and how long the rest takes"


def add_options(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    add_dataset(parser)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of tables")


def run(options: argparse.Namespace) -> int:
    """Run the command."""
    from pipeline.dataset import open_dataset
    from pipeline.upkeep.status import print_status

    return print_status(open_dataset(options.dataset), as_json=options.json)
