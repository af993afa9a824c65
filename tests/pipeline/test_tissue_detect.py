"""The parts of the classical detector: properties and slow, obvious versions."""

import math

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.tissue.classes import TissueClass
from pipeline.tissue.colour import (
    ink_colour,
    is_coloured,
    optical_density,
    smooth_density,
)
from pipeline.tissue.detect import (
    DetectorConfig,
    classify_density,
    density_threshold,
    detect_tissue,
)
from pipeline.tissue.glass import glass_level
from pipeline.tissue.verdict import Verdict, judge_tiles

CONFIG = DetectorConfig()
EOSIN, HAEMATOXYLIN = (0.03, 0.24, 0.15), (0.24, 0.33, 0.17)


def slide_of(
    glass: int = 243, density: tuple[float, float, float] = EOSIN, side: int = 128
) -> np.ndarray:
    """Glass with a disc of evenly stained tissue, 50 pixels in radius, in the middle."""
    canvas = np.full((side, side, 3), glass, np.uint8)
    colour = [round((glass + 1) * 10**-d - 1) for d in density]
    cv2.circle(canvas, (side // 2, side // 2), 50, colour, cv2.FILLED)
    return canvas


@given(st.integers(210, 254))
@settings(max_examples=20, deadline=None)
def test_empty_glass_of_any_level_has_no_tissue(glass):
    noise = np.random.default_rng(glass).integers(-1, 2, (96, 96, 1))
    empty = (np.full((96, 96, 3), glass) + noise).clip(0, 254).astype(np.uint8)
    assert abs(glass_level(empty)[0] - glass) <= 1
    assert (detect_tissue(empty, 8.0, CONFIG).mask == TissueClass.BACKGROUND).all()


@given(st.integers(225, 254), st.sampled_from([EOSIN, HAEMATOXYLIN]), st.floats(0.25, 1.5))
@settings(max_examples=25, deadline=None)
def test_a_disc_of_stain_is_found_whatever_the_glass_and_the_strength(glass, stain, strength):
    density = tuple(strength * d for d in stain)
    mask = detect_tissue(slide_of(glass, density), 8.0, CONFIG).mask
    area = np.isin(mask, (TissueClass.TISSUE, TissueClass.FOLD)).sum()
    assert area == pytest.approx(math.pi * 50**2, rel=0.1)
    assert (mask != TissueClass.PEN).all()


def test_scanner_padding_does_not_move_the_glass_level():
    image = slide_of(241)
    padded = np.pad(image, ((0, 900), (0, 900), (0, 0)), constant_values=255)
    assert glass_level(padded) == glass_level(image) == (241, 241, 241)


def test_a_field_without_glass_has_a_level_to_go_by():
    assert glass_level(np.full((50, 50, 3), (190, 120, 180), np.uint8)) == (245, 245, 245)


def test_optical_density_is_beer_and_lambert():
    image = np.random.default_rng(0).integers(0, 256, (7, 5, 3)).astype(np.uint8)
    density = optical_density(image, (243, 241, 240))
    assert density.shape == (3, 7, 5)
    for channel, glass in enumerate((243, 241, 240)):
        for row in range(7):
            for column in range(5):
                value = math.log10((glass + 1) / (int(image[row, column, channel]) + 1))
                assert density[channel, row, column] == pytest.approx(max(0, value), abs=1e-6)


def test_the_threshold_follows_the_stain_and_not_the_dirt():
    stain = np.full(1000, 0.2, np.float32)
    dirt = np.full(10_000, 0.004, np.float32)
    clean = density_threshold(stain, CONFIG)
    assert clean == pytest.approx(0.04)
    assert density_threshold(np.concatenate([stain, dirt]), CONFIG) == pytest.approx(clean, 0.2)
    assert density_threshold(stain / 8, CONFIG) == CONFIG.min_density
    assert density_threshold(stain * 5, CONFIG) == CONFIG.max_density
    assert density_threshold(np.zeros(0, np.float32), CONFIG) == CONFIG.min_density


@pytest.mark.parametrize("density", [EOSIN, HAEMATOXYLIN])
def test_stains_are_no_ink_and_grey_is_no_stain(density):
    field = np.array(density, np.float32)[:, None, None] * np.linspace(0.2, 2, 9)[None, None]
    sure, _ = ink_colour(field.astype(np.float32))
    assert not sure.any()
    assert is_coloured(field.astype(np.float32)).all()
    grey = np.broadcast_to(field.mean(0), field.shape).astype(np.float32)
    assert not is_coloured(grey).any()


def test_a_hair_and_a_speck_of_dust_are_other_artifacts():
    image = slide_of()
    cv2.line(image, (2, 2), (2, 120), (90, 90, 90), 2)
    mask = detect_tissue(image, 8.0, CONFIG).mask
    assert (mask[10:110, 2] == TissueClass.OTHER).all()
    assert (mask != TissueClass.PEN).all()


def test_ink_wins_over_tissue_and_specks_of_it_do_not():
    image = slide_of()
    image[60:80] = (20, 60, 160)
    image[40:42, 64:66] = (20, 60, 160)
    mask = detect_tissue(image, 8.0, CONFIG).mask
    assert (mask[61:79] == TissueClass.PEN).all()
    assert mask[41, 65] == TissueClass.TISSUE


def test_small_holes_are_filled_and_large_ones_are_not():
    image = slide_of()
    cv2.circle(image, (64, 40), 3, (243, 243, 243), cv2.FILLED)
    cv2.circle(image, (64, 80), 14, (243, 243, 243), cv2.FILLED)
    mask = detect_tissue(image, 8.0, CONFIG).mask
    assert mask[40, 64] == TissueClass.TISSUE
    assert mask[80, 64] == TissueClass.BACKGROUND


def test_sizes_are_in_micrometres():
    """The same object in finer pixels gets the same verdict."""
    image = np.full((64, 64, 3), 243, np.uint8)
    cv2.circle(image, (32, 32), 12, (220, 140, 170), cv2.FILLED)
    for factor in (1, 2, 4):
        large = cv2.resize(image, None, fx=factor, fy=factor, interpolation=cv2.INTER_NEAREST)
        kept = detect_tissue(large, 8.0 / factor, CONFIG).mask == TissueClass.TISSUE
        gone = detect_tissue(large, 4.0 / factor, CONFIG).mask == TissueClass.TISSUE
        area_um2 = kept.sum() * (8.0 / factor) ** 2
        assert area_um2 == pytest.approx(math.pi * 96**2, rel=0.25)
        assert not gone.any()


def test_the_same_picture_gives_the_same_mask_and_is_left_alone():
    image = np.random.default_rng(1).integers(0, 256, (80, 90, 3)).astype(np.uint8)
    before = image.copy()
    density = smooth_density(optical_density(image, (243, 243, 243)), 1.0)
    first, second = (classify_density(density, 8.0, CONFIG) for _ in range(2))
    assert np.array_equal(first, second)
    assert np.array_equal(image, before)


def test_an_overview_without_pixels_is_refused_with_a_reason():
    from pipeline.tissue.colour import NotHematoxylinEosinError

    with pytest.raises(NotHematoxylinEosinError):
        detect_tissue(np.zeros((0, 0, 3), np.uint8), 8.0, CONFIG)


def naive_verdict(
    window: np.ndarray, min_tissue: float, max_artifact: float, experimental: frozenset
) -> Verdict:
    """Count the pixels of one tile, one class after another."""
    share = {one: float((window == one).mean()) for one in TissueClass}
    tissue = sum(share[one] for one in (TissueClass.TISSUE, *experimental))
    artifacts = [one for one in TissueClass if one > TissueClass.TISSUE and one not in experimental]
    total = sum(share[one] for one in artifacts)
    if total > max_artifact:
        return Verdict(max(artifacts, key=lambda one: (share[one], -one)))
    if tissue >= min_tissue:
        return Verdict.KEPT
    return Verdict.LITTLE_TISSUE if tissue >= 0.01 else Verdict.NO_TISSUE


@given(st.integers(0, 2**32 - 1), st.booleans())
@settings(max_examples=30, deadline=None)
def test_tiles_are_judged_as_by_counting(seed, spare_folds):
    random = np.random.default_rng(seed)
    coarse = random.choice(6, (12, 12), p=(0.35, 0.35, 0.1, 0.05, 0.1, 0.05))
    mask = coarse.repeat(4, 0).repeat(4, 1).astype(np.uint8)
    ys, xs = np.mgrid[0:48:16, 0:48:16].astype(np.float64)
    experimental = frozenset({TissueClass.FOLD}) if spare_folds else frozenset()
    judgement = judge_tiles(
        mask, xs.ravel(), ys.ravel(), 16.0,
        min_tissue=0.45, max_artifact=0.15, experimental=experimental,
    )  # fmt: skip
    for index, (x, y) in enumerate(zip(xs.ravel(), ys.ravel(), strict=True)):
        window = mask[int(y) : int(y) + 16, int(x) : int(x) + 16]
        expected = naive_verdict(window, 0.45, 0.15, experimental)
        assert judgement.verdict[index] == expected
    assert sum(judgement.count_verdicts().values()) == 9
    assert np.array_equal(judgement.kept, judgement.verdict == Verdict.KEPT)
