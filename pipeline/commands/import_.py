"""`pipeline import`: coordinates, tiles, masks and h5 files that others made."""

import argparse
from pathlib import Path

from pipeline.commands.options import (
    add_dataset,
    add_engine,
    add_stage_in,
    count,
    engine_config,
    fraction,
    mpp,
    stage_in,
)

HELP = "take coordinates, tiles or masks that others made"


def add_options(parser: argparse.ArgumentParser) -> None:
    """One sub-command a kind of thing to import."""
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    for name, about, add in (
        ("coordinates", "tables of tile positions become candidates and selections", _coordinates),
        ("h5", "coordinate files of CLAM or TRIDENT become candidates and a selection", _h5),
        ("tiles", "folders of pictures of tiles become a dataset of their own", _tiles),
        ("masks", "masks that others made stand in for the tissue detector", _masks),
    ):
        one = kinds.add_parser(name, help=about, description=about)
        add_dataset(one)
        add(one)


def run(options: argparse.Namespace) -> int:
    """Run the import of that kind."""
    run_kind = {
        "coordinates": _run_coordinates,
        "h5": _run_h5,
        "tiles": _run_tiles,
        "masks": _run_masks,
    }
    return run_kind[options.kind](options)


def _coordinates(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "files", nargs="+", metavar="NAME=FILE",
        help="a CSV or Parquet table and the selection that it becomes; all of them in one call",
    )  # fmt: skip
    for role in ("slide", "x", "y", "level", "mpp"):
        parser.add_argument(
            f"--{role}-column", default="", metavar="NAME", help="see docs/import.md"
        )
    parser.add_argument(
        "--units", default="", choices=("level0", "level", "mpp"),
        help="what the coordinates are pixels of (default: as the columns say)",
    )  # fmt: skip
    _add_placing(parser)


def _add_placing(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--anchor", default="corner", choices=("corner", "center"),
        help="what of the tile lies there: its upper left corner, or its centre (corner)",
    )  # fmt: skip
    parser.add_argument(
        "--drop-outside", action="store_true",
        help="leave out tiles that are not wholly on their slide (default: refuse)",
    )  # fmt: skip


def _run_coordinates(options: argparse.Namespace) -> int:
    from pipeline.dataset import open_dataset
    from pipeline.imports.coordinates import CoordinatesConfig, import_coordinates, parse_file
    from pipeline.imports.table import Columns

    columns = Columns(
        *(getattr(options, f"{role}_column") for role in ("slide", "x", "y", "level", "mpp"))
    )
    config = CoordinatesConfig(
        files=tuple(parse_file(text) for text in options.files),
        columns=columns,
        units=options.units,
        anchor=options.anchor,
        drop_outside=options.drop_outside,
    )
    return import_coordinates(open_dataset(options.dataset), config)


def _h5(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "folder", type=Path, metavar="FOLDER", help="of <slide_id>.h5 or <slide_id>_patches.h5"
    )
    parser.add_argument("--name", required=True, help="the selection that they become")
    _add_placing(parser)


def _run_h5(options: argparse.Namespace) -> int:
    from pipeline.dataset import open_dataset
    from pipeline.imports.h5 import H5Config, import_h5

    config = H5Config(options.folder, options.name, options.anchor, options.drop_outside)
    return import_h5(open_dataset(options.dataset), config)


def _tiles(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source", type=Path, metavar="FOLDER",
        help="of <slide>/<tile>.png or .jpeg, at any depth; or a CSV with path and slide",
    )  # fmt: skip
    parser.add_argument("--mpp", type=mpp, required=True, help="µm per pixel of the pictures")
    parser.add_argument("--tile-px", type=count, default=224, help="their side in pixels (224)")
    parser.add_argument(
        "--names", default="none", choices=("none", "x_y", "col_row"),
        help="what names end in: the corner in pixels, or the cell of the grid (none)",
    )  # fmt: skip
    parser.add_argument("--crop", action="store_true", help="take the centre of larger pictures")
    parser.add_argument(
        "--icc", default="ignore", choices=("ignore", "srgb"),
        help="srgb: apply a picture's colour profile (ignore)",
    )  # fmt: skip
    parser.add_argument("--png", default="small", choices=("small", "fast"), help="as in `tile`")
    parser.add_argument("--seed", type=int, default=0, help="seed of the rank order (0)")
    add_engine(parser)


def _run_tiles(options: argparse.Namespace) -> int:
    from pipeline.dataset import Dataset
    from pipeline.imports.tiles import TilesConfig, import_tiles

    config = TilesConfig(
        source=options.source,
        mpp=options.mpp,
        tile_px=options.tile_px,
        seed=options.seed,
        names=options.names,
        crop=options.crop,
        icc=options.icc,
        png=options.png,
    )
    return import_tiles(Dataset(options.dataset), config, engine_config(options))


def _masks(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "folder", type=Path, metavar="FOLDER", help="of <slide_id>.geojson (QuPath) or .png"
    )
    parser.add_argument("--min-tissue", type=fraction, default=0.5, help="tissue share (0.5)")
    parser.add_argument("--max-artifact", type=fraction, default=0.1, help="artifact share (0.1)")
    parser.add_argument(
        "--class", dest="classes", action="append", default=[], metavar="NAME=CLASS",
        help="what a class of the annotations is here, such as Tumor=tissue; repeatable",
    )  # fmt: skip
    add_stage_in(parser)
    add_engine(parser)


def _run_masks(options: argparse.Namespace) -> int:
    from pipeline.dataset import open_dataset
    from pipeline.imports.geojson import parse_classes
    from pipeline.imports.masks import MasksConfig, import_masks

    config = MasksConfig(
        folder=options.folder,
        min_tissue=options.min_tissue,
        max_artifact=options.max_artifact,
        classes=parse_classes(options.classes),
        stage_in=stage_in(options),
    )
    return import_masks(open_dataset(options.dataset), config, engine_config(options))
