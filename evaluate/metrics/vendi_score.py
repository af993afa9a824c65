"""The Vendi score: how many different images a set effectively holds, without a reference."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from common.errors import UserError
from evaluate.metrics.features import checked_features, chunks


@dataclass(frozen=True)
class VendiScore:
    """A Vendi score.

    Attributes:
        value: in [1, min(n, d)]; 1 for copies of one image, n for mutually orthogonal ones.
        n: rows. The score grows with n: compare at equal n.
        dim: feature dimension.
    """

    value: float
    n: int
    dim: int


def vendi(features: ArrayLike) -> VendiScore:
    """The exponential of the eigenvalues' entropy of ``K / n``, K the matrix of cosines.

    Friedman & Dieng, arXiv 2210.02410, definition 2.1. The smaller of ``Z Z^T / n`` and
    ``Z^T Z / n`` is taken, which have the same non-zero eigenvalues: O(n d min(n, d)) time.

    Args:
        features: ``[n, d]``, scaled here to length 1.

    Raises:
        UserError: no rows, NaN or infinity, a row of zeros.
    """
    rows = checked_features(features, "given", min_rows=1, any_scale=True)
    n, d = rows.shape
    zero = int((~rows.any(axis=1)).sum())
    if zero:
        raise UserError(f"given features: {zero} rows hold only zeros and have no direction")
    if n <= d:
        unit = _unit(rows.astype(np.float64))
        gram = unit @ unit.T
    else:
        gram = np.zeros((d, d))
        for block in chunks(rows):
            unit = _unit(block)
            gram += unit.T @ unit
    eigenvalues = np.linalg.eigvalsh(gram / n)
    shares = eigenvalues[eigenvalues > np.finfo(np.float64).eps]
    entropy = -float((shares * np.log(shares)).sum())
    return VendiScore(value=float(np.exp(max(entropy, 0.0))), n=n, dim=d)


def _unit(rows: np.ndarray) -> np.ndarray:
    scaled = rows / np.abs(rows).max(axis=1, keepdims=True)
    return np.asarray(scaled / np.linalg.norm(scaled, axis=1, keepdims=True))
