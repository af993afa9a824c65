"""`measure`: a synthetic dataset against a real one, from the cached features of both."""

import time
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from evaluate.generate.plan import source_order
from evaluate.metrics import cosine_similarity, frechet_distance, precision_recall
from evaluate.results import SCHEMA_VERSION, hardware, warning
from model.errors import UserError
from pipeline.dataset import (
    Dataset,
    Selection,
    identity_value,
    open_dataset,
    read_candidates,
    read_identity,
    read_selection,
    software_versions,
)
from pipeline.features import FeatureStore, encoder_file

Features = npt.NDArray[np.float32]

_FEW_TILES = 1000
_COSINE_BINS = 100
_SPLITS, _SPLIT_ROWS = 8, 4096
_MIN_ROWS = 8
"""Fewer rows a side make no half with three neighbours a tile."""

_SAMPLER_KEYS = (
    "solver",
    "steps",
    "guidance_scale",
    "guidance_low",
    "guidance_high",
    "compute_dtype",
    "micro_batch",
    "seed",
    "variations",
    "guidance",
)
_ENCODER_KEYS = ("encoder", "weights_sha256", "view", "compute_dtype", "dim", "tile_px")


@dataclass(frozen=True)
class Side:
    """One side of a comparison: a selection of a dataset, and its features."""

    dataset: Dataset
    selection: Selection
    store: FeatureStore
    features: Features

    @classmethod
    def open(cls, root: Path, selection_name: str, encoder: str, *, like: "Side | None") -> "Side":
        """Read the CLS features of a selection.

        Raises `UserError` naming the `cache` command where they are missing, and where they were
        made otherwise than those of `like`.
        """
        dataset = open_dataset(root)
        selection = read_selection(dataset, selection_name)
        store = _open_store(dataset, selection_name, encoder, like)
        if like is not None:
            check_comparable(like.store.record, store.record, like.dataset, dataset)
        return cls(dataset, selection, store, np.asarray(store.read_selection(selection)))

    def described(self) -> dict[str, Any]:
        """The side's entry in results.json."""
        return {
            "dataset": str(self.dataset.root),
            "selection": self.selection.name,
            "selection_sha256": self.selection.content_hash,
            "rows": self.selection.rows,
            "slides": len(self.selection.slide_ids),
        }


def _open_store(
    dataset: Dataset, selection_name: str, encoder: str, like: Side | None
) -> FeatureStore:
    tile_px = int(identity_value(dataset, "tile_px"))
    if not encoder_file(dataset, tile_px, encoder, "", "cls").exists():
        weights = f" --weights {like.store.record['weights']}" if like is not None else ""
        raise UserError(
            f"no cls features of {encoder} in {dataset.root}; make them with `python -m pipeline "
            f"cache --dataset {dataset.root} --selection {selection_name} "
            f"--encoder {encoder}{weights} --tokens none`"
        )
    return FeatureStore(dataset, tile_px=tile_px, encoder=encoder)


def check_comparable(
    real: dict[str, Any], generated: dict[str, Any], first: Dataset, second: Dataset
) -> None:
    """Refuse features that were made differently: no distance between them means anything.

    Raises `UserError` naming the first difference, with both values.
    """
    for key in _ENCODER_KEYS:
        if real.get(key) != generated.get(key):
            raise UserError(
                f"features cannot be compared: {key} is {real.get(key)!r} in {first.root} and "
                f"{generated.get(key)!r} in {second.root}; cache both with the same encoder, "
                "weights and dtype"
            )


def measure(real: Side, generated: Side, guidance: Dataset | None = None) -> dict[str, Any]:
    """Compare a generated selection with a real one; returns results.json as a dictionary.

    The metrics are Fréchet distance, precision, recall, density and coverage over the two sets,
    and the cosine of each generated tile to its own source tile, which is read from `guidance`
    (None: the real dataset). Raises `UserError` with fewer than 8 tiles a side.
    """
    started = time.monotonic()
    for side, name in ((real, "--real-selection"), (generated, "--generated-selection")):
        if len(side.features) < _MIN_ROWS:
            raise UserError(
                f"{name} {side.selection.name} has {len(side.features)} tiles, at least "
                f"{_MIN_ROWS} are needed; choose a larger selection"
            )
    identity = read_identity(generated.dataset)
    sources, reason = source_features(generated, real, guidance or real.dataset)
    return {
        "schema_version": SCHEMA_VERSION,
        "real": real.described(),
        "generated": {**generated.described(), "identity": identity},
        "model_sha256": identity.get("model_sha256"),
        "sampler": {key: identity.get(key) for key in _SAMPLER_KEYS},
        "encoder": real.store.record,
        "metrics": {
            **set_metrics(real.features, generated.features),
            "cosine_similarity": None
            if sources is None
            else cosine_metrics(sources, generated.features),
        },
        "references": {"real_vs_real": real_halves(real)},
        "warnings": _warnings(real, generated, identity, reason),
        "seconds": round(time.monotonic() - started, 3),
        "versions": software_versions("torch", "numpy", "scipy"),
        "hardware": hardware(),
    }


def set_metrics(real: Features, generated: Features) -> dict[str, Any]:
    """The metrics that compare two sets of features [n, d] and [m, d]."""
    return {
        "frechet_distance": _plain(frechet_distance(real, generated)),
        "precision_recall": _plain(precision_recall(real, generated)),
    }


def cosine_metrics(sources: Features, generated: Features) -> dict[str, Any]:
    """The cosine of each generated tile to its source, with a histogram in place of the values."""
    result = cosine_similarity(sources, generated)
    counts, edges = np.histogram(result.values, bins=_COSINE_BINS, range=(-1.0, 1.0))
    histogram = {"edges": edges.tolist(), "counts": counts.tolist()}
    return {**_plain(result), "histogram": histogram}


def _plain(result: Any) -> dict[str, Any]:
    """The numbers and words of a metric's result; arrays, one value a tile, are left out."""
    values = {field.name: getattr(result, field.name) for field in fields(result)}
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in values.items()
        if isinstance(value, int | float | str | tuple)
    }


def real_halves(real: Side) -> dict[str, Any] | None:
    """The same metrics between two disjoint random halves of the real tiles.

    This is what a perfect generator would reach with half as many tiles a side. One split of few
    tiles says little, so the numbers are means over 8 splits where there are at most 4,096 tiles.
    None with fewer than 16 tiles.
    """
    count = len(real.features)
    half = count // 2
    if half < _MIN_ROWS:
        return None
    splits = []
    for split in range(_SPLITS if count <= _SPLIT_ROWS else 1):
        order = source_order(count, f"halves {split} {real.selection.content_hash}")
        first, second = order[:half], order[half : 2 * half]
        splits.append(set_metrics(real.features[first], real.features[second]))
    return {
        "splits": len(splits),
        **{metric: _mean([split[metric] for split in splits]) for metric in splits[0]},
    }


def _mean(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Results with every fractional number replaced by its mean; the rest is the first's."""
    first = results[0]
    return {
        key: float(np.mean([result[key] for result in results]))
        if isinstance(value, float)
        else value
        for key, value in first.items()
    }


def source_features(
    generated: Side, real: Side, guidance: Dataset
) -> tuple[Features | None, str | None]:
    """Features [m, d] of each generated tile's own source tile, or None and the reason why."""
    names, ranks = _sources(generated)
    if None in names:
        return None, "the tiles were generated without guidance: no cosine to a source tile"
    store = real.store
    if guidance.root != real.dataset.root:
        store = _open_store(guidance, "NAME", real.store.encoder, real)
        check_comparable(real.store.record, store.record, real.dataset, guidance)
    rows = np.empty_like(generated.features)
    slides = np.array(names, dtype=object)
    try:
        for name in sorted(set(names), key=str):
            where = np.flatnonzero(slides == name)
            rows[where] = store.read(str(name), ranks[where])
    except UserError as error:
        return None, f"no cosine to source tiles, whose features were not found: {error}"
    return rows, None


def _sources(generated: Side) -> tuple[list[str | None], npt.NDArray[np.int64]]:
    """Slide and rank of the source tile of every row of the generated selection."""
    names: list[str | None] = []
    ranks: list[npt.NDArray[np.int64]] = []
    for slide_id, rows in generated.selection.items():
        table = read_candidates(generated.dataset, slide_id)
        if "source_slide_id" not in table.column_names:
            raise UserError(
                f"{generated.dataset.root} is no synthetic dataset: its candidates have no "
                "source_slide_id; give one that `python -m evaluate generate` made"
            )
        picked = table.take(rows)
        names.extend(picked["source_slide_id"].to_pylist())
        ranks.append(picked["source_rank"].to_numpy().astype(np.int64))
    return names, np.concatenate(ranks)


def _warnings(
    real: Side, generated: Side, identity: dict[str, Any], no_cosine: str | None
) -> list[dict[str, str]]:
    found = []
    record = real.store.record
    if record.get("random_weights"):
        found.append(
            warning(
                "random_encoder_weights",
                f"the encoder {record['encoder']} has random weights ({record['weights']}): "
                "no number here says anything about image quality",
            )
        )
    for side, name in ((real, "real"), (generated, "generated")):
        count = len(side.features)
        if count < _FEW_TILES:
            few = f"{count:,} {name} tiles: fewer than 1,000, the numbers are noisy and biased"
            found.append(warning(f"few_{name}_tiles", few))
    smallest, dim = min(len(real.features), len(generated.features)), real.features.shape[1]
    if smallest <= dim:
        found.append(
            warning(
                "fewer_tiles_than_dimensions",
                f"n = {smallest:,} tiles for {dim} feature dimensions (n <= d): the covariance is "
                "singular, the Fréchet distance is mostly the bias of a small sample",
            )
        )
    if identity.get("forced_guidance"):
        found.append(warning("forced_guidance", str(identity["forced_guidance"])))
    if no_cosine is not None:
        found.append(warning("no_cosine", no_cosine))
    return found
