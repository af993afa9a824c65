"""A protocol from its plan to results.json: make what is missing, refuse, measure, lay out."""

import shlex
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from itertools import chain
from pathlib import Path
from typing import Any

from common.console import open_meter, print_line
from common.errors import UserError
from evaluate.compare.warnings import seen_cohort_warnings
from evaluate.protocols.cautions import find_cautions
from evaluate.protocols.cells import Measurer
from evaluate.protocols.comparable import check_table
from evaluate.protocols.config import Protocol
from evaluate.protocols.describe import describe_protocol
from evaluate.protocols.image_checks import check_images, given_deviations, random_models
from evaluate.protocols.making import SourceMaker
from evaluate.protocols.memorisation import measure_memorisation
from evaluate.protocols.memorisation_tables import memorisation_tables
from evaluate.protocols.plan import (
    Cell,
    all_features,
    all_images,
    made_sources,
    plan_cells,
    used_sets,
)
from evaluate.protocols.store import ResultStore
from evaluate.protocols.tables import build_tables

_SIZES = ("n_real", "n_generated", "n_train")


def run_protocol(protocol: Protocol, command: Sequence[str] = ()) -> dict[str, Any]:
    """Run a protocol to its end; returns results.json as a dictionary.

    Raises `UserError` where a set is too small, numbers do not belong together, or a command
    that makes something failed. What was made until then is kept.
    """
    started = time.monotonic()
    sources = SourceMaker(protocol, command)
    cells = plan_cells(protocol)
    for name in used_sets(protocol):
        sources.select_tiles(name)  # a set that is too small is refused before days of generation
    protocol = replace(protocol, deviations=given_deviations(sources))
    print_line(
        f"protocol {protocol.name}: {len(cells)} comparisons by {len(protocol.encoders)} encoders"
    )
    make_missing(sources, cells)
    protocol = replace(protocol, deviations=protocol.deviations | random_models(sources))
    store = ResultStore(Path(protocol.out) / "cells")
    measurer = Measurer(protocol, sources, store)
    # What does not belong in one table is refused before hours of measuring.
    bases = [measurer.cell_basis(cell) for cell in cells]
    _check_tables(protocol, cells, bases)
    results: dict[str, Any]
    if protocol.kind == "memorisation":
        searches = measure_memorisation(measurer)
        results = {"memorisation": searches, "tables": memorisation_tables(searches)}
    else:
        measured = _measure_cells(measurer, cells, bases)
        results = {"cells": measured, "tables": build_tables(protocol, measured)}
    print_line(
        f"protocol {protocol.name}: {store.computed} results computed, {store.reused} reused"
    )
    results |= describe_protocol(protocol, sources, cells, store)
    results["warnings"] = [*_seen_cohorts(protocol, sources), *find_cautions(protocol, results)]
    return results | {"seconds": round(time.monotonic() - started, 3)}


def _seen_cohorts(protocol: Protocol, sources: SourceMaker) -> list[dict[str, str]]:
    """Held-out columns that the encoders were trained on."""
    guides = {images.spec.model for images in all_images(protocol) if images.spec.guidance}
    encoders = dict.fromkeys(protocol.encoders, "measures")
    encoders |= {protocol.models[name].encoder: "guides the images" for name in guides}
    held_out = [sources.select_tiles(name) for name in protocol.columns]
    return seen_cohort_warnings(encoders, [(one.dataset, one.whole) for one in held_out])


def make_missing(sources: SourceMaker, cells: list[Cell]) -> None:
    """Make images and features that are missing; what is valid is passed over."""
    # Images need the features that guide them; these are of the whole guiding selection.
    for seen, encoder in sources.conditioning_features():
        sources.make_features(seen, encoder, whole=True)
    for source in made_sources(sources.protocol, cells):
        sources.make_images(source)
    check_images(sources)
    for seen, encoder in all_features(sources.protocol, cells):
        sources.make_features(seen, encoder)


def list_missing(sources: SourceMaker, cells: list[Cell]) -> list[str]:
    """What is still to be made, one line each, as commands where they are the pipeline's."""
    lines = [
        f"python -m {shlex.join(sources.cache_command(seen, encoder))}"
        for seen, encoder in sources.conditioning_features()
        if sources.missing_features(seen, encoder, whole=True)
    ]
    counts = {name: sources.missing_images(name) for name in made_sources(sources.protocol, cells)}
    lines += [
        f"{source}: {count:,} images into {sources.image_folder(source)}"
        for source, count in counts.items()
        if count
    ]
    # Features of images that do not exist yet cannot be counted, only announced.
    for seen, encoder in all_features(sources.protocol, cells):
        if counts.get(seen.source):
            view = f" through {seen.view}" if seen.view else ""
            lines.append(f"{encoder} features of {seen.source}{view}, once it is made")
        elif sources.missing_features(seen, encoder):
            lines.append(f"python -m {shlex.join(sources.cache_command(seen, encoder))}")
    return list(dict.fromkeys(lines))


def _check_tables(protocol: Protocol, cells: list[Cell], bases: list[dict[str, object]]) -> None:
    """Numbers of one metric are in one table: all but the controls must rest on the same.

    Of a protocol that varies `columns`, these may be of different sizes, each of one.
    """
    by_column = _SIZES if "columns" in protocol.varies else ()
    for metric in dict.fromkeys(metric for cell in cells for metric in cell.metrics):
        rows: dict[str, list[tuple[str, dict[str, object]]]] = {}
        for cell, basis in zip(cells, bases, strict=True):
            if metric in cell.metrics and cell.kind != "control":
                rows.setdefault(cell.column, []).append((cell.place, basis))
        for column_rows in rows.values():
            check_table(metric, column_rows, protocol.varies)
        check_table(metric, chain.from_iterable(rows.values()), (*protocol.varies, *by_column))


def _measure_cells(
    measurer: Measurer, cells: list[Cell], bases: list[dict[str, object]]
) -> list[dict[str, object]]:
    measured = []
    with open_meter("measure", len(cells), "comparisons") as shown:
        for cell, basis in zip(cells, bases, strict=True):
            results = measurer.measure_cell(cell)
            measured.append(asdict(cell) | {"basis": basis, "results": results})
            shown.advance(1, cell.place)
    return measured


def out_folder(protocol: Protocol) -> Path:
    """Where the results of this protocol are written."""
    folder = Path(protocol.out) / protocol.name
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}; set out=DIR") from error
    return folder
