"""The `protocol` command: the plan, the run, the files that it leaves."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from common.console import EXIT_FAILURES, EXIT_OK, print_line
from common.errors import UserError
from common.files import write_files
from common.text import format_bytes, format_seconds
from common.torch_processes import joined_processes
from evaluate.compare.results import results_bytes
from evaluate.protocols.config import Protocol, load_protocol, protocol_names
from evaluate.protocols.making import SourceMaker
from evaluate.protocols.plan import expand_names, plan_cells
from evaluate.protocols.published_values import check_published_model, describe_rows
from evaluate.protocols.report_protocols import load_report
from evaluate.protocols.reproduction import reproduction_sheet
from evaluate.protocols.run import list_missing, out_folder, run_protocol
from evaluate.report.protocol_files import protocol_files
from evaluate.report.reproduction_files import Outcome, reproduction_files


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
    if options.generate:
        if len(protocols) > 1:
            raise UserError("--generate makes images of one protocol: name it with --only NAME")
        sources = SourceMaker(protocols[0])
        with joined_processes(protocols[0].device, setting="device=") as processes:
            for source in expand_names(protocols[0], options.generate):
                sources.generate_images(source, processes)
        return EXIT_OK
    if options.dry_run:
        return _print_plan(protocols)
    if options.name == "all":
        return _run_report(protocols, options.arguments)
    return _run_and_write(protocols[0], options.arguments)[0]


def _load_protocols(options: argparse.Namespace) -> list[Protocol]:
    if options.name != "all":
        if options.only:
            raise UserError(f"--only is for `all`; here the protocol is {options.name}")
        protocol = load_protocol(options.name, options.config, options.overrides)
        check_published_model(protocol)
        return [protocol]
    protocols = load_report(options.config, options.overrides)
    if not options.only:
        return protocols
    chosen = [protocol for protocol in protocols if protocol.name == options.only]
    if not chosen:
        there = ", ".join(protocol.name for protocol in protocols)
        raise UserError(f"--only {options.only}: not one of all; there are {there}")
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


def _run_report(protocols: Sequence[Protocol], arguments: Sequence[str]) -> int:
    """Each protocol in turn; one that fails leaves the others be. Then the sheet and its page."""
    outcomes, results = [], {}
    for protocol in protocols:
        try:
            status, measured = _run_and_write(protocol, [*arguments, "--only", protocol.name])
        except UserError as error:
            print_line(f"protocol {protocol.name}: failed: {error}")
            outcomes.append(Outcome(protocol.name, protocol.title, str(error)))
            continue
        results[protocol.name] = measured
        failure = "some numbers could not be computed" if status else ""
        outcomes.append(Outcome(protocol.name, protocol.title, failure))
    sheet = reproduction_sheet(results)
    files = reproduction_files(outcomes, sheet, Path(protocols[0].out))
    write_files(files)
    for path in files:
        print_line(f"protocol all: wrote {path}, {format_bytes(path.stat().st_size)}")
    failed = [outcome.name for outcome in outcomes if outcome.failure]
    compared = sum(row.difference is not None for row in sheet)
    print_line(
        f"protocol all: {len(outcomes) - len(failed)} of {len(outcomes)} protocols done"
        + (f" (failed: {', '.join(failed)})" if failed else "")
        + f"; {compared} of {len(sheet)} published values compared"
    )
    return EXIT_FAILURES if failed else EXIT_OK


def _run_and_write(protocol: Protocol, arguments: Sequence[str]) -> tuple[int, dict[str, object]]:
    folder = out_folder(protocol)
    results = run_protocol(protocol, arguments)
    files = {folder / "results.json": results_bytes(results)}
    try:
        files |= protocol_files(results, folder)
    finally:
        # Together: tables of another run next to results.json would pass for its own. Where a
        # page cannot be drawn, the results are kept all the same.
        write_files(files)
    written = list(files)
    for warning in results["warnings"]:
        print_line(f"warning: {warning['message']}")
    for path in written:
        print_line(f"protocol {protocol.name}: wrote {path}, {format_bytes(path.stat().st_size)}")
    print_line(f"protocol {protocol.name}: done in {format_seconds(results['seconds'])}")
    has_failed = any("failed" in cell["results"] for cell in results.get("cells", []))
    return EXIT_FAILURES if has_failed else EXIT_OK, results
