"""Mean and covariance of features in one pass, in float64, mergeable in any grouping."""

from __future__ import annotations

from typing import Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from common.errors import UserError
from evaluate.metrics.features import checked_features, row_chunks


class Moments:
    """Running count, mean and scatter of the rows seen: O(d^2) memory for any number of rows.

    >>> moments = Moments.from_rows([[0.0, 1.0], [2.0, 3.0]]).merge(Moments.from_rows([[4.0, 5.0]]))
    >>> moments.n, moments.mean.tolist(), moments.covariance.tolist()
    (3, [2.0, 3.0], [[4.0, 4.0], [4.0, 4.0]])

    Each block is centred on its own mean before its scatter is taken and the blocks are joined
    by the pairwise update of Chan, Golub & LeVeque (1979), so that features with a large common
    mean lose no digits in any order of the rows.

    Attributes:
        n: rows seen.
        mean: ``[d]`` float64.
        scatter: ``[d, d]`` float64, the sum of ``(x - mean)(x - mean)^T``.
    """

    def __init__(self, dim: int) -> None:
        self.n = 0
        self.mean: NDArray[np.float64] = np.zeros(dim)
        self.scatter: NDArray[np.float64] = np.zeros((dim, dim))

    @classmethod
    def from_rows(cls, features: ArrayLike, name: str = "given") -> Self:
        """The moments of an array ``[n, d]``; `name` is what messages call the set."""
        array = checked_features(features, name, min_rows=1)
        return cls(array.shape[1]).update(array)

    @property
    def dim(self) -> int:
        """The dimension d of the features ``[n, d]``."""
        return len(self.mean)

    @property
    def covariance(self) -> NDArray[np.float64]:
        """The covariance ``[d, d]`` with divisor n - 1.

        Raises:
            UserError: fewer than two rows were seen.
        """
        if self.n < 2:
            raise UserError(f"a covariance needs at least 2 rows, {self.n} came; measure more")
        return self.scatter / (self.n - 1)

    def update(self, features: ArrayLike) -> Self:
        """Take in the rows of an array ``[n, d]``.

        Raises:
            UserError: NaN, infinity, or another dimension.
        """
        array = checked_features(features, "given", min_rows=0)
        self._check_dim(array.shape[1])
        for block in row_chunks(array):
            mean = block.mean(axis=0)
            block -= mean
            self._join_block(len(block), mean, block.T @ block)
        return self

    def merge(self, other: Moments) -> Self:
        """Take in all the rows that `other` has seen."""
        self._check_dim(other.dim)
        self._join_block(other.n, other.mean, other.scatter)
        return self

    def _join_block(self, n: int, mean: NDArray[np.float64], scatter: NDArray[np.float64]) -> None:
        if n == 0:
            return
        total = self.n + n
        delta = mean - self.mean
        self.scatter += scatter
        if self.n:
            self.scatter += np.outer(delta * (self.n * n / total), delta)
        self.mean = self.mean + delta * (n / total)
        self.n = total

    def _check_dim(self, dim: int) -> None:
        if dim != self.dim:
            raise UserError(f"expected features of {self.dim} dimensions, got {dim}")
