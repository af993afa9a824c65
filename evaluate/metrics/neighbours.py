"""Exact nearest neighbours and ball counts in blocks of bounded memory.

A block of squared distances is one matrix product, ``|x|^2 + |y|^2 - 2 x.y`` on centred rows, in
fast arithmetic: bfloat16 or TF32 inputs with float32 sums where the processor has units for
them, else float32. Its error is bounded, so a block only *screens*: the few pairs that its bounds
leave open are decided in float64 as ``|x - y|^2``. Results equal those of an all-float64
computation, at the speed of the screen.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

Rows = NDArray[np.floating]
Pairs = tuple[torch.Tensor, torch.Tensor]

_TILE = 2048  # rows and columns of a block: 16 MB of float32
_EXACT_ROWS = 32  # pairs compared at a time in float64: what stays in a core's cache
_EXACT_TASK = 64 * _EXACT_ROWS  # and by one thread in a row
_POOL_PAIRS = 1 << 22  # candidates in hand before those overtaken are dropped
MANY = 32  # open pairs per row in one block; beyond, a finer screen is cheaper than deciding them


@dataclass(frozen=True)
class Screen:
    """The arithmetic of a block.

    Attributes:
        precision: torch's name of it, as `torch.set_float32_matmul_precision` takes it, or
            "bfloat16" for factors and products of that type, summed in float32.
        error: bound on a squared distance's error, relative to ``|x|^2 + |y|^2``.
    """

    precision: str
    error: float

    def squared_distances(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        """``left right^T`` float32; the user's setting is restored afterwards."""
        if self.precision == "bfloat16":
            return (left.bfloat16() @ right.bfloat16().T).float()
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(self.precision)
        try:
            return left @ right.T
        finally:
            torch.set_float32_matmul_precision(before)


def choose_screens(dim: int, device: torch.device) -> list[Screen]:
    """The screens that pay for rows of this dimension, coarsest first.

    Float32 sums err like sqrt(d) eps; four times that is beyond what any order of summation
    shows. Rounding both factors to u adds at most ``2 u |x||y|`` to a product (Cauchy-Schwarz),
    and twice that, ``2 u (|x|^2 + |y|^2)``, to a squared distance; u is 2^-8 for bfloat16, 2^-11
    for TF32. A distance that is rounded too adds u
    times itself, which is at most ``2 u (|x|^2 + |y|^2)`` again.
    """
    full = 4 * float(np.finfo(np.float32).eps) * float(np.sqrt(dim))
    exact = Screen("highest", full)
    if device.type == "cuda":
        return [Screen("high", full + 1.01 * 2**-10), exact]
    if not torch.backends.mkldnn.is_available():
        return [exact]
    if getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)():
        return [Screen("medium", full + 1.01 * 2**-7), exact]
    # AVX-512 multiplies bfloat16 twice as fast as float32; of that "medium" gains a fifth only
    # (docs/performance/metrics.md), factors of the type the rest.
    if getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)():
        return [Screen("bfloat16", full + 2.02 * 2**-7), exact]
    return [exact]


@dataclass(frozen=True)
class Neighbours:
    """The k nearest rows of another set, or of the same set without the row itself.

    Attributes:
        indices: ``[n, k]`` int64, nearest first.
        distances: ``[n, k]`` float64, Euclidean.
    """

    indices: NDArray[np.int64]
    distances: NDArray[np.float64]


class ScreenedRows:
    """A feature set as a factor of the block products: tiles of centred rows in float32.

    Both factors of a product must be centred on the same point; near the data it keeps the
    lengths, and so the errors, small. On a CPU tiles are made when they are needed, which costs a
    twentieth of a product and saves a copy of the set; other devices keep the copy.

    Attributes:
        exact: the rows ``[n, d]`` as they came.
        squares: ``[n]`` float32, squared lengths of the centred rows.
        screens: the arithmetics that blocks are tried in, coarsest first.
    """

    def __init__(self, rows: Rows, centre: NDArray[np.float64], device: str = "cpu") -> None:
        self.exact = rows
        self.device = torch.device(device)
        self.screens = choose_screens(rows.shape[1], self.device)
        self._centre = centre.astype(np.float32)
        self._resident: torch.Tensor | None = None
        if self.device.type != "cpu":
            self._resident = torch.cat([self._centred_tile(span) for span in self.tile_spans()])
        squares = [self._centred_tile(span).square_().sum(dim=1) for span in self.tile_spans()]
        self.squares = torch.cat(squares)

    def __len__(self) -> int:
        return len(self.exact)

    @property
    def dim(self) -> int:
        """The dimension d of the rows ``[n, d]``."""
        return self.exact.shape[1]

    def tile_spans(self) -> list[slice]:
        """The tiles' row ranges."""
        return [slice(a, min(a + _TILE, len(self))) for a in range(0, len(self), _TILE)]

    def left_factor(self, span: slice) -> torch.Tensor:
        """``[-2 x, |x|^2, 1]``, so that the product with `right` is the squared distance."""
        tile = self._widened_tile(span)
        tile[:, : self.dim].mul_(-2)
        tile[:, self.dim : -3] = _in_three(self.squares[span])
        return tile

    def right_factor(self, span: slice) -> torch.Tensor:
        """``[y, 1, |y|^2]``."""
        tile = self._widened_tile(span)
        tile[:, -3:] = _in_three(self.squares[span])
        return tile

    def _widened_tile(self, span: slice) -> torch.Tensor:
        tile = torch.empty((span.stop - span.start, self.dim + 6), device=self.device)
        tile[:, self.dim :] = 1
        self._centred_tile(span, out=tile[:, : self.dim])
        return tile

    def _centred_tile(self, span: slice, out: torch.Tensor | None = None) -> torch.Tensor:
        if out is None:
            out = torch.empty((span.stop - span.start, self.dim), device=self.device)
        if self._resident is not None:
            return out.copy_(self._resident[span])
        host = out if out.device.type == "cpu" else torch.empty(out.shape)
        # The centre as it was rounded is the common point; one rounded subtraction follows.
        np.subtract(self.exact[span], self._centre, out=host.numpy(), casting="same_kind")
        return out if host is out else out.copy_(host)


def _in_three(values: torch.Tensor) -> torch.Tensor:
    """Float32 values as sums of three bfloat16 numbers ``[n, 3]``: no screen rounds them."""
    high = values.bfloat16().float()
    middle = (values - high).bfloat16().float()
    return torch.stack([high, middle, values - high - middle], dim=1)


def open_pairs(squared: torch.Tensor, limits: torch.Tensor) -> Pairs:
    """Row and column, int64 ``[pairs]``, of a block's entries at or below the broadcast limits."""
    if squared.device.type != "cpu":
        row, column = (squared <= limits).nonzero(as_tuple=True)
        return row, column
    # They are few among many, and numpy's search passes over runs of False five times as fast.
    found = np.flatnonzero(squared.numpy() <= limits.numpy())
    rows, columns = np.divmod(found, squared.shape[1])
    return torch.from_numpy(rows), torch.from_numpy(columns)


def in_sets(found: Pairs, block: tuple[slice, slice], by_columns: bool) -> Pairs:
    """A block's entries as rows ``[pairs]`` of the two sets; `by_columns`: the columns' first."""
    row, column = (index + span.start for index, span in zip(found, block, strict=True))
    return (column, row) if by_columns else (row, column)


class Nearest:
    """The k nearest base rows ``[queries, k]``, from pairs that their bounds leave open."""

    def __init__(self, queries: ScreenedRows, base: ScreenedRows, k: int) -> None:
        self._queries, self._base, self._k = queries, base, k
        # The k smallest upper bounds seen: no true neighbour is beyond the last of them.
        self._upper = torch.full((len(queries), k), torch.inf, device=queries.device)
        # Queries with k exact copies: nothing is nearer, and all else like them may be skipped.
        self._settled = torch.zeros(len(queries), dtype=torch.bool, device=queries.device)
        self._pool: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        self._pooled = 0

    def open_limits(self, span: slice, error: float) -> torch.Tensor:
        """The largest block distance ``[queries]``, float32, that may still be of a neighbour.

        The other row's ``|y|^2`` is at most ``2 (|x|^2 + |x - y|^2)``.
        """
        upper = self._upper[span, -1]
        limits = upper + error * (3 * self._queries.squares[span] + 2 * upper)
        limits[self._settled[span]] = -torch.inf
        return limits.clamp_(max=torch.finfo(limits.dtype).max)

    def seed_bounds(self, span: slice, squared: torch.Tensor, base: slice, error: float) -> bool:
        """First bounds for these queries from a block ``[queries, base rows]``, if k are in it."""
        if squared.shape[1] < self._k:
            return False
        near = squared.topk(self._k, dim=1, largest=False, sorted=False)
        far = self._base.squares[base][near.indices] + self._queries.squares[span, None]
        self._upper[span] = (near.values + error * far).sort(dim=1).values
        return True

    def add_pairs(
        self,
        found: Pairs,
        squared: torch.Tensor,
        block: tuple[slice, slice],
        error: float,
        *,
        by_columns: bool = False,
        tighten: bool = True,
    ) -> None:
        """Take in entries of a block, whose rows, or with `by_columns` columns, are queries.

            `squared` is a block ``[queries, base rows]``; `error` is relative to squared lengths.
        A block that `seed_bounds` has seen must not `tighten`: a bound would count twice.
        """
        query, base = in_sets(found, block, by_columns)
        slack = error * (self._queries.squares[query] + self._base.squares[base])
        lower = squared[found] - slack
        # Bounds have tightened since the limits were computed for the block.
        near = lower <= self._upper[query, -1]
        query, base, lower = query[near], base[near], lower[near]
        self._pool.append((query, base, lower))
        self._pooled += len(query)
        if tighten:
            self._tighten_bounds(query, lower + 2 * slack[near])
        if self._pooled > _POOL_PAIRS:
            self._shrink_pool()

    def _tighten_bounds(self, query: torch.Tensor, upper: torch.Tensor) -> None:
        # Per query the k smallest of the new bounds, merged with the k known ones.
        lower_than = upper < self._upper[query, -1]
        query, upper = query[lower_than], upper[lower_than]
        order = upper.argsort()
        order = order[query[order].argsort(stable=True)]
        rows, which, counts = query[order].unique_consecutive(
            return_inverse=True, return_counts=True
        )
        rank = torch.arange(len(order), device=order.device) - (counts.cumsum(0) - counts)[which]
        best = rank < self._k
        table = torch.full((len(rows), self._k), torch.inf, device=order.device)
        table[which[best], rank[best]] = upper[order[best]]
        merged = torch.cat([self._upper[rows], table], dim=1)
        self._upper[rows] = merged.sort(dim=1).values[:, : self._k]

    def _shrink_pool(self) -> None:
        """Drop what was overtaken; if that is little, decide, and keep each query's k nearest."""
        query, base = self._near_pairs()
        # Many ties (duplicated images) would fill the pool without end.
        if len(query) > _POOL_PAIRS // 2:
            rows, indices, squared = self._decide_pairs(query, base)
            device = self._upper.device
            self._upper[rows] = torch.from_numpy(_round_towards(squared, np.inf)).to(device)
            self._settled[rows[squared[:, -1] == 0]] = True
            row, rank = np.nonzero(indices >= 0)
            lower = _round_towards(squared[row, rank], -np.inf)
            kept = (rows[row], indices[row, rank], lower)
            query_kept, base_kept, lower_kept = (torch.from_numpy(x).to(device) for x in kept)
            self._pool = [(query_kept, base_kept, lower_kept)]
        self._pooled = len(self._pool[0][0])

    def _near_pairs(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        query, base, lower = (torch.cat(parts) for parts in zip(*self._pool, strict=True))
        near = lower <= self._upper[query, -1]
        self._pool = [(query[near], base[near], lower[near])]
        return self._pool[0][0].cpu().numpy(), self._pool[0][1].cpu().numpy()

    def _decide_pairs(
        self, query: NDArray[np.int64], base: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
        """The queries met, and the k nearest of each's pairs by exact distance, nearest first.

        Where a query has fewer pairs its last indices are -1, at infinite distance.
        """
        squared = exact_pairs(self._queries.exact, query, self._base.exact, base)
        # By query, then by distance, equal distances by row number: ties have one order.
        order = np.lexsort((base, squared, query))
        rows, first, counts = np.unique(query[order], return_index=True, return_counts=True)
        rank = np.arange(len(order)) - np.repeat(first, counts)
        kept, row = rank < self._k, np.repeat(np.arange(len(rows)), counts)
        indices = np.full((len(rows), self._k), -1)
        distances = np.full((len(rows), self._k), np.inf)
        indices[row[kept], rank[kept]] = base[order][kept]
        distances[row[kept], rank[kept]] = squared[order][kept]
        return rows, indices, distances

    def find_nearest(self) -> Neighbours:
        """The k nearest ``[queries, k]`` by exact float64 distance, equal ones by row number."""
        _, indices, squared = self._decide_pairs(*self._near_pairs())
        self._pool = []
        return Neighbours(indices=indices, distances=np.sqrt(squared))


def _round_towards(values: NDArray[np.float64], towards: float) -> NDArray[np.float32]:
    """Float32 values no nearer to the other end than these: rounding decides nothing."""
    return np.nextafter(values.astype(np.float32), np.float32(towards))


def neighbours_within(rows: ScreenedRows, k: int) -> Neighbours:
    """The k nearest other rows ``[n, k]`` of each row; symmetric blocks are computed once."""
    nearest, spans = Nearest(rows, rows, k), rows.tile_spans()
    # The diagonal first, as it bounds all rows.
    for i in spans:
        _search_block(nearest, rows, rows, rows.left_factor(i), i, i)
    for number, i in enumerate(spans):
        left = rows.left_factor(i)
        for j in spans[number + 1 :]:
            _search_block(nearest, rows, rows, left, i, j)
    return nearest.find_nearest()


def neighbours_between(queries: ScreenedRows, base: ScreenedRows, k: int) -> Neighbours:
    """The k nearest rows ``[queries, k]`` of another set; both sets are centred on one point.

    `base` has at least k rows.
    """
    nearest = Nearest(queries, base, k)
    for i in queries.tile_spans():
        left = queries.left_factor(i)
        for j in base.tile_spans():
            _search_block(nearest, queries, base, left, i, j)
    return nearest.find_nearest()


def _search_block(
    nearest: Nearest,
    queries: ScreenedRows,
    base: ScreenedRows,
    left: torch.Tensor,
    i: slice,
    j: slice,
) -> None:
    """Take in the block of queries i and base rows j; within one set it serves both."""
    right, within = base.right_factor(j), base is queries
    for screen in queries.screens:
        squared = screen.squared_distances(left, right)
        if within and i == j:
            squared.fill_diagonal_(torch.inf)
        # Bounds come from the first block that has each query.
        is_first = i == j if within else not j.start
        seeded = is_first and nearest.seed_bounds(i, squared, j, screen.error)
        found = [open_pairs(squared, nearest.open_limits(i, screen.error)[:, None])]
        if within and i != j:
            found.append(open_pairs(squared, nearest.open_limits(j, screen.error)))
        # A coarse screen that leaves much open costs more than a finer one.
        if sum(len(pairs[0]) for pairs in found) <= MANY * sum(squared.shape):
            break
    nearest.add_pairs(found[0], squared, (i, j), screen.error, tighten=not seeded)
    for pairs in found[1:]:
        nearest.add_pairs(pairs, squared, (i, j), screen.error, by_columns=True)


def exact_pairs(
    a: Rows, i: NDArray[np.int64], b: Rows, j: NDArray[np.int64]
) -> NDArray[np.float64]:
    """``|a[i] - b[j]|^2`` of index pairs, in float64, in bounded memory."""
    result = np.empty(len(i))

    def fill_pairs(start: int) -> None:
        for at in range(start, min(start + _EXACT_TASK, len(i)), _EXACT_ROWS):
            part = slice(at, min(at + _EXACT_ROWS, start + _EXACT_TASK))
            difference = a[i[part]].astype(np.float64)
            difference -= b[j[part]]
            np.einsum("nd,nd->n", difference, difference, out=result[part])

    # Threads cost more than they save where a single task does.
    starts = range(0, len(i), _EXACT_TASK)
    if len(starts) < 2:
        fill_pairs(0)
        return result
    with ThreadPoolExecutor(torch.get_num_threads()) as threads:
        list(threads.map(fill_pairs, starts))
    return result
