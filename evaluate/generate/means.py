"""The mean feature of a selection, or of each of its slides, as guidance."""

from typing import Literal

import numpy as np
import numpy.typing as npt

from evaluate.generate.conditions import Condition, ConditionGuidance
from evaluate.generate.guidance import GUIDING_MARK, SelectionGuidance, guiding_mark

MeanOver = Literal["all", "slide"]


def mean_guidance(selection: SelectionGuidance, over: MeanOver) -> ConditionGuidance:
    """One condition for the whole selection ("all"), or one for each of its slides ("slide").

    Features are read a slide at a time and summed in float64: memory does not grow with the
    selection.
    """
    sums = _slide_sums(selection)
    if over == "slide":
        conditions = [
            Condition(f"mean of {count:,} tiles of {slide_id}", (), _mean(total, count))
            for slide_id, (total, count) in sums.items()
        ]
    else:
        total = np.sum([one for one, _ in sums.values()], axis=0)
        count = sum(count for _, count in sums.values())
        conditions = [Condition(f"mean of {count:,} tiles", (), _mean(total, count))]
    return ConditionGuidance(
        selection.name,
        conditions,
        (),
        record=selection.encoder_record,
        tile_px=selection.tile_px,
        mpp=selection.mpp,
        what={
            "guidance": f"mean of {over}",
            "guidance_selection_sha256": selection.selection.content_hash,
            GUIDING_MARK: guiding_mark(selection.dataset),
        },
    )


def _slide_sums(
    selection: SelectionGuidance,
) -> dict[str, tuple[npt.NDArray[np.float64], int]]:
    found = {}
    for slide_id, ranks in selection.selection.items():
        if len(ranks):
            rows = selection.store.read(slide_id, ranks)
            found[slide_id] = (rows.sum(axis=0, dtype=np.float64), len(ranks))
    return found


def _mean(total: npt.NDArray[np.float64], count: int) -> npt.NDArray[np.float32]:
    return (total / count).astype(np.float32)
