"""Options of commands that are no field of a configuration: the dataset, and where tasks run."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from common.options import number_within, parse_count
from pipeline.options import SLIDE_TIMEOUT_S

if TYPE_CHECKING:
    from pipeline.run.workers import EngineConfig

_parse_timeout = number_within(0.0, float("inf"), "a number of seconds, 0 for no limit")


def add_dataset(parser: argparse.ArgumentParser) -> None:
    """`--dataset DIR`."""
    parser.add_argument("--dataset", required=True, type=Path, metavar="DIR", help="the dataset")


def add_engine(
    parser: argparse.ArgumentParser,
    *,
    array: bool = False,
    slide_timeout_s: float = SLIDE_TIMEOUT_S,
) -> None:
    """`--workers`, `--cluster`, `--scheduler`, `--slide-timeout`; `--array` for some stages.

    Those are the stages whose slides are independent.
    """
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--workers", type=parse_count, metavar="N", help="local processes (default: cores)"
    )
    where.add_argument(
        "--cluster", type=Path, metavar="FILE.yaml", help="batch jobs (docs/cluster.md)"
    )
    where.add_argument("--scheduler", default="", metavar="ADDRESS", help="a running Dask cluster")
    parser.add_argument(
        "--slide-timeout", type=_parse_timeout, default=slide_timeout_s, metavar="SECONDS",
        help="a slide that takes longer than this fails, and its worker is restarted; 0: no limit "
        f"(default: {slide_timeout_s:_.0f})",
    )  # fmt: skip
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
    return EngineConfig(
        options.workers, options.scheduler, cluster=cluster, array=array,
        slide_timeout_s=options.slide_timeout,
    )  # fmt: skip


def parse_array_part(text: str) -> tuple[int, int]:
    """`I/N` with 0 <= I < N.

    >>> parse_array_part("3/8")
    (3, 8)
    """
    element, _, elements = text.partition("/")
    if element.isdecimal() and elements.isdecimal() and int(element) < int(elements):
        return int(element), int(elements)
    raise argparse.ArgumentTypeError(f"expected I/N with I from 0 to N - 1, got '{text}'")
