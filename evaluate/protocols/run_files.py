"""Runs of protocols with the files that they leave: of one, and of the whole report."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from common.console import EXIT_FAILURES, EXIT_OK, print_line, print_traceback
from common.errors import UserError
from common.files import write_files
from common.text import format_bytes, format_seconds
from evaluate.compare.results import results_bytes
from evaluate.metrics.registry import describe_failure
from evaluate.protocols.config import Protocol
from evaluate.protocols.describe import config_sum, plain_config
from evaluate.protocols.reproduction import SheetRow, reproduction_sheet
from evaluate.protocols.results import read_protocol_results
from evaluate.protocols.run import out_folder, run_protocol
from evaluate.report.protocol_files import protocol_files
from evaluate.report.reproduction_files import Outcome, reproduction_files

_DONE = "done"
_INCOMPLETE = "some numbers could not be computed"


class _Ending(NamedTuple):
    """How a protocol of the report ended; without results where it failed or was not run."""

    outcome: Outcome
    results: Mapping[str, object] | None = None


def run_and_write(protocol: Protocol, arguments: Sequence[str]) -> dict[str, object]:
    """Run a protocol and write results.json, the page and the tables; returns results.json."""
    folder = out_folder(protocol)
    results = run_protocol(protocol, arguments)
    files = {folder / "results.json": results_bytes(results)}
    try:
        files |= protocol_files(results, folder)
    finally:
        # Together: tables of another run next to results.json would pass for its own. Where a
        # page cannot be drawn, the results are kept all the same.
        write_files(files)
    for warning in results["warnings"]:
        print_line(f"warning: {warning['message']}")
    for path in files:
        print_line(f"protocol {protocol.name}: wrote {path}, {format_bytes(path.stat().st_size)}")
    print_line(f"protocol {protocol.name}: done in {format_seconds(results['seconds'])}")
    return results


def exit_status(results: Mapping[str, object]) -> int:
    """1 where a number of the results could not be computed, else 0."""
    cells = results.get("cells")
    measured = cells if isinstance(cells, list) else []
    return EXIT_FAILURES if any("failed" in cell["results"] for cell in measured) else EXIT_OK


def run_report(
    protocols: Sequence[Protocol], chosen: Collection[str], arguments: Sequence[str]
) -> int:
    """Run the chosen protocols of the report in turn, then write the sheet of all and its page.

    One that fails leaves the others be. Of those that are not chosen the results of an earlier
    run under the same configuration count. Returns the exit status: 1 where one of the chosen
    failed.
    """
    endings = [
        _try_protocol(protocol, [*arguments, "--only", protocol.name])
        if protocol.name in chosen
        else _earlier_run(protocol)
        for protocol in protocols
    ]
    sheet = reproduction_sheet(
        {outcome.name: results for outcome, results in endings if results is not None}
    )
    outcomes = [ending.outcome for ending in endings]
    files = reproduction_files(outcomes, sheet, Path(protocols[0].out))
    write_files(files)
    for path in files:
        print_line(f"protocol all: wrote {path}, {format_bytes(path.stat().st_size)}")
    print_line(_final_line(outcomes, sheet))
    done = {outcome.name for outcome in outcomes if outcome.state == _DONE}
    return EXIT_OK if done.issuperset(chosen) else EXIT_FAILURES


def _try_protocol(protocol: Protocol, arguments: Sequence[str]) -> _Ending:
    try:
        results = run_and_write(protocol, arguments)
    except Exception as error:
        # Whatever it is, such as a GPU without memory: the others may take days.
        if not isinstance(error, UserError):
            print_traceback(error)
        failure = describe_failure(error)
        print_line(f"protocol {protocol.name}: failed: {failure}")
        return _Ending(Outcome(protocol.name, protocol.title, f"failed: {failure}"))
    return _Ending(_outcome_of(protocol, results), results)


def _earlier_run(protocol: Protocol) -> _Ending:
    """What the folder has of a protocol, where it was made under the same configuration."""
    state = "not run yet"
    try:
        results = read_protocol_results(Path(protocol.out) / protocol.name / "results.json")
    except UserError as error:
        results, state = None, str(error)
    if results is not None and results["config_sha256"] != config_sum(plain_config(protocol)):
        results, state = None, "not run under this configuration"
    if results is None:
        return _Ending(Outcome(protocol.name, protocol.title, state))
    return _Ending(_outcome_of(protocol, results), results)


def _outcome_of(protocol: Protocol, results: Mapping[str, object]) -> Outcome:
    state = _INCOMPLETE if exit_status(results) else _DONE
    return Outcome(protocol.name, protocol.title, state, has_page=True)


def _final_line(outcomes: Sequence[Outcome], sheet: Sequence[SheetRow]) -> str:
    done = sum(outcome.state == _DONE for outcome in outcomes)
    rest = [outcome for outcome in outcomes if outcome.state != _DONE]
    reasons = "; ".join(f"{one.name}: {one.state.partition(':')[0]}" for one in rest)
    compared = sum(row.difference is not None for row in sheet)
    return (
        f"protocol all: {done} of {len(outcomes)} protocols done"
        + (f" ({reasons})" if rest else "")
        + f"; {compared} of {len(sheet)} published values compared"
    )
