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

from evaluate.metrics.features import checked_pair, chunks
from evaluate.metrics.neighbours import (
    TINY,
    Block32,
    NearestCandidates,
    Neighbours,
    exact_pairs,
    full_float32,
    own_neighbours,
    squared_distances,
)
from model.errors import UserError

Semantics = Literal["fld", "kynkaanniemi", "prdc"]


@dataclass(frozen=True)
class PrecisionRecall:
    """How far the real and the generated manifold cover each other, in [0, 1] but `density`.

    Attributes:
        precision: fraction of generated rows in at least one real ball.
        recall: fraction of real rows in at least one generated ball.
        density: mean number of real balls around a generated row, over k; may exceed 1
            (Naeem et al., arXiv 2002.09797, equation 4). A ball is open here in all semantics.
        coverage: fraction of real balls that hold a generated row (same, equation 5).
        authenticity: fraction of generated rows that are farther from their nearest real row
            than that row is from its own nearest (Alaa et al., arXiv 2102.08921).
        k: the neighbour whose distance is a ball's radius, the row itself not counted.
        semantics: whose rule decides for a row exactly on a ball's surface.
        n_real: real rows.
        n_generated: generated rows. All five numbers depend on both: compare at equal sizes.
        dim: feature dimension.
        authentic: ``[n_generated]`` bool, the rows that `authenticity` counts.
        realism: ``[n_generated]`` float64, ``max_j r_j / |g - x_j|`` over the real balls no
            larger than the median one (arXiv 1904.06991, equation 3); infinite for a copy. The
            ball is picked in float32: among near copies it may not be the very best.
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
    """Precision and recall, and what the same distances also tell.

    The rules of the known implementations differ only on a ball's surface, which duplicated
    images reach: "fld" (Jiralerspong et al., the paper's) and "prdc" (Naeem et al.) count it as
    outside, "kynkaanniemi" as inside. Constant features change nothing. Memory is that of the
    rows in float32 and a few blocks of 2048 x 2048.

    Args:
        real: ``[n, d]``.
        generated: ``[m, d]``.
        k: 3 in the paper (its implementation writes 4, counting the row itself).
        semantics: see above.
        device: where the blocks are computed; the result does not depend on it.

    Raises:
        UserError: k below 1 or not below both row counts, unknown semantics, NaN or infinity,
            differing dimensions.
    """
    first, second = checked_pair(real, generated)
    _check_arguments(k, semantics, len(first), len(second))
    centre = np.stack([block.sum(axis=0) for block in chunks(first)]).sum(axis=0) / len(first)
    with full_float32():
        real_side, generated_side = Block32(first, centre, device), Block32(second, centre, device)
        own_real = own_neighbours(real_side, k)
        own_generated = own_neighbours(generated_side, k)
        cross = _CrossPass(real_side, generated_side, own_real, own_generated).run()
    return _summary(cross, own_real, own_generated, semantics)


def _check_arguments(k: int, semantics: str, n_real: int, n_generated: int) -> None:
    if semantics not in get_args(Semantics):
        raise UserError(
            f"semantics {semantics!r} is unknown, expected one of {', '.join(get_args(Semantics))}"
        )
    for n, name in ((n_real, "real"), (n_generated, "generated")):
        if not 1 <= k < n:
            raise UserError(
                f"k is {k}, but with {n} {name} rows it must be between 1 and {n - 1} "
                f"(a row is not its own neighbour)"
            )


class _Balls:
    """The balls around one side's rows, and which points of the other side lie in them."""

    def __init__(self, side: Block32, own: Neighbours, points: Block32) -> None:
        self._side, self._points = side, points
        self.radii = own.distances[:, -1]
        # Recomputed rather than squared, so that a point at the same distance ties exactly.
        self._squared = exact_pairs(
            side.exact, np.arange(len(side)), side.exact, own.indices[:, -1]
        )
        margin = side.margin(self._squared)
        device = side.rows.device
        # Widened by one float32 step: rounding the limits themselves must not decide either.
        self._surely = torch.from_numpy(_float32(self._squared - margin, -np.inf)).to(device)
        self._maybe = torch.from_numpy(
            _float32(np.maximum(self._squared + margin, TINY), np.inf)
        ).to(device)
        self._holding = torch.zeros(len(points), dtype=torch.int64, device=device)
        self._on_surface = np.zeros(len(points), dtype=bool)

    def update(self, i: slice, j: slice, squared: torch.Tensor) -> None:
        """Take in the block of squared distances of the balls i to the points j."""
        # Few pairs are this near, so one comparison of the whole block is all it takes.
        balls, points = (squared <= self._maybe[i, None]).nonzero(as_tuple=True)
        surely = squared[balls, points] < self._surely[i][balls]
        self._holding[j] += torch.bincount(points[surely], minlength=j.stop - j.start)
        balls, points = balls[~surely], points[~surely]
        if len(balls):
            self._decide(balls.cpu().numpy() + i.start, points.cpu().numpy() + j.start)

    def _decide(self, balls: NDArray[np.int64], points: NDArray[np.int64]) -> None:
        squared = exact_pairs(self._side.exact, balls, self._points.exact, points)
        within = points[squared < self._squared[balls]]
        counts = np.bincount(within, minlength=len(self._points))
        self._holding += torch.from_numpy(counts).to(self._holding.device)
        self._on_surface[points[squared == self._squared[balls]]] = True

    def holding(self) -> NDArray[np.int64]:
        """How many open balls hold each point."""
        return self._holding.cpu().numpy()

    def covers(self, semantics: str) -> NDArray[np.bool_]:
        """Which points lie in a ball, by the rule of `semantics` for its surface."""
        inside = self.holding() > 0
        return inside | self._on_surface if semantics == "kynkaanniemi" else inside


def _float32(values: NDArray[np.float64], towards: float) -> NDArray[np.float32]:
    return np.nextafter(values.astype(np.float32), np.float32(towards))


class _Realism:
    """The running ``max_j r_j / |g - x_j|`` over balls no larger than the median one."""

    def __init__(self, real: Block32, radii: NDArray[np.float64], generated: Block32) -> None:
        self._real, self._generated, self._radii = real, generated, radii
        usable = np.where(radii <= np.median(radii), radii**2, 0.0).astype(np.float32)
        device = real.rows.device
        self._usable = torch.from_numpy(usable).to(device)
        self._best = torch.full((len(generated),), -1.0, device=device)
        self._ball = torch.zeros(len(generated), dtype=torch.int64, device=device)

    def update(self, i: slice, j: slice, squared: torch.Tensor) -> None:
        ratio = self._usable[i, None] / squared
        top = ratio.amax(dim=0)
        better = (top > self._best[j]).nonzero().squeeze(1)
        self._best[j.start + better] = top[better]
        self._ball[j.start + better] = ratio[:, better].argmax(dim=0) + i.start

    def finish(self, nearest: Neighbours) -> NDArray[np.float64]:
        """Exact ratios of the balls found, and of the nearest ones, which float32 may not order."""
        n = len(self._ball)
        balls = np.concatenate([self._ball.cpu().numpy()[:, None], nearest.indices], axis=1)
        points = np.repeat(np.arange(n), balls.shape[1])
        squared = exact_pairs(self._generated.exact, points, self._real.exact, balls.ravel())
        distances = np.sqrt(squared).reshape(balls.shape)
        radii = self._radii[balls]
        with np.errstate(divide="ignore", invalid="ignore"):
            ratios = np.where(distances > 0, radii / distances, np.inf)
        ratios[radii > np.median(self._radii)] = 0.0
        return np.asarray(ratios.max(axis=1))


class _CrossPass:
    """All real-to-generated blocks, each computed once and shown to everyone who asks."""

    def __init__(
        self, real: Block32, generated: Block32, own_real: Neighbours, own_generated: Neighbours
    ) -> None:
        k = own_real.indices.shape[1]
        self.dim = real.exact.shape[1]
        self._real, self._generated = real, generated
        self.real_balls = _Balls(real, own_real, generated)
        self.generated_balls = _Balls(generated, own_generated, real)
        self._realism = _Realism(real, self.real_balls.radii, generated)
        self._to_real = NearestCandidates(generated, real, k, own_set=False)
        self._to_generated = NearestCandidates(real, generated, k, own_set=False)

    def run(self) -> "_CrossPass":
        for i in self._real.spans():
            for j in self._generated.spans():
                squared = squared_distances(self._real, i, self._generated, j)
                turned = squared.T.contiguous()
                self.real_balls.update(i, j, squared)
                self._realism.update(i, j, squared)
                self._to_generated.update(i, j, squared)
                self.generated_balls.update(j, i, turned)
                self._to_real.update(j, i, turned)
        self.nearest_real = self._to_real.finish()
        self.nearest_generated = self._to_generated.finish()
        self.realism = self._realism.finish(self.nearest_real)
        return self


def _summary(
    cross: _CrossPass, own_real: Neighbours, own_generated: Neighbours, semantics: str
) -> PrecisionRecall:
    n, k = own_real.indices.shape
    nearest = cross.nearest_real
    authentic = nearest.distances[:, 0] > own_real.distances[nearest.indices[:, 0], 0]
    covered = cross.nearest_generated.distances[:, 0] < cross.real_balls.radii
    return PrecisionRecall(
        precision=float(cross.real_balls.covers(semantics).mean()),
        recall=float(cross.generated_balls.covers(semantics).mean()),
        density=float(cross.real_balls.holding().mean() / k),
        coverage=float(covered.mean()),
        authenticity=float(authentic.mean()),
        k=k,
        semantics=semantics,
        n_real=n,
        n_generated=len(authentic),
        dim=cross.dim,
        authentic=authentic,
        realism=cross.realism,
        real_radii=own_real.distances[:, -1],
        generated_radii=own_generated.distances[:, -1],
        nearest_real=nearest,
        nearest_generated=cross.nearest_generated,
    )
