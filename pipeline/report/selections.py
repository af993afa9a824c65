"""A selection against the cohort that it was drawn from: shares by project and by site."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipeline.dataset import Dataset, read_selection
from pipeline.selection.distribution import jensen_shannon, sum_by_group

GROUPS = ("project", "site")


@dataclass(frozen=True)
class SelectionFacts:
    """A selection: tiles per slide, counted in its file, and what its plan says."""

    name: str
    tiles_by_slide: Mapping[str, int]
    plan: Mapping[str, object]

    @property
    def tiles(self) -> int:
        """Selected tiles in all."""
        return sum(self.tiles_by_slide.values())


@dataclass(frozen=True)
class Shares:
    """How tiles are divided among groups, in the cohort and in a selection.

    `cohort` and `selected` are tiles per group, int64 [groups], the cohort's largest first.
    """

    names: tuple[str, ...]
    cohort: npt.NDArray[np.int64]
    selected: npt.NDArray[np.int64]

    @property
    def cohort_share(self) -> npt.NDArray[np.float64]:
        """The cohort's tiles as parts of one, float64 [groups]."""
        return self.cohort / max(1, int(self.cohort.sum()))

    @property
    def selected_share(self) -> npt.NDArray[np.float64]:
        """The selection's tiles as parts of one, float64 [groups]."""
        return self.selected / max(1, int(self.selected.sum()))

    @property
    def divergence_bits(self) -> float:
        """Jensen-Shannon divergence of the two, 0 to 1 bit; NaN where either is empty."""
        return jensen_shannon(self.cohort, self.selected)


@dataclass(frozen=True)
class Shortfall:
    """A stratum that gave a whole tile less than its quota, or lower."""

    name: str
    quota: float
    selected: int
    candidates: int


def read_selections(dataset: Dataset) -> list[SelectionFacts]:
    """All selections of the dataset, by name."""
    selections = []
    for name in dataset.selection_names():
        selection = read_selection(dataset, name)
        counts = np.diff(selection.offsets).tolist()
        by_slide = dict(zip(selection.slide_ids, counts, strict=True))
        selections.append(SelectionFacts(name, by_slide, selection.plan))
    return selections


def compare_shares(groups: Sequence[str], cohort: Sequence[int], selected: Sequence[int]) -> Shares:
    """Tiles per group, int64, from tiles per slide; the sequences run over the slides."""
    names, group = np.unique(np.array([*groups], dtype=object).astype(str), return_inverse=True)
    of_cohort, of_selected = (sum_by_group(group, n, len(names)) for n in (cohort, selected))
    kept = np.flatnonzero((of_cohort > 0) | (of_selected > 0))
    order = kept[np.lexsort((names[kept], -of_selected[kept], -of_cohort[kept]))]
    return Shares(tuple(names[order].tolist()), of_cohort[order], of_selected[order])


def list_shortfalls(plan: Mapping[str, object]) -> list[Shortfall]:
    """Strata of a plan at least one tile below their quota, the furthest below first.

    Rows of the plan that do not have the expected keys and numbers are passed over.
    """
    rows = plan.get("strata")
    # Plans come from older releases and other tools too.
    below = []
    for row in rows if isinstance(rows, list) else ():
        try:
            stratum = Shortfall(
                str(row["name"]), float(row["quota"]), int(row["selected"]), int(row["candidates"])
            )
        except (KeyError, TypeError, ValueError):
            continue
        if stratum.quota - stratum.selected >= 1:
            below.append(stratum)
    return sorted(below, key=lambda stratum: (stratum.selected - stratum.quota, stratum.name))
