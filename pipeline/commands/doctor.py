"""`pipeline doctor`."""

import argparse
from pathlib import Path

HELP = "is this machine and file system fit: readers, codecs, disk, GPU, versions"


def add_options(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument(
        "--dataset", type=Path, metavar="DIR",
        help="a dataset, or where one will be: its file system is checked (under `srun`: seen "
        "from every task)",
    )  # fmt: skip
    parser.add_argument("--slide", type=Path, metavar="FILE", help="try the readers on this slide")
    parser.add_argument(
        "--size", type=float, default=256, metavar="MB", help="written to measure the disk (256)"
    )
    parser.add_argument("--json", action="store_true", help="a JSON list instead of lines")


def run(options: argparse.Namespace) -> int:
    """Look and say."""
    from pipeline.upkeep.doctor.check import DoctorConfig, doctor

    config = DoctorConfig(options.dataset, options.slide, int(options.size * 1e6))
    return doctor(config, as_json=options.json)
