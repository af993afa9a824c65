"""`pipeline doctor`."""

import argparse

from common.options import add_config_options, config_from_options
from pipeline.upkeep.doctor.config import DoctorConfig

HELP = "is this machine and file system fit: readers, codecs, disk, GPU, versions"


def add_options(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    add_config_options(parser, DoctorConfig)
    parser.add_argument("--json", action="store_true", help="a JSON list instead of lines")


def run(options: argparse.Namespace) -> int:
    """Check and report."""
    from pipeline.upkeep.doctor.check import doctor

    return doctor(config_from_options(DoctorConfig, options), as_json=options.json)
