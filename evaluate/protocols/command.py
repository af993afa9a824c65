"""The `protocol` command: the plan, the run, the files that it leaves."""

import argparse
from collections.abc import Sequence

from common.console import EXIT_FAILURES, EXIT_OK, print_line
from common.files import write_files
from common.text import format_bytes, format_seconds
from common.torch_processes import joined_processes
from evaluate.compare.results import results_bytes
from evaluate.protocols.config import Protocol, load_protocol, protocol_names
from evaluate.protocols.making import SourceMaker
from evaluate.protocols.plan import expand_names, plan_cells
from evaluate.protocols.run import list_missing, out_folder, run_protocol
from evaluate.report.protocol_files import protocol_files


def protocol_command(options: argparse.Namespace) -> int:
    """Run `python -m evaluate protocol` with parsed options; returns the exit status.

    `options.arguments` is the command line, for a launcher to repeat.
    """
    if options.name == "list":
        for name in protocol_names():
            print_line(f"{name:14} {load_protocol(name).title}")
        return EXIT_OK
    protocol = load_protocol(options.name, options.config, options.overrides)
    if options.generate:
        sources = SourceMaker(protocol)
        with joined_processes(protocol.device, setting="device=") as processes:
            for source in expand_names(protocol, options.generate):
                sources.generate_images(source, processes)
    elif options.dry_run:
        cells = plan_cells(protocol)
        lines = list_missing(SourceMaker(protocol), cells)
        for line in lines:
            print_line(line)
        rest = f"{len(lines)} things are missing" if lines else "nothing is missing"
        print_line(f"protocol {protocol.name}: {len(cells)} comparisons; {rest}")
    else:
        return _run_and_write(protocol, options.arguments)
    return EXIT_OK


def _run_and_write(protocol: Protocol, arguments: Sequence[str]) -> int:
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
    return EXIT_FAILURES if has_failed else EXIT_OK
