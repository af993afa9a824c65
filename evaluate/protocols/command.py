"""The `protocol` command: options, the plan, the run, the files that it leaves."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.console import EXIT_OK, say
from common.text import format_bytes, format_seconds


def add_protocol_options(it: argparse.ArgumentParser) -> None:
    """Add the command's options to its parser."""
    it.add_argument("name", metavar="NAME", help="the protocol; `list` shows what there is")
    it.add_argument("--config", type=Path, metavar="FILE.yaml", help="where datasets and models "
                    "are, and what is changed")  # fmt: skip
    it.add_argument("--dry-run", action="store_true", help="print what is missing, make nothing")
    it.add_argument("--generate", metavar="IMAGES", help="only make these images (a name or `all`):"
                    " for torchrun and GPU jobs")  # fmt: skip
    it.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. count=1000 "
                    "encoders=[inception-v3] generations.*.steps=50")  # fmt: skip


def protocol_command(options: argparse.Namespace, arguments: Sequence[str]) -> int:
    """Run `python -m evaluate protocol` with parsed options; returns the exit status."""
    from common.torch_processes import make_sums_independent_of_threads
    from evaluate.protocols.config import load, names

    make_sums_independent_of_threads()  # images that it makes are those of `generate`
    if options.name == "list":
        for name in names():
            say(f"{name:14} {load(name).title}")
        return EXIT_OK
    protocol = load(options.name, options.config, options.overrides)
    if options.generate:
        return _generate_only(protocol, options.generate)
    if options.dry_run:
        return _dry_run(protocol)
    return _run(protocol, [one for one in arguments if one != "--dry-run"])


def _generate_only(protocol: Any, name: str) -> int:
    from common.torch_processes import joined_processes
    from evaluate.protocols.work import Workshop, expand_names

    workshop = Workshop(protocol)
    with joined_processes(protocol.device, setting="device=") as processes:
        for source in expand_names(protocol, name):
            workshop.generate(source, processes)
    return EXIT_OK


def _dry_run(protocol: Any) -> int:
    from evaluate.protocols.plan import plan_cells
    from evaluate.protocols.run import missing
    from evaluate.protocols.work import Workshop

    cells = plan_cells(protocol)
    lines = missing(Workshop(protocol), cells)
    for line in lines:
        say(line)
    rest = f"{len(lines)} things are missing" if lines else "nothing is missing"
    say(f"protocol {protocol.name}: {len(cells)} comparisons; {rest}")
    return EXIT_OK


def _run(protocol: Any, arguments: list[str]) -> int:
    from evaluate.compare.results import write_results
    from evaluate.protocols.run import out_folder, run_protocol
    from evaluate.report.protocol_files import write_protocol_files

    folder = out_folder(protocol)
    results = run_protocol(protocol, arguments)
    write_results(folder / "results.json", results)
    written = [folder / "results.json", *write_protocol_files(results, folder)]
    for one in results["warnings"]:
        say(f"warning: {one['message']}")
    for path in written:
        say(f"protocol {protocol.name}: wrote {path}, {format_bytes(path.stat().st_size)}")
    say(f"protocol {protocol.name}: done in {format_seconds(results['seconds'])}")
    return EXIT_OK
