"""Precision, recall, density, coverage, realism and authenticity from one pass over all pairs.

A set's manifold is the union of balls, one around each row, reaching to that row's k-th nearest
neighbour within the set (Kynkäänniemi et al., arXiv 1904.06991). All six, and the nearest
neighbours a memorisation study needs, come from the same blocks of distances.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from common.errors import UserError
from common.record import Record
from evaluate.metrics.features import checked_pair, row_chunks
from evaluate.metrics.metric import (
    FeaturePair,
    Metric,
    MetricSettings,
    TableQuantity,
    WarningKind,
    plain_fields,
    value_at,
)
from evaluate.metrics.neighbours import (
    MANY,
    Nearest,
    Neighbours,
    Pairs,
    ScreenedRows,
    exact_pairs,
    in_sets,
    neighbours_within,
    open_pairs,
)

_LOWERED = WarningKind(
    "lowered_k",
    "k is {k} in place of {wanted}, as more than half of the smaller set of {rows} rows would be "
    "in every ball: compare with numbers of the same k only",
)
Semantics = Literal["fld", "kynkaanniemi", "prdc"]


@dataclass(frozen=True)
class PrecisionRecall:
    """How far the real and the generated manifold cover each other, in [0, 1] but `density`.

    Attributes:
        precision: fraction of generated rows in at least one real ball.
        recall: fraction of real rows in at least one generated ball.
        density: mean number of real balls around a generated row, over k; may exceed 1
            (Naeem et al., arXiv 2002.09797, equation 4). A ball is open here in all semantics.
        coverage: fraction of real balls that contain a generated row (same, equation 5).
        authenticity: fraction of generated rows that are farther from their nearest real row
            than that row is from its own nearest (Alaa et al., arXiv 2102.08921).
        k: the neighbour whose distance is a ball's radius, the row itself not counted.
        semantics: whose rule decides for a row exactly on a ball's surface.
        n_real: real rows.
        n_generated: generated rows. All five numbers depend on both: compare at equal sizes.
        dim: feature dimension.
        authentic: ``[n_generated]`` bool, the rows that `authenticity` counts.
        realism: ``[n_generated]`` float64, ``max_j r_j / |g - x_j|`` over the real balls no
            larger than the median one (arXiv 1904.06991, equation 3); infinite for a copy.
        real_radii: ``[n_real]`` float64.
        generated_radii: ``[n_generated]`` float64.
        nearest_real: for each generated row its k nearest real rows.
        nearest_generated: for each real row its k nearest generated rows.
    """

    precision: float
    recall: float
    density: float
    coverage: float
    authenticity: float
    k: int
    semantics: str
    n_real: int
    n_generated: int
    dim: int
    authentic: NDArray[np.bool_]
    realism: NDArray[np.float64]
    real_radii: NDArray[np.float64]
    generated_radii: NDArray[np.float64]
    nearest_real: Neighbours
    nearest_generated: Neighbours


def precision_recall(
    real: ArrayLike,
    generated: ArrayLike,
    *,
    k: int = 3,
    semantics: Semantics = "fld",
    device: str = "cpu",
) -> PrecisionRecall:
    """Precision and recall, and what else the same distances give.

    The rules of the known implementations differ only on a ball's surface, which duplicated
    images reach: "fld" (Jiralerspong et al., the paper's) and "prdc" (Naeem et al.) count it as
    outside, "kynkaanniemi" as inside. Constant features change nothing. On a CPU
    memory is that of two tiles of 2048 rows, a few blocks of 2048 x 2048 and k neighbours per row;
    another device has the rows in float32 too.

    Args:
        real: ``[n, d]``.
        generated: ``[m, d]``.
        k: 3 in the paper (its implementation writes 4, counting the row itself).
        semantics: see above.
        device: where the blocks are computed; the result does not depend on it.

    Raises:
        UserError: k below 1 or not below both row counts, unknown semantics, NaN or infinity,
            differing dimensions.

    >>> rows = np.arange(10.0)[:, None]
    >>> result = precision_recall(rows, rows + 0.25, k=1)
    >>> result.precision, result.recall, result.coverage
    (1.0, 1.0, 1.0)
    """
    first, second = checked_pair(real, generated)
    if semantics not in get_args(Semantics):
        raise UserError(
            f"semantics {semantics!r} is unknown, expected one of {', '.join(get_args(Semantics))}"
        )
    for n, name in ((len(first), "real"), (len(second), "generated")):
        if not 1 <= k < n:
            raise UserError(
                f"k is {k}, but with {n} {name} rows it must be between 1 and {n - 1} "
                f"(a row is not its own neighbour)"
            )
    # Both sets are centred on one point near the data: lengths, and so errors, stay small.
    centre = np.stack([block.sum(axis=0) for block in row_chunks(first)]).sum(axis=0) / len(first)
    real_rows, generated_rows = (
        ScreenedRows(first, centre, device),
        ScreenedRows(second, centre, device),
    )
    real_neighbours, generated_neighbours = (
        neighbours_within(real_rows, k),
        neighbours_within(generated_rows, k),
    )
    cross = _CrossPass(
        real_rows, generated_rows, real_neighbours, generated_neighbours
    ).run_blocks()
    return _collect_result(cross, real_neighbours, generated_neighbours, semantics)


class _Balls:
    """The balls around one set's rows, and which points of the other set are in them."""

    def __init__(self, side: ScreenedRows, neighbours: Neighbours, points: ScreenedRows) -> None:
        self._side, self._points = side, points
        self.radii = neighbours.distances[:, -1]
        # Recomputed rather than squared, so that a point at the same distance ties exactly.
        self._exact = exact_pairs(
            side.exact, np.arange(len(side)), side.exact, neighbours.indices[:, -1]
        )
        self._squared = torch.from_numpy(self._exact).to(side.device)
        self._counts = torch.zeros(len(points), dtype=torch.int64, device=side.device)
        self._on_surface = np.zeros(len(points), dtype=bool)

    def open_limits(self, span: slice, error: float) -> torch.Tensor:
        """What a block distance to these balls' centres may be and still be within, float32."""
        squared = self._squared[span].float()
        return squared + error * (3 * self._side.squares[span] + 2 * squared)

    def add_pairs(
        self,
        found: Pairs,
        squared: torch.Tensor,
        block: tuple[slice, slice],
        error: float,
        *,
        by_columns: bool = False,
    ) -> None:
        """Take in entries of a block, whose rows, or with `by_columns` columns, are balls."""
        ball, point = in_sets(found, block, by_columns)
        slack = error * (self._side.squares[ball] + self._points.squares[point])
        beyond = squared[found].double() - self._squared[ball]
        # Well inside counts at once; what the error leaves open is decided in float64.
        surely = beyond < -slack
        self._counts += torch.bincount(point[surely], minlength=len(self._points))
        doubtful = ~surely & (beyond <= slack)
        if bool(doubtful.any()):
            self._decide_exactly(ball[doubtful].cpu().numpy(), point[doubtful].cpu().numpy())

    def _decide_exactly(self, balls: NDArray[np.int64], points: NDArray[np.int64]) -> None:
        # A ball of radius 0 contains nothing and touches copies only; one such touch is enough.
        useful = (self._exact[balls] > 0) | ~self._on_surface[points]
        balls, points = balls[useful], points[useful]
        squared = exact_pairs(self._side.exact, balls, self._points.exact, points)
        within = points[squared < self._exact[balls]]
        counts = np.bincount(within, minlength=len(self._points))
        self._counts += torch.from_numpy(counts).to(self._counts.device)
        self._on_surface[points[squared == self._exact[balls]]] = True

    def count_balls(self) -> NDArray[np.int64]:
        """How many open balls contain each point."""
        return self._counts.cpu().numpy()

    def covered_points(self, semantics: str) -> NDArray[np.bool_]:
        """Which points are in a ball, by the rule of `semantics` for its surface."""
        inside = self.count_balls() > 0
        return inside | self._on_surface if semantics == "kynkaanniemi" else inside


class _Realism:
    """``max_j r_j / |g - x_j|`` over balls no larger than the median one.

    Sought as the least ``|g - x_j|^2 / r_j^2``: pairs whose bounds leave that open are pooled
    and decided at the end.
    """

    def __init__(
        self, real: ScreenedRows, radii: NDArray[np.float64], generated: ScreenedRows
    ) -> None:
        self._real, self._generated, self._radii = real, generated, radii
        self._small = radii <= np.median(radii)
        self._usable = torch.from_numpy(self._small & (radii > 0)).to(real.device)
        squared = torch.from_numpy(radii**2).to(real.device)
        self._weights = (1 / squared.clamp_(min=np.finfo(np.float64).tiny)).float()
        # An upper bound of the least ratio of each generated row.
        self._best = torch.full((len(generated),), torch.inf, device=real.device)
        self._pool: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []

    def add_block(self, i: slice, j: slice, squared: torch.Tensor, error: float) -> None:
        """Take in a block of the real rows i and the generated rows j.

        A block distance is at most ``D + error (|x|^2 + |g|^2)`` with ``|x|^2`` at most
        ``2 (|g|^2 + D)``, so what is less than ``3 error |g|^2`` above D matters.
        """
        rows = self._usable[i].nonzero().squeeze(1)
        if not len(rows):
            return
        ratio = squared[rows].sub_(3 * error * self._generated.squares[j])
        ratio.mul_(self._weights[i][rows, None])
        # Columns without any bound yet get one from their best ball in this block.
        unseen = self._best[j].isinf()
        if bool(unseen.any()):
            column = torch.arange(len(unseen), device=unseen.device)
            self._bound_ratios(rows[ratio.argmin(dim=0)] + i.start, column, j, squared, i, error)
        row, column = open_pairs(ratio, self._best[j] * (1 + 2 * error))
        self._pool.append(self._bound_ratios(rows[row] + i.start, column, j, squared, i, error))

    def _bound_ratios(
        self,
        ball: torch.Tensor,
        column: torch.Tensor,
        j: slice,
        squared: torch.Tensor,
        i: slice,
        error: float,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Tighten the bounds of the points by these pairs; balls, points and lower bounds."""
        point, found = column + j.start, squared[ball - i.start, column]
        slack = error * (self._real.squares[ball] + self._generated.squares[point])
        weight = self._weights[ball]
        self._best.scatter_reduce_(0, point, (found + slack) * weight, "amin")
        return ball, point, (found - slack) * weight

    def find_ratios(self, nearest: Neighbours) -> NDArray[np.float64]:
        """The ratios ``[n_generated]``, infinite for a copy of a row whose ball is small."""
        copied = ((nearest.distances == 0) & self._small[nearest.indices]).any(axis=1)
        realism = np.where(copied, np.inf, 0.0)
        if self._pool:
            ball, point, lower = (torch.cat(parts) for parts in zip(*self._pool, strict=True))
            near = (lower <= self._best[point]) & ~torch.from_numpy(copied).to(point.device)[point]
            balls, points = ball[near].cpu().numpy(), point[near].cpu().numpy()
            squared = exact_pairs(self._real.exact, balls, self._generated.exact, points)
            np.maximum.at(realism, points, self._radii[balls] / np.sqrt(squared))
        return realism


class _CrossPass:
    """All real-to-generated blocks, each computed once for all of its readers."""

    def __init__(
        self,
        real: ScreenedRows,
        generated: ScreenedRows,
        real_neighbours: Neighbours,
        generated_neighbours: Neighbours,
    ) -> None:
        k = real_neighbours.indices.shape[1]
        self.dim = real.dim
        self._real, self._generated = real, generated
        self.real_balls = _Balls(real, real_neighbours, generated)
        self.generated_balls = _Balls(generated, generated_neighbours, real)
        self._realism = _Realism(real, self.real_balls.radii, generated)
        self._to_real = Nearest(generated, real, k)
        self._to_generated = Nearest(real, generated, k)

    def run_blocks(self) -> "_CrossPass":
        for i in self._real.tile_spans():
            left = self._real.left_factor(i)
            for j in self._generated.tile_spans():
                self._read_block(left, i, j)
        self.nearest_real = self._to_real.find_nearest()
        self.nearest_generated = self._to_generated.find_nearest()
        self.realism = self._realism.find_ratios(self.nearest_real)
        return self

    def _read_block(self, left: torch.Tensor, i: slice, j: slice) -> None:
        right, many = self._generated.right_factor(j), MANY * (i.stop - i.start + j.stop - j.start)
        for screen in self._real.screens:
            squared, error = screen.squared_distances(left, right), screen.error
            seeded_i = not j.start and self._to_generated.seed_bounds(i, squared, j, error)
            seeded_j = not i.start and self._to_real.seed_bounds(
                j, squared.T.contiguous(), i, error
            )
            row_limits = torch.maximum(
                self.real_balls.open_limits(i, error), self._to_generated.open_limits(i, error)
            )
            column_limits = torch.maximum(
                self.generated_balls.open_limits(j, error), self._to_real.open_limits(j, error)
            )
            by_row = open_pairs(squared, row_limits[:, None])
            by_column = open_pairs(squared, column_limits)
            # A coarse screen that leaves much open costs more than a finer one.
            if len(by_row[0]) + len(by_column[0]) <= many:
                break
        # Five readers share the block: balls of both sets, nearest rows both ways, realism.
        self.real_balls.add_pairs(by_row, squared, (i, j), error)
        self._to_generated.add_pairs(by_row, squared, (i, j), error, tighten=not seeded_i)
        self.generated_balls.add_pairs(by_column, squared, (i, j), error, by_columns=True)
        self._to_real.add_pairs(
            by_column, squared, (i, j), error, by_columns=True, tighten=not seeded_j
        )
        self._realism.add_block(i, j, squared, error)


def _collect_result(
    cross: _CrossPass, real_neighbours: Neighbours, generated_neighbours: Neighbours, semantics: str
) -> PrecisionRecall:
    n, k = real_neighbours.indices.shape
    nearest = cross.nearest_real
    # Authentic: farther from the nearest real tile than that tile is from its own nearest.
    authentic = nearest.distances[:, 0] > real_neighbours.distances[nearest.indices[:, 0], 0]
    covered = cross.nearest_generated.distances[:, 0] < cross.real_balls.radii
    return PrecisionRecall(
        precision=float(cross.real_balls.covered_points(semantics).mean()),
        recall=float(cross.generated_balls.covered_points(semantics).mean()),
        density=float(cross.real_balls.count_balls().mean() / k),
        coverage=float(covered.mean()),
        authenticity=float(authentic.mean()),
        k=k,
        semantics=semantics,
        n_real=n,
        n_generated=len(authentic),
        dim=cross.dim,
        authentic=authentic,
        realism=cross.realism,
        real_radii=real_neighbours.distances[:, -1],
        generated_radii=generated_neighbours.distances[:, -1],
        nearest_real=nearest,
        nearest_generated=cross.nearest_generated,
    )


_SHOWN = {
    "precision": "Share of generated tiles that fall among the real ones (within the distance of "
    "some real tile to its real neighbour number {k}): do they look real?",
    "recall": "Share of real tiles that fall among the generated ones: is the variety of the real "
    "tissue covered?",
    "density": "Like precision, but counts how many real neighbourhoods hold a generated tile, so "
    "one real outlier weighs little; about 1 for equal distributions, can exceed it.",
    "coverage": "Share of real tiles with at least one generated tile in their neighbourhood: "
    "recall that outliers among the generated tiles cannot inflate.",
}
"""Numbers that reports and tables show, with their meaning."""


def largest_k(rows: int) -> int:
    """The largest k that means something in a set of so many rows.

    A ball that reaches beyond half of the other rows of its set says where the set is, not where
    its neighbourhood is.

    >>> largest_k(2), largest_k(8), largest_k(41)
    (0, 3, 20)
    """
    return (rows - 1) // 2


def manifold_result(pair: FeaturePair, settings: MetricSettings) -> dict[str, object]:
    """The metric as plain values, with its settings; a k that is too large is lowered and said.

    Raises:
        UserError: fewer than 3 rows in a set, in which no k means anything.
    """
    smaller = min(len(pair.real), len(pair.generated))
    k = min(settings.k, largest_k(smaller))
    if k < 1:
        raise UserError(
            f"the smaller set has {smaller} row{'s' * (smaller != 1)}, but precision and recall "
            "need at least 3; measure more images"
        )
    result = precision_recall(pair.real, pair.generated, k=k, device=pair.device)
    is_lowered = k < settings.k
    warnings = [_LOWERED.format_sentence(k=k, wanted=settings.k, rows=smaller)]
    return plain_fields(result) | {"warnings": warnings if is_lowered else []}


def manifold_summary(result: Record) -> str:
    """Precision, recall, density and coverage in a few words."""
    return ", ".join(f"{key} {result.number(key):.3f}" for key in ("precision", "recall"))


METRIC = Metric(
    name="precision_recall",
    title="Precision and recall",
    place=20,
    compute=manifold_result,
    compute_floor=manifold_result,
    quantities=tuple(
        TableQuantity(key, key.capitalize(), "higher", value_at(key), share=True, meaning=meaning)
        for key, meaning in _SHOWN.items()
    ),
    warnings=(_LOWERED,),
    summary=manifold_summary,
)
