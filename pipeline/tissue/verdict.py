"""Which tiles of the grid are kept, and why the others are not."""

from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import numpy.typing as npt

from pipeline.dataset.grid import window_means
from pipeline.tissue.classes import CLASS_NAMES, TissueClass

_FAINT_TISSUE = 0.01


class Verdict(IntEnum):
    """What became of a tile (uint8); artifacts have the values of their `TissueClass`."""

    NO_TISSUE = 0
    KEPT = 1
    PEN = 2
    OUT_OF_FOCUS = 3
    FOLD = 4
    OTHER = 5
    LITTLE_TISSUE = 6


VERDICT_NAMES = {
    Verdict.NO_TISSUE: "no tissue",
    Verdict.KEPT: "kept",
    Verdict.LITTLE_TISSUE: "little tissue",
    **{Verdict(c): name for c, name in CLASS_NAMES.items() if c > TissueClass.TISSUE},
}


@dataclass(frozen=True)
class Judgement:
    """Per tile: tissue and artifact fractions float32 from 0 to 1, and a `Verdict` uint8; [n]."""

    tissue: npt.NDArray[np.float32]
    artifact: npt.NDArray[np.float32]
    verdict: npt.NDArray[np.uint8]

    @property
    def kept(self) -> npt.NDArray[np.bool_]:
        """The tiles that become candidates, bool [n]."""
        return self.verdict == Verdict.KEPT

    def count_verdicts(self) -> dict[str, int]:
        """Tiles by verdict, those that occur."""
        numbers = np.bincount(self.verdict, minlength=len(Verdict))
        return {VERDICT_NAMES[v]: int(numbers[v]) for v in Verdict if numbers[v]}


def judge_tiles(
    mask: npt.NDArray[np.uint8],
    x: npt.NDArray[np.float64],
    y: npt.NDArray[np.float64],
    size: float,
    *,
    min_tissue: float,
    max_artifact: float,
    experimental: AbstractSet[TissueClass] = frozenset(),
) -> Judgement:
    """Judge tiles at (x, y) of `size` pixels of `mask` (`TissueClass` values, uint8 [h, w]).

    Kept is a tile with at least `min_tissue` tissue and at most `max_artifact` of all artifacts
    together. A tile with too much of them is named after the largest, any other after its lack
    of tissue. Classes in `experimental` count as tissue: no tile is refused for them.
    """
    counted = [TissueClass.TISSUE, *sorted(experimental)]
    artifacts = [c for c in TissueClass if c > TissueClass.TISSUE and c not in experimental]
    tissue = _class_shares(mask, counted, x, y, size)
    artifact = _class_shares(mask, artifacts, x, y, size)
    # Little tissue and none are told apart, so that the overlay shows what a threshold costs.
    verdict = np.where(tissue >= _FAINT_TISSUE, Verdict.LITTLE_TISSUE, Verdict.NO_TISSUE)
    verdict[(tissue >= min_tissue) & (artifact <= max_artifact)] = Verdict.KEPT
    spoiled = artifact > max_artifact
    if spoiled.any():
        # Named after the largest of its artifacts.
        x, y = x[spoiled], y[spoiled]
        shares = np.stack([_class_shares(mask, [value], x, y, size) for value in artifacts])
        verdict[spoiled] = np.array(artifacts)[shares.argmax(0)]
    return Judgement(tissue, artifact, verdict.astype(np.uint8))


def _class_shares(
    mask: npt.NDArray[np.uint8],
    classes: list[TissueClass],
    x: npt.NDArray[np.float64],
    y: npt.NDArray[np.float64],
    size: float,
) -> npt.NDArray[np.float32]:
    chosen = np.isin(mask, [int(value) for value in classes])
    if not chosen.any():
        return np.zeros(len(x), np.float32)
    return window_means(chosen.astype(np.float32), x, y, size)
