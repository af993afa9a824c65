"""A protocol from its plan to results.json: make what is missing, refuse, measure, lay out."""

import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from common.console import meter, say
from common.errors import UserError
from evaluate.protocols.cautions import cautions
from evaluate.protocols.cells import Measurer
from evaluate.protocols.comparable import check_table
from evaluate.protocols.config import Protocol
from evaluate.protocols.describe import describe
from evaluate.protocols.memorisation import measure_memorisation
from evaluate.protocols.memorisation_tables import memorisation_tables
from evaluate.protocols.plan import Cell, all_features, plan_cells, sources, used_sets
from evaluate.protocols.standing import check_images, given_deviations
from evaluate.protocols.store import ResultStore
from evaluate.protocols.tables import build_tables
from evaluate.protocols.work import Workshop


def run_protocol(protocol: Protocol, command: Sequence[str] = ()) -> dict[str, Any]:
    """Run a protocol to its end; returns results.json as a dictionary.

    Raises `UserError` where a set is too small, numbers do not belong together, or a command
    that was asked to make something failed. What was made until then stands.
    """
    started = time.monotonic()
    workshop = Workshop(protocol, command)
    cells = plan_cells(protocol)
    _check_sets(workshop)
    protocol = replace(protocol, deviations=given_deviations(workshop))
    say(f"protocol {protocol.name}: {len(cells)} comparisons by {len(protocol.encoders)} encoders")
    prepare(workshop, cells)
    store = ResultStore(Path(protocol.out) / "cells")
    measurer = Measurer(protocol, workshop, store)
    bases = [measurer.basis(cell) for cell in cells]
    _check_tables(protocol, cells, bases)
    if protocol.kind == "memorisation":
        searches = measure_memorisation(protocol, measurer)
        measured: dict[str, Any] = {
            "memorisation": searches,
            "tables": memorisation_tables(searches),
        }
    else:
        found = _measure(measurer, cells, bases)
        measured = {"cells": found, "tables": build_tables(protocol, found)}
    say(f"protocol {protocol.name}: {store.computed} results computed, {store.reused} reused")
    results = measured | describe(protocol, workshop, cells, store)
    results["warnings"] = cautions(protocol, results)
    return results | {"seconds": round(time.monotonic() - started, 3)}


def _check_sets(workshop: Workshop) -> None:
    """Refuse a set that is too small before days are spent on generation."""
    for name in used_sets(workshop.protocol):
        workshop.tiles(name)


def prepare(workshop: Workshop, cells: list[Cell]) -> None:
    """Make images and features that are missing; a stage that stands is passed over."""
    for seen, encoder in workshop.conditioning_features():
        workshop.make_features(seen, encoder, whole=True)
    for source in sources(workshop.protocol, cells):
        workshop.make_images(source)
    check_images(workshop)
    for seen, encoder in all_features(workshop.protocol, cells):
        workshop.make_features(seen, encoder)


def missing(workshop: Workshop, cells: list[Cell]) -> list[str]:
    """What is still to be made, a line each, as commands where they are the pipeline's."""
    lines = [
        f"python -m {' '.join(workshop.cache_command(seen, encoder))}"
        for seen, encoder in workshop.conditioning_features()
        if workshop.missing_features(seen, encoder, whole=True)
    ]
    absent = set()
    for source in sources(workshop.protocol, cells):
        count = workshop.missing_images(source)
        if count:
            absent.add(source)
            lines.append(f"{source}: {count:,} images into {workshop.folder(source)}")
    for seen, encoder in all_features(workshop.protocol, cells):
        if seen.source in absent:
            view = f" through {seen.view}" if seen.view else ""
            lines.append(f"{encoder} features of {seen.source}{view}, once it stands")
        elif workshop.missing_features(seen, encoder):
            lines.append(f"python -m {' '.join(workshop.cache_command(seen, encoder))}")
    return list(dict.fromkeys(lines))


def _check_tables(protocol: Protocol, cells: list[Cell], bases: list[dict[str, Any]]) -> None:
    """Numbers of one metric stand in one table: all but the controls must rest on the same."""
    for metric in dict.fromkeys(metric for cell in cells for metric in cell.metrics):
        rows = [
            (f"{cell.label}, {cell.encoder}, {cell.column}", basis)
            for cell, basis in zip(cells, bases, strict=True)
            if metric in cell.metrics and cell.kind != "control"
        ]
        check_table(metric, rows, protocol.varies)


def _measure(
    measurer: Measurer, cells: list[Cell], bases: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    found = []
    with meter("measure", len(cells), "comparisons") as shown:
        for cell, basis in zip(cells, bases, strict=True):
            metrics = measurer.measure(cell)
            found.append(asdict(cell) | {"basis": basis, "results": metrics})
            shown.advance(1, f"{cell.label}, {cell.encoder}, {cell.column}")
    return found


def out_folder(protocol: Protocol) -> Path:
    """Where the results of this protocol are written."""
    folder = Path(protocol.out) / protocol.name
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}; set out=DIR") from error
    return folder
