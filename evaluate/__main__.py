"""The door of `evaluate`: `python -m evaluate generate | figure | measure | protocol | report`.

`torchrun --nproc-per-node N -m evaluate generate ...` splits the images over N processes.
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path

from common.console import EXIT_OK, EXIT_USAGE, run_door, say
from common.errors import UserError
from common.text import format_bytes, format_seconds
from evaluate.figures.options import add_figure_options
from evaluate.generate.options import add_generate_options
from evaluate.protocols.options import add_protocol_options

_WIDE = argparse.ArgumentDefaultsHelpFormatter


def parser() -> argparse.ArgumentParser:
    """All options of the commands."""
    top = argparse.ArgumentParser(prog="python -m evaluate", description=__doc__)
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_generate(commands)
    _add_figure(commands)
    _add_measure(commands)
    _add_protocol(commands)
    _add_report(commands)
    return top


def _imported(module: str, function: str) -> Callable[[argparse.Namespace], int]:
    """A command's function, imported when it runs: help needs no torch."""

    def run(options: argparse.Namespace) -> int:
        return int(getattr(import_module(module), function)(options))

    return run


def _add_generate(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    it = commands.add_parser(
        "generate",
        help="make a synthetic dataset with a model",
        description="Make a synthetic dataset with a model. The same command goes on where an "
        "interrupted one stopped; a larger --limit adds images.",
    )
    it.set_defaults(run=_imported("evaluate.generate.command", "generate_command"))
    add_generate_options(it)


def _add_figure(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    it = commands.add_parser(
        "figure",
        help="draw a figure of generated tiles",
        description="Draw a figure of generated tiles, as PNG and PDF.",
    )
    it.set_defaults(run=_imported("evaluate.figures.command", "figure_command"))
    add_figure_options(it)


def _add_measure(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    it = commands.add_parser(
        "measure",
        help="compare a synthetic dataset with a real one",
        description="Compare a synthetic dataset with a real one, from the CLS features that "
        "`python -m pipeline cache` made of both.",
        formatter_class=_WIDE,
    )
    it.set_defaults(run=_measure)
    it.add_argument("--real", type=Path, required=True, metavar="DATASET", help="real dataset")
    it.add_argument("--real-selection", required=True, metavar="NAME", help="its selection")
    it.add_argument("--generated", type=Path, required=True, metavar="SYN", help="synthetic one")
    it.add_argument("--generated-selection", default="generated", metavar="NAME", help=" ")
    it.add_argument(
        "--guidance", type=Path, metavar="DATASET", help="holds the source tiles, if not --real"
    )
    it.add_argument("--encoder", default="h0-mini", help="whose features are compared")
    it.add_argument("--view", default="", help="view of the features that are compared")
    it.add_argument("--tile-px", type=int, metavar="PX", help="of tiles of this size")
    it.add_argument(
        "--train-selection", metavar="NAME", help="of the guidance's dataset: also measures FLD"
    )
    it.add_argument("--draws", type=int, default=50, help="resamples for the widths; 0 is none")
    it.add_argument("--seed", type=int, default=0, help="of all random draws")
    it.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="computes distances"
    )
    it.add_argument("--out", type=Path, default=Path("results.json"), help="results file")


def _add_protocol(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    it = commands.add_parser(
        "protocol",
        help="run one of the paper's protocols",
        description="Run one of the paper's protocols: make the images and features that are "
        "missing, measure, and write results.json, a page and tables. The same command goes on "
        "where an interrupted one stopped.",
    )
    it.set_defaults(run=_imported("evaluate.protocols.command", "protocol_command"))
    add_protocol_options(it)


def _add_report(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    it = commands.add_parser(
        "report",
        help="write a page that shows it all",
        description="Write one HTML page that holds everything it shows and needs no network.",
        formatter_class=_WIDE,
    )
    it.set_defaults(run=_report)
    it.add_argument(
        "--results", type=Path, required=True, help="results.json of measure or of a protocol"
    )
    it.add_argument("--run", type=Path, dest="run_dir", metavar="RUN", help="training run")
    it.add_argument("--dataset", type=Path, metavar="DATASET", help="real dataset (of measure)")
    it.add_argument("--generated", type=Path, metavar="SYN", help="synthetic one (of measure)")
    it.add_argument("--out", type=Path, default=Path("report.html"), help="the page")
    it.add_argument("--picture", type=Path, metavar="FILE.png", help="also a small picture of it")


def _measure(options: argparse.Namespace) -> int:
    from common.record import Record
    from common.torch_processes import choose_device
    from evaluate.compare.measure import measure
    from evaluate.compare.results import write_results
    from evaluate.compare.sides import FeatureSide
    from evaluate.metrics.metric import MetricSettings
    from evaluate.metrics.registry import summarise_metrics
    from pipeline.dataset import open_dataset

    settings = MetricSettings(draws=options.draws, seed=options.seed)
    device = choose_device(options.device).type
    chosen = {"view": options.view, "tile_px": options.tile_px}
    real = FeatureSide.open(
        options.real, options.real_selection, options.encoder, like=None, **chosen
    )
    generated = FeatureSide.open(
        options.generated, options.generated_selection, options.encoder, like=real, **chosen
    )
    guidance = open_dataset(options.guidance) if options.guidance else None
    train = None
    if options.train_selection:
        root = options.guidance or options.real
        train = FeatureSide.open(
            root, options.train_selection, options.encoder, like=real, **chosen
        )
    results = measure(real, generated, guidance, train=train, settings=settings, device=device)
    write_results(options.out, results)
    record = Record(results, str(options.out))
    for warning in record.parts("warnings"):
        say(f"warning: {warning['message']}")
    say(f"measure: {', '.join(summarise_metrics(record))}")
    tiles, seconds = len(real.features) + len(generated.features), record.number("seconds")
    say(
        f"measure: {len(generated.features):,} generated against {len(real.features):,} real tiles "
        f"in {format_seconds(seconds)} ({tiles / max(seconds, 1e-9):,.0f} tiles/s); "
        f"wrote {options.out}"
    )
    return EXIT_OK


def _report(options: argparse.Namespace) -> int:
    from evaluate.protocols.results import read_protocol_results
    from evaluate.report.command import write_report

    protocol = read_protocol_results(options.results)
    if protocol is not None:
        from evaluate.report.protocol_files import write_protocol_files

        for path in write_protocol_files(protocol, options.out.parent, options.out):
            say(f"report: wrote {path}, {format_bytes(path.stat().st_size)}")
        return EXIT_OK
    if options.dataset is None or options.generated is None:
        raise UserError("results of `measure` need --dataset DATASET and --generated SYN")
    written = write_report(
        results_file=options.results,
        run_dir=options.run_dir,
        real=options.dataset,
        generated=options.generated,
        out=options.out,
        picture_file=options.picture,
    )
    for path in written:
        say(f"report: wrote {path}, {format_bytes(path.stat().st_size)}")
    return EXIT_OK


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options; a protocol's key=value texts may stand before and after them."""
    top = parser()
    options, rest = top.parse_known_args(arguments)
    if options.command == "protocol" and all("=" in one and one[0] != "-" for one in rest):
        options.overrides += rest
    elif rest:
        top.error(f"unrecognized arguments: {' '.join(rest)}")
    return options


def _refuse_many_processes(command: str) -> None:
    """Every process of a `torchrun` would do all the work and write the same files.

    The first one says so, for all: the others leave silently.
    """
    size = os.environ.get("WORLD_SIZE", "1")
    if size == "1":
        return
    if os.environ.get("RANK", "0") != "0":
        raise SystemExit(EXIT_USAGE)
    more = ": only its --generate is shared among processes" if command == "protocol" else ""
    raise UserError(f"`evaluate {command}` runs in one process, not in {size}{more}; call it "
                    "without torchrun")  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = parse(given)
    options.arguments = given
    if options.command != "generate" and not getattr(options, "generate", None):
        _refuse_many_processes(options.command)
    for name in ("steps", "batch", "variations", "limit", "count", "rows", "columns"):
        value = getattr(options, name, None)
        if value is not None and value < 1:
            raise UserError(f"--{name} is {value}; expected a whole number of 1 or more")
    return int(options.run(options))


if __name__ == "__main__":
    run_door(lambda: main(sys.argv[1:]), ("common", "evaluate", "model", "pipeline"))
