"""What a protocol's numbers are of: sources, encoders, configuration, software, machine."""

import hashlib
import json
from collections.abc import Mapping

from common.config import to_plain_values
from common.terms import plain_terms
from evaluate.compare.provenance import tile_provenance
from evaluate.compare.results import describe_hardware
from evaluate.protocols.config import Protocol
from evaluate.protocols.plan import (
    Cell,
    all_features,
    guiding_set,
    made_sources,
    parse_vae,
    used_sets,
)
from evaluate.protocols.published_values import published_rows
from evaluate.protocols.results import KIND, SCHEMA_VERSION
from evaluate.protocols.sources import ProtocolSources
from evaluate.protocols.store import ResultStore
from pipeline.dataset import lineage_terms, read_identity, software_versions


def describe_protocol(
    protocol: Protocol, sources: ProtocolSources, cells: list[Cell], store: ResultStore
) -> dict[str, object]:
    """Everything of results.json but the numbers, which says what they are of."""
    config = plain_config(protocol)
    used = dict.fromkeys([*used_sets(protocol), *made_sources(protocol, cells)])
    # encoder.json of every feature set that was read, once for each view and size.
    encoders: dict[str, dict[str, dict[str, object]]] = {}
    for seen, encoder in all_features(protocol, cells):
        record = dict(sources.feature_store(seen, encoder).record)
        encoders.setdefault(encoder, {})[json.dumps(record, sort_keys=True)] = record
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": KIND,
        "protocol": protocol.name,
        "title": protocol.title,
        "source": protocol.source,
        "config": config,
        "config_sha256": config_sum(config),
        "deviations": {key: list(pair) for key, pair in protocol.deviations.items()},
        "left_out": list(protocol.leave_out),
        "published": published_rows(protocol),
        "sources": {name: describe_source(sources, name, store) for name in used},
        "encoders": {encoder: list(records.values()) for encoder, records in encoders.items()},
        "terms": plain_terms(
            lineage_terms(
                [sources.select_tiles(name).dataset for name in used],
                [record for records in encoders.values() for record in records.values()],
            )
        ),
        "versions": software_versions("torch", "numpy", "scipy", "timm", "pillow"),
        "hardware": describe_hardware(),
    }


def plain_config(protocol: Protocol) -> dict[str, object]:
    """The whole configuration as results.json has it; what deviates is not part of it."""
    config = to_plain_values(protocol)
    config.pop("deviations")
    return config


def config_sum(config: Mapping[str, object]) -> str:
    """The SHA-256 of a configuration, in hexadecimal."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()


def describe_source(sources: ProtocolSources, name: str, store: ResultStore) -> dict[str, object]:
    """A source's dataset, selection, sums of files and pixels, and identity."""
    tiles = sources.select_tiles(name)
    identity = read_identity(tiles.dataset)
    inputs = {"metric": "tiles", "dataset": identity, "px": tiles.px,
              "root": str(tiles.dataset.root.resolve()),
              "selection": tiles.used.content_hash}  # fmt: skip
    # Decoding 100,000 tiles for their sums takes minutes, so these are kept, too.
    provenance = store.get_or_compute(
        inputs, lambda: tile_provenance(tiles.dataset, tiles.used, tiles.px)
    )
    if provenance["missing"]:  # the tiles may be back by now
        provenance = tile_provenance(tiles.dataset, tiles.used, tiles.px)
    generated = name not in sources.protocol.sets
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
        "guidance": guiding_set(sources.protocol, name) if generated else "",
    }
