"""The command line: `python -m pipeline COMMAND --dataset DIR ...`."""

import argparse
import sys
from importlib import import_module

from common.console import OneLineParser, run_door
from pipeline.commands import COMMANDS
from pipeline.commands.stages import STAGE_COMMANDS

_DESCRIPTION = (
    "Whole-slide images in, an immutable dataset of tiles and features out. Stages run in the "
    "order scan, tissue, select, tile, cache; each may be run again and does only what is missing."
)

_PRINT_RESULTS = {"batch", "doctor", "prune", "status", "verify"}
"""Commands that are of no use where their output cannot be written."""


def make_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = OneLineParser(prog="python -m pipeline", description=_DESCRIPTION)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in COMMANDS:
        module = STAGE_COMMANDS.get(name) or import_module(f"pipeline.commands.{name}")
        # `import` is a keyword: its module is import_; plan_cohort is `plan-cohort`.
        word = name.rstrip("_").replace("_", "-")
        command = commands.add_parser(word, help=module.HELP, description=module.HELP)
        module.add_options(command)
        command.set_defaults(run=module.run)
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line and run the command; returns the exit status."""
    options = make_parser().parse_args(arguments)
    return int(options.run(options))


if __name__ == "__main__":
    run_door(
        lambda: main(sys.argv[1:]),
        ("common", "model", "pipeline"),
        prints_result=bool(_PRINT_RESULTS & set(sys.argv[1:2])),
    )
