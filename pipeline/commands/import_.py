"""`pipeline import`: coordinates, tiles, masks and h5 files that others made."""

import argparse

from common.options import add_config_options, config_from_options
from pipeline.commands.options import add_dataset, add_engine, engine_config
from pipeline.imports.config import CoordinatesConfig, H5Config, MasksConfig, TilesConfig

HELP = "take coordinates, tiles or masks that others made"
_KINDS: dict[str, tuple[type, str]] = {
    "coordinates": (
        CoordinatesConfig, "tables of tile positions become candidates and selections",
    ),
    "h5": (H5Config, "coordinate files of CLAM or TRIDENT become candidates and a selection"),
    "tiles": (TilesConfig, "folders of pictures of tiles become a dataset"),
    "masks": (MasksConfig, "masks that others made take the place of the tissue detector"),
}  # fmt: skip


def add_options(parser: argparse.ArgumentParser) -> None:
    """One sub-command per kind of thing to import."""
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    for kind, (config, about) in _KINDS.items():
        kind_parser = kinds.add_parser(kind, help=about, description=about)
        add_dataset(kind_parser)
        add_config_options(kind_parser, config)
        if kind in ("tiles", "masks"):
            add_engine(kind_parser)


def run(options: argparse.Namespace) -> int:
    """Run the import of that kind."""
    from pipeline.dataset import Dataset, open_dataset
    from pipeline.imports.coordinates import import_coordinates
    from pipeline.imports.h5 import import_h5
    from pipeline.imports.masks import import_masks
    from pipeline.imports.tiles import import_tiles

    config: object = config_from_options(_KINDS[options.kind][0], options)
    match config:
        case CoordinatesConfig():
            return import_coordinates(open_dataset(options.dataset), config)
        case H5Config():
            return import_h5(open_dataset(options.dataset), config)
        case TilesConfig():
            return import_tiles(Dataset(options.dataset), config, engine_config(options))
        case MasksConfig():
            return import_masks(open_dataset(options.dataset), config, engine_config(options))
    raise AssertionError(options.kind)
