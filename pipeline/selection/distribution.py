"""How a selection is spread over sites and projects, against its cohort: pure functions."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipeline.selection.allocate import Counts


def jensen_shannon(p: npt.ArrayLike, q: npt.ArrayLike) -> float:
    """Jensen-Shannon divergence of two vectors of counts, in bits: 0 for equal shares, 1 at most.

    JSD = (KL(p | m) + KL(q | m)) / 2 with m = (p + q) / 2 (Lin, 1991). NaN where either is empty.

    >>> jensen_shannon([2, 2], [5, 5]), jensen_shannon([1, 0], [0, 3])
    (0.0, 1.0)
    """
    first, second = np.asarray(p, np.float64), np.asarray(q, np.float64)
    if first.sum() <= 0 or second.sum() <= 0:
        return float("nan")
    first, second = first / first.sum(), second / second.sum()
    middle = (first + second) / 2

    # 0 log 0 is 0: groups that one side does not have add nothing to its part.
    def divergence(share: npt.NDArray[np.float64]) -> float:
        some = share > 0
        return float((share[some] * np.log2(share[some] / middle[some])).sum())

    return max(0.0, (divergence(first) + divergence(second)) / 2)


def sum_by_group(group: npt.NDArray[np.int64], values: npt.ArrayLike, groups: int) -> Counts:
    """Sums int64 [groups] of whole numbers `values` [n] by their group [n]."""
    # Sums of whole numbers below 2^53 are exact in float64.
    return np.bincount(group, np.asarray(values, np.float64), groups).astype(np.int64)


@dataclass(frozen=True)
class Spread:
    """Counts int64 [values] of one column: the cohort's slides and candidates, the selection's."""

    names: tuple[str, ...]
    cohort_slides: Counts
    cohort_tiles: Counts
    slides: Counts
    tiles: Counts

    @property
    def covered(self) -> int:
        """Values with at least one slide selected."""
        return int((self.slides > 0).sum())

    @property
    def jsd_slides(self) -> float:
        """Divergence of the slides' shares from the cohort's, 0 to 1 bit."""
        return jensen_shannon(self.slides, self.cohort_slides)

    @property
    def jsd_tiles(self) -> float:
        """Divergence of the tiles' shares from the cohort's candidates, 0 to 1 bit."""
        return jensen_shannon(self.tiles, self.cohort_tiles)


def measure_spread(values: npt.NDArray[np.str_], candidates: Counts, tiles: Counts) -> Spread:
    """The spread over the distinct `values` [slides] of the cohort's slides.

    `candidates` and `tiles` are int64 [slides]; a slide with tiles is selected.
    """
    names, group = np.unique(values, return_inverse=True)
    cohort_slides, cohort_tiles, slides, selected = (
        sum_by_group(group, weights, len(names))
        for weights in (np.ones(len(values)), candidates, tiles > 0, tiles)
    )
    return Spread(tuple(names.tolist()), cohort_slides, cohort_tiles, slides, selected)
