"""`pipeline geojson`."""

import argparse
from pathlib import Path

from pipeline.commands.options import add_dataset, add_engine, add_selections, engine_config

HELP = "write masks and tiles as GeoJSON for QuPath"


def add_options(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    add_dataset(parser)
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: DATASET/geojson")
    parser.add_argument("--tiles", action="store_true", help="with the tiles that were kept")
    add_selections(parser)
    add_engine(parser)


def run(options: argparse.Namespace) -> int:
    """Write the files."""
    from pipeline.dataset import open_dataset
    from pipeline.imports.export import ExportConfig, export_geojson

    config = ExportConfig(options.out, options.tiles, tuple(options.selections))
    return export_geojson(open_dataset(options.dataset), config, engine_config(options))
