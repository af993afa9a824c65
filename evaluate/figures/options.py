"""The options of `python -m evaluate figure`; nothing heavy is imported for them."""

import argparse
from pathlib import Path

FIGURES = {
    "grid": "generated tiles, row by row (Figure 1 of the report, of an unconditional dataset)",
    "variations": "a real tile and five images that it guides, one row per tile (Figure 2)",
    "interpolation": "images between two real tiles, one row per pair (Figure 3)",
}


def add_figure_options(command: argparse.ArgumentParser) -> None:
    """Add the kinds of figures and their options to the command's parser."""
    kinds = command.add_subparsers(dest="figure", required=True, metavar="KIND")
    for name, help_text in FIGURES.items():
        kind = kinds.add_parser(
            name,
            help=help_text,
            description=f"Draw {help_text}, as PNG and PDF.",
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )
        kind.add_argument(
            "--generated", type=Path, required=True, metavar="SYN", help="synthetic dataset"
        )
        kind.add_argument(
            "--guidance",
            type=Path,
            metavar="DATASET",
            help="contains the real tiles, if SYN does not",
        )
        kind.add_argument("--out", type=Path, default=Path(name), help="files, without suffix")
        kind.add_argument("--rows", type=int, default=8, help="number of rows, at most")
        if name == "grid":
            kind.add_argument("--columns", type=int, default=8, help="tiles per row")
        if name == "variations":
            kind.add_argument("--variations", type=int, default=5, help="images per row")
            kind.add_argument(
                "--reconstruct",
                metavar="MODEL",
                help="add each real tile as the autoencoder of this model, which made SYN, has it",
            )
