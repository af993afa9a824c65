"""Fréchet distance of two feature sets, as Gaussians: never complex, never negative.

``FD = |m_r - m_g|^2 + tr S_r + tr S_g - 2 tr (S_r S_g)^(1/2)`` (Heusel et al., arXiv 1706.08500,
equation 6). With any factors ``F F^T = S`` the last trace is the sum of the singular values of
``F_r^T F_g``: real and non-negative by construction, defined for singular covariances too, and
no square root of a non-symmetric matrix is taken.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import scipy.linalg
import torch
from numpy.typing import ArrayLike, NDArray

from common.errors import UserError
from evaluate.metrics.features import checked_pair, constant_features, random_subset
from evaluate.metrics.moments import Moments

Matrix = NDArray[np.float64]

_ACCURACY = 1e-9  # relative, that the eigenvalue route must promise for the trace of the root
_ROUNDING = 1e-6  # what of the traces a difference may fall below zero by rounding alone


@dataclass(frozen=True)
class FrechetDistance:
    """A Fréchet distance with what one must know to read it.

    Attributes:
        value: the distance (squared feature units, at least 0): the two terms' sum.
        mean_term: ``|m_r - m_g|^2``.
        covariance_term: ``tr S_r + tr S_g - 2 tr (S_r S_g)^(1/2)``.
        noise_floor: the value to expect of two sets of these sizes from one Gaussian with the
            real set's covariance; a value near it says "indistinguishable", not "n better".
        n_real: real rows used.
        n_generated: generated rows used, after the cap.
        dim: feature dimension.
        warnings: what makes the value doubtful, one sentence each.
    """

    value: float
    mean_term: float
    covariance_term: float
    noise_floor: float
    n_real: int
    n_generated: int
    dim: int
    warnings: tuple[str, ...]


def frechet_distance(
    real: ArrayLike,
    generated: ArrayLike,
    *,
    max_generated: int | None = 50_000,
    seed: int = 0,
) -> FrechetDistance:
    """The Fréchet distance between real and generated features.

    Sets of at most d rows have singular covariances: the distance is still exact for what was
    measured (the factors are then the centred rows themselves), but is dominated by the missing
    rows, and a warning says so. Constant features contribute only their mean and are named in a
    warning.

    Args:
        real: ``[n, d]``, all rows are used.
        generated: ``[m, d]``.
        max_generated: as in the paper's implementation, of a larger generated set this many rows
            are drawn without replacement; None uses them all.
        seed: of that draw.

    Raises:
        UserError: fewer than two rows, NaN or infinity, differing dimensions.
    """
    real_rows, generated_rows = checked_pair(real, generated)
    generated_rows = _capped(generated_rows, max_generated, seed)
    first, second = Moments.of(real_rows), Moments.of(generated_rows)
    warnings = _constant_warnings(real_rows, "real") + _constant_warnings(
        generated_rows, "generated"
    )
    return _distance(first, second, (real_rows, generated_rows), warnings)


def frechet_distance_of_moments(real: Moments, generated: Moments) -> FrechetDistance:
    """The Fréchet distance from moments alone, where the rows are gone or never met in memory.

    Raises:
        UserError: a side has fewer than two rows, or the dimensions differ.
    """
    if real.dim != generated.dim:
        raise UserError(
            f"real moments have {real.dim} dimensions, generated {generated.dim}: "
            f"compare features of one encoder and one feature definition"
        )
    return _distance(real, generated, (None, None), ())


def expected_noise(eigenvalues: Matrix, n: int, m: int) -> float:
    """The expected distance of two samples of n and m rows from one Gaussian.

    ``(1/n + 1/m) (tr S + 1/2 sum_ij l_i l_j (1 + [i = j]) / (l_i + l_j))`` to first order in 1/n,
    with l the eigenvalues of the covariance S: the mean term's share and, by the second-order
    expansion of the covariance term, the covariances' own noise.
    """
    spectrum = eigenvalues[eigenvalues > 0]
    if not len(spectrum):
        return 0.0
    pairs = np.outer(spectrum, spectrum) / np.add.outer(spectrum, spectrum)
    covariance_share = 0.5 * (pairs.sum() + np.trace(pairs))
    return float((1 / n + 1 / m) * (spectrum.sum() + covariance_share))


class FrechetReference:
    """The real side of many distances, factored once."""

    def __init__(self, real: Moments, rows: NDArray[np.floating] | None = None) -> None:
        """Take the real moments, and the rows too where no more than d of them exist.

        Raises:
            UserError: the moments are of fewer than two rows.
        """
        self._moments, self._rows = real, rows
        self._covariance = real.covariance
        self._graded = None if self._few(real, rows) else _graded_cholesky(self._covariance)

    @cached_property
    def _spectrum(self) -> Matrix:
        # Sums over the spectrum to a few digits are all that is asked of it: float32 will do.
        return _eigenvalues((self._covariance / _largest(self._covariance)).astype(np.float32))

    def noise_floor(self, n_generated: int) -> float:
        """See `expected_noise`, of the real spectrum."""
        floor = expected_noise(self._spectrum, self._moments.n, n_generated)
        return floor * _largest(self._covariance)

    def terms(
        self, generated: Moments, rows: NDArray[np.floating] | None = None
    ) -> tuple[float, float]:
        """The mean and the covariance term of the distance to the generated moments.

        Raises:
            UserError: fewer than two generated rows.
        """
        covariance = generated.covariance
        difference = self._moments.mean - generated.mean
        traces = float(np.trace(self._covariance) + np.trace(covariance))
        root = None
        if self._graded is not None and not self._few(generated, rows):
            root = _trace_by_eigenvalues(*self._graded, covariance)
        if root is None:
            product = self._factor.T @ _factor(generated, covariance, rows)
            root = float(np.linalg.svd(product, compute_uv=False).sum())
        return float(difference @ difference), _at_least_zero(traces - 2 * root, traces)

    @cached_property
    def _factor(self) -> Matrix:
        return _factor(self._moments, self._covariance, self._rows)

    @staticmethod
    def _few(moments: Moments, rows: NDArray[np.floating] | None) -> bool:
        return rows is not None and moments.n <= moments.dim


def _distance(
    real: Moments,
    generated: Moments,
    rows: tuple[NDArray[np.floating], NDArray[np.floating]] | tuple[None, None],
    warnings: tuple[str, ...],
) -> FrechetDistance:
    reference = FrechetReference(real, rows[0])
    mean_term, covariance_term = reference.terms(generated, rows[1])
    return FrechetDistance(
        value=mean_term + covariance_term,
        mean_term=mean_term,
        covariance_term=covariance_term,
        noise_floor=reference.noise_floor(generated.n),
        n_real=real.n,
        n_generated=generated.n,
        dim=real.dim,
        warnings=_size_warnings(real, "real") + _size_warnings(generated, "generated") + warnings,
    )


def _trace_by_eigenvalues(
    lower: Matrix, pivots: NDArray[np.int64], covariance: Matrix
) -> float | None:
    """``tr (S_r S_g)^(1/2)`` from the eigenvalues of ``C^T S_g C``, ``C C^T = S_r``.

    A third of the work of singular values. An eigenvalue's error is eps times the largest in
    general, and its square root magnifies that where it is small; but C of a pivoted Cholesky
    falls from column to column, so the product is graded from its upper left corner, and
    reduction to tridiagonal form from there errs in each place relative to its own scale. None
    where even those errors could exceed the accuracy promised: the product is singular.
    """
    product = _congruent(lower, covariance[np.ix_(pivots, pivots)])
    if not product.size:
        return 0.0
    eigenvalues = _eigenvalues(product)
    scale = np.sort(np.maximum(np.diag(product), 0.0))
    error = np.finfo(np.float64).eps * np.maximum(scale, np.finfo(np.float64).tiny)
    roots = np.sqrt(np.maximum(eigenvalues, error))
    return float(roots.sum()) if (error / (2 * roots)).sum() < _ACCURACY * roots.sum() else None


def _congruent(lower: Matrix, symmetric: Matrix) -> Matrix:
    """``L^T S L``; where L is a whole triangle, its zeros are not multiplied."""
    if lower.shape[0] != lower.shape[1]:
        return lower.T @ (symmetric @ lower)
    multiply = scipy.linalg.blas.dtrmm
    half = multiply(1.0, lower, symmetric.T, side=1, lower=1, overwrite_b=1)
    return np.asarray(multiply(1.0, lower, half, side=0, lower=1, trans_a=1, overwrite_b=1))


def _eigenvalues(symmetric: NDArray[np.floating]) -> Matrix:
    """In ascending order. Torch's LAPACK takes two thirds of the time of numpy's."""
    return torch.linalg.eigvalsh(torch.from_numpy(symmetric)).double().numpy()


def _largest(covariance: Matrix) -> float:
    """The largest variance, a scale at which float32 neither over- nor underflows; never 0."""
    return float(np.max(np.diag(covariance))) or 1.0


def _factor(moments: Moments, covariance: Matrix, rows: NDArray[np.floating] | None) -> Matrix:
    """Some F ``[d, r]`` with ``F F^T`` the covariance: the centred rows where they are few."""
    if rows is not None and moments.n <= moments.dim:
        return np.asarray((rows.astype(np.float64) - moments.mean).T / np.sqrt(moments.n - 1))
    lower, pivots = _graded_cholesky(covariance)
    factor = np.empty_like(lower)
    factor[pivots] = lower
    return factor


def _graded_cholesky(covariance: Matrix) -> tuple[Matrix, NDArray[np.int64]]:
    """C ``[d, r]`` and an order with ``C C^T`` the covariance in that order, to its rank r.

    Each step takes the largest variance that is left, so C's columns fall in size.
    """
    factor, pivots, rank, _ = scipy.linalg.lapack.dpstrf(covariance, lower=1)
    # In the order of columns, as the BLAS wants it.
    return np.asfortranarray(np.tril(factor)[:, :rank]), np.asarray(pivots, dtype=np.int64) - 1


def _at_least_zero(difference: float, scale: float) -> float:
    """Zero for what rounding alone left below zero; more than that is a fault, not a number."""
    if difference < -_ROUNDING * scale:
        raise ArithmeticError(f"covariance term {difference} of traces {scale} is negative")
    return max(difference, 0.0)


def _capped(rows: NDArray[np.floating], limit: int | None, seed: int) -> NDArray[np.floating]:
    if limit is None or len(rows) <= limit:
        return rows
    if limit < 2:
        raise UserError(f"max_generated is {limit}, but a Fréchet distance needs at least 2 rows")
    return rows[random_subset(len(rows), limit, seed)]


def _size_warnings(moments: Moments, name: str) -> tuple[str, ...]:
    if moments.n > moments.dim:
        return ()
    return (
        f"{moments.n} {name} images for {moments.dim} feature dimensions: the covariance is "
        f"singular and the Fréchet distance mostly measures how few images there are",
    )


def _constant_warnings(rows: NDArray[np.floating], name: str) -> tuple[str, ...]:
    dead = int(constant_features(rows).sum())
    if not dead:
        return ()
    return (f"{dead} of {rows.shape[1]} {name} feature dimensions are constant",)
