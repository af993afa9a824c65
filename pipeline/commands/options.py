"""Options of commands that are no field of a configuration: the dataset, and where tasks run."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from common.options import parse_count

if TYPE_CHECKING:
    from pipeline.run.workers import EngineConfig


def add_dataset(parser: argparse.ArgumentParser) -> None:
    """`--dataset DIR`."""
    parser.add_argument("--dataset", required=True, type=Path, metavar="DIR", help="the dataset")


def add_engine(parser: argparse.ArgumentParser, *, array: bool = False) -> None:
    """`--workers`, `--cluster` and `--scheduler`; `--array` where slides are independent."""
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--workers", type=parse_count, metavar="N", help="local processes (default: cores)"
    )
    where.add_argument(
        "--cluster", type=Path, metavar="FILE.yaml", help="batch jobs (docs/cluster.md)"
    )
    where.add_argument("--scheduler", default="", metavar="ADDRESS", help="a running Dask cluster")
    if array:
        parser.add_argument(
            "--array", type=parse_array_part, default=(0, 1), metavar="I/N",
            help="only the I-th of N parts of the slides, I from 0: an element of a job array",
        )  # fmt: skip


def engine_config(options: argparse.Namespace) -> "EngineConfig":
    """The engine that the options describe."""
    from pipeline.run.cluster import load_cluster
    from pipeline.run.workers import EngineConfig

    cluster = load_cluster(options.cluster, options.command) if options.cluster else None
    array = getattr(options, "array", (0, 1))
    return EngineConfig(options.workers, options.scheduler, cluster=cluster, array=array)


def parse_array_part(text: str) -> tuple[int, int]:
    """`I/N` with 0 <= I < N.

    >>> parse_array_part("3/8")
    (3, 8)
    """
    element, _, elements = text.partition("/")
    if element.isdecimal() and elements.isdecimal() and int(element) < int(elements):
        return int(element), int(elements)
    raise argparse.ArgumentTypeError(f"expected I/N with I from 0 to N - 1, got '{text}'")
