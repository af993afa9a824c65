"""The `figure` command."""

import argparse

from common.console import EXIT_OK, say
from common.text import format_bytes
from evaluate.figures.draw import draw_sheet, write_figure
from evaluate.figures.sheets import grid_sheet, interpolation_sheet, variations_sheet
from evaluate.figures.tiles import GeneratedTiles
from pipeline.dataset import open_dataset


def figure_command(options: argparse.Namespace) -> int:
    """Run `python -m evaluate figure KIND` with parsed options; returns the exit status."""
    guidance = open_dataset(options.guidance) if options.guidance else None
    made = GeneratedTiles(open_dataset(options.generated), guidance)
    if options.figure == "grid":
        sheet = grid_sheet(made, options.rows, options.columns)
    elif options.figure == "variations":
        sheet = variations_sheet(made, options.rows, options.variations)
    else:
        sheet = interpolation_sheet(made, options.rows)
    for warning in made.image_warnings():
        say(f"warning: {warning}")
    for path in write_figure(options.out, draw_sheet(sheet, made.image_warnings())):
        say(f"figure: wrote {path}, {format_bytes(path.stat().st_size)}")
    return EXIT_OK
