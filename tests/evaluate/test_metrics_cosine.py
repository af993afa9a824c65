"""Sample-wise cosine similarity against loops, and its null and retrieval on known cases."""

import numpy as np
import pytest

from common.errors import UserError
from evaluate.metrics import cosine, cosine_similarity


def pairs(n=60, d=12, noise=0.5, seed=0, common=0.0):
    rng = np.random.default_rng(seed)
    real = rng.standard_normal((n, d)) + common
    return real, real + noise * rng.standard_normal((n, d))


def cosine_of(a, b):
    return float(a @ b / np.sqrt((a @ a) * (b @ b)))


def test_values_equal_the_loop():
    real, generated = pairs()
    found = cosine_similarity(real, generated)
    expected = [cosine_of(a, b) for a, b in zip(real, generated, strict=True)]
    np.testing.assert_allclose(found.values, expected, rtol=1e-12)
    assert found.mean == pytest.approx(np.mean(expected), rel=1e-12)
    assert found.std == pytest.approx(np.std(expected, ddof=1), rel=1e-12)
    centre = real.mean(0)
    centred = [cosine_of(a - centre, b - centre) for a, b in zip(real, generated, strict=True)]
    assert found.centred_mean == pytest.approx(np.mean(centred), rel=1e-12)


def test_retrieval_equals_the_loop_across_blocks(monkeypatch):
    monkeypatch.setattr(cosine, "_BLOCK_ROWS", 16)
    real, generated = pairs(noise=2.0)
    hits = [
        all(cosine_of(real[i], generated[i]) >= cosine_of(real[j], generated[i]) for j in range(60))
        for i in range(60)
    ]
    assert 0.1 < np.mean(hits) < 0.9
    assert cosine_similarity(real, generated).retrieval_at_1 == pytest.approx(np.mean(hits))


def test_a_common_direction_lifts_the_plain_mean_and_its_null_but_not_the_centred_mean():
    plain, lifted = (cosine_similarity(*pairs(400, common=c)) for c in (0.0, 5.0))
    assert abs(plain.null_mean) < 0.05
    assert lifted.null_mean > 0.9
    assert lifted.centred_mean == pytest.approx(plain.centred_mean, abs=1e-9)


def test_copies_are_at_one_and_retrieved():
    real, _ = pairs()
    found = cosine_similarity(real, 3 * real)
    np.testing.assert_allclose(found.values, 1.0, rtol=1e-12)
    assert (found.values <= 1.0).all()
    assert found.retrieval_at_1 == 1.0
    assert cosine_similarity(real, -real).mean == pytest.approx(-1.0)


def test_duplicated_sources_do_not_count_as_misses():
    real = np.repeat(pairs(30)[0], 2, axis=0)
    assert cosine_similarity(real, real).retrieval_at_1 == 1.0


def test_near_ties_below_float32_are_decided_in_float64():
    rng = np.random.default_rng(1)
    real = np.ones((40, 8)) + 1e-6 * rng.standard_normal((40, 8))
    assert cosine_similarity(real, real).retrieval_at_1 == 1.0


def test_the_null_pairs_nothing_with_its_own_source():
    for n in (2, 3, 50):
        for seed in range(20):
            partner = cosine._draw_derangement(n, seed)
            assert sorted(partner) == list(range(n))
            assert (partner != np.arange(n)).all()


def test_the_seed_decides_null_and_pool_and_nothing_else():
    real, generated = pairs(300, noise=1.5)
    a, again, b = (cosine_similarity(real, generated, seed=s, retrieval_pool=50) for s in (0, 0, 1))
    assert (a.null_mean, a.retrieval_at_1) == (again.null_mean, again.retrieval_at_1)
    assert a.null_mean != b.null_mean
    assert (a.mean, a.centred_mean) == (b.mean, b.centred_mean)
    assert a.retrieval_pool == 50


def test_extreme_magnitudes_neither_overflow_nor_vanish():
    real, generated = pairs()
    expected = cosine_similarity(real, generated).values
    found = cosine_similarity(real * 1e200, generated * 1e-200).values
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_rows_all_alike_have_no_centred_direction():
    found = cosine_similarity(np.ones((5, 3)), np.ones((5, 3)))
    assert (found.mean, found.centred_mean) == (pytest.approx(1.0), 0.0)


@pytest.mark.parametrize(
    ("real", "generated", "message"),
    [
        (np.ones((4, 3)), np.ones((5, 3)), "4 real and 5 generated rows"),
        (np.eye(3), np.zeros((3, 3)), "generated features: 3 rows are all zeros"),
        (np.ones((1, 3)), np.ones((1, 3)), "at least 2"),
        (np.ones((4, 3)), np.full((4, 3), np.nan), "generated features: 4 of 4 rows hold NaN"),
        (np.ones((4, 3)), np.ones((4, 2)), "real features have 3 dimensions"),
    ],
)
def test_what_has_no_pairing_or_direction_is_refused(real, generated, message):
    with pytest.raises(UserError, match=message):
        cosine_similarity(real, generated)


def test_a_retrieval_pool_of_one_is_refused():
    with pytest.raises(UserError, match="retrieval_pool is 1"):
        cosine_similarity(*pairs(), retrieval_pool=1)
