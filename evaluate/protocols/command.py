"""The `protocol` command: what exists, the plan, images alone, the run."""

import argparse
from collections.abc import Sequence

from common.console import EXIT_OK, print_line
from common.errors import UserError
from common.torch_processes import joined_processes
from evaluate.protocols.config import Protocol, load_protocol, protocol_names
from evaluate.protocols.making import SourceMaker
from evaluate.protocols.plan import expand_names, plan_cells
from evaluate.protocols.published_values import check_published_model, describe_rows
from evaluate.protocols.report_protocols import load_report
from evaluate.protocols.run import list_missing
from evaluate.protocols.run_files import exit_status, run_and_write, run_report


def protocol_command(options: argparse.Namespace) -> int:
    """Run `python -m evaluate protocol` with parsed options; returns the exit status.

    `options.arguments` is the command line, for a launcher to repeat.
    """
    if options.name == "list":
        for name in protocol_names():
            print_line(f"{name:14} {load_protocol(name).title}")
        print_line(f"{'all':14} Every table and figure of the report, and a reproduction sheet")
        return EXIT_OK
    protocols = _load_protocols(options)
    chosen = _choose_protocols(protocols, options.only)
    if options.generate:
        if len(chosen) > 1:
            raise UserError("--generate makes images of one protocol: name it with --only NAME")
        sources = SourceMaker(chosen[0])
        with joined_processes(chosen[0].device, setting="device=") as processes:
            for source in expand_names(chosen[0], options.generate):
                sources.generate_images(source, processes)
        return EXIT_OK
    if options.dry_run:
        return _print_plan(chosen)
    if options.name == "all":
        return run_report(protocols, [one.name for one in chosen], options.arguments)
    return exit_status(run_and_write(protocols[0], options.arguments))


def _load_protocols(options: argparse.Namespace) -> list[Protocol]:
    if options.name != "all":
        if options.only:
            raise UserError(f"--only is for `all`; here the protocol is {options.name}")
        protocol = load_protocol(options.name, options.config, options.overrides)
        check_published_model(protocol)
        return [protocol]
    return load_report(options.config, options.overrides)


def _choose_protocols(protocols: list[Protocol], only: str | None) -> list[Protocol]:
    chosen = [one for one in protocols if not only or one.name == only]
    if not chosen:
        there = ", ".join(protocol.name for protocol in protocols)
        raise UserError(f"--only {only}: not one of all; there are {there}")
    return chosen


def _print_plan(protocols: Sequence[Protocol]) -> int:
    """The rows with what they repeat, and all that is missing, each thing once."""
    plans = [(protocol, plan_cells(protocol)) for protocol in protocols]
    for protocol, cells in plans:
        for line in describe_rows(protocol, cells):
            print_line(f"{protocol.name}: {line}")
    missing = dict.fromkeys(
        line for protocol, cells in plans for line in list_missing(SourceMaker(protocol), cells)
    )
    for line in missing:
        print_line(line)
    rest = f"{len(missing)} things are missing" if missing else "nothing is missing"
    names = ", ".join(protocol.name for protocol in protocols)
    comparisons = sum(len(cells) for _, cells in plans)
    print_line(f"protocol {names}: {comparisons} comparisons; {rest}")
    return EXIT_OK
