"""Precision, recall and their company against a double loop in float64."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import UserError
from evaluate.metrics import manifold, neighbours, precision_recall


def squared(a, b):
    """All ``|a_i - b_j|^2`` in float64, each from the difference itself."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    return np.array([((row - b) ** 2).sum(axis=1) for row in a])


def by_definition(real, generated, k, *, closed):
    rr, gg, gr = squared(real, real), squared(generated, generated), squared(generated, real)
    real_radii = np.sort(rr, axis=1)[:, k]  # index 0 is the row itself
    generated_radii = np.sort(gg, axis=1)[:, k]
    within = (lambda d, r: d <= r) if closed else (lambda d, r: d < r)
    nearest = gr.argmin(axis=1)
    np.fill_diagonal(rr, np.inf)
    small = real_radii <= np.median(real_radii)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.where(gr > 0, real_radii / gr, np.inf)[:, small]
    return {
        "precision": within(gr, real_radii).any(axis=1).mean(),
        "recall": within(gr.T, generated_radii).any(axis=1).mean(),
        "density": (gr < real_radii).sum(axis=1).mean() / k,
        "coverage": (gr.min(axis=0) < real_radii).mean(),
        "authenticity": (gr.min(axis=1) > rr.min(axis=1)[nearest]).mean(),
        "realism": np.sqrt(ratio.max(axis=1)),
        "nearest_real": np.sqrt(np.sort(gr, axis=1)[:, :k]),
        "nearest_generated": np.sqrt(np.sort(gr.T, axis=1)[:, :k]),
    }


def assert_equals_definition(real, generated, k, semantics):
    found = precision_recall(real, generated, k=k, semantics=semantics)
    expected = by_definition(real, generated, k, closed=semantics == "kynkaanniemi")
    for name in ("precision", "recall", "density", "coverage", "authenticity"):
        assert getattr(found, name) == pytest.approx(expected[name], abs=1e-12), name
    np.testing.assert_allclose(found.realism, expected["realism"], rtol=1e-9)
    for name in ("nearest_real", "nearest_generated"):
        np.testing.assert_allclose(getattr(found, name).distances, expected[name], rtol=1e-12)


def clouds(n, m, d, seed=0, *, dtype=np.float32, offset=0.0):
    rng = np.random.default_rng(seed)
    mixing = rng.standard_normal((min(d, 6), d))
    real = rng.standard_normal((n, len(mixing))) @ mixing + offset
    generated = 0.8 * rng.standard_normal((m, len(mixing))) @ mixing + 0.3 + offset
    return real.astype(dtype), generated.astype(dtype)


@pytest.fixture
def small_tiles(monkeypatch):
    """Blocks of 32, so that small sets already cross many block borders."""
    monkeypatch.setattr(neighbours, "_TILE", 32)


@pytest.mark.parametrize("semantics", ["fld", "kynkaanniemi", "prdc"])
@pytest.mark.parametrize("k", [1, 3, 10])
def test_equals_the_definition_across_block_borders(small_tiles, semantics, k):
    assert_equals_definition(*clouds(211, 150, 24), k, semantics)


@pytest.mark.parametrize(("n", "m", "d"), [(4, 5, 3), (33, 32, 1), (300, 40, 300)])
def test_equals_the_definition_for_odd_sizes(small_tiles, n, m, d):
    assert_equals_definition(*clouds(n, m, d, 1), 3, "fld")


def test_full_size_blocks_agree_too():
    assert_equals_definition(*clouds(2300, 2100, 8, 2), 3, "fld")


@pytest.mark.parametrize("semantics", ["fld", "kynkaanniemi"])
def test_grids_full_of_ties_are_decided_as_in_exact_arithmetic(small_tiles, semantics):
    """Integer points: hundreds of distances equal the radii exactly, float32 sees a blur."""
    rng = np.random.default_rng(3)
    real, generated = (rng.integers(0, 4, (n, 5)).astype(np.float32) for n in (150, 130))
    assert_equals_definition(real + 1000, generated + 1000, 3, semantics)


def test_nearly_equal_distances_far_from_the_origin_are_decided_in_float64(small_tiles):
    """Offsets of 1e-7 in rows of length 300: far below float32's rounding of the distances."""
    rng = np.random.default_rng(4)
    base = rng.standard_normal((12, 16)) * 100
    real = np.repeat(base, 12, axis=0) + 1e-7 * rng.standard_normal((144, 16))
    generated = np.repeat(base, 10, axis=0) + 1e-7 * rng.standard_normal((120, 16))
    assert_equals_definition(real, generated, 3, "fld")


def rounded_product(screen, left, right):
    """A product of factors in bfloat16 with float32 sums, on any machine."""
    if screen.precision != "highest":
        left, right = left.bfloat16().float(), right.bfloat16().float()
    found = left @ right.T
    return found.bfloat16().float() if screen.precision == "bfloat16" else found


COARSE = [("medium", 1.01 * 2**-7), ("bfloat16", 2.02 * 2**-7)]


@pytest.mark.parametrize(("precision", "error"), COARSE)
@pytest.mark.parametrize("many", [0, 10**9])
@pytest.mark.parametrize("spread", [1.0, 1e-3])
def test_a_screen_of_coarse_arithmetic_changes_nothing(
    small_tiles, monkeypatch, many, spread, precision, error
):
    """Near copies leave thousands of pairs open, which `many` sends to float32 or to decision."""
    dim = 24
    full = neighbours.choose_screens(dim, torch.device("cpu"))[-1]
    coarse = neighbours.Screen(precision, full.error + error)
    monkeypatch.setattr(neighbours, "choose_screens", lambda *_: [coarse, full])
    monkeypatch.setattr(neighbours.Screen, "squared_distances", rounded_product)
    for module in (neighbours, manifold):
        monkeypatch.setattr(module, "MANY", many)
    rng = np.random.default_rng(8)
    base = 3 * rng.standard_normal((9, dim))
    real, generated = (
        base[rng.integers(0, 9, n)] + spread * rng.standard_normal((n, dim)) for n in (170, 140)
    )
    assert_equals_definition(real.astype(np.float32), generated.astype(np.float32), 3, "fld")


@settings(max_examples=20, deadline=None)
@given(d=st.integers(1, 64), seed=st.integers(0, 10**6), offset=st.sampled_from([0.0, 50.0]))
def test_a_screens_error_stays_within_its_bound_ratios(d, seed, offset):
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((40, d)) * rng.exponential(2.0, (1, d)) + offset
    side = neighbours.ScreenedRows(rows.astype(np.float32), rows.mean(axis=0))
    span = slice(0, 40)
    exact = squared(rows.astype(np.float32), rows.astype(np.float32))
    scale = (side.squares[:, None] + side.squares).double().numpy()
    full = neighbours.choose_screens(d, torch.device("cpu"))[-1]
    left, right = side.left_factor(span), side.right_factor(span)
    for screen in (full, *(neighbours.Screen(name, full.error + error) for name, error in COARSE)):
        found = rounded_product(screen, left, right).double().numpy()
        assert (np.abs(found - exact) <= screen.error * scale).all()
    for screen in neighbours.choose_screens(d, torch.device("cpu")):  # those of this machine
        found = screen.squared_distances(left, right).double().numpy()
        assert (np.abs(found - exact) <= screen.error * scale).all()


@pytest.mark.parametrize("semantics", ["fld", "kynkaanniemi"])
def test_a_collapsed_set_is_decided_in_bounded_memory(small_tiles, monkeypatch, semantics):
    monkeypatch.setattr(neighbours, "_POOL_PAIRS", 2000)
    real, _ = clouds(120, 5, 7, 9)
    collapsed = np.repeat(real[:1], 150, axis=0)
    assert_equals_definition(real, collapsed, 3, semantics)
    assert_equals_definition(collapsed, real, 3, semantics)


@pytest.mark.gpu
def test_a_gpu_gives_the_same_numbers():
    real, generated = clouds(5000, 4500, 96, 10)
    here, there = (precision_recall(real, generated, device=name) for name in ("cpu", "cuda"))
    for name in ("precision", "recall", "density", "coverage", "authenticity"):
        assert getattr(here, name) == getattr(there, name)
    np.testing.assert_array_equal(here.realism, there.realism)
    np.testing.assert_array_equal(here.nearest_real.indices, there.nearest_real.indices)


def test_a_surface_point_is_outside_for_fld_and_inside_for_kynkaanniemi():
    real = np.arange(4.0)[:, None] * 10
    generated = np.array([[40.0], [1000.0], [2000.0]])  # 40 is at distance 10 from the ball at 30
    open_balls = precision_recall(real, generated, k=1, semantics="fld")
    closed_balls = precision_recall(real, generated, k=1, semantics="kynkaanniemi")
    assert (open_balls.precision, closed_balls.precision) == (0.0, pytest.approx(1 / 3))
    assert open_balls.density == closed_balls.density == 0.0


def test_identical_copies_have_empty_open_balls_and_full_closed_ones():
    rows = np.ones((9, 4), dtype=np.float32)
    open_balls = precision_recall(rows, rows, semantics="prdc")
    closed_balls = precision_recall(rows, rows, semantics="kynkaanniemi")
    assert (open_balls.precision, open_balls.recall) == (0.0, 0.0)
    assert (closed_balls.precision, closed_balls.recall) == (1.0, 1.0)
    assert np.isinf(open_balls.realism).all()


def test_a_copied_set_is_covered_and_not_authentic():
    real, _ = clouds(80, 5, 7, 5)
    found = precision_recall(real, real)
    assert (found.precision, found.recall, found.coverage, found.authenticity) == (1, 1, 1, 0)
    np.testing.assert_array_equal(found.nearest_real.indices[:, 0], np.arange(80))
    np.testing.assert_array_equal(found.real_radii, found.generated_radii)
    assert np.isinf(found.realism[found.real_radii <= np.median(found.real_radii)]).all()


def test_far_sets_share_nothing():
    real, generated = clouds(60, 50, 6, 6)
    found = precision_recall(real, generated + 1e4)
    assert (found.precision, found.recall, found.density, found.coverage) == (0, 0, 0, 0)
    assert found.authenticity == 1.0
    assert (found.realism < 0.1).all()


@settings(max_examples=20, deadline=None)
@given(n=st.integers(5, 40), m=st.integers(5, 40), d=st.integers(1, 20), seed=st.integers(0, 10**6))
def test_swapping_the_sets_swaps_precision_and_recall_and_row_order_is_immaterial(n, m, d, seed):
    real, generated = clouds(n, m, d, seed, dtype=np.float64)
    found, swapped = precision_recall(real, generated), precision_recall(generated, real)
    assert (found.precision, found.recall) == (swapped.recall, swapped.precision)
    np.testing.assert_array_equal(found.nearest_real.indices, swapped.nearest_generated.indices)
    shuffled = precision_recall(real[::-1], generated)
    for name in ("precision", "recall", "density", "coverage", "authenticity"):
        assert getattr(shuffled, name) == pytest.approx(getattr(found, name), abs=1e-12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": 8}, "k is 8, but with 8 generated rows it must be between 1 and 7"),
        ({"k": 0}, "k is 0, but with 9 real rows it must be between 1 and 8"),
        ({"semantics": "other"}, "semantics 'other' is unknown, expected one of fld"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        precision_recall(*clouds(9, 8, 4), **arguments)


def test_the_users_matmul_precision_is_left_as_it_was():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        precision_recall(*clouds(9, 8, 4))
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)
