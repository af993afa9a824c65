"""`pipeline run`."""

import argparse
from pathlib import Path

from common.options import parse_byte_count

HELP = "all stages from one YAML file; run again to go on, --dry-run to plan"


def add_options(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("recipe", type=Path, metavar="CONFIG.yaml", help="see docs/operations.md")
    parser.add_argument(
        "--dry-run", action="store_true",
        help="print each step's bytes, files and hours that are left, and do nothing",
    )  # fmt: skip
    parser.add_argument(
        "--max-bytes", type=parse_byte_count, metavar="N",
        help="refuse a plan that would write more, such as 2TB or 500GB",
    )  # fmt: skip
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--workers", type=int, metavar="N", help="local processes; overrides the recipe"
    )
    where.add_argument("--cluster", metavar="FILE.yaml", help="batch jobs; overrides the recipe")
    where.add_argument("--scheduler", metavar="ADDRESS", help="Dask cluster; overrides the recipe")


def run(options: argparse.Namespace) -> int:
    """Run or plan the recipe."""
    from pipeline.recipe.run import run_recipe
    from pipeline.recipe.steps import load_recipe

    engine = {
        key: value
        for key in ("workers", "cluster", "scheduler")
        if (value := getattr(options, key)) is not None
    }
    recipe = load_recipe(options.recipe, engine)
    return run_recipe(recipe, max_bytes=options.max_bytes, dry_run=options.dry_run)
