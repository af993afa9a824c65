import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.slides.reader import Level, ResolutionTags
from pipeline.slides.resolution import (
    ResolutionError,
    area_resample,
    level_downsamples,
    plan_read,
    resolve_mpp,
)

APERIO = [Level(100_000, 80_000, 1.0), Level(25_000, 20_000, 4.00012), Level(6250, 5000, 16.0013)]


def test_mpp_comes_in_the_stated_order():
    tags = ResolutionTags(vendor=(0.25, 0.25), tiff=(0.3, 0.3))
    assert resolve_mpp(tags, table=0.4, assumed=0.6).source == "table"
    assert resolve_mpp(tags, table=None, assumed=0.6).source == "vendor"
    only_tiff = ResolutionTags(tiff=(0.3, 0.3))
    assert resolve_mpp(only_tiff, table=None, assumed=0.6).source == "tiff-tags"
    assert resolve_mpp(ResolutionTags(), table=None, assumed=0.6).source == "assumed"
    with pytest.raises(ResolutionError, match="--assume-mpp"):
        resolve_mpp(ResolutionTags(), table=None, assumed=None)


def test_tiff_tags_outside_the_window_are_not_believed():
    with pytest.raises(ResolutionError, match=r"352\.8"):
        resolve_mpp(ResolutionTags(tiff=(352.8, 352.8)), table=None, assumed=None)


def test_pixels_that_are_not_square_are_rejected():
    with pytest.raises(ResolutionError, match="not square"):
        resolve_mpp(ResolutionTags(vendor=(0.25, 0.26)), table=None, assumed=None)
    assert resolve_mpp(ResolutionTags(vendor=(0.25, 0.2505)), table=None, assumed=None)


@pytest.mark.parametrize(
    ("mpp", "factor", "aligned", "true_mpp"),
    [
        (0.25, 2, True, 0.5),
        (0.2525, 2, True, 0.505),
        (0.499, 1, True, 0.499),
        (0.5, 1, True, 0.5),
        (0.125, 1, True, 0.5),
        (0.2325, 0.5 / 0.2325, False, 0.5),
    ],
)
def test_integer_multiples_within_tolerance_are_aligned(mpp, factor, aligned, true_mpp):
    plan = plan_read(APERIO, mpp, 0.5, 0.02, 224)
    assert plan.factor == pytest.approx(factor)
    assert plan.aligned is aligned
    assert plan.mpp == pytest.approx(true_mpp)
    assert plan.level == (1 if mpp == 0.125 else 0)


def test_tolerance_zero_forces_exactness():
    plan = plan_read(APERIO, 0.2525, 0.5, 0.0, 224)
    assert not plan.aligned
    assert plan.mpp == pytest.approx(0.5, abs=1e-12)
    assert plan_read(APERIO, 0.25, 0.5, 0.0, 224).aligned


def test_nothing_is_enlarged():
    with pytest.raises(ResolutionError, match="never enlarged"):
        plan_read([Level(1472, 690, 1.0)], 0.987, 0.5, 0.02, 224)
    assert plan_read([Level(1472, 690, 1.0)], 0.505, 0.5, 0.02, 224).factor == 1


@given(mpp=st.floats(0.1, 0.5), target=st.floats(0.5, 2.0), tolerance=st.sampled_from([0, 0.02]))
@settings(max_examples=100, deadline=None)
def test_plans_hold_their_promises(mpp, target, tolerance):
    plan = plan_read(APERIO, mpp, target, tolerance, 224)
    assert plan.factor >= 1 - tolerance
    assert abs(plan.mpp - target) <= tolerance * target + 1e-9
    assert plan.stride_level0 * mpp == pytest.approx(224 * plan.mpp)
    if plan.aligned:
        assert plan.factor == round(plan.factor)


def test_downsamples_of_rounded_levels_are_the_whole_ones_that_were_meant():
    base = Level(44_443, 35_671, 1.0)
    levels = [
        base,
        Level(11_110, 8_917, (44_443 / 11_110 + 35_671 / 8_917) / 2),
        Level(2_777, 2_229, (44_443 / 2_777 + 35_671 / 2_229) / 2),
        Level(17_777, 14_268, 2.5),
    ]
    assert levels[1].downsample != 4
    assert level_downsamples(levels) == [1.0, 4.0, 16.0, 2.5]
    off = Level(22_111, 17_747, 44_443 / 22_111)
    assert level_downsamples([base, off]) == [1.0, off.downsample], "110 px away at the far edge"
    thin = Level(2_500, 10, (10_000 / 2_500 + 42 / 10) / 2)
    assert level_downsamples([Level(10_000, 42, 1.0), thin]) == [1.0, 4.0], "10 rows are 10.5"


def test_area_resample_equals_the_plain_mean_for_integer_factors():
    image = np.random.default_rng(0).integers(0, 256, (448, 448, 3), dtype=np.uint8)
    means = image.reshape(224, 2, 224, 2, 3).mean((1, 3))
    assert np.abs(area_resample(image, 0, 0, 448, 224) - means).max() <= 0.5


def test_area_resample_at_sub_pixels_equals_an_oversampled_mean():
    rng = np.random.default_rng(1)
    image = rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)
    # Edges at multiples of 1/8 px: start 0.375, cells of 2.125 px.
    fine = np.kron(image.astype(float), np.ones((8, 8, 1)))
    cell = 17
    expected = np.array(
        [
            [
                fine[5 + i * cell : 5 + (i + 1) * cell, 3 + j * cell : 3 + (j + 1) * cell].mean(
                    (0, 1)
                )
                for j in range(16)
            ]
            for i in range(16)
        ]
    )
    found = area_resample(image, 0.375, 0.625, 16 * 2.125, 16)
    assert np.abs(found - expected).max() <= 0.501
