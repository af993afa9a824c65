"""`pipeline select`."""

import argparse

from common.options import add_config_options, config_from_options
from pipeline.commands.options import add_dataset
from pipeline.selection.config import SelectConfig

HELP = "make a named selection, stratified by site"


def add_options(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    add_dataset(parser)
    add_config_options(parser, SelectConfig)
    parser.add_argument(
        "--replace", action="store_true",
        help="replace a selection of that name that was made with other options",
    )  # fmt: skip
    parser.add_argument(
        "--skip-lost", action="store_true",
        help="leave out slides whose tissue result is lost or damaged, instead of ending",
    )  # fmt: skip
    parser.add_argument(
        "--remove", metavar="NAME", action="append", default=[],
        help="remove that selection, if no other depends on it; may be given several times",
    )  # fmt: skip


def run(options: argparse.Namespace) -> int:
    """Run the stage."""
    from common.console import EXIT_OK
    from common.errors import UserError
    from pipeline.dataset import open_dataset
    from pipeline.selection.select import select
    from pipeline.selection.ties import remove_selection

    dataset = open_dataset(options.dataset)
    for name in options.remove:
        remove_selection(dataset, name)
    if options.remove:
        return EXIT_OK
    if not options.name:
        raise UserError("select needs --name (or --remove); see `python -m pipeline select --help`")
    config = config_from_options(SelectConfig, options)
    return select(dataset, config, replace_other=options.replace, skip_lost=options.skip_lost)
