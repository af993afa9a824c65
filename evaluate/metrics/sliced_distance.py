"""A sliced Wasserstein distance that needs few images: for step sweeps and during training."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from common.errors import UserError
from evaluate.metrics.features import checked_pair, random_subset, row_chunks
from evaluate.metrics.metric import (
    FeaturePair,
    Metric,
    MetricSettings,
    TableQuantity,
    plain_fields,
    value_at,
)

_BLOCK_BYTES = 256 << 20


@dataclass(frozen=True)
class SlicedDistance:
    """A sliced distance with the spread that its random directions leave.

    Attributes:
        value: at least 0; on the scale of a Fréchet distance.
        standard_error: of `value`, over the directions only, not over the images.
        n: rows used of each side.
        directions: how many.
        dim: feature dimension.
    """

    value: float
    standard_error: float
    n: int
    directions: int
    dim: int


def mind(
    real: ArrayLike, generated: ArrayLike, *, directions: int = 1000, seed: int = 0
) -> SlicedDistance:
    """``3 d`` times the mean squared 2-Wasserstein distance along random unit directions.

    After arXiv 2605.06797. In one dimension the transport is the pairing of sorted values, so
    no covariance, kernel or Gaussian is involved: O(directions n (d + log n)). Of the larger
    set as many rows as the smaller has are drawn. Constant features count for their means.

    Args:
        real: ``[n, d]``.
        generated: ``[m, d]``.
        directions: at least 2.
        seed: of the directions and of the draw.

    Raises:
        UserError: fewer than two rows or directions, NaN or infinity, differing dimensions.

    >>> rows = np.random.default_rng(0).standard_normal((100, 2))
    >>> mind(rows, rows).value, mind(rows, rows + 1).value > 3
    (0.0, True)
    """
    first, second = checked_pair(real, generated)
    if directions < 2:
        raise UserError(f"directions is {directions}, expected at least 2")
    n, d = min(len(first), len(second)), first.shape[1]
    first, second = (
        x if len(x) == n else x[random_subset(len(x), n, seed)] for x in (first, second)
    )
    # Normal vectors scaled to length 1 are uniform on the sphere.
    axes = np.random.RandomState(seed).standard_normal((directions, d))
    axes /= np.linalg.norm(axes, axis=1, keepdims=True)
    # As many directions at a time as their projections fit in 256 MB.
    width = max(1, _BLOCK_BYTES // (8 * n))
    squared = np.concatenate(
        [
            _squared_along(first, second, axes[start : start + width])
            for start in range(0, directions, width)
        ]
    )
    return SlicedDistance(
        value=float(3 * d * squared.mean()),
        standard_error=float(3 * d * squared.std(ddof=1) / np.sqrt(directions)),
        n=n,
        directions=directions,
        dim=d,
    )


def _squared_along(
    first: NDArray[np.floating], second: NDArray[np.floating], axes: NDArray[np.float64]
) -> NDArray[np.float64]:
    """The squared 2-Wasserstein distance along each axis ``[axes]``."""
    # Chunks are widened one by one: no float64 copy of all rows.
    a, b = (
        np.concatenate([axes @ block.T for block in row_chunks(rows)], axis=1)
        for rows in (first, second)
    )
    a.sort(axis=1)
    b.sort(axis=1)
    a -= b
    return np.asarray(np.einsum("ad,ad->a", a, a) / a.shape[1])


def mind_result(pair: FeaturePair, settings: MetricSettings) -> dict[str, object]:
    """The metric as plain values, with its settings."""
    distance = mind(pair.real, pair.generated, seed=settings.seed)
    return plain_fields(distance) | {"seed": settings.seed}


_TITLE = "Sliced distance (MIND)"

METRIC = Metric(
    name="sliced_distance",
    title=_TITLE,
    place=50,
    compute=mind_result,
    quantities=(
        TableQuantity(
            "mind", _TITLE, "lower", value_at("value"), ideal=(0.0, "equal sets"),
            meaning="The mean distance along random directions, on the scale of a Fréchet "
            "distance; it needs fewer tiles to settle.",
        ),
    ),
)  # fmt: skip
