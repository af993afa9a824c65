"""A budget of tiles divided among strata and slides, and the ranks it takes: pure functions."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from pipeline.dataset.grid import RESERVE_PER_CANDIDATES
from pipeline.selection.allocate import Counts, sainte_lague
from pipeline.selection.distribution import sum_by_group

Ranks = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Stratum:
    """A site or project: its slides and candidates, the tiles it could give, should and does."""

    name: str
    slides: int
    candidates: int
    capacity: int
    quota: float
    selected: int


@dataclass(frozen=True)
class Division:
    """Tiles per slide (`counts` int64 [slides], in the cohort's order), and the strata by name."""

    counts: Counts
    strata: tuple[Stratum, ...]

    @property
    def below_quota(self) -> list[Stratum]:
        """Strata that give a tile or more less than their share, for want of candidates."""
        return [stratum for stratum in self.strata if stratum.quota - stratum.selected >= 1]

    @property
    def largest_deviation(self) -> float:
        """The largest |share - wanted share| of a stratum that had the candidates; 0 to 1."""
        total = max(1, sum(stratum.selected for stratum in self.strata))
        able = [stratum for stratum in self.strata if stratum.capacity >= stratum.quota]
        return max((abs(s.selected - s.quota) / total for s in able), default=0.0)


def pool_bounds(candidates: Counts, pool: str) -> tuple[Counts, Counts]:
    """The half-open range of ranks [first, stop) that a pool takes of each slide.

    >>> first, stop = pool_bounds(np.array([1000, 3]), "reserve")
    >>> first.tolist(), stop.tolist()
    ([0, 0], [2, 1])
    """
    reserve, nothing = -(-candidates // RESERVE_PER_CANDIDATES), np.zeros_like(candidates)
    return {
        "train": (reserve, candidates),
        "reserve": (nothing, reserve),
        "all": (nothing, candidates),
    }[pool]


def divide_budget(
    strata: npt.NDArray[np.str_], candidates: Counts, capacities: Counts, budget: int, share: str
) -> Division:
    """Tiles per slide: the budget among strata by their share, then evenly over their slides.

    Both by Sainte-Laguë with capacities, ties to the lower name: what a small stratum or slide
    cannot give goes to the others by the same rule. A stratum's share is that of its candidates
    (`share` is `tiles`) or of its slides (`slides`). The arrays [slides] are in the order of
    slide_id. Raises `UserError` with the largest possible budget where this one cannot be met.
    """
    # Sorted names and slides: ties in Sainte-Laguë are then broken by name, not by row.
    names, group = np.unique(strata, return_inverse=True)
    ones = np.ones(len(candidates), np.int64)
    limits, offered, slides = (
        sum_by_group(group, values, len(names)) for values in (capacities, candidates, ones)
    )
    weights = offered if share == "tiles" else slides
    seats = sainte_lague(weights, limits, budget)
    counts = np.zeros(len(candidates), np.int64)
    order = np.argsort(group, kind="stable")
    for members, tiles in zip(np.split(order, np.cumsum(slides)[:-1]), seats, strict=True):
        counts[members] = sainte_lague(ones[members], capacities[members], int(tiles))
    total = max(1, int(weights.sum()))
    table = tuple(
        Stratum(
            str(name), int(slides[i]), int(offered[i]), int(limits[i]),
            budget * int(weights[i]) / total, int(seats[i]),
        )
        for i, name in enumerate(names)
    )  # fmt: skip
    return Division(counts, table)


class TilePool(Protocol):
    """Where the tiles of a selection come from, slide by slide of a cohort."""

    @property
    def capacities(self) -> Counts:
        """Tiles that each slide can give, int64 [slides]."""

    def lowest_ranks(self, index: int, count: int) -> Ranks:
        """The slide's lowest `count` ranks, int32, ascending; `count` is within its capacity."""


class RangePool:
    """Ranks [first, stop) of each slide without the denied ones (ascending, by slide index)."""

    def __init__(self, first: Counts, stop: Counts, denied: Mapping[int, Ranks]) -> None:
        self._first, self._stop, self._denied = first, stop, denied
        self.capacities = stop - first
        for index, ranks in denied.items():
            low, high = np.searchsorted(ranks, [first[index], stop[index]])
            self.capacities[index] -= high - low

    def lowest_ranks(self, index: int, count: int) -> Ranks:
        """The slide's lowest `count` ranks that are not denied, int32."""
        first, denied = int(self._first[index]), self._denied.get(index)
        # Most slides have no denied rank: nothing to look up.
        stop = first + count if denied is None else int(self._stop[index])
        return _without_denied(np.arange(first, stop, dtype=np.int32), denied)[:count]


class SelectionPool:
    """The rows of another selection (offsets and ranks over the same slides), less the denied."""

    def __init__(self, offsets: Counts, ranks: Ranks, denied: Mapping[int, Ranks]) -> None:
        self._offsets, self._ranks, self._denied = offsets, ranks, denied
        self.capacities = np.diff(offsets)
        for index in denied:
            self.capacities[index] = len(self._allowed_ranks(index))

    def _allowed_ranks(self, index: int) -> Ranks:
        ranks = self._ranks[self._offsets[index] : self._offsets[index + 1]]
        return _without_denied(ranks, self._denied.get(index))

    def lowest_ranks(self, index: int, count: int) -> Ranks:
        """The slide's lowest `count` rows that are not denied, int32."""
        return self._allowed_ranks(index)[:count]


def _without_denied(ranks: Ranks, denied: Ranks | None) -> Ranks:
    return ranks if denied is None else ranks[~np.isin(ranks, denied, assume_unique=True)]


def draw_ranks(pool: TilePool, counts: Counts) -> tuple[Counts, Ranks]:
    """Each slide's `counts` lowest ranks of the pool.

    Returns offsets int64 [slides + 1] and ranks int32, laid out as in a `Selection`.

    >>> pool = RangePool(np.array([1, 0]), np.array([9, 4]), {0: np.array([2], np.int32)})
    >>> offsets, ranks = draw_ranks(pool, np.array([3, 1]))
    >>> offsets.tolist(), ranks.tolist()
    ([0, 3, 4], [1, 3, 4, 0])
    """
    offsets = np.zeros(len(counts) + 1, np.int64)
    np.cumsum(counts, out=offsets[1:])
    ranks = np.empty(int(offsets[-1]), np.int32)
    for index in np.flatnonzero(counts).tolist():
        drawn = pool.lowest_ranks(index, int(counts[index]))
        ranks[offsets[index] : offsets[index + 1]] = drawn
    return offsets, ranks


def split_rows(
    strata: npt.NDArray[np.str_], offsets: Counts, ranks: Ranks, sets: int
) -> list[tuple[Counts, Ranks]]:
    """The rows split into that many disjoint sets whose sizes differ by a row at most.

    Rows go round the sets in the order of (stratum, slide, rank), so that every slide and every
    stratum is shared evenly, to a row. Offsets and ranks as from `draw_ranks`.

    >>> offsets, ranks = np.array([0, 3, 4]), np.array([1, 3, 4, 0], np.int32)
    >>> [part.tolist() for _, part in split_rows(np.array(["a", "a"]), offsets, ranks, 2)]
    [[1, 4], [3, 0]]
    """
    sizes = np.diff(offsets)
    start = np.zeros(len(sizes), np.int64)
    order = np.argsort(strata, kind="stable")
    start[order] = np.concatenate([[0], np.cumsum(sizes[order])])[:-1]
    within = np.arange(len(ranks)) - np.repeat(offsets[:-1], sizes)
    owner = (np.repeat(start, sizes) + within) % sets
    slide = np.repeat(np.arange(len(sizes)), sizes)
    parts = []
    for number in range(sets):
        rows = owner == number
        part_offsets = np.zeros(len(offsets), np.int64)
        np.cumsum(np.bincount(slide[rows], minlength=len(sizes)), out=part_offsets[1:])
        parts.append((part_offsets, ranks[rows]))
    return parts
