"""Options that several commands share."""

import argparse
import re
from pathlib import Path

from pipeline.run.cluster import load_cluster
from pipeline.run.workers import EngineConfig
from pipeline.slides.staging import JOB_SCRATCH, StageIn


def add_dataset(parser: argparse.ArgumentParser) -> None:
    """`--dataset DIR`."""
    parser.add_argument("--dataset", required=True, type=Path, metavar="DIR", help="the dataset")


def add_engine(parser: argparse.ArgumentParser, *, array: bool = False) -> None:
    """`--workers`, `--cluster` and `--scheduler`; `--array` where slides are independent."""
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--workers", type=count, metavar="N", help="local processes (cores)")
    where.add_argument(
        "--cluster", type=Path, metavar="FILE.yaml", help="batch jobs (docs/cluster.md)"
    )
    where.add_argument("--scheduler", default="", metavar="ADDRESS", help="a running Dask cluster")
    if array:
        parser.add_argument(
            "--array", type=array_part, default=(0, 1), metavar="I/N",
            help="only the I-th of N parts of the slides, I from 0: an element of a job array",
        )  # fmt: skip


def engine_config(options: argparse.Namespace) -> EngineConfig:
    """The engine that the options ask for."""
    cluster = load_cluster(options.cluster, options.command) if options.cluster else None
    array = getattr(options, "array", (0, 1))
    return EngineConfig(options.workers, options.scheduler, cluster=cluster, array=array)


def array_part(text: str) -> tuple[int, int]:
    """`I/N` with 0 <= I < N."""
    element, _, elements = text.partition("/")
    if element.isdecimal() and elements.isdecimal() and int(element) < int(elements):
        return int(element), int(elements)
    raise argparse.ArgumentTypeError(f"expected I/N with I from 0 to N - 1, got '{text}'")


def add_stage_in(parser: argparse.ArgumentParser) -> None:
    """`--stage-in`, `--scratch` and their limits."""
    parser.add_argument(
        "--stage-in", default="", metavar="'CMD {uri} {dest}'",
        help="fetch each slide to local scratch with this command, delete it after; also {id} "
        "(before the last / of the uri), {name}, {dir}",
    )  # fmt: skip
    parser.add_argument(
        "--scratch", default=JOB_SCRATCH, metavar="DIR",
        help="where fetched slides lie ($SLURM_TMPDIR of the job, else inside the dataset); "
        "$NAMES are the worker's",
    )  # fmt: skip
    parser.add_argument("--stage-in-retries", type=retries, default=3, metavar="N", help="(3)")
    parser.add_argument(
        "--stage-in-timeout", type=seconds, default=3600, metavar="S", help="(3600)"
    )


def stage_in(options: argparse.Namespace) -> StageIn:
    """How slides are fetched, as the options ask."""
    return StageIn(
        options.stage_in, options.scratch, options.stage_in_retries, options.stage_in_timeout
    )


def add_selections(parser: argparse.ArgumentParser) -> None:
    """`--selection NAME`, repeatable."""
    parser.add_argument(
        "--selection", dest="selections", action="append", default=[], metavar="NAME",
        help="may be given several times; default: all selections",
    )  # fmt: skip


def mpp(text: str) -> float:
    """Micrometres per pixel, such as brightfield slides have."""
    return _within(text, 0.01, 100.0, "micrometres per pixel from 0.01 to 100")


def mpp_tolerance(text: str) -> float:
    """How far, relatively, a tile's resolution may be from the target: under a third."""
    return _within(text, 0.0, 0.3, "a relative tolerance from 0 to 0.3")


def fraction(text: str) -> float:
    """A share of an area."""
    return _within(text, 0.0, 1.0, "a fraction from 0 to 1")


def seconds(text: str) -> float:
    """A time limit."""
    return _within(text, 0.001, float("inf"), "a number of seconds above 0")


def retries(text: str) -> int:
    """How often something is tried again."""
    return 0 if text.strip() == "0" else count(text)


def _within(text: str, least: float, most: float, what: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not least <= value <= most:
        raise argparse.ArgumentTypeError(f"expected {what}, got '{text}'")
    return value


def count(text: str) -> int:
    """A positive whole number; `40_000_000` and `40,000,000` are understood."""
    try:
        value = int(text.replace("_", "").replace(",", ""))
    except ValueError:
        value = 0
    if value <= 0:
        raise argparse.ArgumentTypeError(f"expected a positive whole number, got '{text}'")
    return value


def byte_count(text: str) -> int:
    """A number of bytes in decimal units, as disks are sold: `500GB`, `1.5 TB`, `1_000_000`."""
    units = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "PB": 10**15}
    found = re.fullmatch(r"([0-9][0-9_,.]*)\s*([A-Za-z]*)", text.strip())
    try:
        if found is None:
            raise ValueError
        value = float(found[1].replace("_", "").replace(",", "")) * units[found[2].upper()]
    except (ValueError, KeyError):
        raise argparse.ArgumentTypeError(
            f"expected bytes such as 500GB or 2TB, got '{text}'"
        ) from None
    return int(value)
