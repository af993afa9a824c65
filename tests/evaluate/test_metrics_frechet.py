"""Fréchet distance against scipy's sqrtm, against closed forms and where sqrtm fails."""

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import UserError
from evaluate.metrics import Moments, frechet, frechet_distance, frechet_distance_of_moments
from evaluate.metrics.frechet import FrechetReference, expected_noise


def features(n, d, seed=0, *, decay=1.0, shift=0.0):
    """Correlated rows with a spectrum that falls like index**-decay."""
    rng = np.random.default_rng(seed)
    mixing = rng.standard_normal((d, d)) * np.arange(1, d + 1)[:, None] ** -decay
    return rng.standard_normal((n, d)) @ mixing + shift


def by_definition(real, generated):
    first, second = np.cov(real, rowvar=False), np.cov(generated, rowvar=False)
    difference = real.mean(0) - generated.mean(0)
    root = scipy.linalg.sqrtm(first @ second)
    return difference @ difference + np.trace(first + second) - 2 * np.trace(root).real


@pytest.mark.parametrize(("n", "m", "d"), [(400, 300, 20), (900, 1200, 128), (50, 70, 1)])
def test_equals_the_definition_with_a_matrix_square_root(n, m, d):
    real, generated = features(n, d, 1, shift=0.3), features(m, d, 2)
    if d == 1:
        spread = np.std(real, ddof=1) - np.std(generated, ddof=1)
        expected = (real.mean() - generated.mean()) ** 2 + spread**2
    else:
        expected = by_definition(real, generated)
    found = frechet_distance(real, generated)
    assert found.value == pytest.approx(expected, rel=1e-8)
    assert found.value == found.mean_term + found.covariance_term
    assert found.warnings == ()


def test_commuting_covariances_have_the_closed_form():
    rng = np.random.default_rng(3)
    base = rng.standard_normal((500, 40))
    base -= base.mean(0)
    u, _, vt = np.linalg.svd(base, full_matrices=False)
    first, second = np.linspace(0.1, 9, 40), np.linspace(4, 0.2, 40)
    make = lambda spread: u * np.sqrt(499) * spread @ vt  # noqa: E731
    found = frechet_distance(make(first) + 2.0, make(second))
    assert found.mean_term == pytest.approx(40 * 4.0, rel=1e-12)
    assert found.covariance_term == pytest.approx(((first - second) ** 2).sum(), rel=1e-10)


def test_float32_features_with_a_large_common_mean_lose_nothing():
    real, generated = features(600, 32, 4), features(500, 32, 5)
    real32, generated32 = (real + 1000).astype(np.float32), (generated + 1000).astype(np.float32)
    exact = frechet_distance(
        real32.astype(np.float64) - 1000, generated32.astype(np.float64) - 1000
    )
    assert frechet_distance(real32, generated32).value == pytest.approx(exact.value, rel=1e-9)


@pytest.mark.parametrize(("n", "m"), [(12, 9), (12, 400), (400, 12), (64, 65)])
def test_fewer_rows_than_dimensions_is_answered_exactly_and_warned_about(n, m):
    """Against the nuclear norm of the centred rows' product, which needs no covariance."""
    real, generated = features(n, 64, 6), features(m, 64, 7)
    a, b = real - real.mean(0), generated - generated.mean(0)
    nuclear = np.linalg.svd(a @ b.T, compute_uv=False).sum() / np.sqrt((n - 1) * (m - 1))
    expected = (
        ((real.mean(0) - generated.mean(0)) ** 2).sum()
        + (a**2).sum() / (n - 1)
        + (b**2).sum() / (m - 1)
        - 2 * nuclear
    )
    found = frechet_distance(real, generated)
    assert found.value == pytest.approx(expected, rel=1e-10)
    assert len(found.warnings) == (n <= 64) + (m <= 64)
    assert any("singular" in line for line in found.warnings)


@pytest.mark.parametrize("decay", [1.0, 4.0, 8.0])
@pytest.mark.parametrize("turned", [False, True])
def test_ill_conditioned_covariances_agree_with_the_singular_values_of_the_rows(decay, turned):
    """The spectrum lies along the features, or across all of them."""
    real, generated = features(300, 48, 8, decay=decay), features(280, 48, 9, decay=decay)
    if turned:
        axes = np.linalg.qr(np.random.default_rng(21).standard_normal((48, 48)))[0]
        real, generated = real @ axes, generated @ axes
    a, b = (real - real.mean(0)) / np.sqrt(299), (generated - generated.mean(0)) / np.sqrt(279)
    nuclear = np.linalg.svd(a @ b.T, compute_uv=False).sum()
    traces = (a**2).sum() + (b**2).sum()
    found = frechet_distance(real, generated)
    assert found.covariance_term == pytest.approx(traces - 2 * nuclear, abs=1e-12 * traces)


def test_graded_eigenvalues_are_as_good_as_singular_values(monkeypatch):
    """On a spectrum like 1/i^2, where a plain product's eigenvalues are wrong by 1e-12."""
    real, generated = features(900, 96, 22, decay=2.0), features(900, 96, 23, decay=2.0)
    found = frechet_distance(real, generated)
    monkeypatch.setattr(frechet, "_trace_by_eigenvalues", lambda *_: None)
    by_singular_values = frechet_distance(real, generated)
    assert found.covariance_term == pytest.approx(by_singular_values.covariance_term, rel=1e-9)


def test_constant_features_add_their_means_and_are_named():
    real, generated = features(200, 10, 10), features(200, 10, 11)
    dead_real = np.hstack([real, np.full((200, 2), 5.0), real[:, :1]])
    dead_generated = np.hstack([generated, np.full((200, 2), 7.0), generated[:, :1]])
    found = frechet_distance(dead_real, dead_generated)
    doubled = frechet_distance(  # the repeated column is a singular direction, not a constant
        np.hstack([real, real[:, :1]]), np.hstack([generated, generated[:, :1]])
    )
    assert found.value == pytest.approx(doubled.value + 8.0, rel=1e-9)
    assert [line[:17] for line in found.warnings] == ["2 of 13 real feat", "2 of 13 generated"]


def test_identical_sets_are_at_zero_also_when_singular():
    for real in (features(300, 24, 12), features(10, 24, 13), np.ones((5, 3))):
        found = frechet_distance(real, real[::-1])
        assert 0 <= found.value <= 1e-12 * max(1.0, (real**2).sum())


def test_noise_floor_is_the_mean_distance_between_samples_of_one_gaussian():
    d, n, m = 16, 800, 500
    spread = np.linspace(0.5, 2.0, d)  # no direction rules, so 60 draws average well
    mixing = np.linalg.qr(np.random.default_rng(14).standard_normal((d, d)))[0] * spread
    draws = [
        frechet_distance(
            *(
                np.random.default_rng((s, i)).standard_normal((size, d)) @ mixing
                for i, size in enumerate((n, m))
            )
        ).value
        for s in range(60)
    ]
    expected = expected_noise(np.linalg.eigvalsh(mixing.T @ mixing), n, m)
    assert np.mean(draws) == pytest.approx(expected, rel=0.05)
    assert expected_noise(np.zeros(3), n, m) == 0.0


def test_the_noise_floor_is_the_same_for_any_number_of_threads():
    rows = np.random.default_rng(0).normal(size=(12, 300)) * np.linspace(1, 0.01, 300)
    threads, floors = torch.get_num_threads(), set()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            floors.add(FrechetReference(Moments.from_rows(rows)).noise_floor(12))
    finally:
        torch.set_num_threads(threads)
    assert len(floors) == 1


def test_the_generated_side_is_capped_by_a_seeded_draw_without_replacement():
    real, generated = features(100, 6, 15), features(300, 6, 16)
    found = frechet_distance(real, generated, max_generated=120, seed=5)
    drawn = np.random.RandomState(5).choice(300, 120, replace=False)
    assert (found.n_real, found.n_generated, found.dim) == (100, 120, 6)
    assert found.value == pytest.approx(frechet_distance(real, generated[drawn]).value, rel=1e-12)
    assert found == frechet_distance(real, generated, max_generated=120, seed=5)
    assert found != frechet_distance(real, generated, max_generated=120, seed=6)
    assert frechet_distance(real, generated, max_generated=None).n_generated == 300


@settings(max_examples=25, deadline=None)
@given(n=st.integers(2, 60), m=st.integers(2, 60), d=st.integers(1, 40), seed=st.integers(0, 10**6))
def test_symmetric_non_negative_and_invariant_to_rotation_and_order(n, m, d, seed):
    rng = np.random.default_rng(seed)
    real, generated = rng.standard_normal((n, d)), rng.standard_normal((m, d)) * 2 + 0.5
    rotation, _ = np.linalg.qr(rng.standard_normal((d, d)))
    value = frechet_distance(real, generated).value
    assert value >= 0
    assert frechet_distance(generated, real).value == pytest.approx(value, rel=1e-8)
    assert frechet_distance(real @ rotation, generated @ rotation).value == pytest.approx(
        value, rel=1e-8
    )
    assert frechet_distance(rng.permutation(real), generated).value == pytest.approx(
        value, rel=1e-8
    )


def test_moments_are_the_same_in_any_grouping_and_equal_numpys():
    rows = features(5000, 12, 17, shift=50.0)  # more than a chunk
    rows = rows[np.argsort(rows[:, 0])]  # sorted: blocks with unlike means
    whole = Moments.from_rows(rows)
    parts = Moments(12)
    for part in np.split(rows, [0, 1, 700, 4999]):
        parts.merge(Moments(12).update(part))
    for moments in (whole, parts):
        assert moments.n == 5000
        np.testing.assert_allclose(moments.mean, rows.mean(0), rtol=1e-13)
        np.testing.assert_allclose(moments.covariance, np.cov(rows, rowvar=False), rtol=1e-11)
    other = Moments.from_rows(features(400, 12, 18))
    assert frechet_distance_of_moments(whole, other).value == pytest.approx(
        frechet_distance(rows, features(400, 12, 18)).value, rel=1e-12
    )


def test_moments_alone_answer_also_for_too_few_rows():
    real, generated = features(20, 30, 19), features(25, 30, 20)
    found = frechet_distance_of_moments(Moments.from_rows(real), Moments.from_rows(generated))
    assert found.value == pytest.approx(frechet_distance(real, generated).value, rel=1e-6)
    assert len(found.warnings) == 2


def with_nan(rows, *indices):
    rows = rows.copy()
    rows[list(indices), 0] = np.nan
    return rows


@pytest.mark.parametrize(
    ("real", "generated", "message"),
    [
        (
            features(9, 4),
            with_nan(features(9, 4), 2, 5),
            "generated features: 2 of 9 rows hold NaN",
        ),
        (features(9, 4) * np.inf, features(9, 4), "real features: 9 of 9 rows hold NaN"),
        (features(1, 4), features(9, 4), "real features: 1 row, but this metric needs at least 2"),
        (features(9, 4), features(9, 5), "real features have 4 dimensions, generated features 5"),
        (features(9, 4), np.zeros(9), "generated features: expected an array"),
        (features(9, 4), np.zeros((9, 4), complex), "expected real numbers, got dtype complex128"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_line(real, generated, message):
    with pytest.raises(UserError, match=message) as caught:
        frechet_distance(real, generated)
    assert "\n" not in str(caught.value)


def test_moments_refuse_what_has_no_covariance_or_another_dimension():
    with pytest.raises(UserError, match="at least 2 rows, 1 came"):
        frechet_distance_of_moments(
            Moments.from_rows(np.ones((1, 3))), Moments.from_rows(features(9, 3))
        )
    with pytest.raises(UserError, match="real moments have 3 dimensions, generated 4"):
        frechet_distance_of_moments(
            Moments.from_rows(features(9, 3)), Moments.from_rows(features(9, 4))
        )
    with pytest.raises(UserError, match="expected features of 3 dimensions, got 4"):
        Moments(3).update(features(9, 4))
    with pytest.raises(UserError, match="max_generated is 1"):
        frechet_distance(features(9, 3), features(9, 3), max_generated=1)


def test_half_precision_features_are_widened():
    real, generated = features(50, 4).astype(np.float16), features(60, 4, 1).astype(np.float16)
    expected = by_definition(real.astype(np.float64), generated.astype(np.float64))
    assert frechet_distance(real, generated).value == pytest.approx(expected, rel=1e-8)
