"""`pipeline tissue`."""

import argparse

from pipeline.commands.options import (
    add_dataset,
    add_engine,
    add_stage_in,
    engine_config,
    fraction,
    stage_in,
)

HELP = "find tissue, draw overlays, rank the candidate tiles"


def add_options(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    add_dataset(parser)
    parser.add_argument("--min-tissue", type=fraction, default=0.5, help="tissue share (0.5)")
    parser.add_argument("--max-artifact", type=fraction, default=0.1, help="artifact share (0.1)")
    parser.add_argument(
        "--detector", default="classical", metavar="NAME",
        help="classical (the default, needs no weights) or onnx:FILE with a JSON beside it",
    )  # fmt: skip
    add_stage_in(parser)
    add_engine(parser, array=True)


def run(options: argparse.Namespace) -> int:
    """Run the stage."""
    from pipeline.dataset import open_dataset
    from pipeline.tissue.stage import TissueConfig, tissue

    config = TissueConfig(
        options.min_tissue, options.max_artifact, options.detector, stage_in(options)
    )
    return tissue(open_dataset(options.dataset), config, engine_config(options))
