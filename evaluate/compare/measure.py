"""`measure`: a synthetic dataset against a real one, from the cached features of both."""

import time
from collections.abc import Sequence
from dataclasses import asdict

import numpy as np

from common.console import print_line
from common.errors import UserError
from common.terms import plain_terms
from evaluate.compare.inputs import InputFault, TileRows, check_train, find_faults, stopped_metrics
from evaluate.compare.results import SCHEMA_VERSION, describe_hardware, make_warning
from evaluate.compare.sides import (
    Features,
    FeatureSide,
    Labels,
    check_comparable,
    open_store,
    slide_attribute,
    source_features,
)
from evaluate.compare.warnings import (
    blockiness_warnings,
    equality_warnings,
    fault_warnings,
    hold_out_warnings,
    metric_warnings,
    seen_cohort_warnings,
    set_warnings,
)
from evaluate.metrics.metric import FeaturePair, MetricSettings
from evaluate.metrics.registry import METRICS, compute_each, compute_floors, describe_failure
from model.sampler_settings import FIELD_OF_OPTION
from pipeline.dataset import Dataset, lineage_terms, read_identity, software_versions
from pipeline.dataset.features import FeatureStore

FLOOR_SPLITS, FLOOR_SPLIT_ROWS = 8, 4096
"""A single split of few tiles is noisy: of at most 4,096 tiles the mean of 8 splits is taken."""
_MIN_ROWS = 8
"""Fewer rows per side make no half with three neighbours per tile."""
_SAMPLER_KEYS = (
    *FIELD_OF_OPTION.values(), "compute_dtype", "micro_batch", "seed", "variations", "guidance",
)  # fmt: skip


def measure(
    real: FeatureSide,
    generated: FeatureSide,
    guidance: Dataset | None = None,
    *,
    train: FeatureSide | None = None,
    settings: MetricSettings | None = None,
    device: str = "cpu",
) -> dict[str, object]:
    """Compare a generated selection with a real one; returns results.json as a dictionary.

    Every metric of the registry is computed whose features there are; what keeps one from being
    computed is under `failed`, and costs no other. `guidance` is the dataset
    of the tiles that guided, for the cosine of each generated tile to its source (None: the real
    dataset); `train` are tiles that the model was trained on, for the feature likelihood
    divergence, which is then tested on `real`. `device` is where distances are computed.
    Raises `UserError` with fewer than 8 tiles per side, and where all real tiles are in `train`.
    """
    started = time.monotonic()
    settings = settings or MetricSettings()
    for side, name in ((real, "--real-selection"), (generated, "--generated-selection")):
        if len(side.features) < _MIN_ROWS:
            raise UserError(
                f"{name} {side.selection.name} has {len(side.features)} tiles, at least "
                f"{_MIN_ROWS} are needed; choose a larger selection"
            )
    if train is not None:
        check_train(train, real)
    # How the images were made is in their dataset's identity, not in the features.
    identity = read_identity(generated.dataset)
    sources, store, no_cosine = _paired_sources(generated, real, guidance or real.dataset)
    pair = make_pair(real, generated, guidance or real.dataset, sources, train, device)
    faults = find_faults(_located_rows(real, generated, train, sources, store))
    for fault in faults:
        print_line(f"measure: {fault.message}")
    metrics, failed = _measure_pair(pair, faults, settings)
    halves = None
    try:
        halves = real_halves(real, settings, device)
    except Exception as error:
        # What was measured is not lost for the floor next to it.
        failed["real_vs_real"] = describe_failure(error)
    described = {"real": real.describe_side(), "generated": generated.describe_side()}
    equal = {
        name: side.count_equal(generated)
        for name, side in (("real", real), ("training", train))
        if side is not None
    }
    warnings = set_warnings(real, generated, identity) + blockiness_warnings(described)
    warnings += equality_warnings(equal, len(generated.features))
    warnings += [make_warning("no_cosine", no_cosine)] if no_cosine else []
    warnings += hold_out_warnings([side for side in (real, train) if side is not None])
    encoders = {str(identity.get("guidance_encoder", "")): "guides the images"}
    encoders.setdefault(real.store.encoder, "measures")
    warnings += seen_cohort_warnings(encoders, [(real.dataset, real.selection)])
    warnings += fault_warnings(faults, failed)
    return {
        "schema_version": SCHEMA_VERSION,
        "real": described["real"],
        "generated": {**described["generated"], "identity": identity},
        "train": None if train is None else train.describe_side(),
        "model_sha256": identity.get("model_sha256"),
        "sampler": {key: identity.get(key) for key in _SAMPLER_KEYS},
        "encoder": real.store.record,
        "terms": plain_terms(
            lineage_terms(
                [side.dataset for side in (real, generated, train) if side], [real.store.record]
            )
        ),
        "settings": asdict(settings) | {"fld_seeds": list(settings.fld_seeds)},
        "metrics": metrics,
        "failed": failed,
        "equal_tiles": equal,
        "references": {"real_vs_real": halves},
        "warnings": warnings
        + metric_warnings([("", metrics), ("real halves", halves or {})], warnings),
        "seconds": round(time.monotonic() - started, 3),
        "versions": software_versions("torch", "numpy", "scipy"),
        "hardware": describe_hardware(),
    }


def _measure_pair(
    pair: FeaturePair, faults: Sequence[InputFault], settings: MetricSettings
) -> tuple[dict[str, object], dict[str, str]]:
    """The results of all metrics, null where there is none; the reasons of those that failed."""
    names = [
        name
        for name, metric in METRICS.items()
        if all(getattr(pair, needed) is not None for needed in metric.needs)
    ]
    failed = stopped_metrics([METRICS[name] for name in names], faults)
    computed, failures = compute_each(pair, [n for n in names if n not in failed], settings)
    # Metrics that need more than two sets come first.
    metrics: dict[str, object] = {name: None for name, metric in METRICS.items() if metric.needs}
    return metrics | {name: computed.get(name) for name in names}, failed | failures


def make_pair(
    real: FeatureSide,
    generated: FeatureSide,
    guidance: Dataset,
    sources: Features | None,
    train: FeatureSide | None,
    device: str = "cpu",
) -> FeaturePair:
    """Two sides as float32 ``[n, d]`` features with the slide and patient of each row ``[n]``."""
    # Generated rows are labelled by the slides of the tiles that guided them.
    slides = generated.source_slides()
    labelled = guidance if generated.is_generated else generated.dataset
    return FeaturePair(
        real.features,
        generated.features,
        clusters=None if slides is None else _cluster_labels(labelled, slides),
        real_clusters=_cluster_labels(real.dataset, real.row_slides),
        train=None if train is None else train.features,
        sources=sources,
        device=device,
    )


def _cluster_labels(dataset: Dataset, slides: Labels) -> dict[str, Labels]:
    """The slide and the patient of each row, which resampling draws as wholes."""
    return {"slide": slides, "patient": slide_attribute(dataset, slides, "patient")}


def _paired_sources(
    generated: FeatureSide, real: FeatureSide, guidance: Dataset
) -> tuple[Features | None, FeatureStore, str | None]:
    store = real.store
    # Sources are compared with generated tiles, so their features must be made alike.
    if guidance.root != real.dataset.root:
        view, tile_px = str(store.record.get("view", "")), int(store.record["tile_px"])
        store = open_store(guidance, "NAME", store.encoder, view=view, tile_px=tile_px)
        check_comparable(real.store, store)
    features, reason = source_features(generated, store)
    return features, store, reason


def _located_rows(
    real: FeatureSide,
    generated: FeatureSide,
    train: FeatureSide | None,
    sources: Features | None,
    store: FeatureStore,
) -> dict[str, TileRows]:
    """The sets that are compared, by their field of `FeaturePair`, with the tile of each row."""
    sets = {
        "real": TileRows.of_side("real", real),
        "generated": TileRows.of_side("generated", generated),
    }
    if train is not None:
        sets["train"] = TileRows.of_side("train", train)
    if sources is not None and generated.sources is not None:
        places = generated.sources
        sets["sources"] = TileRows("source", sources, places.slides, places.ranks, store)
    return sets


def real_halves(
    real: FeatureSide, settings: MetricSettings | None = None, device: str = "cpu"
) -> dict[str, object] | None:
    """The same metrics, by the same settings, between two disjoint random halves of the real tiles.

    This is what a perfect generator would reach with half as many tiles per side.
    None with fewer than 16 tiles, or where a half has no k neighbours.
    """
    settings = settings or MetricSettings()
    count = len(real.features)
    half = count // 2
    if half < least_rows(settings):
        return None
    # Seeded by the selection: the same tiles always have the same halves.
    random = np.random.default_rng(int(real.selection.content_hash[:16], 16))
    orders = [
        random.permutation(count)
        for _ in range(FLOOR_SPLITS if count <= FLOOR_SPLIT_ROWS else 1)
    ]  # fmt: skip
    return mean_floors(
        [(real.features[order[:half]], real.features[order[half : 2 * half]]) for order in orders],
        settings,
        device,
    )


def least_rows(settings: MetricSettings) -> int:
    """Rows that each half of a floor needs, at least 8: of fewer, recall would use a smaller k."""
    return max(_MIN_ROWS, 2 * settings.k + 1)


def mean_floors(
    splits: Sequence[tuple[Features, Features]], settings: MetricSettings, device: str
) -> dict[str, object]:
    """Metrics between the halves of each split, float32 ``[n, d]``: fractions as their means.

    Whole numbers and texts are those of the first split.
    """
    floors = [compute_floors(FeaturePair(*split, device=device), settings) for split in splits]
    # Counts and labels are no measurements: their mean over splits would mean nothing.
    means = {
        name: {
            key: float(np.mean([floor[name][key] for floor in floors]))
            if isinstance(value, float)
            else value
            for key, value in result.items()
        }
        for name, result in floors[0].items()
    }
    return {"splits": len(floors), **means}
