"""Conditions made of tiles: each tile alone, their mean, or points between two of them.

Pure functions of feature arrays, and the guidance that they become.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from common.errors import UserError
from evaluate.generate.guidance import Sources
from pipeline.dataset import encode_png

Kind = Literal["slerp", "lerp"]
KINDS: tuple[str, ...] = get_args(Kind)
FACTORS = (0.2, 0.4, 0.6, 0.8)
"""Those of the CytoSyn report's Figure 3 (arXiv 2603.18089)."""
CONDITIONS_FILE = "conditions.json"
_PARALLEL = 1e-6
"""Below this angle, in radians, the arc is taken for its chord: sin(angle) would divide."""

Features = npt.NDArray[np.float32]


def interpolate(first: Features, second: Features, factor: float, kind: Kind) -> Features:
    """The feature [d] a `factor` of the way from `first` (0) to `second` (1).

    "lerp" is the straight line. "slerp" weighs both by their angle (Shoemake 1985,
    doi:10.1145/325165.325242), so that vectors of one norm keep it. Computed in float64.
    Raises `UserError` for a factor outside [0, 1] and for slerp between opposite vectors or from
    a zero one, where the way is not defined.
    """
    if not 0 <= factor <= 1:
        raise UserError(f"--factors: {factor} lies outside [0, 1]")
    a, b = first.astype(np.float64), second.astype(np.float64)
    weights = (1 - factor, factor) if kind == "lerp" else _arc_weights(a, b, factor)
    return (weights[0] * a + weights[1] * b).astype(np.float32)


def _arc_weights(
    a: npt.NDArray[np.float64], b: npt.NDArray[np.float64], factor: float
) -> tuple[float, float]:
    norms = np.linalg.norm(a), np.linalg.norm(b)
    if min(norms) == 0:
        raise UserError("--kind slerp: a feature is zero and has no direction; use --kind lerp")
    a, b = a / norms[0], b / norms[1]
    # Kahan's angle: exact also where the cosine is nearly 1 or -1.
    angle = 2 * np.arctan2(np.linalg.norm(a - b), np.linalg.norm(a + b))
    if angle < _PARALLEL:
        return 1 - factor, factor
    if np.pi - angle < _PARALLEL:
        raise UserError("--kind slerp: the two features are opposite, there is no shortest arc")
    return float(np.sin((1 - factor) * angle) / np.sin(angle)), float(
        np.sin(factor * angle) / np.sin(angle)
    )


@dataclass(frozen=True)
class Reference:
    """A real tile that guides: what it is called, its pixels where they are at hand, its feature.

    `source` is (slide_id, rank) of a tile of a dataset.
    """

    name: str
    tile: npt.NDArray[np.uint8] | None
    feature: Features
    source: tuple[str, int] | None = None

    def sha256(self) -> str:
        """The sum of what guides: the pixels, or the feature where it came from a cache."""
        data = self.feature if self.source or self.tile is None else self.tile
        return hashlib.sha256(np.ascontiguousarray(data).tobytes()).hexdigest()


@dataclass(frozen=True)
class Condition:
    """What guides `--variations` images: the references at its ends, and its feature.

    `factor` is the place between two references; None for one reference or a mean of many.
    """

    name: str
    references: tuple[int, ...]
    feature: Features
    factor: float | None = None


def each(references: Sequence[Reference]) -> list[Condition]:
    """Every reference as a condition of its own."""
    return [Condition(one.name, (i,), one.feature) for i, one in enumerate(references)]


def mean_of(references: Sequence[Reference]) -> list[Condition]:
    """One condition: the mean feature of all references, in float64."""
    features = np.stack([one.feature for one in references])
    mean: Features = features.mean(axis=0, dtype=np.float64).astype(np.float32)
    everything = tuple(range(len(references)))
    return [Condition(f"mean of {len(references)} tiles", everything, mean)]


def between(
    references: Sequence[Reference],
    pairs: Sequence[tuple[int, int]],
    factors: Sequence[float],
    kind: Kind,
) -> list[Condition]:
    """For every pair of references, in turn, a condition at each factor."""
    found = []
    for first, second in pairs:
        a, b = references[first], references[second]
        for factor in factors:
            feature = interpolate(a.feature, b.feature, factor, kind)
            name = f"{a.name} to {b.name}, {factor:g}"
            found.append(Condition(name, (first, second), feature, factor))
    return found


class ConditionGuidance:
    """Guidance by conditions that were made one by one, with the tiles that they are made of.

    `record` is encoder.json of the features, `what` further identity values, such as the kind of
    interpolation. The references' pixels and the list of conditions become files of the
    synthetic dataset, so that figures can show them.
    """

    def __init__(
        self,
        name: str,
        conditions: Sequence[Condition],
        references: Sequence[Reference],
        *,
        record: dict[str, Any],
        tile_px: int,
        mpp: float | None,
        what: dict[str, Any],
    ) -> None:
        self.name, self.tile_px, self.mpp = name, tile_px, mpp
        self.count = self.end = len(conditions)
        self.encoder_record: dict[str, Any] = record
        self._conditions, self._references, self._what = conditions, references, what
        self._features = np.stack([one.feature for one in conditions]).astype(np.float32)

    def identity(self) -> dict[str, Any]:
        """Which tiles guide, by their sums, how they are joined, and by which encoder."""
        record = self.encoder_record
        conditions = hashlib.sha256(json.dumps(self._listing(), sort_keys=True).encode())
        return {
            **self._what,
            "guidance_conditions_sha256": conditions.hexdigest(),
            "guidance_encoder": record["encoder"],
            "guidance_encoder_sha256": record["weights_sha256"],
            "guidance_compute_dtype": record.get("compute_dtype"),
        }

    def sources(self, positions: npt.NDArray[np.int64]) -> Sources:
        """The dataset's tile behind each condition that is one such tile, and none elsewhere."""
        found = [self._source(self._conditions[position]) for position in positions]
        ranks = np.array([-1 if one is None else one[1] for one in found], np.int32)
        return Sources([None if one is None else one[0] for one in found], ranks)

    def features(self, positions: npt.NDArray[np.int64]) -> Features:
        """Features float32 [n, d] of the conditions at these positions."""
        return self._features[positions]

    def attachments(self) -> dict[str, bytes]:
        """The list of conditions as JSON and the references' pixels as PNG, by file name."""
        files = {CONDITIONS_FILE: (json.dumps(self._listing(), indent=2) + "\n").encode()}
        for number, one in enumerate(self._references):
            if one.tile is not None:
                files[_tile_file(number)] = encode_png(one.tile)
        return files

    def _source(self, condition: Condition) -> tuple[str, int] | None:
        if len(condition.references) != 1:
            return None
        return self._references[condition.references[0]].source

    def _listing(self) -> dict[str, Any]:
        tiles = [
            {
                "name": one.name,
                "sha256": one.sha256(),
                "file": None if one.tile is None else _tile_file(number),
            }
            for number, one in enumerate(self._references)
        ]
        conditions = [
            {"name": one.name, "tiles": list(one.references), "factor": one.factor}
            for one in self._conditions
        ]
        return {"tiles": tiles, "conditions": conditions}


def _tile_file(number: int) -> str:
    return f"tile-{number:05d}.png"
