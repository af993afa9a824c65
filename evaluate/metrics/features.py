"""What every metric requires of a feature array, and the errors that name what is wrong."""

import hashlib
from collections.abc import Iterator

import numpy as np
from numpy.typing import ArrayLike, NDArray

from common.errors import UserError

CHUNK_ROWS = 4096  # 50 MB of float64 at d = 1536
_SMALLEST, _LARGEST = 1e-15, 1e15  # no encoder's features; their squares stay within float32


def checked_features(
    features: ArrayLike, name: str, *, min_rows: int = 2, any_scale: bool = False
) -> NDArray[np.floating]:
    """The features as a float32 or float64 array ``[n, d]`` of finite values.

    Half precision is widened to float32, integers to float64; nothing else is changed or copied.

    Args:
        features: ``[n, d]``, one row per image.
        name: how messages call the set, as in "generated".
        min_rows: the fewest rows the metric is defined for.
        any_scale: whether the metric scales rows itself, so that no magnitude is too large.

    Raises:
        UserError: not two-dimensional, not real numbers, too few rows, NaN or infinity, or, but
            for `any_scale`, a largest magnitude beyond 1e15 or below 1e-15, whose squares and
            products would leave float32's range.
    """
    array = np.asarray(features)
    if array.ndim != 2 or array.shape[1] == 0:
        raise UserError(
            f"{name} features: expected an array [images, dimensions], got shape {array.shape}"
        )
    if array.dtype.kind not in "fiu":
        raise UserError(f"{name} features: expected real numbers, got dtype {array.dtype}")
    if len(array) < min_rows:
        raise UserError(
            f"{name} features: {len(array)} row{'s' * (len(array) != 1)}, but this metric needs "
            f"at least {min_rows}; measure more images"
        )
    if array.dtype not in (np.float32, np.float64):
        array = array.astype(np.float32 if array.dtype == np.float16 else np.float64)
    # One pass finds both: a NaN anywhere makes the largest magnitude NaN.
    largest = _largest_magnitude(array)
    if not np.isfinite(largest):
        bad = sum(int((~np.isfinite(block).all(axis=1)).sum()) for block in row_chunks(array))
        raise UserError(
            f"{name} features: {bad} of {len(array)} rows hold NaN or infinity; "
            f"recompute them (half precision overflows in some encoders) or leave them out"
        )
    if not any_scale and largest and not _SMALLEST <= largest <= _LARGEST:
        raise UserError(
            f"{name} features: the largest magnitude is {largest:.3g}, expected {_SMALLEST:g} to "
            f"{_LARGEST:g}; look at what the encoder was given, or scale both sets alike"
        )
    return array


def checked_pair(
    real: ArrayLike,
    generated: ArrayLike,
    *,
    min_rows: int = 2,
    names: tuple[str, str] = ("real", "generated"),
    any_scale: bool = False,
) -> tuple[NDArray[np.floating], NDArray[np.floating]]:
    """Two feature sets ``[n, d]`` and ``[m, d]``, each as `checked_features` leaves it.

    Raises:
        UserError: as `checked_features`, or the two sets differ in dimension.
    """
    first = checked_features(real, names[0], min_rows=min_rows, any_scale=any_scale)
    second = checked_features(generated, names[1], min_rows=min_rows, any_scale=any_scale)
    if first.shape[1] != second.shape[1]:
        raise UserError(
            f"{names[0]} features have {first.shape[1]} dimensions, {names[1]} features "
            f"{second.shape[1]}: compare features of one encoder and one feature definition"
        )
    return first, second


def row_chunks(
    features: NDArray[np.floating], rows: int = CHUNK_ROWS
) -> Iterator[NDArray[np.float64]]:
    """Consecutive blocks of at most `rows` rows, each widened to float64."""
    for start in range(0, len(features), rows):
        yield features[start : start + rows].astype(np.float64)


def constant_features(features: NDArray[np.floating]) -> NDArray[np.bool_]:
    """Which dimensions have a single value in all rows, as a mask ``[d]``."""
    low, high = features[0].copy(), features[0].copy()
    for start in range(0, len(features), CHUNK_ROWS):
        block = features[start : start + CHUNK_ROWS]
        np.minimum(low, block.min(axis=0), out=low)
        np.maximum(high, block.max(axis=0), out=high)
    return np.asarray(low == high)


def row_digests(features: NDArray[np.floating]) -> list[bytes]:
    """A sum of each row ``[n, d]``: equal rows, of whatever float type, have equal sums."""
    return [
        # Adding 0 makes one of both zeros.
        hashlib.blake2b((row + 0.0).tobytes(), digest_size=16).digest()
        for block in row_chunks(features)
        for row in block
    ]


def count_shared(first: NDArray[np.floating], second: NDArray[np.floating]) -> int:
    """How many rows of the second set ``[m, d]`` are equal to some row of the first ``[n, d]``."""
    known = set(row_digests(first))
    return sum(digest in known for digest in row_digests(second))


def random_subset(n: int, size: int, seed: int) -> NDArray[np.int64]:
    """`size` of the indices 0..n-1 without replacement, ascending, int64 ``[size]``.

    numpy's legacy generator draws them, because its stream is frozen for good: the same seed
    names the same subset under every numpy version, and the one that the implementation of
    Jiralerspong et al. (arXiv 2302.04440) draws after ``np.random.seed(seed)``.
    """
    draw = np.random.RandomState(seed).choice(n, size, replace=False)
    return np.sort(draw).astype(np.int64)


def unit_rows(rows: NDArray[np.floating]) -> NDArray[np.float64]:
    """The rows ``[n, d]`` in float64, scaled to length 1; a row of zeros is left as it is."""
    wide = rows.astype(np.float64)
    # Divided by the largest entry first, so that no square over- or underflows.
    for scale in (np.abs(wide).max(axis=1, keepdims=True), None):
        length = np.linalg.norm(wide, axis=1, keepdims=True) if scale is None else scale
        wide /= np.where(length > 0, length, 1.0)
    return wide


def refuse_zero_rows(rows: NDArray[np.floating], name: str) -> None:
    """Refuse rows ``[n, d]`` with one of zeros, which has no direction; `name` is the set's."""
    zeros = int((~rows.any(axis=1)).sum())
    if zeros:
        raise UserError(
            f"{name} features: {zeros} rows are all zeros and have no direction; leave them out, "
            f"or look at what the encoder was given"
        )


def _largest_magnitude(array: NDArray[np.floating]) -> float:
    """NaN where there is one; 0 of no rows."""
    extremes = [0.0]
    for start in range(0, len(array), CHUNK_ROWS):
        block = array[start : start + CHUNK_ROWS]
        extremes += [float(block.max()), -float(block.min())]
    return float(np.max(extremes))
