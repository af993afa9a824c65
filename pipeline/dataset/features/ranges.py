"""Whether features are numbers that an encoder gives: finite, and of a magnitude that can be."""

import numpy as np
import numpy.typing as npt

MOST_FEATURE = 1e4
"""The largest magnitude of a CLS or patch token. Every encoder ends in a layer norm, after which a
value is at most sqrt(d) times its learnt scale, of which the largest here is about 10: some 400 for
d = 1,536. float16, in which tokens are stored, ends at 65,504."""

_MOST_HALF_BITS = int(np.float16(MOST_FEATURE).view(np.uint16))
_SIGN = 0x8000


def are_in_range(values: npt.NDArray[np.floating]) -> bool:
    """Whether all of the values [...] are finite and within `MOST_FEATURE`.

    One or two passes at the speed of memory, without a copy (docs/performance/features.md).
    """
    if not values.size:
        return True
    if values.dtype == np.float16 and values.flags.c_contiguous:
        # The bits of positive halves are in their order, as are those of negative ones behind the
        # sign: integers are compared many times faster than halves.
        bits = values.view(np.uint16)
        largest_negative = int(bits.max()) - _SIGN
        largest_positive = int(bits.view(np.int16).max())
        return max(largest_negative, largest_positive) <= _MOST_HALF_BITS
    if values.flags.c_contiguous:
        flat = values.reshape(-1)
        # A sum of squares within the square of the limit has no value beyond it, and is the
        # fastest thing to compute; NaN is within nothing.
        with np.errstate(over="ignore", invalid="ignore"):
            if float(np.dot(flat, flat)) <= MOST_FEATURE**2:
                return True
    # min and max are NaN where any value is, and NaN is within nothing.
    return bool(values.max() <= MOST_FEATURE and values.min() >= -MOST_FEATURE)


def find_outside(values: npt.NDArray[np.floating]) -> tuple[int, float] | None:
    """The first row of values [n, ...] that no encoder gives, and its worst value; None for none.

    >>> find_outside(np.array([[0.5, -2.0], [1e30, 1.0]], np.float32))
    (1, 1.0000000150474662e+30)
    """
    if are_in_range(values):
        return None
    rows = np.asarray(values, np.float64).reshape(len(values), -1)
    magnitudes = np.abs(rows)
    # NaN is sorted last: worse than any number.
    bad = ~(magnitudes <= MOST_FEATURE).all(axis=1)
    row = int(np.argmax(bad))
    worst = int(np.argmax(np.where(np.isnan(magnitudes[row]), np.inf, magnitudes[row])))
    return row, float(rows[row, worst])
