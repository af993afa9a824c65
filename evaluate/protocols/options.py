"""The options of `python -m evaluate protocol`; nothing heavy is imported for them."""

import argparse
from pathlib import Path


def add_protocol_options(command: argparse.ArgumentParser) -> None:
    """Add the command's options to its parser."""
    add = command.add_argument
    add(
        "name",
        metavar="NAME",
        help="the protocol; `list` shows those that exist, "
        "`all` runs every table and figure of the report",
    )
    add("--config", type=Path, metavar="FILE.yaml",
        help="where datasets and models are, and what is changed")  # fmt: skip
    add("--dry-run", action="store_true", help="print what is missing, make nothing")
    add("--only", metavar="NAME", help="of `all`, only this protocol")
    add("--generate", metavar="IMAGES",
        help="only make these images (a name or `all`), as a GPU job of its own")  # fmt: skip
    add("overrides", nargs="*", metavar="key=value",
        help="e.g. count=1000 encoders=[inception-v3] generations.*.steps=50")  # fmt: skip
