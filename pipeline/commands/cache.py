"""`pipeline cache`."""

import argparse

from pipeline.commands.options import add_dataset, add_engine, add_selections, engine_config

HELP = "write an encoder's CLS and patch tokens for selections"


def add_options(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    add_dataset(parser)
    parser.add_argument("--encoder", default="h0-mini", help="name in the encoder table (h0-mini)")
    parser.add_argument(
        "--weights", default="hub",
        help="hub, hub:ID, a local .safetensors or .pt file, or explicitly random:SEED",
    )  # fmt: skip
    parser.add_argument(
        "--tokens", default="auto", choices=("auto", "none", "float16", "int8"),
        help="how patch tokens are stored; auto: float16 for h0-mini, none for the others",
    )  # fmt: skip
    parser.add_argument(
        "--view", default="", metavar="VIEW",
        help="applied to each tile first: crop224, resize224, jpeg70 or a chain (jpeg70+crop224)",
    )  # fmt: skip
    parser.add_argument("--tile-px", type=int, help="of tiles of this size (the dataset's)")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--batch", type=int, default=32, help="tiles a forward pass (32)")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument(
        "--dry-run", action="store_true", help="print files, bytes and hours, compute nothing"
    )
    add_selections(parser)
    add_engine(parser, array=True)


def run(options: argparse.Namespace) -> int:
    """Run the stage."""
    from pipeline.dataset import open_dataset
    from pipeline.features.config import CacheConfig
    from pipeline.features.stage import cache

    config = CacheConfig(
        encoder=options.encoder,
        weights=options.weights,
        selections=tuple(options.selections),
        tokens=options.tokens,
        dtype=options.dtype,
        batch=options.batch,
        device=options.device,
        view=options.view,
        tile_px=options.tile_px,
    )
    dataset = open_dataset(options.dataset)
    return cache(dataset, config, engine_config(options), dry_run=options.dry_run)
