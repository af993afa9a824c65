"""`pipeline report`."""

import argparse
from pathlib import Path

from common.options import parse_count
from pipeline.commands.options import add_dataset

HELP = "write the dataset's QC page, to be opened in a browser"


def add_options(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    add_dataset(parser)
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder (default: DATASET/report)")
    parser.add_argument(
        "--workers", type=parse_count, metavar="N",
        help="threads that make small pictures (default: cores)",
    )  # fmt: skip


def run(options: argparse.Namespace) -> int:
    """Write the page; returns the exit status."""
    from pipeline.dataset import open_dataset
    from pipeline.report.write import write_report

    return write_report(open_dataset(options.dataset), options.out, options.workers)
