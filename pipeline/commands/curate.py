"""`pipeline curate`."""

import argparse
from pathlib import Path

from pipeline.commands.options import add_dataset, add_engine, add_selections, engine_config

HELP = "find tiles with artifacts by a linear classifier on cached features"


def add_options(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    add_dataset(parser)
    parser.add_argument(
        "--labels", required=True, type=Path, metavar="CSV",
        help="columns slide_id, rank, label (usable or artifact)",
    )  # fmt: skip
    parser.add_argument(
        "--features", required=True, metavar="ENCODER", help="whose cached CLS features to use"
    )
    parser.add_argument("--view", default="", help="the features' preprocessing view (none)")
    parser.add_argument(
        "--name", default="curated", help="of the deny-list; selection S is cleaned as S-NAME"
    )
    parser.add_argument("--folds", type=int, default=5, help="of the cross-validation (5)")
    parser.add_argument(
        "--recall", type=float, default=0.99, help="share of usable tiles to keep (0.99)"
    )
    add_selections(parser)
    add_engine(parser)


def run(options: argparse.Namespace) -> int:
    """Run the stage."""
    from pipeline.dataset import open_dataset
    from pipeline.selection.curate import CurateConfig, curate

    config = CurateConfig(
        labels=options.labels, encoder=options.features, name=options.name, view=options.view,
        selections=tuple(options.selections), folds=options.folds, usable_recall=options.recall,
    )  # fmt: skip
    return curate(open_dataset(options.dataset), config, engine_config(options))
