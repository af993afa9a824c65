"""Focus: sharpness of a patch, and how patches become a mask."""

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.slides.open import open_slide
from pipeline.tissue.classes import TissueClass
from pipeline.tissue.focus import (
    FocusConfig,
    PatchSource,
    _neighbourhood_median,
    mark_out_of_focus,
    measure_sharpness,
    slide_patches,
)

CONFIG = FocusConfig()


def cells(seed: int, side: int = 112) -> np.ndarray:
    """Dark nuclei of 6 µm on a pink field at 1 µm per pixel."""
    random = np.random.default_rng(seed)
    image = np.full((side, side, 3), (225, 170, 200), np.uint8)
    for x, y in random.integers(0, side, (90, 2)).tolist():
        cv2.circle(image, (x, y), 3, (110, 70, 150), cv2.FILLED, cv2.LINE_AA)
    return image


@given(st.integers(0, 99))
@settings(max_examples=15, deadline=None)
def test_blur_lowers_sharpness_step_by_step(seed):
    image = cells(seed)
    blurred = [cv2.GaussianBlur(image, (0, 0), sigma) for sigma in (1.0, 2.0, 3.0)]
    values = [measure_sharpness(one, 1.0, 0.0) for one in (image, *blurred)]
    assert values == sorted(values, reverse=True)
    assert values[0] > CONFIG.min_sharpness > values[2]


def test_sharpness_knows_neither_the_lamp_nor_the_strength_of_the_stain():
    image = cells(3)
    density = -np.log10((image.astype(np.float64) + 1) / 256)
    for lamp, strength in ((0.9, 1.0), (1.0, 0.6)):
        other = (lamp * 255 * 10 ** (-strength * density)).round().clip(0, 255).astype(np.uint8)
        assert measure_sharpness(other, 1.0, 0.0) == pytest.approx(
            measure_sharpness(image, 1.0, 0.0), rel=0.05
        )


def test_sharpness_is_that_of_the_field_at_other_resolutions():
    large = cv2.resize(cells(5), None, fx=2, fy=2, interpolation=cv2.INTER_CUBIC)
    assert measure_sharpness(large, 0.5, 0.0) == pytest.approx(
        measure_sharpness(cells(5), 1.0, 0.0), rel=0.2
    )


def test_an_empty_patch_is_not_judged():
    assert np.isnan(
        measure_sharpness(np.full((64, 64, 3), 240, np.uint8), 1.0, CONFIG.min_contrast)
    )


def test_only_tissue_is_probed_and_only_blurred_tissue_is_marked():
    mask = np.zeros((160, 160), np.uint8)
    mask[:, :100] = TissueClass.TISSUE
    mask[:40, :100] = TissueClass.PEN
    seen = []
    sharp, blurred = cells(0), cv2.GaussianBlur(cells(0), (0, 0), 4)

    def read(x_um: float, y_um: float) -> np.ndarray:
        seen.append((x_um / 8, y_um / 8))
        return blurred if y_um > 8 * 90 else sharp

    marked = mark_out_of_focus(mask, 8.0, PatchSource(read, 1.0), CONFIG)
    assert seen
    for x, y in seen:
        window = mask[int(y) : int(y) + 14, int(x) : int(x) + 14]
        assert (window == TissueClass.TISSUE).mean() > 0.6
    assert (marked[130:, :90] == TissueClass.OUT_OF_FOCUS).all()
    assert (marked[40:80, :90] == TissueClass.TISSUE).all()
    assert np.array_equal(marked[mask != TissueClass.TISSUE], mask[mask != TissueClass.TISSUE])


def test_one_smooth_spot_among_sharp_ones_is_not_blur():
    mask = np.full((192, 192), TissueClass.TISSUE, np.uint8)
    calls = iter(range(10_000))

    def read(x_um: float, y_um: float) -> np.ndarray:
        return cv2.GaussianBlur(cells(0), (0, 0), 4) if next(calls) == 14 else cells(0)

    marked = mark_out_of_focus(mask, 8.0, PatchSource(read, 1.0), CONFIG)
    assert next(calls) > 14
    assert (marked == TissueClass.TISSUE).all()


def test_the_number_of_patches_is_bounded():
    mask = np.full((2500, 3000), TissueClass.TISSUE, np.uint8)
    count = 0

    def read(x_um: float, y_um: float) -> np.ndarray:
        nonlocal count
        count += 1
        return cells(0)

    mark_out_of_focus(mask, 8.0, PatchSource(read, 1.0), CONFIG)
    assert 0.8 * CONFIG.max_probes < count <= 1.05 * CONFIG.max_probes


@pytest.mark.parametrize("shape", [(0, 0), (1, 1), (3, 200)])
def test_masks_too_small_for_a_patch_are_left_as_they_are(shape):
    mask = np.zeros(shape, np.uint8)
    marked = mark_out_of_focus(mask, 8.0, PatchSource(lambda x, y: cells(0), 1.0), CONFIG)
    assert np.array_equal(marked, mask)


@given(st.integers(0, 10_000))
@settings(max_examples=20, deadline=None)
def test_neighbourhood_median_is_the_median_of_what_was_judged(seed):
    random = np.random.default_rng(seed)
    values = random.random((4, 5))
    values[random.random((4, 5)) < 0.6] = np.nan
    result = _neighbourhood_median(values)
    for row in range(4):
        for column in range(5):
            around = values[max(0, row - 1) : row + 2, max(0, column - 1) : column + 2]
            known = around[~np.isnan(around)]
            if len(known):
                assert result[row, column] == np.median(known)
            else:
                assert np.isnan(result[row, column])


def test_patches_of_the_real_slide_lie_where_they_were_asked_for(cmu_slide):
    with open_slide(cmu_slide, "openslide") as reader:
        patches = slide_patches(reader, 0.499, CONFIG)
        assert patches is not None
        assert patches.um_per_px == pytest.approx(0.998)
        patch = patches.read(500.0, 800.0)
        direct = reader.read(0, 1002, 1603, 224, 224)
    assert np.array_equal(patch, cv2.resize(direct, (112, 112), interpolation=cv2.INTER_AREA))


def test_a_slide_too_coarse_is_not_judged(cmu_slide):
    with open_slide(cmu_slide, "openslide") as reader:
        assert slide_patches(reader, 2.0, CONFIG) is None
