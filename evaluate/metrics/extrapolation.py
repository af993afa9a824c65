"""The Fréchet distance extrapolated to infinitely many generated images."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from common.errors import UserError
from evaluate.metrics.features import checked_pair
from evaluate.metrics.frechet import FrechetReference
from evaluate.metrics.metric import FeaturePair, MetricSettings, WarningKind, plain_fields
from evaluate.metrics.moments import Moments

_MIN_ROWS = 4  # of 2, 3 and 4 rows
_MIN_RESULT_ROWS = 64
_NOT_LINEAR = WarningKind(
    "not_linear",
    "the smallest subset has {smallest} rows for {dim} feature dimensions: there the distance is "
    "not linear in 1/N",
)
_BIASED = WarningKind(
    "biased_real_set", "{n_real} real images for {dim} feature dimensions: their bias stays"
)
_NEGATIVE = WarningKind(
    "below_zero", "the extrapolated distance is below zero: not distinguishable from zero"
)


@dataclass(frozen=True)
class FrechetInfinity:
    """A Fréchet distance without the bias of a finite generated set.

    Attributes:
        value: intercept of the line through (1/N, distance of N rows). The real set's own
            finiteness stays in it. Noise can take it below zero where the sets are alike; it is
            then reported as it is, with a warning.
        slope: of that line, the bias times N.
        sizes: ``[points]`` int64, the N.
        values: ``[points]`` float64, their distances.
        n_real: real rows.
        n_generated: generated rows.
        dim: feature dimension.
        warnings: what makes the value doubtful, one sentence each.
    """

    value: float
    slope: float
    sizes: NDArray[np.int64]
    values: NDArray[np.float64]
    n_real: int
    n_generated: int
    dim: int
    warnings: tuple[str, ...]


def frechet_infinity(
    real: ArrayLike,
    generated: ArrayLike,
    *,
    points: int = 15,
    smallest: int | None = None,
    seed: int = 0,
) -> FrechetInfinity:
    """Least squares of Fréchet distances on 1/N (Chong & Forsyth, arXiv 1911.07023).

    The subsets are prefixes of one random order, so that their moments come from one pass
    instead of one per size.

    Args:
        real: ``[n, d]``, used whole.
        generated: ``[m, d]``.
        points: sizes, evenly spaced up to m.
        smallest: the first of them; by default m / 10, at most 5000.
        seed: of the order.

    Raises:
        UserError: fewer than three different sizes, too few rows, NaN or infinity, differing
            dimensions.

    >>> rows = np.random.default_rng(0).standard_normal((2000, 4))
    >>> line = frechet_infinity(rows[:1000], rows[1000:])
    >>> len(line.sizes), bool(line.value < line.values[0])
    (15, True)
    """
    real_rows, generated_rows = checked_pair(real, generated)
    n, d = generated_rows.shape
    sizes = _subset_sizes(n, points, smallest)
    order = np.random.RandomState(seed).permutation(n)
    reference = FrechetReference(Moments.from_rows(real_rows), real_rows)
    # Each subset has the rows of the one before: only the new ones are added to its moments.
    moments, values = Moments(d), []
    for start, stop in zip([0, *sizes[:-1]], sizes, strict=True):
        moments.update(generated_rows[order[start:stop]])
        # Of at most d rows the covariance is singular: the rows themselves are its factor.
        rows = generated_rows[order[:stop]] if stop <= d else None
        values.append(sum(reference.distance_terms(moments, rows)))
    slope, intercept = np.polyfit(1 / sizes, values, 1)
    counts = {"smallest": int(sizes[0]), "n_real": len(real_rows), "dim": d}
    doubts = {_NOT_LINEAR: sizes[0] <= d, _BIASED: len(real_rows) <= d, _NEGATIVE: intercept < 0}
    return FrechetInfinity(
        value=float(intercept),
        slope=float(slope),
        sizes=sizes,
        values=np.array(values),
        n_real=len(real_rows),
        n_generated=n,
        dim=d,
        warnings=tuple(
            kind.format_sentence(**counts) for kind, is_true in doubts.items() if is_true
        ),
    )


def _subset_sizes(n: int, points: int, smallest: int | None) -> NDArray[np.int64]:
    if n < _MIN_ROWS:
        raise UserError(
            f"generated features: {n} rows, but a line through distances of 3 sizes needs at "
            f"least {_MIN_ROWS}; measure more images"
        )
    # Distances of few rows leave the line; of nearly all rows they span too little of 1/N.
    first = max(2, min(5000, n // 10)) if smallest is None else smallest
    if not 2 <= first < n:
        raise UserError(
            f"the smallest subset has {first} rows, expected 2 to {n - 1} of the {n} generated"
        )
    # Few rows give the same size twice, which would weigh double in the fit.
    sizes = np.unique(np.linspace(first, n, max(points, 0)).astype(np.int64))
    if len(sizes) < 3:
        raise UserError(
            f"{points} points over {n} generated rows give {len(sizes)} different sizes, but a "
            f"line with a residual needs 3; measure more images or ask for more points"
        )
    return sizes


def infinity_result(pair: FeaturePair, settings: MetricSettings) -> dict[str, object] | None:
    """`frechet_infinity` as plain values; None below 64 generated rows, whose line is noise."""
    if len(pair.generated) < _MIN_RESULT_ROWS:
        return None
    line = frechet_infinity(pair.real, pair.generated, seed=settings.seed)
    lists = {"sizes": line.sizes.tolist(), "values": line.values.tolist()}
    return plain_fields(line) | lists | {"seed": settings.seed}
