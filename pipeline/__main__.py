"""The only door of the room: `python -m pipeline STAGE --dataset DIR ...`."""

import argparse
import sys
from pathlib import Path
from typing import TypeAlias

from pipeline.console import OneLineParser, run_door
from pipeline.dataset import Dataset, open_dataset
from pipeline.engine import EngineConfig

Stages: TypeAlias = "argparse._SubParsersAction[OneLineParser]"

_DESCRIPTION = (
    "Whole-slide images in, an immutable dataset of tiles and features out. Stages run in the "
    "order scan, tissue, select, tile, cache; each may be run again and does only what is missing."
)


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(prog="python -m pipeline", description=_DESCRIPTION)
    stages = parser.add_subparsers(dest="stage", required=True, metavar="STAGE")
    _add_scan(stages)
    _add_tissue(stages)
    _add_select(stages)
    _add_tile(stages)
    _add_cache(stages)
    return parser


def _stage(stages: Stages, name: str, text: str) -> OneLineParser:
    parser = stages.add_parser(name, help=text, description=text)
    parser.add_argument("--dataset", required=True, type=Path, metavar="DIR", help="the dataset")
    return parser


def _add_engine(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workers", type=int, metavar="N", help="local processes (default: cores)")
    parser.add_argument("--scheduler", default="", metavar="ADDRESS", help="a running Dask cluster")


def _add_scan(stages: Stages) -> None:
    parser = _stage(stages, "scan", "open slides and record them in slides.parquet")
    parser.add_argument(
        "inputs", nargs="+", metavar="SLIDES", help="folders, files, globs or a CSV"
    )
    parser.add_argument("--mpp", type=float, default=0.5, help="target µm per pixel (0.5)")
    parser.add_argument("--mpp-tolerance", type=float, default=0.02, help="relative (0.02)")
    parser.add_argument("--tile-px", type=int, default=224, help="tile side in pixels (224)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the rank order (0)")
    parser.add_argument("--assume-mpp", type=float, help="µm per pixel where a slide states none")
    parser.add_argument(
        "--reader", default="auto", choices=("auto", "native", "openslide", "tiffslide"),
        help="auto: native where its pixels are OpenSlide's, else OpenSlide, else tiffslide",
    )  # fmt: skip
    parser.add_argument("--sha256", action="store_true", help="recognise slides by their sha256")
    _add_engine(parser)


def _add_tissue(stages: Stages) -> None:
    parser = _stage(stages, "tissue", "find tissue, draw overlays, rank the candidate tiles")
    parser.add_argument("--min-tissue", type=float, default=0.5, help="tissue fraction (0.5)")
    parser.add_argument("--max-artifact", type=float, default=0.1, help="artifact fraction (0.1)")
    parser.add_argument(
        "--detector", default="classical", metavar="NAME",
        help="classical (the default, needs no weights) or onnx:FILE with a JSON beside it",
    )  # fmt: skip
    _add_engine(parser)


def _add_select(stages: Stages) -> None:
    parser = _stage(stages, "select", "make a named selection, stratified by site")
    parser.add_argument("--name", required=True, help="the selection's name")
    parser.add_argument("--tiles", type=_count, help="number of tiles (default: all there are)")
    parser.add_argument("--stratify", default="site", choices=("site", "project", "none"))
    parser.add_argument(
        "--pool", default="train", choices=("train", "reserve"),
        help="ranks above the validation reserve, or the reserve itself",
    )  # fmt: skip


def _add_tile(stages: Stages) -> None:
    parser = _stage(stages, "tile", "write the tile shards that selections need")
    _add_selections(parser)
    parser.add_argument("--format", default="png", choices=("png", "zarr"), help="default: png")
    parser.add_argument(
        "--png", default="small", choices=("small", "fast"),
        help="fast encodes five times as fast, 3 to 7%% larger (small)",
    )  # fmt: skip
    parser.add_argument("--resampler", default="area", choices=("area", "lanczos", "bicubic"))
    parser.add_argument(
        "--icc", default="ignore", choices=("ignore", "srgb"),
        help="srgb: apply the slide's colour profile to its tiles (ignore)",
    )  # fmt: skip
    parser.add_argument(
        "--tile-px", type=int, help="larger tiles around the same ranks (default: the dataset's)"
    )
    parser.add_argument(
        "--spool", default="", metavar="DIR", help="where tiles wait (default: in the dataset)"
    )
    _add_engine(parser)


def _add_cache(stages: Stages) -> None:
    parser = _stage(stages, "cache", "write an encoder's CLS and patch tokens for selections")
    parser.add_argument("--encoder", default="h0-mini", help="name in the encoder table (h0-mini)")
    parser.add_argument(
        "--weights", default="hub",
        help="hub, hub:ID, a local .safetensors or .pt file, or explicitly random:SEED",
    )  # fmt: skip
    parser.add_argument("--tokens", default="float16", choices=("none", "float16"))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--batch", type=int, default=32, help="tiles a forward pass (32)")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    _add_selections(parser)
    _add_engine(parser)


def _add_selections(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--selection", dest="selections", action="append", default=[], metavar="NAME",
        help="may be given several times; default: all selections",
    )  # fmt: skip


def _count(text: str) -> int:
    value = int(text.replace("_", "").replace(",", ""))
    if value <= 0:
        raise argparse.ArgumentTypeError("expected a positive number of tiles")
    return value


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line and run the stage; returns the exit status."""
    options = _parser().parse_args(arguments)
    engine = EngineConfig(getattr(options, "workers", None), getattr(options, "scheduler", ""))
    if options.stage == "scan":
        return _scan(options, engine)
    dataset = open_dataset(options.dataset)
    return _STAGES[options.stage](dataset, options, engine)


def _scan(options: argparse.Namespace, engine: EngineConfig) -> int:
    from pipeline.slides.scan import ScanConfig, scan

    config = ScanConfig(
        inputs=tuple(options.inputs),
        mpp=options.mpp,
        mpp_tolerance=options.mpp_tolerance,
        tile_px=options.tile_px,
        seed=options.seed,
        assume_mpp=options.assume_mpp,
        reader=options.reader,
        sha256=options.sha256,
    )
    return scan(Dataset(options.dataset), config, engine)


def _tissue(dataset: Dataset, options: argparse.Namespace, engine: EngineConfig) -> int:
    from pipeline.tissue.stage import TissueConfig, tissue

    config = TissueConfig(options.min_tissue, options.max_artifact, options.detector)
    return tissue(dataset, config, engine)


def _select(dataset: Dataset, options: argparse.Namespace, engine: EngineConfig) -> int:
    from pipeline.selection.select import SelectConfig, select

    config = SelectConfig(options.name, options.tiles, options.stratify, options.pool)
    return select(dataset, config)


def _tile(dataset: Dataset, options: argparse.Namespace, engine: EngineConfig) -> int:
    from pipeline.tile import TileConfig, tile

    config = TileConfig(
        selections=tuple(options.selections),
        resampler=options.resampler,
        icc=options.icc,
        format=options.format,
        png=options.png,
        tile_px=options.tile_px,
        spool=options.spool,
    )
    return tile(dataset, config, engine)


def _cache(dataset: Dataset, options: argparse.Namespace, engine: EngineConfig) -> int:
    from pipeline.features.cache import CacheConfig, cache

    config = CacheConfig(
        encoder=options.encoder,
        weights=options.weights,
        selections=tuple(options.selections),
        tokens=options.tokens,
        dtype=options.dtype,
        batch=options.batch,
        device=options.device,
    )
    return cache(dataset, config, engine)


_STAGES = {"tissue": _tissue, "select": _select, "tile": _tile, "cache": _cache}

if __name__ == "__main__":
    run_door(lambda: main(sys.argv[1:]), ("pipeline", "model"))
