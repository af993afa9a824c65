"""KID, MMD, Vendi and the sliced distance against loops and known values."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import UserError
from evaluate.metrics import kernel_distance, kid, mind, mmd, sliced_distance, vendi


def clouds(n=40, m=50, d=6, seed=0, shift=0.3):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((n, d)), rng.standard_normal((m, d)) + shift


def looped_mmd(a, b, kernel):
    n, m = len(a), len(b)
    aa = sum(kernel(a[i], a[j]) for i in range(n) for j in range(n) if i != j)
    bb = sum(kernel(b[i], b[j]) for i in range(m) for j in range(m) if i != j)
    ab = sum(kernel(x, y) for x in a for y in b)
    own = (sum(kernel(x, x) for x in a), sum(kernel(y, y) for y in b))
    unbiased = aa / (n * (n - 1)) + bb / (m * (m - 1)) - 2 * ab / (n * m)
    return unbiased, (aa + own[0]) / n**2 + (bb + own[1]) / m**2 - 2 * ab / (n * m)


def test_kid_equals_the_loop_over_its_subsets():
    real, generated = clouds()
    found = kid(real, generated, subsets=3, subset_size=20, seed=4)
    random = np.random.RandomState(4)
    expected = []
    for _ in range(3):
        a = real[random.choice(40, 20, replace=False)]
        b = generated[random.choice(50, 20, replace=False)]
        expected.append(looped_mmd(a, b, lambda x, y: (x @ y / 6 + 1) ** 3)[0])
    np.testing.assert_allclose(found.values, expected, rtol=1e-11)
    assert found.value == pytest.approx(np.mean(expected), rel=1e-11)
    assert found.standard_error == pytest.approx(np.std(expected, ddof=1) / np.sqrt(3), rel=1e-9)
    assert found.warnings == ()


def test_kid_takes_all_of_small_sets_and_says_so():
    found = kid(*clouds(), subsets=1)
    assert (found.subset_size, found.std, found.standard_error) == (40, None, None)
    assert found.warnings == ("subsets of 40 rows in place of 1000, as no more are there",)


def test_kid_is_unbiased_where_the_sets_are_alike():
    values = [kid(*clouds(60, 60, 5, s, 0.0), subsets=1).value for s in range(300)]
    assert abs(np.mean(values)) < 4 * np.std(values) / np.sqrt(300)
    assert min(values) < 0


@pytest.mark.parametrize("unit_norm", [True, False])
def test_mmd_equals_the_loop_across_blocks(monkeypatch, unit_norm):
    monkeypatch.setattr(kernel_distance, "_BLOCK_ROWS", 16)
    real, generated = clouds()
    found = mmd(real, generated, unit_norm=unit_norm)
    if unit_norm:
        real, generated = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (real, generated))
    distances = [np.linalg.norm(real[i] - real[j]) for i in range(40) for j in range(i)]
    assert found.sigma == pytest.approx(np.median(distances), rel=1e-9)
    expected = looped_mmd(
        real, generated, lambda x, y: np.exp(-((x - y) ** 2).sum() / (2 * found.sigma**2))
    )
    assert (found.value, found.biased) == pytest.approx(expected, rel=1e-10)


def test_mmd_of_a_set_with_itself_is_zero_and_far_sets_reach_two():
    real, _ = clouds()
    assert mmd(real, real[::-1]).biased == pytest.approx(0.0, abs=1e-12)
    assert mmd(real, real + 1e3, unit_norm=False, sigma=0.01).value == pytest.approx(0, abs=1e-6)
    assert mmd(np.zeros((9, 2)), np.full((9, 2), 1e3), unit_norm=False, sigma=1.0).value == 2.0


def test_mmd_refuses_a_width_of_zero_and_rows_without_direction():
    with pytest.raises(UserError, match="kernel width is 0"):
        mmd(np.ones((5, 2)), clouds(d=2)[1])
    with pytest.raises(UserError, match="generated features: 5 rows are all zeros"):
        mmd(clouds(d=2)[0], np.zeros((5, 2)))


def looped_vendi(rows):
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    shares = np.linalg.eigvalsh(unit @ unit.T / len(rows))
    return np.exp(-sum(x * np.log(x) for x in shares if x > 1e-15))


@pytest.mark.parametrize(("n", "d"), [(1, 5), (7, 30), (90, 12), (5000, 4)])
def test_vendi_equals_the_definition_on_all_pairs(n, d):
    rows = np.random.default_rng(1).standard_normal((n, d))
    if n < 1000:
        assert vendi(rows).value == pytest.approx(looped_vendi(rows), rel=1e-10)
    assert 1 <= vendi(rows).value <= min(n, d) + 1e-9


def test_vendi_counts_distinct_directions_whatever_their_length():
    rows = np.repeat(np.eye(5), 3, axis=0) * np.arange(1, 16)[:, None]
    assert vendi(rows).value == pytest.approx(5.0)
    assert vendi(np.ones((8, 3))).value == pytest.approx(1.0)
    with pytest.raises(UserError, match="1 rows are all zeros"):
        vendi(np.eye(3) * [1, 1, 0])


def test_mind_equals_the_pairing_of_sorted_projections(monkeypatch):
    monkeypatch.setattr(sliced_distance, "_BLOCK_BYTES", 3000)
    real, generated = clouds(40, 40)
    axes = np.random.RandomState(2).standard_normal((50, 6))
    per_axis = [
        np.mean(
            (np.sort(real @ (a / np.linalg.norm(a))) - np.sort(generated @ (a / np.linalg.norm(a))))
            ** 2
        )
        for a in axes
    ]
    found = mind(real, generated, directions=50, seed=2)
    assert found.value == pytest.approx(18 * np.mean(per_axis), rel=1e-12)
    assert found.standard_error == pytest.approx(
        18 * np.std(per_axis, ddof=1) / np.sqrt(50), rel=1e-10
    )


def test_mind_of_a_shift_is_three_times_its_squared_length():
    real, _ = clouds(50, 50, 8)
    shift = np.full(8, 0.5)
    found = mind(real, real + shift, directions=4000)
    assert found.value == pytest.approx(3 * shift @ shift, abs=4 * found.standard_error)


def test_mind_draws_as_many_rows_as_the_smaller_set_has():
    real, generated = clouds(30, 80)
    assert mind(real, generated, directions=5).n == 30
    assert mind(real, real, directions=5).value == 0.0


@settings(max_examples=15, deadline=None)
@given(n=st.integers(2, 30), d=st.integers(1, 8), seed=st.integers(0, 10**6))
def test_distances_are_symmetric_and_blind_to_row_order(n, d, seed):
    real, generated = clouds(n, n, d, seed)
    shuffled = np.random.default_rng(seed).permutation(real)
    for distance in (
        lambda a, b: mmd(a, b, sigma=1.0).value,
        lambda a, b: kid(a, b, subsets=1).value,
        lambda a, b: mind(a, b, directions=4).value,
    ):
        value = distance(real, generated)
        assert distance(generated, real) == pytest.approx(value, rel=1e-9, abs=1e-12)
        assert distance(shuffled, generated) == pytest.approx(value, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda a, b: kid(a, b, subsets=0), "subsets is 0"),
        (lambda a, b: kid(a, b[:, :3]), "real features have 6 dimensions"),
        (lambda a, b: kid(a, b * np.nan), "generated features: 50 of 50 rows"),
        (lambda a, b: mmd(a, b, sigma=-1), "kernel width is -1"),
        (lambda a, b: mind(a, b, directions=1), "directions is 1"),
        (lambda a, b: mind(a[:1], b), "real features: 1 row"),
        (lambda a, b: vendi(a * np.inf), "given features: 40 of 40 rows"),
    ],
)
def test_wrong_arguments_are_refused(call, message):
    with pytest.raises(UserError, match=message):
        call(*clouds())
