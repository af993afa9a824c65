"""`pipeline plan-cohort`."""

import argparse
from pathlib import Path

from common.options import add_config_options, config_from_options
from pipeline.selection.config import PlanConfig

HELP = "plan all selections of a cohort from a CSV list, before a slide is opened"


def add_options(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("cohort", type=Path, metavar="FILE.csv", help="one row per slide")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="where to write")
    add_config_options(parser, PlanConfig)


def run(options: argparse.Namespace) -> int:
    """Plan the cohort."""
    from pipeline.selection.write_cohort import plan_cohort

    return plan_cohort(options.cohort, options.out, config_from_options(PlanConfig, options))
