"""Metrics of generated against real features, as pure functions of feature arrays.

Every function takes ``numpy`` arrays ``[n, d]``, one row per image, and returns a small frozen
dataclass. None of them reads a file, knows an encoder or keeps state. A module that also defines
`METRIC` (see `evaluate.metrics.metric`) is part of every comparison.
Public names are imported on first use, so that one metric costs only its own imports.

>>> import numpy as np
>>> from evaluate.metrics import frechet_distance
>>> rows = np.random.default_rng(0).standard_normal((500, 8))
>>> result = frechet_distance(rows, rows + 1)
>>> round(result.value, 6), round(result.mean_term, 6)
(8.0, 8.0)
"""

from importlib import import_module
from typing import Any

_MODULES = {
    "cosine": ("CosineSimilarity", "cosine_similarity"),
    "extrapolation": ("FrechetInfinity", "frechet_infinity"),
    "frechet": (
        "FrechetDistance", "FrechetReference", "frechet_distance", "frechet_distance_of_moments",
    ),
    "kernel_distance": ("KernelInceptionDistance", "MaximumMeanDiscrepancy", "kid", "mmd"),
    "likelihood": (
        "FeatureLikelihoodDivergence", "LikelihoodBaseline", "feature_likelihood_divergence",
    ),
    "manifold": ("PrecisionRecall", "precision_recall"),
    "moments": ("Moments",),
    "resampling": ("FrechetBootstrap", "bootstrap"),
    "sliced_distance": ("SlicedDistance", "mind"),
    "vendi_score": ("VendiScore", "vendi"),
}  # fmt: skip
_PUBLIC = {name: module for module, names in _MODULES.items() for name in names}

__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    """Import the module that defines the public name, once."""
    if name not in _PUBLIC:
        raise AttributeError(f"module 'evaluate.metrics' has no attribute {name!r}")
    value = getattr(import_module(f"evaluate.metrics.{_PUBLIC[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
