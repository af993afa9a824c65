"""Kernel distances: unbiased in the number of images, where the Fréchet distance is not.

Being unbiased they fall below zero about half the time where two sets are alike; such a value
means "indistinguishable" and is reported as it is.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from common.errors import UserError
from evaluate.metrics.features import checked_pair, refuse_zero_rows, unit_rows
from evaluate.metrics.metric import (
    FeaturePair,
    Metric,
    MetricSettings,
    TableQuantity,
    WarningKind,
    plain_fields,
    value_at,
)

Rows = NDArray[np.float64]
Kernel = Callable[[Rows, Rows], Rows]
Prepare = Callable[[NDArray[np.floating]], Rows]

_BLOCK_ROWS = 1024
_MEDIAN_ROWS = 2000
_SMALL_SUBSETS = WarningKind(
    "small_subsets", "subsets of {size} rows in place of {wanted}, as no more are there"
)


@dataclass(frozen=True)
class KernelInceptionDistance:
    """A kernel (inception) distance.

    Attributes:
        value: mean of the subsets' unbiased squared distances; may be slightly negative.
        std: their standard deviation, divisor n - 1; None for one subset.
        standard_error: std / sqrt(subsets); the subsets overlap, so it is a lower bound.
        values: ``[subsets]`` float64.
        subset_size: rows per side in each subset.
        n_real: real rows drawn from.
        n_generated: generated rows drawn from.
        dim: feature dimension.
        warnings: what makes the value doubtful, one sentence each.
    """

    value: float
    std: float | None
    standard_error: float | None
    values: NDArray[np.float64]
    subset_size: int
    n_real: int
    n_generated: int
    dim: int
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class MaximumMeanDiscrepancy:
    """A squared maximum mean discrepancy under a Gaussian kernel.

    Attributes:
        value: the unbiased estimate; may be slightly negative.
        biased: the biased one, ≥ 0, CMMD's (which prints it times 1000).
        sigma: the kernel's width; values compare only at equal sigma.
        n_real: real rows.
        n_generated: generated rows.
        dim: feature dimension.
    """

    value: float
    biased: float
    sigma: float
    n_real: int
    n_generated: int
    dim: int


def kid(
    real: ArrayLike,
    generated: ArrayLike,
    *,
    subsets: int = 100,
    subset_size: int = 1000,
    seed: int = 0,
) -> KernelInceptionDistance:
    """The kernel distance of Bińkowski et al. (arXiv 1801.01401): kernel ``(x.y / d + 1)^3``.

    Args:
        real: ``[n, d]``.
        generated: ``[m, d]``.
        subsets: pairs of subsets, each drawn without replacement.
        subset_size: rows per side; of smaller sets all rows are taken, with a warning.
        seed: of the draws.

    Raises:
        UserError: fewer than two rows, NaN or infinity, differing dimensions, sizes too small.

    >>> rows = np.random.default_rng(0).standard_normal((64, 4))
    >>> result = kid(rows, rows + 3, subsets=4)
    >>> result.value > 1, result.subset_size, result.warnings
    (True, 64, ('subsets of 64 rows in place of 1000, as no more are there',))
    """
    first, second = checked_pair(real, generated)
    if subsets < 1 or subset_size < 2:
        raise UserError(
            f"subsets is {subsets} and subset_size {subset_size}, expected at least 1 and 2"
        )
    # Equal sizes on both sides, or the estimate would weigh the smaller set more.
    size = min(subset_size, len(first), len(second))
    random = np.random.RandomState(seed)
    values = np.empty(subsets)
    for draw in range(subsets):
        a, b = (
            x[random.choice(len(x), size, replace=False)].astype(np.float64)
            for x in (first, second)
        )
        values[draw] = _kernel_sums(a, b, _cubic_kernel).unbiased_distance(size, size)
    std = float(values.std(ddof=1)) if subsets > 1 else None
    return KernelInceptionDistance(
        value=float(values.mean()),
        std=std,
        standard_error=None if std is None else std / float(np.sqrt(subsets)),
        values=values,
        subset_size=size,
        n_real=len(first),
        n_generated=len(second),
        dim=first.shape[1],
        warnings=()
        if size == subset_size
        else (_SMALL_SUBSETS.format_sentence(size=size, wanted=subset_size),),
    )


def mmd(
    real: ArrayLike,
    generated: ArrayLike,
    *,
    sigma: float | None = None,
    unit_norm: bool = True,
    seed: int = 0,
) -> MaximumMeanDiscrepancy:
    """The squared MMD with kernel ``exp(-|x - y|^2 / (2 sigma^2))`` over all pairs, in float64.

    With CLIP features and sigma 10 it is CMMD (Jayasumana et al., arXiv 2401.09603); here the
    features are a pathology encoder's. The default width is the median distance within the real
    set alone, so that all models measured against that set share it.

    Args:
        real: ``[n, d]``.
        generated: ``[m, d]``.
        sigma: kernel width, in the (normalised) features' units.
        unit_norm: whether rows are scaled to length 1 first.
        seed: of the at most 2000 real rows whose median distance is taken.

    Raises:
        UserError: fewer than two rows, NaN or infinity, differing dimensions, rows of zeros to
            be normalised, sigma not positive, a median distance of zero.

    >>> result = mmd(np.eye(3), np.eye(3)[::-1])
    >>> round(result.sigma, 6), result.biased
    (1.414214, 0.0)
    """
    first, second = checked_pair(real, generated, any_scale=unit_norm)
    if unit_norm:
        refuse_zero_rows(first, "real")
        refuse_zero_rows(second, "generated")
    # Scaling is block by block too: a whole float64 copy may not fit in memory.
    prepare = unit_rows if unit_norm else _to_float64
    width = _median_distance(first, seed, prepare) if sigma is None else float(sigma)
    if not (np.isfinite(width) and width > 0):
        raise UserError(
            f"the kernel width is {width}: give a positive sigma (the median distance is zero "
            f"where most real rows are copies)"
        )

    def gaussian_kernel(a: Rows, b: Rows) -> Rows:
        return np.exp(_squared_distances(a, b) / (-2 * width**2))

    sums = _kernel_sums(first, second, gaussian_kernel, prepare)
    return MaximumMeanDiscrepancy(
        value=sums.unbiased_distance(len(first), len(second)),
        biased=max(0.0, sums.biased_distance(len(first), len(second))),
        sigma=width,
        n_real=len(first),
        n_generated=len(second),
        dim=first.shape[1],
    )


def _to_float64(rows: NDArray[np.floating]) -> Rows:
    return rows.astype(np.float64)


@dataclass(frozen=True)
class _KernelSums:
    """Sums of the kernel over ordered pairs: within a set without the diagonal, and across."""

    real: float
    generated: float
    across: float
    real_diagonal: float
    generated_diagonal: float

    def unbiased_distance(self, n: int, m: int) -> float:
        within = self.real / (n * (n - 1)) + self.generated / (m * (m - 1))
        return within - 2 * self.across / (n * m)

    def biased_distance(self, n: int, m: int) -> float:
        real, generated = self.real + self.real_diagonal, self.generated + self.generated_diagonal
        return real / n**2 + generated / m**2 - 2 * self.across / (n * m)


def _kernel_sums(
    first: NDArray[np.floating],
    second: NDArray[np.floating],
    kernel: Kernel,
    prepare: Prepare = _to_float64,
) -> _KernelSums:
    """All pairs in blocks; `prepare` makes float64 of each, so that no set is copied whole."""
    (real, real_diagonal), (generated, generated_diagonal) = (
        _sums_within(rows, kernel, prepare) for rows in (first, second)
    )
    across = sum(
        float(kernel(a, b).sum())
        for a in _row_blocks(first, prepare)
        for b in _row_blocks(second, prepare)
    )
    return _KernelSums(real, generated, across, real_diagonal, generated_diagonal)


def _sums_within(
    rows: NDArray[np.floating], kernel: Kernel, prepare: Prepare
) -> tuple[float, float]:
    """The sum off the diagonal, whose symmetric half is not computed, and on it."""
    off, on = 0.0, 0.0
    for number, block in enumerate(_row_blocks(rows, prepare), start=1):
        square = kernel(block, block)
        diagonal = float(np.trace(square))
        on += diagonal
        off += float(square.sum()) - diagonal
        # The kernel is symmetric: blocks below the diagonal are those above it.
        later = _row_blocks(rows[number * _BLOCK_ROWS :], prepare)
        off += 2 * sum(float(kernel(block, other).sum()) for other in later)
    return off, on


def _row_blocks(rows: NDArray[np.floating], prepare: Prepare) -> Iterator[Rows]:
    starts = range(0, len(rows), _BLOCK_ROWS)
    return (prepare(rows[start : start + _BLOCK_ROWS]) for start in starts)


def _cubic_kernel(a: Rows, b: Rows) -> Rows:
    base = a @ b.T / a.shape[1] + 1
    return base * base * base


def _squared_distances(a: Rows, b: Rows) -> Rows:
    squared = (a**2).sum(axis=1)[:, None] + (b**2).sum(axis=1) - 2 * (a @ b.T)
    return np.maximum(squared, 0.0)


def _median_distance(rows: NDArray[np.floating], seed: int, prepare: Prepare) -> float:
    if len(rows) > _MEDIAN_ROWS:
        rows = rows[np.random.RandomState(seed).choice(len(rows), _MEDIAN_ROWS, replace=False)]
    # Each pair once: the diagonal's zeros would lower the median.
    upper = np.triu_indices(len(rows), k=1)
    ready = prepare(rows)
    return float(np.median(np.sqrt(_squared_distances(ready, ready)[upper])))


def kid_result(pair: FeaturePair, settings: MetricSettings) -> dict[str, object]:
    """The metric as plain values, with its settings."""
    distance = kid(
        pair.real, pair.generated, subsets=settings.kid_subsets,
        subset_size=settings.kid_subset_size, seed=settings.seed,
    )  # fmt: skip
    return plain_fields(distance) | {"subsets": settings.kid_subsets, "seed": settings.seed}


_TITLE = "Kernel distance (KID)"

METRIC = Metric(
    name="kernel_distance",
    title=_TITLE,
    place=40,
    compute=kid_result,
    quantities=(
        TableQuantity(
            "kid", _TITLE, "lower", value_at("value"), ideal=(0.0, "equal distributions"),
            meaning="Like the Fréchet distance, without taking the clouds for Gaussians and "
            "without its bias; slightly negative values are legitimate.",
        ),
    ),
    warnings=(_SMALL_SUBSETS,),
)  # fmt: skip
