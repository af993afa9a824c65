"""Exact nearest neighbours and ball counts in blocks of bounded memory.

A block of squared distances is one matrix product in float32, ``|x|^2 + |y|^2 - 2 x.y`` on
centred rows. Its error is bounded, so whatever it leaves in doubt (the order of near
neighbours, a point at a ball's surface) is decided again in float64 as ``|x - y|^2``: results
equal those of an all-float64 computation, at float32 speed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

Rows = NDArray[np.floating]

_TILE = 2048  # rows and columns of a block: 16 MB of float32
_EXACT_ROWS = 64  # pairs compared at a time in float64: what stays in a core's cache
TINY = float(np.finfo(np.float32).tiny)  # stands for a block distance of zero: divisible
_SPARE = 2  # candidates kept beyond the k asked for, so that rounding seldom loses a true one


@contextmanager
def full_float32() -> Iterator[None]:
    """Matrix products in plain float32 inside: TF32's errors are beyond the margins here."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@dataclass(frozen=True)
class Neighbours:
    """The k nearest rows of another set, or of the own set without the row itself.

    Attributes:
        indices: ``[n, k]`` int64, nearest first.
        distances: ``[n, k]`` float64, Euclidean.
    """

    indices: NDArray[np.int64]
    distances: NDArray[np.float64]


class Block32:
    """Rows in float32, centred, with their squared lengths: one side of the block products.

    Both sides of a product must be centred on the same point; near the data it keeps the
    lengths, and so the rounding, small.
    """

    def __init__(self, rows: Rows, centre: NDArray[np.float64], device: str = "cpu") -> None:
        self.exact = rows
        centred = np.empty(rows.shape, dtype=np.float32)
        for start in range(0, len(rows), _TILE):
            centred[start : start + _TILE] = rows[start : start + _TILE] - centre
        self.rows = torch.from_numpy(centred).to(device)
        self.squares = self.rows.square().sum(dim=1)

    def __len__(self) -> int:
        return len(self.rows)

    def spans(self) -> list[slice]:
        """The blocks' row ranges."""
        return [slice(a, min(a + _TILE, len(self))) for a in range(0, len(self), _TILE)]

    def margin(self, squared: NDArray[np.float64]) -> NDArray[np.float64]:
        """How far a block distance near `squared`, a row each, may be from the exact one.

        A product's error is relative to ``|x|^2 + |y|^2``, where ``|y|^2`` is at most
        ``2 (|x|^2 + |x - y|^2)``, and grows like sqrt(d); four times that is beyond what any
        order of summation shows.
        """
        relative = 4 * np.finfo(np.float32).eps * np.sqrt(self.rows.shape[1])
        return np.asarray(relative * (3 * self.squares.cpu().numpy() + 2 * squared))


def squared_distances(a: Block32, i: slice, b: Block32, j: slice) -> torch.Tensor:
    """The block ``[rows of i, rows of j]`` of squared distances, float32, at least `TINY`."""
    squared = a.squares[i][:, None] + b.squares[j][None, :]
    return squared.addmm_(a.rows[i], b.rows[j].T, alpha=-2).clamp_(min=TINY)


class NearestCandidates:
    """Running top-c of the distances seen, a row each; `finish` orders them in float64."""

    def __init__(self, queries: Block32, base: Block32, k: int, *, own_set: bool) -> None:
        self._queries, self._base, self._k, self._own_set = queries, base, k, own_set
        width = min(k + _SPARE, len(base) - own_set)
        device = queries.rows.device
        self._squared = torch.full((len(queries), width), torch.inf, device=device)
        self._indices = torch.full((len(queries), width), -1, dtype=torch.int64, device=device)

    def update(self, i: slice, j: slice, squared: torch.Tensor) -> None:
        """Take in the block of squared distances of the queries i to the base rows j."""
        best, where = self._squared[i], self._indices[i]
        # Most later blocks hold nothing nearer for most rows: a minimum is cheap, a top-k not.
        open_rows = (squared.amin(dim=1) < best[:, -1]).nonzero().squeeze(1)
        if not len(open_rows):
            return
        width = best.shape[1]
        near = squared[open_rows].topk(min(width, squared.shape[1]), dim=1, largest=False)
        merged = torch.cat([best[open_rows], near.values], dim=1)
        origin = torch.cat([where[open_rows], near.indices + j.start], dim=1)
        kept = merged.topk(width, dim=1, largest=False)
        best[open_rows] = kept.values
        where[open_rows] = origin.gather(1, kept.indices)

    def finish(self) -> Neighbours:
        """The k nearest by exact distance; rows whose candidates might miss one are redone."""
        indices = self._indices.cpu().numpy()
        squared = _exact_candidates(self._queries.exact, self._base.exact, indices)
        order = np.lexsort((indices, squared), axis=1)[:, : self._k]
        indices = np.take_along_axis(indices, order, axis=1)
        squared = np.take_along_axis(squared, order, axis=1)
        for row in np.flatnonzero(self._doubtful(squared[:, -1])):
            indices[row], squared[row] = self._search(int(row))
        return Neighbours(indices=indices, distances=np.sqrt(squared))

    def _doubtful(self, kth: NDArray[np.float64]) -> NDArray[np.bool_]:
        """Rows where a base row left out may be nearer than the k-th one kept."""
        if self._squared.shape[1] == len(self._base) - self._own_set:
            return np.zeros(len(kth), dtype=bool)
        margin = self._queries.margin(kth)
        return np.asarray((self._squared[:, -1].cpu().numpy() - margin <= kth) & (kth > 0))

    def _search(self, row: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        squared = _exact_from(self._queries.exact[row], self._base.exact)
        if self._own_set:
            squared[row] = np.inf
        order = np.lexsort((np.arange(len(squared)), squared))[: self._k]
        return order, squared[order]


def own_neighbours(rows: Block32, k: int) -> Neighbours:
    """The k nearest other rows of each row; the symmetric half of the blocks is not computed."""
    nearest = NearestCandidates(rows, rows, k, own_set=True)
    for number, i in enumerate(rows.spans()):
        for j in rows.spans()[number:]:
            squared = squared_distances(rows, i, rows, j)
            if i == j:
                squared.fill_diagonal_(torch.inf)
            else:
                nearest.update(j, i, squared.T.contiguous())
            nearest.update(i, j, squared)
    return nearest.finish()


def exact_pairs(
    a: Rows, i: NDArray[np.int64], b: Rows, j: NDArray[np.int64]
) -> NDArray[np.float64]:
    """``|a[i] - b[j]|^2`` of index pairs, in float64, in bounded memory."""
    result = np.empty(len(i))
    for start in range(0, len(i), _EXACT_ROWS):
        part = slice(start, start + _EXACT_ROWS)
        difference = a[i[part]].astype(np.float64) - b[j[part]]
        result[part] = np.einsum("nd,nd->n", difference, difference)
    return result


def _exact_candidates(a: Rows, b: Rows, indices: NDArray[np.int64]) -> NDArray[np.float64]:
    first = np.repeat(np.arange(len(a)), indices.shape[1])
    return exact_pairs(a, first, b, indices.ravel()).reshape(indices.shape)


def _exact_from(row: Rows, base: Rows) -> NDArray[np.float64]:
    everything = np.arange(len(base))
    return exact_pairs(row[None], np.zeros(len(base), dtype=np.int64), base, everything)
