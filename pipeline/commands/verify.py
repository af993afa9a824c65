"""`pipeline verify`."""

import argparse

from pipeline.commands.options import add_dataset

HELP = "re-read every file and compare it with its journal; --leakage: prove the hold-out"


def add_options(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    add_dataset(parser)
    parser.add_argument("--workers", type=int, metavar="N", help="threads (default: cores)")
    parser.add_argument(
        "--repair", action="store_true",
        help="remove damaged files that their stage makes again; move others, and damaged journal "
        "lines, to .damaged",
    )  # fmt: skip
    parser.add_argument(
        "--leakage", action="store_true",
        help="instead: no tile, patient, file or pixel is on both sides of training and validation",
    )  # fmt: skip
    for option, what in (
        ("--train", "training selections (default: names beginning with train)"),
        ("--val", "validation selections (default: names beginning with val-)"),
        ("--val-out", "validation selections of held-out patients (default: val-out...)"),
    ):
        parser.add_argument(option, nargs="+", default=[], action="extend", metavar="NAME",
                            help=f"with --leakage: {what}")  # fmt: skip


def run(options: argparse.Namespace) -> int:
    """Run the command."""
    from common.errors import UserError
    from pipeline.dataset import Dataset, open_dataset

    if options.workers is not None and options.workers < 1:
        raise UserError(f"--workers {options.workers}: expected 1 or more")
    if options.leakage:
        from pipeline.upkeep.verify.leakage import verify_leakage

        return verify_leakage(
            open_dataset(options.dataset), options.train, options.val, options.val_out,
            options.workers,
        )  # fmt: skip
    if options.train or options.val or options.val_out:
        raise UserError("--train, --val and --val-out go with --leakage")
    from pipeline.upkeep.verify.check import verify

    return verify(Dataset(options.dataset), options.workers, options.repair)
