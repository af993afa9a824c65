"""`pipeline geojson`."""

import argparse

from common.options import add_config_options, config_from_options
from pipeline.commands.options import add_dataset, add_engine, engine_config
from pipeline.imports.config import CoordinatesExport

HELP = "write masks and tiles as GeoJSON for QuPath"


def add_options(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    add_config_options(parser, CoordinatesExport)
    add_dataset(parser)
    add_engine(parser)


def run(options: argparse.Namespace) -> int:
    """Run the stage."""
    from pipeline.dataset import open_dataset
    from pipeline.imports.export import export_geojson

    config = config_from_options(CoordinatesExport, options)
    return export_geojson(open_dataset(options.dataset), config, engine_config(options))
