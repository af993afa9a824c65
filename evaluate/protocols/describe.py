"""What a protocol's numbers are of: sets, images, encoders, configuration, software, machine."""

import hashlib
import json
from pathlib import Path
from typing import Any

from common.config import plain
from evaluate.compare.provenance import tile_provenance
from evaluate.compare.results import hardware
from evaluate.protocols.cells import Measurer
from evaluate.protocols.config import Protocol
from evaluate.protocols.plan import Cell, all_features, guiding_set, parse_vae, sources, used_sets
from evaluate.protocols.results import KIND, SCHEMA_VERSION
from evaluate.protocols.store import ResultStore
from evaluate.protocols.work import Workshop
from pipeline.dataset import read_identity, software_versions


def describe(
    protocol: Protocol, workshop: Workshop, cells: list[Cell], store: ResultStore
) -> dict[str, Any]:
    """Everything that says what the numbers are of: sets, images, encoders, software, machine."""
    config = plain(protocol)
    config.pop("deviations")
    text = json.dumps(config, sort_keys=True)
    used = dict.fromkeys([*used_sets(protocol), *sources(protocol, cells)])
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": KIND,
        "protocol": protocol.name,
        "title": protocol.title,
        "source": protocol.source,
        "config": config,
        "config_sha256": hashlib.sha256(text.encode()).hexdigest(),
        "deviations": {key: list(pair) for key, pair in protocol.deviations.items()},
        "left_out": list(protocol.leave_out),
        "published": protocol.published,
        "sources": {name: describe_source(workshop, name, store) for name in used},
        "encoders": _encoders(protocol, workshop, cells),
        "versions": software_versions("torch", "numpy", "scipy", "timm", "pillow"),
        "hardware": hardware(),
    }


def describe_source(workshop: Workshop, name: str, store: ResultStore) -> dict[str, Any]:
    """A source's dataset, selection, sums of files and pixels, and identity."""
    tiles = workshop.tiles(name)
    identity = read_identity(tiles.dataset)
    inputs = {"metric": "tiles", "dataset": identity, "px": tiles.px,
              "root": str(tiles.dataset.root.resolve()),
              "selection": tiles.used.content_hash}  # fmt: skip
    provenance = store.get(inputs, lambda: tile_provenance(tiles.dataset, tiles.used, tiles.px))
    if provenance["missing"]:  # the tiles may be back by now
        provenance = tile_provenance(tiles.dataset, tiles.used, tiles.px)
    generated = name not in workshop.protocol.sets
    return {
        "kind": "reconstruction" if parse_vae(name) else "generated" if generated else "real",
        "dataset": str(tiles.dataset.root),
        "selection": tiles.whole.name,
        "selection_sha256": tiles.used.content_hash,
        "selection_rows": tiles.whole.rows,
        "rows": tiles.used.rows,
        "slides": len(tiles.used.slide_ids),
        "tile_px": tiles.px,
        "tiles": provenance,
        "identity": identity,
        "guidance": guiding_set(workshop.protocol, name) if generated else "",
    }


def _encoders(
    protocol: Protocol, workshop: Workshop, cells: list[Cell]
) -> dict[str, list[dict[str, Any]]]:
    """encoder.json of every feature set that was read, once for each view and size."""
    measurer = Measurer(protocol, workshop, ResultStore(Path(protocol.out) / "cells"))
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for seen, encoder in all_features(protocol, cells):
        record = dict(measurer.feature_store(seen, encoder).record)
        found.setdefault(encoder, {})[json.dumps(record, sort_keys=True)] = record
    return {encoder: list(records.values()) for encoder, records in found.items()}
