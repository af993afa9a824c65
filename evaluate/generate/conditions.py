"""Conditions made of tiles: each tile alone, their mean, or points between two of them.

Pure functions of feature arrays, and the condition source that they become.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypedDict

import numpy as np
import numpy.typing as npt

from common.errors import UserError
from common.terms import Terms, merge_terms, parse_terms
from evaluate.generate.condition_source import (
    ConditionSource,
    Positions,
    SourceTiles,
    encoder_identity,
)
from evaluate.generators import EncoderRecord
from evaluate.generators.interface import Features
from pipeline.dataset import encode_png

Interpolation = Literal["slerp", "lerp"]
CONDITIONS_FILE = "conditions.json"
_PARALLEL = 1e-6
"""Below this angle, in radians, the arc is taken for its chord: sin(angle) would divide."""


class ListedTile(TypedDict):
    """A guiding tile in conditions.json; `file` is None where its pixels were not on disk."""

    name: str
    sha256: str
    file: str | None


class ListedCondition(TypedDict):
    """A condition in conditions.json: its tiles' numbers; `factor` from 0 to 1 between two."""

    name: str
    tiles: list[int]
    factor: float | None


class ConditionListing(TypedDict):
    """conditions.json."""

    tiles: list[ListedTile]
    conditions: list[ListedCondition]


def interpolate_features(
    first: Features, second: Features, factor: float, kind: Interpolation
) -> Features:
    """The feature [d] at `factor` in [0, 1] of the way from `first` (0) to `second` (1).

    "lerp" is the straight line. "slerp" weighs both by their angle (Shoemake 1985,
    doi:10.1145/325165.325242), so that vectors of one norm keep it. Computed in float64.
    Raises `UserError` for a factor outside [0, 1] and for slerp between opposite vectors or from
    a zero vector, where the way is not defined.

    >>> interpolate_features(np.array([0.0, 4.0]), np.array([2.0, 4.0]), 0.25, "lerp").tolist()
    [0.5, 4.0]
    """
    if not 0 <= factor <= 1:
        raise UserError(f"--factors: {factor} lies outside [0, 1]")
    # In float64: the sine of a small angle has few digits in float32.
    a, b = first.astype(np.float64), second.astype(np.float64)
    weights = (1 - factor, factor) if kind == "lerp" else _arc_weights(a, b, factor)
    return (weights[0] * a + weights[1] * b).astype(np.float32)


def _arc_weights(
    a: npt.NDArray[np.float64], b: npt.NDArray[np.float64], factor: float
) -> tuple[float, float]:
    """sin((1 - f) w) / sin(w) and sin(f w) / sin(w) for the angle w between a and b."""
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
    start, end = (float(np.sin(part * angle) / np.sin(angle)) for part in (1 - factor, factor))
    return start, end


@dataclass(frozen=True)
class Reference:
    """A real tile that guides: its name, its pixels [px, px, 3] where they exist, its feature [d].

    `source` is (slide_id, rank) of a tile of a dataset.
    """

    name: str
    tile: npt.NDArray[np.uint8] | None
    feature: Features
    source: tuple[str, int] | None = None

    def content_sha256(self) -> str:
        """The sum of what guides: the pixels, or the feature where it came from a cache."""
        data = self.feature if self.source or self.tile is None else self.tile
        return hashlib.sha256(np.ascontiguousarray(data).tobytes()).hexdigest()


@dataclass(frozen=True)
class Condition:
    """What guides `--variations` images: the references at its ends, and its feature [d].

    `factor` is the place between two references, from 0 to 1; None for one reference or a mean.
    """

    name: str
    references: tuple[int, ...]
    feature: Features
    factor: float | None = None


def each_alone(references: Sequence[Reference]) -> list[Condition]:
    """Every reference as one condition."""
    return [Condition(tile.name, (i,), tile.feature) for i, tile in enumerate(references)]


def mean_of(references: Sequence[Reference]) -> list[Condition]:
    """One condition: the mean feature [d] of all references, in float64."""
    features = np.stack([tile.feature for tile in references])
    mean: Features = features.mean(axis=0, dtype=np.float64).astype(np.float32)
    return [Condition(f"mean of {len(references)} tiles", tuple(range(len(references))), mean)]


def conditions_between(
    references: Sequence[Reference],
    pairs: Sequence[tuple[int, int]],
    factors: Sequence[float],
    kind: Interpolation,
) -> list[Condition]:
    """For every pair of references, in turn, a condition at each factor in [0, 1]."""
    conditions = []
    for first, second in pairs:
        a, b = references[first], references[second]
        for factor in factors:
            feature = interpolate_features(a.feature, b.feature, factor, kind)
            name = f"{a.name} to {b.name}, {factor:g}"
            conditions.append(Condition(name, (first, second), feature, factor))
    return conditions


class ConditionList(ConditionSource):
    """Conditions that were made one by one, with the tiles that they are made of.

    `record` describes the encoder of the features, `how` is further identity values, such as the
    kind of interpolation, `terms` are those of the tiles, where a dataset states them. The
    references' pixels and the list of conditions become files of the synthetic dataset, so that
    figures can show them.
    """

    encoder_record: EncoderRecord

    def __init__(
        self,
        name: str,
        conditions: Sequence[Condition],
        references: Sequence[Reference],
        *,
        record: EncoderRecord,
        tile_px: int,
        mpp: float | None,
        how: dict[str, object],
        terms: tuple[Terms, ...] = (),
    ) -> None:
        self.name, self.tile_px, self.mpp = name, tile_px, mpp
        self.count = self.end = len(conditions)
        self.encoder_record = record
        self._conditions, self._references, self._how = conditions, references, how
        self._terms = terms
        self._features = np.stack([each.feature for each in conditions]).astype(np.float32)

    def identity(self) -> dict[str, object]:
        """Which tiles guide, by their sums, how they are combined, and by which encoder."""
        # The listing has sums and names but no paths: a file that was moved is the same.
        conditions = hashlib.sha256(
            json.dumps(self._describe_conditions(), sort_keys=True).encode()
        )
        return {
            **self._how,
            "guidance_conditions_sha256": conditions.hexdigest(),
            **encoder_identity(self.encoder_record),
        }

    def terms(self) -> tuple[Terms, ...]:
        """The terms of the tiles, where a dataset states them, and of the features' encoder."""
        return merge_terms(self._terms, parse_terms(self.encoder_record.get("terms")))

    def source_tiles(self, positions: Positions) -> SourceTiles:
        """The tile behind each condition [n] that is a single tile of a dataset, none elsewhere."""
        tiles: list[tuple[str | None, int]] = []
        for position in positions:
            numbers = self._conditions[position].references
            single = self._references[numbers[0]].source if len(numbers) == 1 else None
            tiles.append(single or (None, -1))
        return SourceTiles([slide for slide, _ in tiles], np.array([r for _, r in tiles], np.int32))

    def read_features(self, positions: Positions) -> Features:
        """Features float32 [n, d] of the conditions at positions [n]."""
        return self._features[positions]

    def guidance_files(self) -> dict[str, bytes]:
        """The bytes by file name: the conditions as JSON, the references' pixels as PNG."""
        files = {
            CONDITIONS_FILE: (json.dumps(self._describe_conditions(), indent=2) + "\n").encode()
        }
        for number, reference in enumerate(self._references):
            if reference.tile is not None:
                files[_tile_file(number)] = encode_png(reference.tile)
        return files

    def _describe_conditions(self) -> ConditionListing:
        return {
            "tiles": [
                {
                    "name": reference.name,
                    "sha256": reference.content_sha256(),
                    "file": None if reference.tile is None else _tile_file(number),
                }
                for number, reference in enumerate(self._references)
            ],
            "conditions": [
                {"name": each.name, "tiles": list(each.references), "factor": each.factor}
                for each in self._conditions
            ],
        }


def _tile_file(number: int) -> str:
    return f"tile-{number:05d}.png"
