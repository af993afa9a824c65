"""Histograms over the slides, and the slides at their ends."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipeline.report.facts import SlideFacts

_BINS = 24
_FAR = 8.0
_EXTREMES = 4


@dataclass(frozen=True)
class SlideQuantity:
    """What is counted: a key that the page's table knows, words, and how to read it of a slide."""

    key: str
    title: str
    unit: str
    read: Callable[[SlideFacts], float | None]
    is_share: bool = False


QUANTITIES = (
    SlideQuantity("mpp", "Resolution", "µm per pixel at level 0", lambda facts: facts.slide.mpp),
    SlideQuantity("tissue", "Tissue", "mm² per slide",
                  lambda facts: facts.class_mm2.get("tissue", 0.0) if facts.tiles else None),
    SlideQuantity("candidates", "Candidate tiles", "tiles per slide",
                  lambda facts: facts.candidates),
    SlideQuantity("artifact", "Artifacts that refuse tiles", "share of what was found",
                  lambda facts: facts.artifact_share, is_share=True),
    SlideQuantity("out of focus", "Out of focus", "share of what was found",
                  lambda facts: facts.class_share("out of focus"), is_share=True),
)  # fmt: skip


@dataclass(frozen=True)
class Histogram:
    """Slides per bin: `edges` float64 [n + 1], `counts` int64 [n]; `beyond` is above the last."""

    edges: npt.NDArray[np.float64]
    counts: npt.NDArray[np.int64]
    beyond: int


@dataclass(frozen=True)
class Distribution:
    """A quantity's histogram, its median and the slides with the lowest and highest values."""

    quantity: SlideQuantity
    histogram: Histogram
    slides: int
    median: float
    lowest: tuple[tuple[str, float], ...]
    highest: tuple[tuple[str, float], ...]


def make_distributions(slides: Sequence[SlideFacts]) -> list[Distribution]:
    """One distribution per quantity of which any slide has a value."""
    measured = []
    for quantity in QUANTITIES:
        values = [(facts.slide.slide_id, quantity.read(facts)) for facts in slides]
        pairs = [(name, float(x)) for name, x in values if x is not None and np.isfinite(x)]
        if not pairs:
            continue
        ordered = sorted(pairs, key=lambda pair: (pair[1], pair[0]))
        lowest = tuple(ordered[: min(_EXTREMES, len(ordered) // 2)])
        highest = tuple(ordered[::-1][: min(_EXTREMES, len(ordered) - len(lowest))])
        if quantity.is_share:
            # Most slides have none of an artifact: only those with some are of interest.
            lowest, highest = (), tuple(pair for pair in highest if pair[1] > 0)
        array = np.array([value for _, value in pairs])
        bins = make_histogram(array, cut=not quantity.is_share)
        median = float(np.median(array))
        measured.append(Distribution(quantity, bins, len(pairs), median, lowest, highest))
    return measured


def make_histogram(
    values: npt.NDArray[np.float64], bins: int = _BINS, *, cut: bool = True
) -> Histogram:
    """Counts of non-negative `values` [n], n > 0, in bins of one round width.

    With `cut`, the bins end with the largest value up to eight times the median: one slide of an
    unbelievable resolution shall not press all others into one bin. Bins are half open, the last
    one too.
    """
    median = float(np.median(values))
    near = values[values <= _FAR * median] if cut and median > 0 else values
    low, high = float(near.min()), float(near.max())
    # Whole multiples of a round width, or the edges could not be read.
    width = round_step((high - low) / bins if high > low else max(high, 1.0) / bins)
    first = np.floor(low / width + 1e-9)
    count = int(np.floor(high / width + 1e-9) - first) + 1
    edges = (first + np.arange(count + 1)) * width
    place = np.floor(values / width + 1e-9) - first
    inside = place[place < count].astype(np.int64)
    return Histogram(edges, np.bincount(inside, minlength=count), len(values) - len(inside))


def round_step(step: float) -> float:
    """The smallest of 1, 2, 2.5, 5 times a power of ten that is at least `step` (> 0).

    >>> round_step(0.03), round_step(21.0)
    (0.05, 25.0)
    """
    power = 10.0 ** np.floor(np.log10(step))
    return next(
        float(m * power) for m in (1.0, 2.0, 2.5, 5.0, 10.0) if m * power >= step * (1 - 1e-9)
    )
