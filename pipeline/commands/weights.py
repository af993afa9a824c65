"""`pipeline weights list` and `pipeline weights fetch`."""

import argparse
from pathlib import Path

HELP = "list the encoders, and fetch published weights on a machine with a network"


def add_options(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    actions.add_parser("list", help="encoders and weights: size, input, licence, where they are")
    fetch = actions.add_parser(
        "fetch", help="fetch weights into a folder, as safetensors with their sums and licences"
    )
    fetch.add_argument("names", nargs="+", metavar="NAME", help="as `weights list` names them")
    fetch.add_argument("--to", required=True, type=Path, metavar="DIR", help="the folder")
    fetch.add_argument(
        "--mirror", default="", metavar="ADDRESS",
        help="address (https://..., file:///...) of the files that are not on the hub",
    )  # fmt: skip


def run(options: argparse.Namespace) -> int:
    """Run the action."""
    from common.console import EXIT_OK, print_line
    from pipeline.upkeep.weights import fetch_weights, table_rows

    if options.action == "fetch":
        return fetch_weights(options.names, options.to, mirror=options.mirror)
    rows = table_rows()
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        print_line("  ".join(cells).rstrip())
    return EXIT_OK
