"""The Vendi score: how many different images a set effectively holds, without a reference."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from evaluate.metrics.features import checked_features, refuse_zero_rows, row_chunks, unit_rows


@dataclass(frozen=True)
class VendiScore:
    """A Vendi score.

    Attributes:
        value: from 1 to min(n, d); 1 for copies of one image, n for mutually orthogonal ones.
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

    >>> round(vendi(np.eye(4)).value, 6), round(vendi(np.ones((4, 3))).value, 6)
    (4.0, 1.0)
    """
    rows = checked_features(features, "given", min_rows=1, any_scale=True)
    n, d = rows.shape
    refuse_zero_rows(rows, "given")
    # The smaller of the two products has the same non-zero eigenvalues.
    if n <= d:
        unit = unit_rows(rows)
        gram = unit @ unit.T
    else:
        gram = np.zeros((d, d))
        for block in row_chunks(rows):
            unit = unit_rows(block)
            gram += unit.T @ unit
    eigenvalues = np.linalg.eigvalsh(gram / n)
    # Zero eigenvalues add nothing to the entropy, and rounding makes some of them negative.
    shares = eigenvalues[eigenvalues > np.finfo(np.float64).eps]
    entropy = -float((shares * np.log(shares)).sum())
    return VendiScore(value=float(np.exp(max(entropy, 0.0))), n=n, dim=d)
