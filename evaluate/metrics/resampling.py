"""How far a Fréchet distance would move with other images, or with other slides.

The CytoSyn report (arXiv 2603.18089, section 5) draws 50,000 of 100,000 generated images 50
times without replacement. That is subsampling: its spread must be widened by the finite
population factor (sqrt 2 for half of the set), and it knows nothing of images being alike within
a slide. Drawing whole slides or patients with replacement does, but repeats rows, which raises a
Fréchet distance: its draws give the width of the interval, never its centre.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from common.errors import UserError
from evaluate.metrics.features import checked_pair, row_chunks
from evaluate.metrics.frechet import FrechetReference
from evaluate.metrics.metric import FeaturePair, MetricSettings, plain_fields
from evaluate.metrics.moments import Moments

_DRAW_BYTES = 2 << 30  # covariances of the draws in hand
_TILE_BYTES = 1 << 30  # columns of all clusters' second moments
_TILE_COLUMNS = 128  # of which no more at a time: wider tiles use less of the symmetry
_QUANTILES = (0.025, 0.975)


@dataclass(frozen=True)
class FrechetBootstrap:
    """A Fréchet distance with the spread of its resamples.

    Attributes:
        value: the centre: for subsampling the mean of the draws, as the paper prints it; for
            clusters the distance of all rows.
        std: standard deviation of the draws, divisor n - 1; the paper's figure.
        corrected_std: of an independent sample of that size: `std` over
            ``sqrt(1 - size / n_generated)`` for subsampling, `std` itself for clusters.
        low: lower end of the 95% interval: `value` less the draws' (corrected) lower spread,
            not below 0.
        high: its upper end.
        values: ``[draws]`` float64.
        kind: "subsample" or "cluster".
        size: rows in a draw; None for clusters, whose draws differ in size.
        n_clusters: generated clusters; None for subsampling.
        n_real: real rows.
        n_generated: generated rows.
        dim: feature dimension.
    """

    value: float
    std: float
    corrected_std: float
    low: float
    high: float
    values: NDArray[np.float64]
    kind: str
    size: int | None
    n_clusters: int | None
    n_real: int
    n_generated: int
    dim: int


def bootstrap(
    real: ArrayLike,
    generated: ArrayLike,
    *,
    draws: int = 50,
    size: int = 50_000,
    clusters: ArrayLike | None = None,
    real_clusters: ArrayLike | None = None,
    seed: int = 0,
) -> FrechetBootstrap:
    """The paper's subsampling, or with `clusters` a cluster bootstrap.

    A cluster draw's covariance is the weighted sum of the clusters' second moments. These are
    computed in tiles of columns, so that 4 GB are enough next to the features and one sorted
    copy, for any number of clusters.

    Args:
        real: ``[n, d]``.
        generated: ``[m, d]``.
        draws: at least 2.
        size: rows in a draw, below m; without clusters only.
        clusters: ``[m]`` labels, the slide or patient each generated row was made from.
        real_clusters: ``[n]`` labels, to draw the real set's slides too; else it is fixed.
        seed: of the draws.

    Raises:
        UserError: labels not of the rows' number, fewer than two clusters, sizes out of range,
            NaN or infinity, differing dimensions.

    >>> rows = np.random.default_rng(0).standard_normal((400, 4))
    >>> result = bootstrap(rows[:200], rows[200:], draws=8, size=100)
    >>> result.low < result.value < result.high, result.kind, result.size
    (True, 'subsample', 100)
    """
    first, second = checked_pair(real, generated)
    if draws < 2:
        raise UserError(f"draws is {draws}, expected at least 2")
    # The legacy generator, whose stream numpy keeps for good.
    random = np.random.RandomState(seed)
    if clusters is None:
        if real_clusters is not None:
            raise UserError("real_clusters were given without clusters: give the generated ones")
        return _resample_rows(first, second, draws, size, random)
    return _resample_clusters(first, second, draws, (real_clusters, clusters), random)


def resampled_widths(pair: FeaturePair, settings: MetricSettings) -> dict[str, object]:
    """The paper's subsampling and the cluster bootstraps as plain values; {} with 0 draws.

    The paper draws 50,000 of 100,000 rows; of fewer rows half are drawn, so that its correction
    by sqrt 2 is the same. Kinds of which there are fewer than two labels are left out.
    """
    if not settings.draws:
        return {}
    draws, seed, rows = settings.draws, settings.seed, len(pair.generated)
    size = settings.subsample if settings.subsample < rows else rows // 2
    widths: dict[str, object] = {}
    if size >= 2:
        drawn = bootstrap(pair.real, pair.generated, draws=draws, size=size, seed=seed)
        widths["subsample"] = plain_fields(drawn) | {"draws": draws, "seed": seed}
    for kind, labels in (pair.clusters or {}).items():
        if len(np.unique(labels)) < 2:
            continue
        # A single real slide cannot be drawn again: that side is then fixed.
        real_labels = (pair.real_clusters or {}).get(kind)
        if real_labels is not None and len(np.unique(real_labels)) < 2:
            real_labels = None
        drawn = bootstrap(
            pair.real, pair.generated, draws=draws, clusters=labels, real_clusters=real_labels,
            seed=seed,
        )  # fmt: skip
        both = real_labels is not None
        widths[kind] = plain_fields(drawn) | {"draws": draws, "seed": seed, "both_sides": both}
    return widths


def _resample_rows(
    real: NDArray[np.floating],
    generated: NDArray[np.floating],
    draws: int,
    size: int,
    random: np.random.RandomState,
) -> FrechetBootstrap:
    n = len(generated)
    if not 2 <= size < n:
        raise UserError(
            f"size is {size}, expected 2 to {n - 1}: a draw without replacement must leave some "
            f"of the {n} generated rows out"
        )
    reference = FrechetReference(Moments.from_rows(real), real)
    values = np.empty(draws)
    for draw in range(draws):
        # Sorted, so that memory is read in order; the set of rows is the same.
        rows = generated[np.sort(random.choice(n, size, replace=False))]
        values[draw] = sum(reference.distance_terms(Moments.from_rows(rows), rows))
    widening = 1 / np.sqrt(1 - size / n)
    return _collect_result(values, float(values.mean()), widening, real, n, size=size)


def _resample_clusters(
    real: NDArray[np.floating],
    generated: NDArray[np.floating],
    draws: int,
    labels: tuple[ArrayLike | None, ArrayLike],
    random: np.random.RandomState,
) -> FrechetBootstrap:
    fixed = FrechetReference(Moments.from_rows(real), real)
    point = sum(fixed.distance_terms(Moments.from_rows(generated), generated))
    side = _ClusteredRows(generated, labels[1], "generated")
    other = None if labels[0] is None else _ClusteredRows(real, labels[0], "real")
    weights = side.draw_weights(draws, random)
    real_weights = None if other is None else other.draw_weights(draws, random)
    values = np.empty(draws)
    # Covariances of many draws at once share one pass over the clusters, within 2 GB.
    group = max(1, _DRAW_BYTES // (8 * real.shape[1] ** 2 * (1 if other is None else 2)))
    for start in range(0, draws, group):
        part = slice(start, start + group)
        references = [fixed] * draws
        if other is not None and real_weights is not None:
            references = [FrechetReference(m) for m in other.weighted_moments(real_weights[part])]
        for number, moments in enumerate(side.weighted_moments(weights[part])):
            values[start + number] = sum(references[number].distance_terms(moments))
    return _collect_result(values, point, 1.0, real, len(generated), n_clusters=side.n_clusters)


def _collect_result(
    values: NDArray[np.float64],
    centre: float,
    widening: float,
    real: NDArray[np.floating],
    n_generated: int,
    *,
    size: int | None = None,
    n_clusters: int | None = None,
) -> FrechetBootstrap:
    # Draws give the width, the centre is given: repeated rows raise a draw's distance.
    std = float(values.std(ddof=1))
    low, high = centre + widening * (np.quantile(values, _QUANTILES) - values.mean())
    return FrechetBootstrap(
        value=centre,
        std=std,
        corrected_std=std * widening,
        low=max(0.0, float(low)),
        high=float(high),
        values=values,
        kind="subsample" if n_clusters is None else "cluster",
        size=size,
        n_clusters=n_clusters,
        n_real=len(real),
        n_generated=n_generated,
        dim=real.shape[1],
    )


class _ClusteredRows:
    """Rows in the order of their clusters, and the moments of weighted sums of clusters."""

    def __init__(self, rows: NDArray[np.floating], labels: ArrayLike, name: str) -> None:
        label = np.asarray(labels)
        if label.shape != (len(rows),):
            raise UserError(
                f"{name} clusters: expected one label for each of {len(rows)} rows, got an array "
                f"of shape {label.shape}"
            )
        names, member, self._counts = np.unique(label, return_inverse=True, return_counts=True)
        self.n_clusters = len(names)
        if self.n_clusters < 2:
            raise UserError(f"{name} clusters: all rows have one label, expected 2 or more")
        # Sorted by cluster, each cluster is one slice.
        self._rows = rows[np.argsort(member, kind="stable")]
        self._stops = np.cumsum(self._counts)
        # Second moments are taken about the common mean, so that nothing large cancels.
        self._centre = np.stack([b.sum(axis=0) for b in row_chunks(rows)]).sum(axis=0) / len(rows)
        self._sums = np.stack([block.sum(axis=0) for block in self._cluster_blocks()])

    def draw_weights(self, draws: int, random: np.random.RandomState) -> NDArray[np.float64]:
        """How often each cluster is drawn ``[draws, clusters]``, with replacement."""
        c = self.n_clusters
        return random.multinomial(c, np.full(c, 1 / c), size=draws).astype(np.float64)

    def weighted_moments(self, weights: NDArray[np.float64]) -> list[Moments]:
        """The moments of the rows with each cluster repeated by its weight, for each draw."""
        scatter = self._weighted_squares(weights)
        result = []
        for draw, weight in enumerate(weights):
            moments = Moments(self._rows.shape[1])
            moments.n = int(weight @ self._counts)
            offset = weight @ self._sums / moments.n
            moments.mean = self._centre + offset
            moments.scatter = scatter[draw]
            moments.scatter -= np.outer(offset * moments.n, offset)
            result.append(moments)
        return result

    def _weighted_squares(self, weights: NDArray[np.float64]) -> NDArray[np.float64]:
        """``[draws, d, d]``: the weighted sums of the clusters' second moments."""
        d, c, draws = self._rows.shape[1], self.n_clusters, len(weights)
        result = np.empty((draws, d, d))
        width = max(1, min(_TILE_COLUMNS, _TILE_BYTES // (8 * d * c)))
        squares, sums = np.empty(c * d * width), np.empty(draws * d * width)
        for start in range(0, d, width):
            # The part above the tile is known by symmetry.
            height, columns = d - start, min(width, d - start)
            tile = squares[: c * height * columns].reshape(c, height, columns)
            for cluster, block in enumerate(self._cluster_blocks(start)):
                np.matmul(block.T, block[:, :columns], out=tile[cluster])
            summed = sums[: draws * height * columns].reshape(draws, height * columns)
            np.matmul(weights, tile.reshape(c, -1), out=summed)
            whole = summed.reshape(draws, height, columns)
            result[:, start:, start : start + columns] = whole
            below = whole[:, columns:].transpose(0, 2, 1)
            result[:, start : start + columns, start + columns :] = below
        return result

    def _cluster_blocks(self, first_column: int = 0) -> Iterator[NDArray[np.float64]]:
        """Each cluster's rows, less the common mean, from a column on."""
        for stop, count in zip(self._stops, self._counts, strict=True):
            rows = self._rows[stop - count : stop, first_column:]
            yield rows - self._centre[first_column:]
