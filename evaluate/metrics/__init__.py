"""Metrics of generated against real features, as pure functions of feature arrays.

Every function takes ``numpy`` arrays ``[n, d]``, one row an image, and returns a small frozen
dataclass. None of them reads a file, knows an encoder or keeps state; protocols do that.
Public names are imported on first use, so that one metric costs only its own imports.
"""

from importlib import import_module
from typing import Any

_PUBLIC: dict[str, str] = {
    "CosineSimilarity": "evaluate.metrics.cosine",
    "FeatureLikelihoodDivergence": "evaluate.metrics.likelihood",
    "FrechetBootstrap": "evaluate.metrics.resampling",
    "FrechetDistance": "evaluate.metrics.frechet",
    "FrechetInfinity": "evaluate.metrics.extrapolation",
    "FrechetReference": "evaluate.metrics.frechet",
    "KernelInceptionDistance": "evaluate.metrics.kernel_distance",
    "LikelihoodBaseline": "evaluate.metrics.likelihood",
    "MaximumMeanDiscrepancy": "evaluate.metrics.kernel_distance",
    "Moments": "evaluate.metrics.moments",
    "PrecisionRecall": "evaluate.metrics.manifold",
    "SlicedDistance": "evaluate.metrics.sliced_distance",
    "VendiScore": "evaluate.metrics.vendi_score",
    "bootstrap": "evaluate.metrics.resampling",
    "cosine_similarity": "evaluate.metrics.cosine",
    "feature_likelihood_divergence": "evaluate.metrics.likelihood",
    "frechet_distance": "evaluate.metrics.frechet",
    "frechet_distance_of_moments": "evaluate.metrics.frechet",
    "frechet_infinity": "evaluate.metrics.extrapolation",
    "kid": "evaluate.metrics.kernel_distance",
    "mind": "evaluate.metrics.sliced_distance",
    "mmd": "evaluate.metrics.kernel_distance",
    "precision_recall": "evaluate.metrics.manifold",
    "vendi": "evaluate.metrics.vendi_score",
}

__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    """Import the module that defines the public name, once."""
    if name not in _PUBLIC:
        raise AttributeError(f"module 'evaluate.metrics' has no attribute {name!r}")
    value = getattr(import_module(_PUBLIC[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
