"""The tile grid and its rank order: pure functions of numbers, tested on properties.

Rank order is part of the dataset contract and never changes: golden values are in the tests.
"""

import hashlib

import numpy as np
import numpy.typing as npt

RESERVE_PER_CANDIDATES = 500
"""The first ceil(n / 500) ranks of a slide are its validation reserve, never trained on."""

COORDINATE_UNITS = 256
"""Positions are kept in 1/256 level-0 pixel: sub-pixel strides neither overlap nor gap."""

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


def grid_positions(
    width: int, height: int, stride: float, window: float
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Upper left corners (x, y), level-0 pixels, of tiles wholly inside width x height.

    `stride` and `window` are in level-0 pixels; positions are multiples of the stride rounded to
    1/256 px, row by row. Tiles that would reach over the edge are not taken.
    """
    # Rounded once, from the exact multiple, so that errors do not add up along a row.
    columns = _count_positions(width, stride, window)
    rows = _count_positions(height, stride, window)
    x = np.rint(np.arange(columns) * stride * COORDINATE_UNITS) / COORDINATE_UNITS
    y = np.rint(np.arange(rows) * stride * COORDINATE_UNITS) / COORDINATE_UNITS
    return np.tile(x, rows), np.repeat(y, columns)


def _count_positions(length: int, stride: float, window: float) -> int:
    # Half a 1/256 pixel of slack, so that rounding does not lose a tile that ends at the edge.
    return max(0, int((length - window + 0.5 / COORDINATE_UNITS) // stride) + 1)


def window_means(
    mask: npt.NDArray[np.floating],
    x: npt.NDArray[np.float64],
    y: npt.NDArray[np.float64],
    size: float,
) -> npt.NDArray[np.float32]:
    """Mean of `mask` [h, w] over windows [x, x+size) x [y, y+size), in (sub)pixels of the mask.

    Exact for fractional edges: the integral image is linear between pixel corners along each
    axis. Windows may reach over the edge; what is outside counts as zero.
    """
    # Four corners of the integral image give the sum over a window, whatever its size.
    integral = np.zeros((mask.shape[0] + 1, mask.shape[1] + 1))
    np.cumsum(np.cumsum(mask, 0, dtype=np.float64), 1, out=integral[1:, 1:])
    total = (
        _sample_bilinear(integral, x + size, y + size)
        - _sample_bilinear(integral, x, y + size)
        - _sample_bilinear(integral, x + size, y)
        + _sample_bilinear(integral, x, y)
    )
    return (total / (size * size)).astype(np.float32)


def _sample_bilinear(
    table: npt.NDArray[np.float64], x: npt.NDArray[np.float64], y: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    # At the far edge the cell before it, so that all four corners exist.
    x = np.clip(x, 0, table.shape[1] - 1)
    y = np.clip(y, 0, table.shape[0] - 1)
    left = np.minimum(x.astype(np.int64), table.shape[1] - 2)
    top = np.minimum(y.astype(np.int64), table.shape[0] - 2)
    dx, dy = x - left, y - top
    upper = table[top, left] * (1 - dx) + table[top, left + 1] * dx
    lower = table[top + 1, left] * (1 - dx) + table[top + 1, left + 1] * dx
    return np.asarray(upper * (1 - dy) + lower * dy)


def rank_keys(
    seed: int, slide_id: str, x: npt.NDArray[np.float64], y: npt.NDArray[np.float64]
) -> npt.NDArray[np.uint64]:
    """64-bit keys of tile positions; a slide's candidates are ordered by them.

    The slide's key is the first 8 bytes (little endian) of BLAKE2b of "<seed>\\0<slide_id>"; a
    tile's key is mix(mix(slide + X * g) + Y * g), where X and Y are positions in 1/256 level-0
    pixel, g = 0x9E3779B97F4A7C15 and mix is the SplitMix64 finaliser (Steele, Lea and Flood,
    2014), all modulo 2^64.
    """
    text = f"{seed}\0{slide_id}".encode()
    slide = np.uint64(int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little"))
    # Whole numbers, so that keys are equal on every machine.
    column = np.rint(x * COORDINATE_UNITS).astype(np.int64).astype(np.uint64)
    row = np.rint(y * COORDINATE_UNITS).astype(np.int64).astype(np.uint64)
    return _mix_bits(_mix_bits(slide + column * _GOLDEN) + row * _GOLDEN)


def _mix_bits(value: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    value = (value ^ (value >> np.uint64(30))) * _MIX_1
    value = (value ^ (value >> np.uint64(27))) * _MIX_2
    return value ^ (value >> np.uint64(31))


def rank_order(
    seed: int, slide_id: str, x: npt.NDArray[np.float64], y: npt.NDArray[np.float64]
) -> npt.NDArray[np.int64]:
    """Indices int64 [n] of the candidates in rank order: by key, ties by (y, x).

    `x` and `y`, float64 [n], are in level-0 px.
    """
    return np.lexsort((x, y, rank_keys(seed, slide_id, x, y)))


def reserve_size(candidates: int) -> int:
    """Tiles in the validation reserve of a slide with that many candidates: 0.2 %, rounded up.

    >>> reserve_size(0), reserve_size(1), reserve_size(501)
    (0, 1, 2)
    """
    return -(-candidates // RESERVE_PER_CANDIDATES)
