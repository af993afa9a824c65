"""`pipeline plan-cohort`."""

import argparse
from pathlib import Path

from pipeline.commands.options import count
from pipeline.commands.select import add_rules, names

HELP = "plan all selections of a cohort from a CSV list, before a slide is opened"


def add_options(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("cohort", type=Path, metavar="FILE.csv", help="one row a slide")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="where to write")
    parser.add_argument(
        "--train", type=count, action="append", metavar="TILES",
        help="a training budget; may be given several times (40_000_000 and 108_000_000)",
    )  # fmt: skip
    parser.add_argument(
        "--val-tiles", type=count, default=100_000, help="of val-in and val-out each"
    )
    parser.add_argument("--guidance", type=count, default=100_000, help="tiles of guidance")
    parser.add_argument("--hold-out", type=count, default=1012, metavar="SLIDES", help="(1012)")
    parser.add_argument("--cover", type=names, default=("project", "site"), metavar="LIST")
    parser.add_argument(
        "--candidates", type=count, default=125_000_000,
        help="candidate tiles to simulate in all, where the list states none (125_000_000)",
    )  # fmt: skip
    parser.add_argument(
        "--stratify", default="site", choices=("site", "project", "project+site", "none")
    )
    parser.add_argument("--share", default="tiles", choices=("tiles", "slides"))
    parser.add_argument("--seed", type=int, default=0)
    add_rules(parser)


def run(options: argparse.Namespace) -> int:
    """Plan the cohort."""
    from pipeline.selection.config import PlanConfig, Rules
    from pipeline.selection.write_cohort import plan_cohort

    config = PlanConfig(
        train=tuple(sorted(set(options.train or PlanConfig.train))),
        val_tiles=options.val_tiles, guidance=options.guidance, hold_out=options.hold_out,
        cover=options.cover, candidates=options.candidates, stratify=options.stratify,
        share=options.share, seed=options.seed,
        rules=Rules(options.sample_types, options.min_candidates, options.frozen),
    )  # fmt: skip
    return plan_cohort(options.cohort, options.out, config)
