"""The mean feature of a selection, or of each of its slides, as conditions."""

from typing import Literal

import numpy as np

from evaluate.generate.condition_source import SelectionConditions
from evaluate.generate.conditions import Condition, ConditionList

MeanOver = Literal["all", "slide"]


def mean_conditions(selection: SelectionConditions, over: MeanOver) -> ConditionList:
    """One condition for the whole selection ("all"), or one for each of its slides ("slide").

    Features are read slide by slide and summed in float64: memory does not grow with the
    selection.
    """
    sums = {
        slide_id: selection.store.read(slide_id, ranks).sum(axis=0, dtype=np.float64)
        for slide_id, ranks in selection.selection.items()
        if len(ranks)
    }
    # The overall mean weighs tiles, not slides, equally.
    counts = {slide_id: len(ranks) for slide_id, ranks in selection.selection.items()}
    parts = [(f" of {slide}", total, counts[slide]) for slide, total in sums.items()]
    if over == "all":
        parts = [("", np.sum(list(sums.values()), axis=0), sum(counts.values()))]
    return ConditionList(
        selection.name,
        [
            Condition(f"mean of {count:,} tiles{of}", (), (total / count).astype(np.float32))
            for of, total, count in parts
        ],
        (),
        record=selection.encoder_record,
        tile_px=selection.tile_px,
        mpp=selection.mpp,
        how=selection.tile_identity(f"mean of {over}"),
        terms=selection.terms(),
    )
