"""The door of `evaluate`: `python -m evaluate generate | figure | measure | protocol | report`.

`python -m common.launch N evaluate generate ...` splits the images over N processes.
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module

from common.console import EXIT_USAGE, run_door
from common.errors import UserError
from common.options import add_config_options, config_from_options
from evaluate.compare.config import MeasureConfig
from evaluate.figures.options import add_figure_options
from evaluate.generate.options import add_generate_options
from evaluate.protocols.options import add_protocol_options
from evaluate.report.config import ReportConfig


@dataclass(frozen=True)
class Command:
    """A command of the door: what runs it, its options and what `--help` shows of it.

    `run` is "module:function", imported when it runs: `--help` needs no torch. `options` is a
    configuration whose fields are the options, or a function that adds them.
    """

    run: str
    options: "type | Callable[[argparse.ArgumentParser], None]"
    summary: str
    description: str


COMMANDS = {
    "generate": Command(
        "evaluate.generate.command:generate_command",
        add_generate_options,
        "make a synthetic dataset with a model",
        "Make a synthetic dataset with a model. The same command goes on where an interrupted one "
        "stopped; a larger --limit adds images.",
    ),
    "figure": Command(
        "evaluate.figures.command:figure_command",
        add_figure_options,
        "draw a figure of generated tiles",
        "Draw a figure of generated tiles, as PNG and PDF.",
    ),
    "measure": Command(
        "evaluate.compare.command:measure_command",
        MeasureConfig,
        "compare a synthetic dataset with a real one",
        "Compare a synthetic dataset with a real one, from the CLS features that `python -m "
        "pipeline cache` made of both.",
    ),
    "protocol": Command(
        "evaluate.protocols.command:protocol_command",
        add_protocol_options,
        "run one of the paper's protocols",
        "Run one of the paper's protocols: make the images and features that are missing, "
        "measure, and write results.json, a page and tables. The same command goes on where an "
        "interrupted one stopped.",
    ),
    "report": Command(
        "evaluate.report.command:report_command",
        ReportConfig,
        "write a page that shows the results",
        "Write one HTML page that contains everything it shows and needs no network.",
    ),
}


def make_parser() -> argparse.ArgumentParser:
    """All options of the commands."""
    top = argparse.ArgumentParser(prog="python -m evaluate", description=__doc__)
    subparsers = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        subparser = subparsers.add_parser(
            name, help=command.summary, description=command.description
        )
        if isinstance(command.options, type):
            add_config_options(subparser, command.options)
        else:
            command.options(subparser)
    return top


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """The options; a protocol's key=value texts may come before and after them."""
    top = make_parser()
    options, rest = top.parse_known_args(arguments)
    if options.command == "protocol" and all("=" in text and text[0] != "-" for text in rest):
        options.overrides += rest
    elif rest:
        top.error(f"unrecognized arguments: {' '.join(rest)}")
    return options


def _refuse_many_processes(command: str) -> None:
    """Every process of several would do all the work and write the same files.

    The first one reports that for all; the others leave silently.
    """
    size = os.environ.get("WORLD_SIZE", "1")
    if size == "1":
        return
    if os.environ.get("RANK", "0") != "0":
        raise SystemExit(EXIT_USAGE)
    more = ": only its --generate is shared among processes" if command == "protocol" else ""
    raise UserError(f"`evaluate {command}` runs in one process, not in {size}{more}; call it "
                    "alone")  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = parse_arguments(given)
    options.arguments = given
    if options.command != "generate" and not getattr(options, "generate", None):
        _refuse_many_processes(options.command)
    for name in ("steps", "batch", "variations", "limit", "count", "rows", "columns"):
        value = getattr(options, name, None)
        if value is not None and value < 1:
            raise UserError(f"--{name} is {value}; expected a whole number of 1 or more")
    if options.command != "report":
        # Here: torch takes seconds that the report saves.
        from common.torch_processes import make_sums_independent_of_threads

        make_sums_independent_of_threads()
    command = COMMANDS[options.command]
    module, _, function = command.run.partition(":")
    config = command.options
    given_options = config_from_options(config, options) if isinstance(config, type) else options
    return int(getattr(import_module(module), function)(given_options))


if __name__ == "__main__":
    run_door(
        lambda: main(sys.argv[1:]),
        ("common", "evaluate", "model", "pipeline"),
        # The others write their result whole, at the end.
        is_resumable=bool({"generate", "protocol"} & set(sys.argv[1:2])),
    )
