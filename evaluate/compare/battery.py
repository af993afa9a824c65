"""The metrics of two feature sets as plain numbers: every one with n, seeds and widths."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt

from common.errors import UserError
from evaluate.metrics import (
    LikelihoodBaseline,
    bootstrap,
    cosine_similarity,
    feature_likelihood_divergence,
    frechet_distance,
    frechet_infinity,
    kid,
    mind,
    precision_recall,
)

Features = npt.NDArray[np.floating]
Labels = npt.NDArray[np.str_]

_COSINE_BINS = 100
_MIN_INFINITY_ROWS = 64


@dataclass(frozen=True)
class Settings:
    """How the metrics are taken; the defaults are the paper's where it says them.

    `draws` resamples of `subsample` rows give the paper's width; 0 draws leave all widths out.
    """

    max_generated: int = 50_000
    draws: int = 50
    subsample: int = 50_000
    seed: int = 0
    k: int = 3
    fld_seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    fld_dtype: str = "float64"
    fld_max_generated: int = 10_000
    kid_subsets: int = 100
    kid_subset_size: int = 1000

    def __post_init__(self) -> None:
        """Refuse, before anything is read, what no metric takes."""
        for seed in (self.seed, *self.fld_seeds):
            if not 0 <= seed < 2**32:
                raise UserError(f"seed is {seed}; expected a whole number from 0 to 4294967295")
        if self.draws < 0 or self.k < 1:
            raise UserError(f"draws is {self.draws} and k is {self.k}; expected at least 0 and 1")


@dataclass(frozen=True)
class Pair:
    """Two feature sets with what some metrics also need.

    `clusters` and `real_clusters` name labels of the rows by kind ("slide", "patient");
    `train` is what a model was trained on, `sources` the source of each generated row. `device`
    is where distances are computed: precision and recall do not depend on it, FLD by rounding
    alone. It is no setting, so that results are not named by the machine that made them.
    """

    real: Features
    generated: Features
    clusters: dict[str, Labels] | None = None
    real_clusters: dict[str, Labels] | None = None
    train: Features | None = None
    sources: Features | None = None
    device: str = "cpu"


def frechet(pair: Pair, settings: Settings) -> dict[str, Any]:
    """Fréchet distance, its widths, and the line through its values at growing n."""
    found = plain(
        frechet_distance(
            pair.real, pair.generated, max_generated=settings.max_generated, seed=settings.seed
        )
    )
    found |= {"seed": settings.seed, "max_generated": settings.max_generated, "dtype": "float64"}
    return found | {"widths": widths(pair, settings), "infinity": _infinity(pair, settings)}


def widths(pair: Pair, settings: Settings) -> dict[str, Any]:
    """The paper's subsampling and the cluster bootstraps, each with its draws; None without.

    The paper draws 50,000 of 100,000 rows; of fewer rows half are drawn, so that its correction
    by sqrt 2 is the same.
    """
    if not settings.draws:
        return {}
    rows = len(pair.generated)
    size = settings.subsample if settings.subsample < rows else rows // 2
    draws, seed = settings.draws, settings.seed
    found: dict[str, Any] = {}
    if size >= 2:
        drawn = bootstrap(pair.real, pair.generated, draws=draws, size=size, seed=seed)
        found["subsample"] = plain(drawn) | {"draws": draws, "seed": seed}
    for kind, labels in (pair.clusters or {}).items():
        if len(np.unique(labels)) < 2:
            continue
        real = (pair.real_clusters or {}).get(kind)
        both = real is not None and len(np.unique(real)) > 1
        drawn = bootstrap(
            pair.real, pair.generated, draws=draws, clusters=labels,
            real_clusters=real if both else None, seed=seed,
        )  # fmt: skip
        found[kind] = plain(drawn) | {"draws": draws, "seed": seed, "both_sides": both}
    return found


def _infinity(pair: Pair, settings: Settings) -> dict[str, Any] | None:
    if len(pair.generated) < _MIN_INFINITY_ROWS:
        return None
    found = frechet_infinity(pair.real, pair.generated, seed=settings.seed)
    lists = {"sizes": found.sizes.tolist(), "values": found.values.tolist()}
    return plain(found) | lists | {"seed": settings.seed}


def manifold(pair: Pair, settings: Settings) -> dict[str, Any]:
    """Precision, recall, density, coverage, authenticity."""
    most = min(len(pair.real), len(pair.generated)) - 1
    found = precision_recall(pair.real, pair.generated, k=min(settings.k, most), device=pair.device)
    return plain(found)


def likelihood(
    pair: Pair, settings: Settings, baseline: LikelihoodBaseline | None = None
) -> dict[str, Any]:
    """Feature likelihood divergence against held-out rows, mean and spread over seeds."""
    if pair.train is None:
        raise UserError("FLD needs the features of the training tiles: name their selection")
    found = feature_likelihood_divergence(
        pair.train, pair.real, pair.generated,
        seeds=settings.fld_seeds,
        dtype="float32" if settings.fld_dtype == "float32" else "float64",
        max_generated=settings.fld_max_generated,
        baseline=baseline,
        device=pair.device,
    )  # fmt: skip
    return plain(found) | {"baseline": _plain_baseline(found.baseline)}


def _plain_baseline(baseline: LikelihoodBaseline | None) -> dict[str, Any] | None:
    if baseline is None:
        return None
    nll = {str(seed): value for seed, value in baseline.nll.items()}
    return {"nll": nll, "fingerprint": baseline.fingerprint}


def kernel_distance(pair: Pair, settings: Settings) -> dict[str, Any]:
    """Kernel distance (KID)."""
    size = settings.kid_subset_size
    found = kid(
        pair.real, pair.generated, subsets=settings.kid_subsets, subset_size=size,
        seed=settings.seed,
    )  # fmt: skip
    return plain(found) | {"subsets": settings.kid_subsets, "seed": settings.seed}


def sliced(pair: Pair, settings: Settings) -> dict[str, Any]:
    """Sliced Wasserstein distance (MIND)."""
    return plain(mind(pair.real, pair.generated, seed=settings.seed)) | {"seed": settings.seed}


def cosine(pair: Pair, settings: Settings) -> dict[str, Any]:
    """Cosine of each generated row to its source, with histograms in place of the values."""
    if pair.sources is None:
        raise UserError("a cosine to the source needs generated tiles that real ones guided")
    result = cosine_similarity(pair.sources, pair.generated, seed=settings.seed)
    return plain(result) | {"seed": settings.seed, "histogram": histogram(result.values)}


def histogram(values: npt.NDArray[np.floating]) -> dict[str, Any]:
    """Counts of values in [-1, 1] in a hundred bins."""
    counts, edges = np.histogram(values, bins=_COSINE_BINS, range=(-1.0, 1.0))
    return {"edges": edges.tolist(), "counts": counts.tolist()}


METRICS: dict[str, Callable[[Pair, Settings], dict[str, Any]]] = {
    "frechet_distance": frechet,
    "precision_recall": manifold,
    "kernel_distance": kernel_distance,
    "sliced_distance": sliced,
    "feature_likelihood": likelihood,
    "cosine_similarity": cosine,
}


def run_battery(pair: Pair, names: Sequence[str], settings: Settings) -> dict[str, Any]:
    """The named metrics of a pair; raises `UserError` for a name that is not known."""
    unknown = [name for name in names if name not in METRICS]
    if unknown:
        raise UserError(f"metric '{unknown[0]}' is not known; expected one of {', '.join(METRICS)}")
    return {name: METRICS[name](pair, settings) for name in names}


def plain(result: Any) -> dict[str, Any]:
    """The numbers and words of a metric's result; arrays, one value a tile, are left out."""
    values = {field.name: getattr(result, field.name) for field in fields(result)}
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in values.items()
        if value is None or isinstance(value, int | float | str | tuple)
    }
