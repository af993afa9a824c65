"""Resamples of the Fréchet distance against plain recomputation, and their widths."""

import numpy as np
import pytest

from common.errors import UserError
from evaluate.metrics import bootstrap, frechet_distance, frechet_infinity, resampling


def clouds(n=400, m=300, d=6, seed=0, shift=0.2):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((n, d)), rng.standard_normal((m, d)) + shift


def fd(real, generated):
    return frechet_distance(real, generated, max_generated=None).value


def test_subsampling_recomputes_each_draw_and_widens_by_the_finite_population_factor():
    real, generated = clouds()
    found = bootstrap(real, generated, draws=5, size=150, seed=3)
    random = np.random.RandomState(3)
    expected = [fd(real, generated[random.choice(300, 150, replace=False)]) for _ in range(5)]
    np.testing.assert_allclose(found.values, expected, rtol=1e-10)
    assert found.value == pytest.approx(np.mean(expected))
    assert found.std == pytest.approx(np.std(expected, ddof=1))
    assert found.corrected_std == pytest.approx(np.sqrt(2) * found.std)
    assert (found.kind, found.size, found.n_clusters) == ("subsample", 150, None)


@pytest.mark.parametrize("tile_bytes", [1 << 30, 2000])
@pytest.mark.parametrize("both_sides", [False, True])
def test_cluster_draws_equal_repeating_the_rows(monkeypatch, tile_bytes, both_sides):
    monkeypatch.setattr(resampling, "_TILE_BYTES", tile_bytes)
    monkeypatch.setattr(resampling, "_DRAW_BYTES", 8 * 36 * 3)  # three draws at a time
    real, generated = clouds(shift=30.0)
    rng = np.random.default_rng(1)
    labels, real_labels = rng.integers(0, 12, 300), rng.choice(list("abcdefg"), 400)
    found = bootstrap(
        real,
        generated,
        draws=7,
        clusters=labels,
        real_clusters=real_labels if both_sides else None,
        seed=5,
    )
    random = np.random.RandomState(5)
    weights = random.multinomial(12, np.full(12, 1 / 12), size=7)
    real_weights = random.multinomial(7, np.full(7, 1 / 7), size=7)
    expected = []
    for draw in range(7):
        rows = np.repeat(generated, weights[draw][labels], axis=0)
        others = real
        if both_sides:
            others = np.repeat(real, real_weights[draw][[ord(x) - 97 for x in real_labels]], axis=0)
        expected.append(fd(others, rows))
    np.testing.assert_allclose(found.values, expected, rtol=1e-9)
    assert found.value == pytest.approx(fd(real, generated), rel=1e-12)
    assert found.low <= found.value <= found.high
    assert (found.kind, found.size, found.n_clusters) == ("cluster", None, 12)


def test_images_alike_within_a_slide_widen_the_cluster_bootstrap_only():
    rng = np.random.default_rng(2)
    real = rng.standard_normal((2000, 4)) * np.sqrt(2)
    slides = np.repeat(np.arange(20), 50)
    generated = rng.standard_normal((20, 4))[slides] + rng.standard_normal((1000, 4))
    by_slide = bootstrap(real, generated, clusters=slides, draws=60)
    by_tile = bootstrap(real, generated, clusters=np.arange(1000), draws=60)
    assert by_slide.std > 2 * by_tile.std


def test_the_intervals_centre_is_the_point_although_draws_are_biased_up():
    real, generated = clouds(2000, 60, 10, shift=0.0)
    found = bootstrap(real, generated, clusters=np.arange(60), draws=80)
    assert found.values.mean() > found.value  # the known bias of repeated rows
    assert found.low < found.value < found.high
    assert found.low >= 0


def test_same_seed_same_draws():
    real, generated = clouds()
    first, again, other = (bootstrap(real, generated, draws=4, size=99, seed=s) for s in (0, 0, 1))
    np.testing.assert_array_equal(first.values, again.values)
    assert (first.values != other.values).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "size is 50000, expected 2 to 299"),
        ({"size": 1}, "size is 1, expected 2 to 299"),
        ({"draws": 1, "size": 9}, "draws is 1"),
        ({"clusters": np.zeros(299)}, "generated clusters: expected one label for each of 300"),
        ({"clusters": np.zeros(300)}, "generated clusters: all rows have one label"),
        ({"real_clusters": np.arange(400)}, "real_clusters were given without clusters"),
    ],
)
def test_bootstrap_refuses_what_it_cannot_draw(arguments, message):
    with pytest.raises(UserError, match=message):
        bootstrap(*clouds(), **arguments)


def test_infinity_is_the_line_through_the_distances_of_prefixes():
    real, generated = clouds()
    found = frechet_infinity(real, generated, points=5, seed=4)
    order = np.random.RandomState(4).permutation(300)
    assert list(found.sizes) == [30, 97, 165, 232, 300]
    expected = [fd(real, generated[order[:size]]) for size in found.sizes]
    np.testing.assert_allclose(found.values, expected, rtol=1e-10)
    design = np.stack([1 / found.sizes, np.ones(5)], axis=1)
    slope, intercept = np.linalg.lstsq(design, np.array(expected), rcond=None)[0]
    assert (found.slope, found.value) == pytest.approx((slope, intercept), rel=1e-9)
    assert found.warnings == ()


def test_infinity_takes_the_bias_of_few_images_away():
    real, generated = clouds(20_000, 2_000, 16, shift=0.0)
    assert abs(frechet_infinity(real, generated).value) < 0.3 * fd(real, generated)


def test_infinity_warns_where_the_line_does_not_hold():
    real, generated = clouds(30, 60, 40)
    found = frechet_infinity(real, generated)
    assert found.sizes[0] == 6
    assert [line.split(":")[0] for line in found.warnings[:2]] == [
        "the smallest subset has 6 rows for 40 feature dimensions",
        "30 real images for 40 feature dimensions",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"points": 2}, "2 points over 300 generated rows give 2 different sizes"),
        ({"smallest": 300}, "smallest subset has 300 rows, expected 2 to 299"),
        ({"smallest": 1}, "smallest subset has 1 rows"),
    ],
)
def test_infinity_refuses_too_few_sizes(arguments, message):
    with pytest.raises(UserError, match=message):
        frechet_infinity(*clouds(), **arguments)
