"""`pipeline import`: coordinates, tiles, masks and h5 files that others made."""

import argparse

from pipeline.commands.stages import IMPORTS

HELP = "take coordinates, tiles or masks that others made"


def add_options(parser: argparse.ArgumentParser) -> None:
    """One sub-command per kind of thing to import."""
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    for kind, command in IMPORTS.items():
        command.add_options(kinds.add_parser(kind, help=command.HELP, description=command.HELP))


def run(options: argparse.Namespace) -> int:
    """Run the import of that kind."""
    return IMPORTS[options.kind].run(options)
