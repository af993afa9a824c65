"""The door of `evaluate`: `python -m evaluate generate | figure | measure | protocol | report`.

`torchrun --nproc-per-node N -m evaluate generate ...` splits the images over N processes.
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
    """A command of the door: who runs it, its options and what `--help` shows of it.

    `evaluate.PACKAGE.command.NAME_command` runs it, with the options or, if there is a `config`,
    with the configuration whose fields they are.
    """

    package: str
    summary: str
    description: str
    add_options: Callable[[argparse.ArgumentParser], None] | None = None
    config: type | None = None


COMMANDS = {
    "generate": Command(
        "generate",
        "make a synthetic dataset with a model",
        "Make a synthetic dataset with a model. The same command goes on where an interrupted one "
        "stopped; a larger --limit adds images.",
        add_generate_options,
    ),
    "figure": Command(
        "figures",
        "draw a figure of generated tiles",
        "Draw a figure of generated tiles, as PNG and PDF.",
        add_figure_options,
    ),
    "measure": Command(
        "compare",
        "compare a synthetic dataset with a real one",
        "Compare a synthetic dataset with a real one, from the CLS features that `python -m "
        "pipeline cache` made of both.",
        config=MeasureConfig,
    ),
    "protocol": Command(
        "protocols",
        "run one of the paper's protocols",
        "Run one of the paper's protocols: make the images and features that are missing, "
        "measure, and write results.json, a page and tables. The same command goes on where an "
        "interrupted one stopped.",
        add_protocol_options,
    ),
    "report": Command(
        "report",
        "write a page that shows the results",
        "Write one HTML page that contains everything it shows and needs no network.",
        config=ReportConfig,
    ),
}


def parser() -> argparse.ArgumentParser:
    """All options of the commands."""
    top = argparse.ArgumentParser(prog="python -m evaluate", description=__doc__)
    subparsers = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        subparser = subparsers.add_parser(
            name, help=command.summary, description=command.description
        )
        if command.config is not None:
            add_config_options(subparser, command.config)
        if command.add_options is not None:
            command.add_options(subparser)
    return top


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
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
    options = parse_arguments(given)
    options.arguments = given
    if options.command != "generate" and not getattr(options, "generate", None):
        _refuse_many_processes(options.command)
    for name in ("steps", "batch", "variations", "limit", "count", "rows", "columns"):
        value = getattr(options, name, None)
        if value is not None and value < 1:
            raise UserError(f"--{name} is {value}; expected a whole number of 1 or more")
    command = COMMANDS[options.command]
    # Only now, as it imports the libraries that this command needs.
    module = import_module(f"evaluate.{command.package}.command")
    run = getattr(module, f"{options.command}_command")
    return int(run(config_from_options(command.config, options) if command.config else options))


if __name__ == "__main__":
    run_door(lambda: main(sys.argv[1:]), ("common", "evaluate", "model", "pipeline"))
