"""A budget of tiles divided among strata and slides, and the ranks it takes: pure functions."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from pipeline.dataset.grid import RESERVE_PER_CANDIDATES
from pipeline.selection.allocate import sainte_lague

Counts = npt.NDArray[np.int64]
Ranks = npt.NDArray[np.int32]

POOLS = ("train", "reserve", "all")
SHARES = ("tiles", "slides")


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
    """Tiles a slide (`counts`, in the cohort's order), and the table of strata by name."""

    counts: Counts
    strata: tuple[Stratum, ...]

    @property
    def below_quota(self) -> list[Stratum]:
        """Strata that give a tile or more less than their share, for want of candidates."""
        return [one for one in self.strata if one.quota - one.selected >= 1]

    @property
    def largest_deviation(self) -> float:
        """The largest |share - wanted share| of a stratum that had the candidates; 0 to 1."""
        total = max(1, sum(one.selected for one in self.strata))
        able = [one for one in self.strata if one.capacity >= one.quota]
        return max((abs(one.selected - one.quota) / total for one in able), default=0.0)


def reserve_sizes(candidates: Counts) -> Counts:
    """Validation reserve of slides with that many candidates."""
    return -(-candidates // RESERVE_PER_CANDIDATES)


def pool_bounds(candidates: Counts, pool: str) -> tuple[Counts, Counts]:
    """The half-open range of ranks [first, stop) that a pool takes of each slide."""
    reserve, nothing = reserve_sizes(candidates), np.zeros_like(candidates)
    return {
        "train": (reserve, candidates),
        "reserve": (nothing, reserve),
        "all": (nothing, candidates),
    }[pool]


def divide(
    strata: npt.NDArray[np.str_], candidates: Counts, capacities: Counts, budget: int, share: str
) -> Division:
    """Tiles a slide: the budget among strata by their share, then evenly over their slides.

    Both by Sainte-Laguë with capacities, ties to the lower name: what a small stratum or slide
    cannot give goes to the others by the same rule. A stratum's share is that of its candidates,
    or of its slides where `share` is `slides`. Slides are to come in the order of slide_id.
    Raises `UserError` with the largest possible budget where this one cannot be met.
    """
    names, group = np.unique(strata, return_inverse=True)
    ones = np.ones(len(candidates), np.int64)
    limits, offered = _sum(group, capacities, names), _sum(group, candidates, names)
    slides = _sum(group, ones, names)
    weights = offered if share == "tiles" else slides
    seats = sainte_lague(weights, limits, budget)
    counts = np.zeros(len(candidates), np.int64)
    order = np.argsort(group, kind="stable")
    for members, given in zip(np.split(order, np.cumsum(slides)[:-1]), seats, strict=True):
        counts[members] = sainte_lague(ones[members], capacities[members], int(given))
    total = max(1, int(weights.sum()))
    table = tuple(
        Stratum(
            str(name), int(slides[i]), int(offered[i]), int(limits[i]),
            budget * int(weights[i]) / total, int(seats[i]),
        )
        for i, name in enumerate(names)
    )  # fmt: skip
    return Division(counts, table)


def _sum(group: npt.NDArray[np.int64], values: Counts, names: npt.NDArray[np.str_]) -> Counts:
    # Whole numbers below 2^53 add exactly in float64.
    return np.bincount(group, values, len(names)).astype(np.int64)


class Source(Protocol):
    """Where the tiles of a selection come from, slide by slide of a cohort."""

    @property
    def capacities(self) -> Counts:
        """Tiles that each slide can give."""

    def take(self, index: int, count: int) -> Ranks:
        """The slide's lowest `count` ranks, ascending; `count` is within its capacity."""


class PoolSource:
    """Ranks [first, stop) of each slide without the denied ones (ascending, by slide index)."""

    def __init__(self, first: Counts, stop: Counts, denied: Mapping[int, Ranks]) -> None:
        self._first, self._stop, self._denied = first, stop, denied
        self._capacities = stop - first
        for index, ranks in denied.items():
            low, high = np.searchsorted(ranks, [first[index], stop[index]])
            self._capacities[index] -= high - low

    @property
    def capacities(self) -> Counts:
        """Tiles that each slide can give."""
        return self._capacities

    def take(self, index: int, count: int) -> Ranks:
        """The slide's lowest free ranks."""
        first = int(self._first[index])
        denied = self._denied.get(index)
        if denied is None:
            return np.arange(first, first + count, dtype=np.int32)
        return _without(np.arange(first, int(self._stop[index]), dtype=np.int32), denied)[:count]


class RowSource:
    """The rows of another selection (offsets and ranks over the same slides), less the denied."""

    def __init__(self, offsets: Counts, ranks: Ranks, denied: Mapping[int, Ranks]) -> None:
        self._offsets, self._ranks, self._denied = offsets, ranks, denied
        self._capacities = np.diff(offsets)
        for index in denied:
            self._capacities[index] = len(self._free(index))

    def _free(self, index: int) -> Ranks:
        ranks = self._ranks[self._offsets[index] : self._offsets[index + 1]]
        return _without(ranks, self._denied[index]) if index in self._denied else ranks

    @property
    def capacities(self) -> Counts:
        """Tiles that each slide can give."""
        return self._capacities

    def take(self, index: int, count: int) -> Ranks:
        """The slide's lowest rows that are not denied."""
        return self._free(index)[:count]


def _without(ranks: Ranks, denied: Ranks) -> Ranks:
    return ranks[~np.isin(ranks, denied, assume_unique=True)]


def draw(source: Source, counts: Counts) -> tuple[Counts, Ranks]:
    """Each slide's `counts` tiles of the source.

    Returns offsets int64 [slides + 1] and ranks int32, laid out as a `Selection` has them.
    """
    offsets = np.zeros(len(counts) + 1, np.int64)
    np.cumsum(counts, out=offsets[1:])
    ranks = np.empty(int(offsets[-1]), np.int32)
    for index in np.flatnonzero(counts).tolist():
        ranks[offsets[index] : offsets[index + 1]] = source.take(index, int(counts[index]))
    return offsets, ranks


def deal(
    strata: npt.NDArray[np.str_], offsets: Counts, ranks: Ranks, sets: int
) -> list[tuple[Counts, Ranks]]:
    """The rows dealt one by one to so many disjoint sets of equal size (to a row).

    Cards are dealt in the order of (stratum, slide, rank), so that every slide and every stratum
    is shared evenly, to a row. Offsets and ranks as from `draw`.
    """
    sizes = np.diff(offsets)
    start = np.zeros(len(sizes), np.int64)
    order = np.argsort(strata, kind="stable")
    start[order] = np.concatenate([[0], np.cumsum(sizes[order])])[:-1]
    within = np.arange(len(ranks)) - np.repeat(offsets[:-1], sizes)
    owner = (np.repeat(start, sizes) + within) % sets
    slide = np.repeat(np.arange(len(sizes)), sizes)
    dealt = []
    for one in range(sets):
        mine = owner == one
        own = np.zeros(len(offsets), np.int64)
        np.cumsum(np.bincount(slide[mine], minlength=len(sizes)), out=own[1:])
        dealt.append((own, ranks[mine]))
    return dealt
