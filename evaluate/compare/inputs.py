"""What is wrong with the features that are to be compared, found before anything is computed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from common.errors import UserError
from evaluate.compare.sides import Features, FeatureSide, Labels
from evaluate.metrics.features import constant_features, count_shared, row_chunks
from evaluate.metrics.metric import Metric
from pipeline.dataset.features import MOST_FEATURE, FeatureStore

_ROWS_NAMED = 3


@dataclass(frozen=True)
class TileRows:
    """Features ``[n, d]`` with the tile of each row, and the store that they were read from.

    `slides` and `ranks` are ``[n]``; `name` is how messages call the set.
    """

    name: str
    features: Features
    slides: Labels
    ranks: npt.NDArray[np.integer]
    store: FeatureStore

    @classmethod
    def of_side(cls, name: str, side: FeatureSide) -> "TileRows":
        """All rows of one side of a comparison."""
        return cls(name, side.features, side.row_slides, side.selection.ranks, side.store)

    def name_rows(self, rows: npt.NDArray[np.int64]) -> str:
        """Slide, rank and file of the first few of these rows."""
        # A source tile has a row for each image that it guides.
        tiles = list(dict.fromkeys((str(self.slides[row]), int(self.ranks[row])) for row in rows))
        named = "; ".join(
            f"slide {slide}, rank {rank} ({self.store.file_of(slide, rank)})"
            for slide, rank in tiles[:_ROWS_NAMED]
        )
        more = len(tiles) - _ROWS_NAMED
        return f"{named}; and {more:,} more" if more > 0 else named


@dataclass(frozen=True)
class InputFault:
    """Rows of a set (a field of `FeaturePair`) that some metrics cannot be computed from."""

    field: str
    kind: Literal["not_finite", "zero"]
    message: str

    def stops(self, metric: Metric) -> bool:
        """Whether the metric cannot be computed for this fault."""
        if self.kind == "zero" and not metric.reads_directions:
            return False
        return self.field in (*metric.reads, *metric.needs)


def find_faults(sets: Mapping[str, TileRows]) -> list[InputFault]:
    """What is wrong in sets by their field of `FeaturePair`, with each row's slide, rank, file.

    NaN, infinity and magnitudes that no encoder gives (see `MOST_FEATURE`), and rows that are all
    zeros, which none gives for a tile.
    """
    faults = []
    for field, tiles in sets.items():
        # A block at a time: masks of all entries would be a quarter of the features again.
        finite = np.concatenate(
            [np.isfinite(block).all(axis=1) for block in row_chunks(tiles.features)]
        )
        # NaN is within no limit: what is left of these are finite.
        within = np.concatenate(
            [(np.abs(block) <= MOST_FEATURE).all(axis=1) for block in row_chunks(tiles.features)]
        )
        zero = np.concatenate([~block.any(axis=1) for block in row_chunks(tiles.features)])
        for kind, mask, words in (
            ("not_finite", ~finite, "NaN or infinity in"),
            ("not_finite", finite & ~within, f"magnitudes above {MOST_FEATURE:,.0f} in"),
            ("zero", zero, "only zeros in"),
        ):
            rows = np.flatnonzero(mask)
            if len(rows):
                message = (
                    f"{tiles.name} features: {words} {len(rows):,} of {len(mask):,} rows: "
                    f"{tiles.name_rows(rows)}; look at these tiles, leave them out of the "
                    "selection, or cache their features again"
                )
                faults.append(InputFault(field, kind, message))  # type: ignore[arg-type]
    return faults


def stopped_metrics(metrics: Sequence[Metric], faults: Sequence[InputFault]) -> dict[str, str]:
    """The metrics that faults of the inputs keep from being computed, with the reason."""
    reasons = {}
    for metric in metrics:
        stops = [fault.message for fault in faults if fault.stops(metric)]
        if stops:
            reasons[metric.name] = "; ".join(stops)
    return reasons


def check_train(train: FeatureSide, real: FeatureSide) -> None:
    """Refuse to test FLD on tiles that are all training tiles, before anything is computed.

    Tiles count by their features, so that another name, order or copy of a dataset hides nothing.
    Raises `UserError` naming both selections.
    """
    if train.features.shape[1] != real.features.shape[1] or constant_features(real.features).all():
        return  # refused by FLD itself, in other words
    count = len(real.features)
    if count_shared(train.features, real.features) < count:
        return
    sides = [f"'{side.selection.name}' of {side.dataset.root}" for side in (train, real)]
    how = "has every tile of" if len(train.features) > count else "has the very tiles of"
    raise UserError(
        f"--train-selection {sides[0]} {how} --real-selection {sides[1]} ({count:,} tiles), but "
        "FLD is tested on tiles that were not trained on; give a validation selection as "
        "--real-selection, or leave --train-selection out"
    )
