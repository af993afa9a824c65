"""The options of `python -m evaluate figure`; nothing heavy is imported for them."""

import argparse
from pathlib import Path

FIGURES = {
    "grid": "generated tiles, row by row (Figure 1 of the report, of an unconditional dataset)",
    "variations": "a real tile and five images that it guides, a row each (Figure 2)",
    "interpolation": "images between two real tiles, a row a pair (Figure 3)",
}


def add_figure_options(it: argparse.ArgumentParser) -> None:
    """Add the kinds of figures and their options to the command's parser."""
    kinds = it.add_subparsers(dest="figure", required=True, metavar="KIND")
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
            "--guidance", type=Path, metavar="DATASET", help="holds the real tiles, if SYN does not"
        )
        kind.add_argument("--out", type=Path, default=Path(f"{name}"), help="files, without suffix")
        kind.add_argument("--rows", type=int, default=8, help="at most so many rows")
        if name == "grid":
            kind.add_argument("--columns", type=int, default=8, help="tiles a row")
        if name == "variations":
            kind.add_argument("--variations", type=int, default=5, help="images a row")
