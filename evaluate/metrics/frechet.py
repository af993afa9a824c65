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
from common.record import Record
from common.text import format_number
from common.torch_processes import one_thread
from evaluate.metrics.features import checked_pair, constant_features, random_subset
from evaluate.metrics.metric import (
    ContextEntry,
    FeaturePair,
    Metric,
    MetricPart,
    MetricRow,
    MetricSettings,
    TableQuantity,
    WarningKind,
    plain_fields,
    value_at,
)
from evaluate.metrics.moments import Moments

Matrix = NDArray[np.float64]

_ACCURACY = 1e-9  # relative, that the eigenvalue route must promise for the trace of the root
_ROUNDING = 1e-6  # what of the traces a difference may fall below zero by rounding alone
_SINGULAR = WarningKind(
    "singular_covariance",
    "{rows} {side} images for {dim} feature dimensions: the covariance is singular and the "
    "Fréchet distance mostly measures how few images there are",
    covered_by="fewer_tiles_than_dimensions",
)
_CONSTANT = WarningKind(
    "constant_dimensions", "{count} of {dim} {side} feature dimensions are constant"
)


@dataclass(frozen=True)
class FrechetDistance:
    """A Fréchet distance with what one must know to read it.

    Attributes:
        value: the distance (squared feature units, at least 0): the two terms' sum.
        mean_term: ``|m_r - m_g|^2``.
        covariance_term: ``tr S_r + tr S_g - 2 tr (S_r S_g)^(1/2)``.
        noise_floor: the value to expect of two sets of these sizes from one Gaussian with the
            real set's covariance; a value near it means "indistinguishable".
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
    rows, with a warning. Constant features contribute only their mean and are named in a
    warning.

    Args:
        real: ``[n, d]``, all rows are used.
        generated: ``[m, d]``.
        max_generated: as in the paper's implementation, of a larger generated set this many rows
            are drawn without replacement; None uses them all.
        seed: of that draw.

    Raises:
        UserError: fewer than two rows, NaN or infinity, differing dimensions.

    >>> rows = np.random.default_rng(0).standard_normal((500, 8))
    >>> result = frechet_distance(rows, 2 * rows + 1)
    >>> result.value > result.noise_floor
    True
    """
    real_rows, generated_rows = checked_pair(real, generated)
    if max_generated is not None and len(generated_rows) > max_generated:
        if max_generated < 2:
            raise UserError(
                f"max_generated is {max_generated}, but a Fréchet distance needs at least 2 rows"
            )
        generated_rows = generated_rows[random_subset(len(generated_rows), max_generated, seed)]
    # Sums in float64 in one pass: no copy of the features in that precision.
    first, second = Moments.from_rows(real_rows), Moments.from_rows(generated_rows)
    warnings = _constant_warnings(real_rows, "real") + _constant_warnings(
        generated_rows, "generated"
    )
    return _measure_moments(first, second, (real_rows, generated_rows), warnings)


def frechet_distance_of_moments(real: Moments, generated: Moments) -> FrechetDistance:
    """The Fréchet distance from moments alone, where the rows are gone or never met in memory.

    Raises:
        UserError: either side has fewer than two rows, or the dimensions differ.
    """
    if real.dim != generated.dim:
        raise UserError(
            f"real moments have {real.dim} dimensions, generated {generated.dim}: "
            f"compare features of one encoder and one feature definition"
        )
    return _measure_moments(real, generated, (None, None), ())


def expected_noise(eigenvalues: Matrix, n: int, m: int) -> float:
    """The expected distance of two samples of n and m rows from one Gaussian.

    ``(1/n + 1/m) (tr S + 1/2 sum_ij l_i l_j (1 + [i = j]) / (l_i + l_j))`` to first order in 1/n,
    with l the eigenvalues of the covariance S: the mean term's share and, by the second-order
    expansion of the covariance term, the covariances' own noise.
    """
    # Rounding leaves a singular covariance with eigenvalues just below zero.
    spectrum = eigenvalues[eigenvalues > 0]
    if not len(spectrum):
        return 0.0
    pairs = np.outer(spectrum, spectrum) / np.add.outer(spectrum, spectrum)
    covariance_share = 0.5 * (pairs.sum() + np.trace(pairs))
    return float((1 / n + 1 / m) * (spectrum.sum() + covariance_share))


class FrechetReference:
    """The real side of many distances, its covariance ``[d, d]`` factored once, in float64."""

    def __init__(self, real: Moments, rows: NDArray[np.floating] | None = None) -> None:
        """Take the real moments, and the rows too where no more than d of them exist.

        Raises:
            UserError: the moments are of fewer than two rows.
        """
        self._moments, self._rows = real, rows
        self._covariance = real.covariance
        self._graded = (
            None if self._has_few_rows(real, rows) else _graded_cholesky(self._covariance)
        )

    @cached_property
    def _scaled_spectrum(self) -> Matrix:
        # Its sums are needed to a few digits only: float32 will do.
        return _ascending_eigenvalues(
            (self._covariance / _largest_variance(self._covariance)).astype(np.float32)
        )

    def noise_floor(self, n_generated: int) -> float:
        """`expected_noise` of the real spectrum ``[d]``, in squared feature units."""
        floor = expected_noise(self._scaled_spectrum, self._moments.n, n_generated)
        return floor * _largest_variance(self._covariance)

    def distance_terms(
        self, generated: Moments, rows: NDArray[np.floating] | None = None
    ) -> tuple[float, float]:
        """The mean and the covariance term, both ≥ 0, of the distance to the generated moments.

        Raises:
            UserError: fewer than two generated rows.
        """
        covariance = generated.covariance
        difference = self._moments.mean - generated.mean
        traces = float(np.trace(self._covariance) + np.trace(covariance))
        # The cheap route first; where it cannot promise the accuracy, singular values decide.
        root = None
        if self._graded is not None and not self._has_few_rows(generated, rows):
            root = _trace_by_eigenvalues(*self._graded, covariance)
        if root is None:
            product = self._real_factor.T @ _covariance_factor(generated, covariance, rows)
            root = float(np.linalg.svd(product, compute_uv=False).sum())
        covariance_term = traces - 2 * root
        # Rounding alone may leave it just below zero; more than that is a fault, not a number.
        if covariance_term < -_ROUNDING * traces:
            raise ArithmeticError(
                f"covariance term {covariance_term} of traces {traces} is negative"
            )
        return float(difference @ difference), max(covariance_term, 0.0)

    @cached_property
    def _real_factor(self) -> Matrix:
        return _covariance_factor(self._moments, self._covariance, self._rows)

    @staticmethod
    def _has_few_rows(moments: Moments, rows: NDArray[np.floating] | None) -> bool:
        return rows is not None and moments.n <= moments.dim


def _measure_moments(
    real: Moments,
    generated: Moments,
    rows: tuple[NDArray[np.floating], NDArray[np.floating]] | tuple[None, None],
    warnings: tuple[str, ...],
) -> FrechetDistance:
    reference = FrechetReference(real, rows[0])
    mean_term, covariance_term = reference.distance_terms(generated, rows[1])
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
    product = _congruent_product(lower, covariance[np.ix_(pivots, pivots)])
    if not product.size:
        return 0.0
    eigenvalues = _ascending_eigenvalues(product)
    # The diagonal, in the order of the eigenvalues, is the scale at which each of them errs.
    scale = np.sort(np.maximum(np.diag(product), 0.0))
    error = np.finfo(np.float64).eps * np.maximum(scale, np.finfo(np.float64).tiny)
    roots = np.sqrt(np.maximum(eigenvalues, error))
    return float(roots.sum()) if (error / (2 * roots)).sum() < _ACCURACY * roots.sum() else None


def _congruent_product(lower: Matrix, symmetric: Matrix) -> Matrix:
    """``L^T S L``; where L is a whole triangle, its zeros are not multiplied."""
    if lower.shape[0] != lower.shape[1]:
        return lower.T @ (symmetric @ lower)
    multiply = scipy.linalg.blas.dtrmm
    half = multiply(1.0, lower, symmetric.T, side=1, lower=1, overwrite_b=1)
    return np.asarray(multiply(1.0, lower, half, side=0, lower=1, trans_a=1, overwrite_b=1))


def _ascending_eigenvalues(symmetric: NDArray[np.floating]) -> Matrix:
    """In ascending order. Torch's LAPACK takes two thirds of the time of numpy's.

    By one thread: LAPACK's bits depend on their number, and more of them save little.
    """
    with one_thread():
        return torch.linalg.eigvalsh(torch.from_numpy(symmetric)).double().numpy()


def _largest_variance(covariance: Matrix) -> float:
    """The largest variance, a scale at which float32 neither over- nor underflows; never 0."""
    return float(np.max(np.diag(covariance))) or 1.0


def _covariance_factor(
    moments: Moments, covariance: Matrix, rows: NDArray[np.floating] | None
) -> Matrix:
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


def _size_warnings(moments: Moments, side: str) -> tuple[str, ...]:
    if moments.n > moments.dim:
        return ()
    return (_SINGULAR.format_sentence(rows=moments.n, side=side, dim=moments.dim),)


def _constant_warnings(rows: NDArray[np.floating], side: str) -> tuple[str, ...]:
    count = int(constant_features(rows).sum())
    return (_CONSTANT.format_sentence(count=count, dim=rows.shape[1], side=side),) if count else ()


def distance_result(pair: FeaturePair, settings: MetricSettings) -> dict[str, object]:
    """The distance and its two terms alone, as plain values."""
    distance = frechet_distance(
        pair.real, pair.generated, max_generated=settings.max_generated, seed=settings.seed
    )
    return plain_fields(distance)


def frechet_result(pair: FeaturePair, settings: MetricSettings) -> dict[str, object]:
    """The distance, its spread over resamples, and the line through its values at growing n."""
    # Both are built on this module, which therefore cannot import them when it is loaded.
    from evaluate.metrics.extrapolation import infinity_result
    from evaluate.metrics.resampling import resampled_widths

    return distance_result(pair, settings) | {
        "seed": settings.seed,
        "max_generated": settings.max_generated,
        "dtype": "float64",
        "widths": resampled_widths(pair, settings),
        "infinity": infinity_result(pair, settings),
    }


def frechet_rows(result: Record, halves: Record) -> list[MetricRow]:
    """The report's lines on the distance."""
    size = f"real halves, {format_number(halves.optional('n_real'))} per side"
    reference = (size if halves else "too few real tiles", size if halves else "")
    terms = [
        f"{format_number(one.optional('mean_term'))} / "
        f"{format_number(one.optional('covariance_term'))}"
        for one in (result, halves)
    ]
    rows = [
        MetricRow(
            "Fréchet distance", "lower",
            format_number(result.number("value")), format_number(halves.optional("value")),
            reference[0],
            "How far the generated tiles are from the real ones as two clouds of features: the "
            "difference of their means plus that of their spreads. 0 is identical. Its unit is "
            "the encoder's own and it falls with the number of tiles, so it is compared with the "
            "numbers next to it, never with another encoder's.",
        ),
        MetricRow(
            "… noise floor", "",
            format_number(result.number("noise_floor")),
            format_number(halves.optional("noise_floor")), reference[1],
            "What two sets of exactly these sizes, drawn from one and the same distribution, "
            "would show by chance (closed form). A distance near it is no worse than "
            "a perfect one.",
        ),
        MetricRow(
            "… of means / of spreads", "lower", terms[0], terms[1], reference[1],
            "The two terms of the distance. A large first one is a common shift, as of colour; a "
            "large second one is missing or surplus variety.",
        ),
    ]  # fmt: skip
    # An interval needs draws and a line 64 generated tiles: either may be absent.
    interval, line = result.part("widths").part("slide"), result.part("infinity")
    if interval:
        rows.append(MetricRow(
            "… 95 % interval", "",
            f"{format_number(interval.number('low'))} to {format_number(interval.number('high'))}",
            format_number(interval.count("draws")), "draws of whole slides",
            "How far the distance would move with other slides of the same kind, tiles of a "
            "slide being alike. Two models whose intervals overlap are not distinguished.",
        ))  # fmt: skip
    if line:
        rows.append(MetricRow(
            "… at infinitely many images", "lower",
            format_number(line.number("value")), format_number(result.number("value")),
            f"with {format_number(result.count('n_generated'))}",
            "The distance extrapolated along 1/N, so that numbers taken with different counts "
            "can be compared. Noise can take it below zero where the sets are alike.",
        ))  # fmt: skip
    return rows


def half_interval(result: Record) -> float | None:
    """Half the 95% interval of the cluster bootstrap by slide, else of the subsampling."""
    widths = result.part("widths")
    interval = widths.part("slide") or widths.part("subsample")
    return (interval.number("high") - interval.number("low")) / 2 if interval else None


def floor_context(result: Record) -> ContextEntry:
    """The closed-form floor, a row of controls in tables."""
    counts = {key: result.count(key) for key in ("n_real", "n_generated")}
    label = "Noise floor of these sizes (closed form)"
    return ContextEntry(label, result.number("noise_floor"), counts)


def frechet_summary(result: Record) -> str:
    """The distance in a few words."""
    value, floor = (format_number(result.number(key)) for key in ("value", "noise_floor"))
    return f"Fréchet distance {value} (noise floor {floor})"


_INFINITY_TITLE = "Fréchet distance at infinitely many images"

METRIC = Metric(
    name="frechet_distance",
    title="Fréchet distance",
    place=10,
    compute=frechet_result,
    compute_floor=distance_result,
    rows=frechet_rows,
    reads_clusters=True,
    quantities=(
        TableQuantity(
            "fd", "Fréchet distance", "lower", value_at("value"), half_interval,
            context=floor_context,
        ),
        # Near zero the line through a control's distances says nothing.
        TableQuantity(
            "fd_infinity", _INFINITY_TITLE, "lower", value_at("infinity", "value"),
            in_controls=False,
        ),
    ),
    warnings=(_SINGULAR, _CONSTANT),
    parts=(MetricPart("infinity", "frechet_infinity", _INFINITY_TITLE),),
    summary=frechet_summary,
)  # fmt: skip
