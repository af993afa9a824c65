"""Conditions made of tiles, against slow oracles."""

import numpy as np
import pytest
from evaluate_data import DIM, RECORD
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial import geometric_slerp

from common.errors import UserError
from evaluate.generate.conditions import (
    ConditionList,
    Reference,
    conditions_between,
    each_alone,
    interpolate_features,
    mean_of,
)
from evaluate.generate.options import parse_factors

seeds, factors = st.integers(0, 2**32 - 1), st.floats(0, 1)


def vectors(seed: int, count: int = 2) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, DIM)).astype(np.float32)


def references(count: int) -> list[Reference]:
    return [Reference(f"tile {i}", None, row, ("A", i)) for i, row in enumerate(vectors(0, count))]


def guided_by(conditions: list, tiles: list[Reference]) -> ConditionList:
    return ConditionList("test", conditions, tiles, record=RECORD, tile_px=224, mpp=0.5, how={})


@given(seeds, factors)
def test_slerp_is_scipys_on_the_sphere(seed: int, factor: float) -> None:
    a, b = (v / np.linalg.norm(v.astype(np.float64)) for v in vectors(seed).astype(np.float64))
    expected = geometric_slerp(a, b, [factor])[0]
    found = interpolate_features(a.astype(np.float32), b.astype(np.float32), factor, "slerp")
    np.testing.assert_allclose(found, expected, atol=1e-6)


@given(seeds, factors, st.sampled_from(["lerp", "slerp"]))
def test_both_ways_lead_from_one_end_to_the_other_and_back(
    seed: int, factor: float, kind: str
) -> None:
    a, b = vectors(seed)
    np.testing.assert_array_equal(interpolate_features(a, b, 0, kind), a)
    np.testing.assert_allclose(interpolate_features(a, b, 1, kind), b, atol=1e-6)
    forth, back = (
        interpolate_features(a, b, factor, kind),
        interpolate_features(b, a, 1 - factor, kind),
    )
    np.testing.assert_allclose(forth, back, atol=1e-5)


def test_lerp_is_the_straight_line() -> None:
    a, b = vectors(3)
    np.testing.assert_allclose(
        interpolate_features(a, b, 0.25, "lerp"), 0.75 * a + 0.25 * b, atol=1e-6
    )


def test_slerp_of_one_direction_does_not_divide_by_zero() -> None:
    a = vectors(1)[0]
    np.testing.assert_allclose(interpolate_features(a, 2 * a, 0.5, "slerp"), 1.5 * a, rtol=1e-6)


def test_ways_that_are_not_defined_are_refused() -> None:
    a = vectors(1)[0]
    with pytest.raises(UserError, match="opposite"):
        interpolate_features(a, -a, 0.5, "slerp")
    with pytest.raises(UserError, match="zero and has no direction; use --kind lerp"):
        interpolate_features(a, 0 * a, 0.5, "slerp")
    with pytest.raises(UserError, match=r"outside \[0, 1\]"):
        interpolate_features(a, a, 1.5, "lerp")
    for text in ("", "a", "0.2,1.2", "nan"):
        with pytest.raises(UserError, match="numbers from 0 to 1"):
            parse_factors(text)


def test_pairs_are_cut_at_each_factor_in_turn() -> None:
    tiles = references(3)
    found = conditions_between(tiles, [(0, 2), (1, 0)], (0.2, 0.8), "lerp")
    assert [(one.references, one.factor) for one in found] == [
        ((0, 2), 0.2), ((0, 2), 0.8), ((1, 0), 0.2), ((1, 0), 0.8)
    ]  # fmt: skip
    np.testing.assert_allclose(
        found[1].feature, 0.2 * tiles[0].feature + 0.8 * tiles[2].feature, atol=1e-6
    )


def test_a_mean_has_no_single_source_and_a_tile_has() -> None:
    tiles = references(3)
    (mean,) = mean_of(tiles)
    expected = np.mean([tile.feature.astype(np.float64) for tile in tiles], axis=0)
    np.testing.assert_allclose(mean.feature, expected, rtol=1e-6)
    assert guided_by([mean], tiles).source_tiles(np.array([0, 0])).slide_ids == [None, None]
    sources = guided_by(each_alone(tiles), tiles).source_tiles(np.array([2, 0]))
    assert (sources.slide_ids, sources.ranks.tolist()) == (["A", "A"], [2, 0])


def test_other_tiles_or_another_way_between_them_are_another_identity() -> None:
    tiles = references(3)
    sums = {
        guided_by(conditions, tiles).identity()["guidance_conditions_sha256"]
        for conditions in (
            each_alone(tiles), each_alone(tiles[:2]), mean_of(tiles),
            conditions_between(tiles, [(0, 1)], (0.2,), "lerp"),
            conditions_between(tiles, [(0, 1)], (0.4,), "lerp"),
            conditions_between(tiles, [(1, 0)], (0.2,), "lerp"),
        )
    }  # fmt: skip
    assert len(sums) == 6
