"""`pipeline batch`."""

import argparse
from importlib.resources import files
from pathlib import Path

SCRIPTS = ("tile", "cache", "train", "generate", "evaluate")
HELP = "print a SLURM batch script: tile, cache, train, generate or evaluate"


def add_options(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("name", choices=SCRIPTS, help="its first lines say how it is sent")
    parser.add_argument(
        "--cluster", type=Path, metavar="FILE.yaml",
        help="write its queue, account, cores, memory, walltime and directives into the script",
    )  # fmt: skip


def run(options: argparse.Namespace) -> int:
    """Print the script."""
    from pipeline.batch.script import adapt_script

    script = (files("pipeline") / "batch" / f"{options.name}.sbatch").read_text()
    if options.cluster:
        script = adapt_script(script, options.name, options.cluster)
    print(script, end="")
    return 0
