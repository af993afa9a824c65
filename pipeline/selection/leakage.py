"""What two selections share that they must not: pure functions of arrays.

Ranks, positions and pixels are compared slide by slide with numpy; no Python object per tile.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from common.text import same_identity_key

Ranks = npt.NDArray[np.int32]
Positions = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]

_ROUNDING_PX = 1 / 128
"""Positions are kept in 1/256 level-0 pixel: neighbours may overlap by what that rounds away."""


@dataclass(frozen=True)
class Overlap:
    """Pairs of tiles, as indices int64 [pairs] into the two sets, that cover the same pixels.

    `pixels` are pairs that overlap as they are; `border` are those that overlap only when both
    are enlarged on all sides.
    """

    pixels: tuple[Indices, Indices]
    border: tuple[Indices, Indices]


def find_overlaps(
    x: Positions,
    y: Positions,
    other_x: Positions,
    other_y: Positions,
    size: float,
    border: float = 0.0,
) -> Overlap:
    """Pairs of equal squares [x, x + size) that overlap; all lengths in the same pixels.

    `border` is what an enlarged tile gains on each side.

    >>> place, zero = np.array([0.0, 224.0]), np.zeros(2)
    >>> overlap = find_overlaps(place, zero, place[:1] + 100, zero[:1], 224.0, 16.0)
    >>> list(zip(*(indices.tolist() for indices in overlap.pixels)))
    [(0, 0), (1, 0)]
    """
    reach = size + 2 * border
    i, j = near_pairs(x, y, other_x, other_y, reach)
    distance = np.maximum(np.abs(x[i] - other_x[j]), np.abs(y[i] - other_y[j]))
    inside = distance < size - _ROUNDING_PX
    # Apart as they are, together once both are enlarged.
    rim = ~inside & (distance < reach - _ROUNDING_PX)
    return Overlap((i[inside], j[inside]), (i[rim], j[rim]))


def near_pairs(
    x: Positions, y: Positions, other_x: Positions, other_y: Positions, reach: float
) -> tuple[Indices, Indices]:
    """Indices (i, j), int64, of all pairs with |x_i - x'_j| <= reach, the same in y, and more.

    The others are sorted into square cells of side `reach`; of each point the nine cells around
    it are looked up, three ranges of the sorted keys.
    """
    if not len(x) or not len(other_x):
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    left = min(x.min(), other_x.min())
    top = min(y.min(), other_y.min())
    column, row = _cell_of(x, left, reach), _cell_of(y, top, reach)
    other_column, other_row = _cell_of(other_x, left, reach), _cell_of(other_y, top, reach)
    width = int(max(column.max(), other_column.max())) + 2
    keys = other_row * width + other_column
    order = np.argsort(keys, kind="stable")
    keys = keys[order]
    parts = []
    for above in (-1, 0, 1):
        middle = (row + above) * width + column
        first = np.searchsorted(keys, middle - 1, "left")
        last = np.searchsorted(keys, middle + 1, "right")
        parts.append(_pairs_of_ranges(first, last))
    i = np.concatenate([part[0] for part in parts])
    j = order[np.concatenate([part[1] for part in parts])]
    return i, j


def _cell_of(values: Positions, origin: float, side: float) -> Indices:
    # From 1: the column to the left of the first is a cell, and none of the row above.
    return np.floor((values - origin) / side).astype(np.int64) + 1


def _pairs_of_ranges(first: Indices, last: Indices) -> tuple[Indices, Indices]:
    """(i, k) for every k in [first[i], last[i])."""
    counts = last - first
    i = np.repeat(np.arange(len(counts)), counts)
    within = np.arange(len(i)) - np.repeat(np.cumsum(counts) - counts, counts)
    return i, first[i] + within


def equal_files(
    left: Iterable[str], right: Iterable[str], sums_of: Mapping[str, Sequence[str]]
) -> list[tuple[str, str]]:
    """Pairs of slides of different names, one of either side, whose files have an equal sum.

    `sums_of` gives a slide's checksums, '' where one is unknown; equal ones of the same place
    (md5 with md5) mean equal files.

    >>> equal_files(["a"], ["a", "b"], {"a": ("0F", ""), "b": ("0f", "")})
    [('a', 'b')]
    """

    def sums(slide_id: str) -> set[tuple[int, str]]:
        keys = enumerate(map(same_identity_key, sums_of.get(slide_id, ())))
        return {(place, key) for place, key in keys if key}

    by_sum: dict[tuple[int, str], list[str]] = {}
    for slide_id in sorted(set(left)):
        for key in sums(slide_id):
            by_sum.setdefault(key, []).append(slide_id)
    pairs = {
        (mate, slide_id)
        for slide_id in set(right)
        for key in sums(slide_id)
        for mate in by_sum.get(key, ())
        if mate != slide_id
    }
    return sorted(pairs)
