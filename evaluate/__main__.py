"""The door of `evaluate`: `python -m evaluate generate | figure | measure | protocol | report`.

`torchrun --nproc-per-node N -m evaluate generate ...` splits the images over N processes.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from common.console import EXIT_OK, EXIT_USAGE, run_door, say
from common.errors import UserError
from common.text import format_bytes, format_seconds
from evaluate.figures.options import add_figure_options
from evaluate.generate.options import add_generate_options
from evaluate.protocols.options import add_protocol_options

_WITH_DEFAULTS = argparse.ArgumentDefaultsHelpFormatter


def parser() -> argparse.ArgumentParser:
    """All options of the commands."""
    top = argparse.ArgumentParser(prog="python -m evaluate", description=__doc__)
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, run, add_options, summary, description in (
        (
            "generate",
            _generate,
            add_generate_options,
            "make a synthetic dataset with a model",
            "Make a synthetic dataset with a model. The same command goes on where an "
            "interrupted one stopped; a larger --limit adds images.",
        ),
        (
            "figure",
            _figure,
            add_figure_options,
            "draw a figure of generated tiles",
            "Draw a figure of generated tiles, as PNG and PDF.",
        ),
        (
            "measure",
            _measure,
            _add_measure_options,
            "compare a synthetic dataset with a real one",
            "Compare a synthetic dataset with a real one, from the CLS features that "
            "`python -m pipeline cache` made of both.",
        ),
        (
            "protocol",
            _protocol,
            add_protocol_options,
            "run one of the paper's protocols",
            "Run one of the paper's protocols: make the images and features that are missing, "
            "measure, and write results.json, a page and tables. The same command goes on where "
            "an interrupted one stopped.",
        ),
        (
            "report",
            _report,
            _add_report_options,
            "write a page that shows the results",
            "Write one HTML page that contains everything it shows and needs no network.",
        ),
    ):
        # Defaults of figures and protocols are in their texts.
        shown = argparse.HelpFormatter if name in ("figure", "protocol") else _WITH_DEFAULTS
        command = commands.add_parser(
            name, help=summary, description=description, formatter_class=shown
        )
        command.set_defaults(run=run)
        add_options(command)
    return top


def _add_measure_options(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("--real", type=Path, required=True, metavar="DATASET", help="real dataset")
    add("--real-selection", required=True, metavar="NAME", help="selection of the real dataset")
    add("--generated", type=Path, required=True, metavar="SYN", help="synthetic dataset")
    add(
        "--generated-selection",
        default="generated",
        metavar="NAME",
        help="selection of the synthetic dataset",
    )
    add(
        "--guidance",
        type=Path,
        metavar="DATASET",
        help="dataset of the tiles that guided, if it is not --real",
    )
    add("--encoder", default="h0-mini", help="encoder whose features are compared")
    add("--view", default="", help="view of the features that are compared")
    add(
        "--tile-px",
        type=int,
        metavar="PX",
        help="side of the tiles in pixels; by default that of the dataset's own tiles",
    )
    add(
        "--train-selection",
        metavar="NAME",
        help="training tiles, a selection of the guidance's dataset: also measures FLD",
    )
    add("--draws", type=int, default=50, help="resamples for the intervals; 0 leaves them out")
    add("--seed", type=int, default=0, help="seed of all random draws")
    add(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="where distances are computed",
    )
    add("--out", type=Path, default=Path("results.json"), help="results file to write")  # fmt: skip


def _add_report_options(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("--results", type=Path, required=True, help="results.json of measure or of a protocol")
    add("--run", type=Path, dest="run_dir", metavar="RUN", help="training run")
    add("--dataset", type=Path, metavar="DATASET", help="real dataset (for results of measure)")
    add("--generated", type=Path, metavar="SYN", help="synthetic dataset (for results of measure)")
    add("--out", type=Path, default=Path("report.html"), help="page to write")
    add("--picture", type=Path, metavar="FILE.png", help="small picture to write as well")


def _generate(options: argparse.Namespace) -> int:
    from evaluate.generate.command import generate_command

    return generate_command(options)


def _figure(options: argparse.Namespace) -> int:
    from evaluate.figures.command import figure_command

    return figure_command(options)


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


def _protocol(options: argparse.Namespace) -> int:
    from evaluate.protocols.command import protocol_command

    return protocol_command(options, options.arguments)


def _report(options: argparse.Namespace) -> int:
    from evaluate.protocols.results import read_protocol_results
    from evaluate.report.command import write_report

    protocol = read_protocol_results(options.results)
    if protocol is not None:
        from evaluate.report.protocol_files import write_protocol_files

        written = write_protocol_files(protocol, options.out.parent, options.out)
    elif options.dataset is None or options.generated is None:
        raise UserError("results of `measure` need --dataset DATASET and --generated SYN")
    else:
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
    """The options; a protocol's key=value texts may come before and after them."""
    top = parser()
    options, rest = top.parse_known_args(arguments)
    if options.command == "protocol" and all("=" in text and text[0] != "-" for text in rest):
        options.overrides += rest
    elif rest:
        top.error(f"unrecognized arguments: {' '.join(rest)}")
    return options


def _refuse_many_processes(command: str) -> None:
    """Every process of a `torchrun` would do all the work and write the same files.

    The first one reports that for all; the others leave silently.
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
