"""`pipeline select`."""

import argparse

from pipeline.commands.options import add_dataset, count

HELP = "make a named selection, stratified by site"


def add_options(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    add_dataset(parser)
    parser.add_argument("--name", help="the selection's name")
    parser.add_argument("--tiles", type=count, help="number of tiles (default: all there are)")
    parser.add_argument(
        "--stratify", default="site", choices=("site", "project", "project+site", "none"),
        help="what the budget is divided among (site)",
    )  # fmt: skip
    parser.add_argument(
        "--share",
        default="tiles",
        choices=("tiles", "slides"),
        help="a stratum's share is that of its candidate tiles, or of its slides (tiles)",
    )
    parser.add_argument(
        "--pool", default="train", choices=("train", "reserve", "all"),
        help="ranks above the validation reserve, the reserve itself, or both (train)",
    )  # fmt: skip
    add_drawing(parser)
    add_rules(parser)
    parser.add_argument(
        "--remove", metavar="NAME", action="append", default=[],
        help="remove that selection, if no other depends on it; may be given several times",
    )  # fmt: skip


def add_drawing(parser: argparse.ArgumentParser) -> None:
    """What the tiles are drawn from, and into how many sets."""
    parser.add_argument(
        "--hold-out", type=count, metavar="SLIDES",
        help="hold out about so many slides by whole patients, and take tiles of those",
    )  # fmt: skip
    parser.add_argument(
        "--cover", type=names, default=(), metavar="LIST",
        help="what a hold-out covers: project, site (in proportion), site=N (at least N)",
    )  # fmt: skip
    parser.add_argument(
        "--from", dest="parent", default="", metavar="NAME", help="draw from that selection's tiles"
    )
    parser.add_argument(
        "--deny", type=names, default=(), metavar="LIST", help="leave out the tiles of deny-lists"
    )
    parser.add_argument(
        "--split", type=names, default=(), metavar="LIST",
        help="deal to disjoint sets NAME-<part> of --tiles each, e.g. conditioning,reference",
    )  # fmt: skip


def add_rules(parser: argparse.ArgumentParser) -> None:
    """Which slides are eligible."""
    parser.add_argument(
        "--sample-types", type=names, default=(), metavar="LIST",
        help="TCGA sample types to take, e.g. 01,06 (default: all)",
    )  # fmt: skip
    parser.add_argument(
        "--min-candidates", type=count, default=1, metavar="N",
        help="leave out slides with fewer candidate tiles (1)",
    )  # fmt: skip
    parser.add_argument("--frozen", action="store_true", help="take frozen sections as well")


def names(text: str) -> tuple[str, ...]:
    """A comma-separated list as its parts."""
    parts = tuple(part.strip() for part in text.split(",") if part.strip())
    if not parts:
        raise argparse.ArgumentTypeError(f"expected names separated by commas, got '{text}'")
    return parts


def run(options: argparse.Namespace) -> int:
    """Run the stage."""
    from common.console import EXIT_OK
    from common.errors import UserError
    from pipeline.dataset import open_dataset
    from pipeline.selection.config import SelectConfig
    from pipeline.selection.select import select
    from pipeline.selection.ties import remove_selection

    dataset = open_dataset(options.dataset)
    for name in options.remove:
        remove_selection(dataset, name)
    if options.remove:
        return EXIT_OK
    if not options.name:
        raise UserError("select needs --name (or --remove); see `python -m pipeline select --help`")
    config = SelectConfig(
        name=options.name, tiles=options.tiles, stratify=options.stratify, pool=options.pool,
        share=options.share, hold_out=options.hold_out, cover=options.cover,
        parent=options.parent, deny=options.deny, split=options.split,
        sample_types=options.sample_types, min_candidates=options.min_candidates,
        frozen=options.frozen,
    )  # fmt: skip
    return select(dataset, config)
