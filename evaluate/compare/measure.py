"""`measure`: a synthetic dataset against a real one, from the cached features of both."""

import time
from dataclasses import asdict
from typing import Any

import numpy as np

from common.errors import UserError
from evaluate.compare.battery import Pair, Settings, manifold, plain, run_battery
from evaluate.compare.results import SCHEMA_VERSION, hardware, warning
from evaluate.compare.sides import (
    ENCODER_KEYS,
    Features,
    Side,
    check_comparable,
    open_store,
    slide_attribute,
    source_features,
)
from evaluate.metric_warnings import metric_warnings
from evaluate.metrics import frechet_distance
from pipeline.dataset import Dataset, read_identity, software_versions

__all__ = ["ENCODER_KEYS", "Side", "check_comparable", "measure", "real_halves"]

_FEW_TILES = 1000
_SPLITS, _SPLIT_ROWS = 8, 4096
_MIN_ROWS = 8
"""Fewer rows a side make no half with three neighbours a tile."""
_BLOCKINESS_GAP = 0.02
"""On 100 TCGA tiles the mean is 0.998 as PNG, 1.020 at JPEG quality 90, 1.112 at 75."""

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


def measure(
    real: Side,
    generated: Side,
    guidance: Dataset | None = None,
    *,
    train: Side | None = None,
    settings: Settings | None = None,
    device: str = "cpu",
) -> dict[str, Any]:
    """Compare a generated selection with a real one; returns results.json as a dictionary.

    The metrics are Fréchet distance with its widths, precision, recall, density, coverage, the
    kernel and the sliced distance over the two sets; the cosine of each generated tile to its
    own source tile, which is read from `guidance` (None: the real dataset); and with `train`,
    the tiles that the model was trained on, the feature likelihood divergence, `real` being
    what it is tested on. `device` computes the distances of precision, recall and that divergence.
    Raises `UserError` with fewer than 8 tiles a side.
    """
    started = time.monotonic()
    settings = settings or Settings()
    for side, name in ((real, "--real-selection"), (generated, "--generated-selection")):
        if len(side.features) < _MIN_ROWS:
            raise UserError(
                f"{name} {side.selection.name} has {len(side.features)} tiles, at least "
                f"{_MIN_ROWS} are needed; choose a larger selection"
            )
    identity = read_identity(generated.dataset)
    sources, reason = _paired_sources(generated, real, guidance or real.dataset)
    pair = make_pair(real, generated, guidance or real.dataset, sources, train, device)
    names = [*_SET_METRICS, *(["feature_likelihood"] if train is not None else [])]
    names += ["cosine_similarity"] if sources is not None else []
    metrics: dict[str, Any] = {"cosine_similarity": None, "feature_likelihood": None}
    metrics |= run_battery(pair, names, settings)
    halves = real_halves(real, settings, device)
    described = {"real": real.described(), "generated": generated.described()}
    warnings = set_warnings(real, generated, identity) + blockiness_warnings(described)
    warnings += [warning("no_cosine", reason)] if reason else []
    doubts = [("", metrics), ("real halves", halves or {})]
    return {
        "schema_version": SCHEMA_VERSION,
        "real": described["real"],
        "generated": {**described["generated"], "identity": identity},
        "train": None if train is None else train.described(),
        "model_sha256": identity.get("model_sha256"),
        "sampler": {key: identity.get(key) for key in _SAMPLER_KEYS},
        "encoder": real.store.record,
        "settings": asdict(settings) | {"fld_seeds": list(settings.fld_seeds)},
        "metrics": metrics,
        "references": {"real_vs_real": halves},
        "warnings": warnings + metric_warnings(doubts, warnings),
        "seconds": round(time.monotonic() - started, 3),
        "versions": software_versions("torch", "numpy", "scipy"),
        "hardware": hardware(),
    }


_SET_METRICS = ("frechet_distance", "precision_recall", "kernel_distance", "sliced_distance")


def make_pair(
    real: Side,
    generated: Side,
    guidance: Dataset,
    sources: Features | None,
    train: Side | None,
    device: str = "cpu",
) -> Pair:
    """Two sides as features with the slides and patients of their rows."""
    slides = generated.slides()
    holder = guidance if generated.is_generated else generated.dataset
    return Pair(
        real.features,
        generated.features,
        clusters=None if slides is None else clusters(holder, slides),
        real_clusters=clusters(real.dataset, real.own_slides),
        train=None if train is None else train.features,
        sources=sources,
        device=device,
    )


def clusters(dataset: Dataset, slides: Any) -> dict[str, Any]:
    """The slide and the patient of each row, which resampling draws as wholes."""
    return {"slide": slides, "patient": slide_attribute(dataset, slides, "patient")}


def _paired_sources(
    generated: Side, real: Side, guidance: Dataset
) -> tuple[Features | None, str | None]:
    store = real.store
    if guidance.root != real.dataset.root:
        view, tile_px = str(store.record.get("view", "")), int(store.record["tile_px"])
        store = open_store(guidance, "NAME", real.store.encoder, view=view, tile_px=tile_px)
        check_comparable(real.store.record, store.record, real.dataset, guidance)
    return source_features(generated, store)


def real_halves(
    real: Side, settings: Settings | None = None, device: str = "cpu"
) -> dict[str, Any] | None:
    """The same metrics, by the same settings, between two disjoint random halves of the real tiles.

    This is what a perfect generator would reach with half as many tiles a side. One split of few
    tiles says little, so the numbers are means over 8 splits where there are at most 4,096 tiles.
    None with fewer than 16 tiles, or where a half has no k neighbours.
    """
    settings = settings or Settings()
    count = len(real.features)
    half = count // 2
    if half < least_rows(settings):
        return None
    random = np.random.default_rng(int(real.selection.content_hash[:16], 16))
    orders = [random.permutation(count) for _ in range(_SPLITS if count <= _SPLIT_ROWS else 1)]
    splits = [
        set_metrics(
            Pair(real.features[order[:half]], real.features[order[half : 2 * half]], device=device),
            settings,
        )
        for order in orders
    ]
    return {
        "splits": len(splits),
        **{metric: mean_of_results([split[metric] for split in splits]) for metric in splits[0]},
    }


def least_rows(settings: Settings) -> int:
    """Rows that each half of a floor needs: `manifold` would take a smaller k of fewer."""
    return max(_MIN_ROWS, settings.k + 1)


def set_metrics(pair: Pair, settings: Settings) -> dict[str, Any]:
    """Fréchet distance and precision, recall of two sets of features [n, d] and [m, d].

    By the settings of the rows that they are read against: precision and recall depend on k.
    """
    distance = frechet_distance(
        pair.real, pair.generated, max_generated=settings.max_generated, seed=settings.seed
    )
    return {
        "frechet_distance": plain(distance),
        "precision_recall": manifold(pair, settings),
    }


def mean_of_results(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Results with every fractional number replaced by its mean; the rest is the first's."""
    first = results[0]
    return {
        key: float(np.mean([result[key] for result in results]))
        if isinstance(value, float)
        else value
        for key, value in first.items()
    }


def set_warnings(real: Side, generated: Side, identity: dict[str, Any]) -> list[dict[str, str]]:
    """What makes numbers between these two sides doubtful."""
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
    return found + model_warnings(identity)


def model_warnings(identity: dict[str, Any]) -> list[dict[str, str]]:
    """What the synthetic dataset's identity says against the model that made it."""
    found = []
    if identity.get("model_encoder_random"):
        message = (
            "the images were made by a model that learned from an encoder with random weights: "
            "what it learned has no biological meaning"
        )
        found.append(warning("random_training_encoder", message))
    if identity.get("forced_guidance"):
        found.append(warning("forced_guidance", str(identity["forced_guidance"])))
    if identity.get("generator_note"):
        found.append(warning("untested", str(identity["generator_note"])))
    return found


def blockiness_warnings(described: dict[str, dict[str, Any]]) -> list[dict[str, str]]:
    """A warning where one side's tiles bear JPEG's 8 x 8 grid and the other's do not.

    The gap must be larger than twice its standard error, so that few tiles do not raise it.
    """
    scores = [described[side]["tiles"]["blockiness"] for side in ("real", "generated")]
    if any(score is None or score["standard_error"] is None for score in scores):
        return []
    real, generated = scores
    gap = abs(real["mean"] - generated["mean"])
    error = float(np.hypot(real["standard_error"], generated["standard_error"]))
    if gap <= max(_BLOCKINESS_GAP, 2 * error):
        return []
    return [
        warning(
            "blockiness_mismatch",
            f"JPEG blockiness differs: {real['mean']:.3f} of the real tiles, "
            f"{generated['mean']:.3f} of the generated ones (1 is no grid). One side was "
            "compressed and the other not, or differently: distances measure that as well",
        )
    ]
