"""The `figure` command."""

import argparse
from collections.abc import Callable

from common.console import EXIT_OK, print_line
from common.errors import UserError
from common.text import format_bytes
from evaluate.figures.draw import draw_sheet, write_figure
from evaluate.figures.sheets import grid_sheet, interpolation_sheet, variations_sheet
from evaluate.figures.tiles import GeneratedTiles, Tile
from pipeline.dataset import open_dataset


def figure_command(options: argparse.Namespace) -> int:
    """Run `python -m evaluate figure KIND` with parsed options; returns the exit status."""
    guidance = open_dataset(options.guidance) if options.guidance else None
    made = GeneratedTiles(open_dataset(options.generated), guidance)
    if options.figure == "grid":
        sheet = grid_sheet(made, options.rows, options.columns)
    elif options.figure == "variations":
        reconstruct = _autoencoder(options.reconstruct, made) if options.reconstruct else None
        sheet = variations_sheet(made, options.rows, options.variations, reconstruct)
    else:
        sheet = interpolation_sheet(made, options.rows)
    for warning in made.image_warnings():
        print_line(f"warning: {warning}")
    for path in write_figure(options.out, draw_sheet(sheet, made.image_warnings())):
        print_line(f"figure: wrote {path}, {format_bytes(path.stat().st_size)}")
    return EXIT_OK


def _autoencoder(source: str, made: GeneratedTiles) -> Callable[[Tile], Tile]:
    """A tile through the autoencoder of the model that made the images, and back."""
    # PyTorch takes seconds to import, and the other figures do without it.
    from evaluate.generators.cytosyn import model_sha256
    from model import CytoSyn

    model = CytoSyn.from_pretrained(source)
    if model_sha256(model) != made.identity.get("model_sha256"):
        raise UserError(f"{source} is not the model that made the images of {made.dataset.root}")
    return lambda tile: model.decode(model.encode(tile[None]))[0]
