"""Glass of any colour and light, black that was not scanned, and pale pieces next to strong ones.

All pictures are made from the committed slide: the mask of the picture as it is, is the reference.
"""

from pathlib import Path

import cv2
import numpy as np
import openslide
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import UserError
from pipeline.__main__ import main
from pipeline.dataset import Dataset, claim_identity, read_slides
from pipeline.dataset.commit import new_run_id
from pipeline.tissue.classes import TissueClass
from pipeline.tissue.colour import NotHematoxylinEosinError
from pipeline.tissue.config import TissueConfig
from pipeline.tissue.detect import Detection, DetectorConfig, detect_tissue
from pipeline.tissue.detector import ClassicalDetector
from pipeline.tissue.glass import estimate_glass, find_black, glass_level
from pipeline.tissue.stage import record_tissue

CMU = Path(__file__).resolve().parents[1] / "data" / "slides" / "CMU-1-Small-Region.svs"
CONFIG, UM_PER_PX = DetectorConfig(), 16 * 0.499
TINTS = {
    "warm": (235, 225, 208),
    "yellow": (243, 236, 207),
    "pinkish": (235, 212, 226),
    "blue": (219, 226, 243),
    "green": (200, 243, 210),
    "dim": (195, 195, 195),
    "dim_warm": (210, 200, 195),
    "very_dim": (110, 104, 98),
}


def cmu_overview() -> np.ndarray:
    slide = openslide.OpenSlide(CMU)
    image = np.array(slide.read_region((0, 0), 0, slide.dimensions).convert("RGB"))
    size = (image.shape[1] // 16, image.shape[0] // 16)
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA)


def on_glass(level: int = 243) -> np.ndarray:
    """The slide twice, mirrored, with 60 pixels of even glass around it."""
    image = np.concatenate([OVERVIEW, OVERVIEW[:, ::-1]], 1)
    return np.pad(image, ((60, 60), (60, 60), (0, 0)), constant_values=level)


def as_bytes(image: np.ndarray) -> np.ndarray:
    return np.clip(np.round(image), 0, 255).astype(np.uint8)


def detect(image: np.ndarray) -> Detection:
    return detect_tissue(image, UM_PER_PX, CONFIG)


def is_tissue(mask: np.ndarray) -> np.ndarray:
    return np.isin(mask, (TissueClass.TISSUE, TissueClass.FOLD))


def overlap(mask: np.ndarray, reference: np.ndarray) -> float:
    """IoU of the tissue of two masks."""
    one, other = is_tissue(mask), is_tissue(reference)
    return float((one & other).sum() / (one | other).sum())


def pen_share(mask: np.ndarray, reference: np.ndarray) -> float:
    """Share of the reference's tissue that is called pen."""
    return float((mask == TissueClass.PEN)[is_tissue(reference)].mean())


def light(shape: tuple[int, ...], kind: str, loss: float) -> np.ndarray:
    """Share of the light that arrives, [h, w, 1]: at least 1 - loss."""
    height, width = shape[:2]
    y, x = np.mgrid[0:height, 0:width]
    y, x = y / height, x / width
    lost = {
        "even": 0 * x,
        "from the left": x,
        "from a corner": (x + y) / 2,
        "vignette": 2 * ((x - 0.5) ** 2 + (y - 0.5) ** 2),
        "stripes": np.floor(x * 8) % 2,
        "two regions": (x > 0.5).astype(float),
    }[kind]
    return (1 - loss * lost)[..., None]


KINDS = ("even", "from the left", "from a corner", "vignette", "stripes", "two regions")
OVERVIEW = cmu_overview()
SLIDE = on_glass()
REFERENCE = detect(SLIDE).mask


@given(
    st.tuples(*[st.floats(0.75, 1.0)] * 3),
    st.sampled_from(KINDS),
    st.floats(0, 0.2),
    st.sampled_from([SLIDE, OVERVIEW]),
)
@settings(max_examples=25, deadline=None, derandomize=True)
def test_tissue_is_the_same_in_any_light(tint, kind, loss, slide):
    image = as_bytes(slide * np.array(tint) * light(slide.shape, kind, loss))
    reference = REFERENCE if slide is SLIDE else detect(OVERVIEW).mask
    found = detect(image)
    assert overlap(found.mask, reference) >= 0.95
    assert pen_share(found.mask, reference) < 0.01
    assert (found.mask == TissueClass.PEN).mean() < 0.01
    assert not found.notes


@pytest.mark.parametrize("name", TINTS)
def test_the_level_of_the_glass_is_its_colour(name):
    image = as_bytes(SLIDE * (np.array(TINTS[name]) / 243))
    assert glass_level(image) == pytest.approx(TINTS[name], abs=3)
    assert estimate_glass(image).found
    assert overlap(detect(image).mask, REFERENCE) >= 0.97


@pytest.mark.parametrize("channels", [(0,), (2,), (0, 1, 2)])
def test_glass_may_be_saturated(channels):
    image = SLIDE.astype(np.float64)
    image[..., channels] *= 255 / 240
    found = detect(as_bytes(image))
    assert overlap(found.mask, REFERENCE) >= 0.97
    assert not found.notes


@pytest.mark.parametrize("level", [255, 254, 250, 240])
@pytest.mark.parametrize("tint", [(1, 1, 1), (0.96, 0.92, 0.85), (0.8, 0.8, 0.8)])
def test_padding_is_no_glass(level, tint):
    noise = np.random.default_rng(0).normal(0, 0.5, (*SLIDE.shape[:2], 1))
    scanned = as_bytes(SLIDE * np.array(tint) + noise)
    image = np.pad(scanned, ((40, 60), (50, 90), (0, 0)), constant_values=level)
    mask = detect(image).mask
    assert overlap(mask[40:-60, 50:-90], REFERENCE) >= 0.95
    assert is_tissue(mask).sum() <= 1.05 * is_tissue(REFERENCE).sum()


@pytest.mark.parametrize("radius", [110, 145])
@pytest.mark.parametrize("kind", ["from the left", "vignette"])
def test_glass_does_not_follow_large_pale_tissue(radius, kind):
    y, x = np.mgrid[0:300, 0:300]
    disc = np.hypot(y - 150, x - 150) < radius
    density = disc[..., None] * np.array([0.009, 0.072, 0.045])
    noise = np.random.default_rng(0).normal(0, 0.4, (300, 300, 3))
    clean = 244 * 10**-density - 1 + noise
    mask = detect(as_bytes(clean * light(clean.shape, kind, 0.2))).mask
    assert is_tissue(mask)[disc].mean() > 0.97
    assert is_tissue(mask)[~disc].mean() < 0.05


def test_a_slide_without_glass_says_so():
    solid = np.tile(np.array([[[205, 120, 170]]], np.uint8), (90, 90, 1)).astype(np.float64)
    solid += np.random.default_rng(0).normal(0, 12, (90, 90, 3))
    found = detect(as_bytes(solid))
    assert is_tissue(found.mask).mean() > 0.99
    assert found.glass == (245, 245, 245)
    assert "no empty glass was found" in found.notes[0]
    assert "245/245/245" in found.notes[0]


@pytest.mark.parametrize("share", [0.1, 0.37, 0.45, 0.67, 0.85])
@pytest.mark.parametrize("level", [0, 8])
def test_black_around_a_slide_changes_nothing_on_it(share, level):
    grown = (1 / (1 - share)) ** 0.5
    height, width = (round(length * grown) for length in SLIDE.shape[:2])
    top, left = (height - SLIDE.shape[0]) // 2, (width - SLIDE.shape[1]) // 3
    image = np.full((height, width, 3), level, np.uint8)
    inside = np.s_[top : top + SLIDE.shape[0], left : left + SLIDE.shape[1]]
    image[inside] = SLIDE
    mask = detect(image).mask
    assert overlap(mask[inside], REFERENCE) >= 0.98
    assert (mask == TissueClass.PEN).mean() < 0.001
    # Around it lies what spoils a tile, as far as one may reach, and then nothing.
    around = np.full(mask.shape, True)
    around[inside] = False
    assert not is_tissue(mask)[around].any()
    assert (mask[max(0, top - 60) : top, left + 60 : left + 120] == TissueClass.OTHER).all()


def test_black_that_cuts_through_tissue_is_an_artifact_and_spoils_nothing():
    image = SLIDE.copy()
    image[:, :150] = 0
    image[100:160, 220:300] = 3
    mask = detect(image).mask
    black = (image.max(-1) < 40) > 0
    assert not np.isin(mask[black], (TissueClass.TISSUE, TissueClass.FOLD, TissueClass.PEN)).any()
    assert (mask[:, 100:150] == TissueClass.OTHER).all()
    away = cv2.dilate(black.astype(np.uint8), np.ones((9, 9))) == 0
    assert overlap(np.where(away, mask, 0), np.where(away, REFERENCE, 0)) >= 0.97
    assert pen_share(mask, REFERENCE) < 0.02


@pytest.mark.parametrize("angle", [30, 60])
def test_black_ink_is_not_taken_for_what_was_not_scanned(angle):
    image = SLIDE.copy()
    end = (round(600 * np.cos(np.radians(angle))), round(600 * np.sin(np.radians(angle))))
    cv2.line(image, (0, 0), end, (3, 3, 3), 20, cv2.LINE_AA)
    assert find_black(image, UM_PER_PX) is None
    assert (detect(image).mask[(image == 3).all(-1)] == TissueClass.PEN).all()


@pytest.mark.parametrize("level", [0, 8, 30])
def test_an_empty_scan_is_refused(level):
    with pytest.raises(NotHematoxylinEosinError, match="100% of the slide is black"):
        detect(np.full((120, 160, 3), level, np.uint8))


def test_fluorescence_on_black_is_refused_also_where_its_edges_are_straight():
    image = np.zeros((200, 300, 3), np.uint8)
    image[50:120, 100:200, 2] = 180
    image[50:120, 100:200, 1] = 30
    with pytest.raises(NotHematoxylinEosinError, match="fluorescence"):
        detect(image)


@pytest.mark.parametrize("side", ["top", "left", "bottom"])
@pytest.mark.parametrize("loss", [0.5, 0.7, 0.8])
def test_shade_at_an_edge_is_no_ink(side, loss):
    height, width = SLIDE.shape[:2]
    # Without the glass above: the shade lies on tissue.
    slide, reference = SLIDE[62:], REFERENCE[62:]
    y, x = np.mgrid[0 : height - 62, 0:width]
    away = {"top": y / height, "left": x / width, "bottom": 1 - y / height}[side]
    shade = 1 - loss * np.clip(1 - away / 0.4, 0, 1) ** 2
    mask = detect(as_bytes(slide * shade[..., None] * np.array([1, 0.98, 0.96]))).mask
    assert pen_share(mask, reference) < 0.02
    assert (mask == TissueClass.PEN).mean() < 0.02
    assert overlap(mask, reference) >= 0.95


@pytest.mark.parametrize(("pale", "strong"), [(0.15, 1.0), (0.25, 2.0), (0.5, 1.0)])
def test_a_pale_piece_keeps_what_it_keeps_alone(pale, strong):
    density = np.log10(244 / (OVERVIEW[:175, :100].astype(np.float64) + 1)).clip(0)

    def slide_with(*strengths: float) -> np.ndarray:
        canvas = np.zeros((260, 420, 3))
        for left, strength in zip((40, 280), strengths, strict=True):
            canvas[40:215, left : left + 100] = strength * density
        return is_tissue(
            detect(as_bytes(244 * 10 ** -cv2.GaussianBlur(canvas, (0, 0), 0.7) - 1)).mask
        )

    both = slide_with(pale, strong)
    for half, alone in ((np.s_[:, :210], (pale, 0)), (np.s_[:, 210:], (0, strong))):
        before, after = slide_with(*alone)[half], both[half]
        assert before.sum() > 5000
        assert (before & after).sum() >= 0.98 * before.sum()
        assert after.sum() <= 1.02 * before.sum()


def test_masks_and_glass_are_the_same_on_every_run():
    image = as_bytes(SLIDE * light(SLIDE.shape, "vignette", 0.2) * np.array([1, 0.95, 0.9]))
    first, second = detect(image), detect(image)
    assert np.array_equal(first.mask, second.mask)
    assert (first.glass, first.glass_variation) == (second.glass, second.glass_variation)
    assert first.glass_variation == pytest.approx(0.18, abs=0.05)


@pytest.fixture(scope="module")
def scanned(tmp_path_factory):
    """A dataset of two slides: one without glass, one in light that falls off to the right."""
    folder, root = tmp_path_factory.mktemp("slides"), tmp_path_factory.mktemp("dataset")
    cells = cv2.GaussianBlur(np.random.default_rng(0).normal(0, 20, (800, 800, 3)), (0, 0), 24)
    uneven = as_bytes(OVERVIEW * light(OVERVIEW.shape, "from the left", 0.2))
    pictures = {
        "solid": as_bytes(np.array([205, 120, 170]) + 30 * cells),
        "uneven": cv2.resize(uneven, None, fx=8, fy=8, interpolation=cv2.INTER_LINEAR),
    }
    for name, picture in pictures.items():
        tifffile.imwrite(
            folder / f"{name}.tif", picture, photometric="rgb", tile=(256, 256), metadata=None,
            resolution=(20000, 20000), resolutionunit="CENTIMETER", compression="jpeg",
        )  # fmt: skip
    assert main(["scan", str(folder), "--dataset", str(root), "--workers", "1"]) == 0
    return Dataset(root)


def test_notes_and_uneven_glass_are_in_the_entry(scanned):
    entries = {
        slide.slide_id: record_tissue(
            scanned, new_run_id(), slide, TissueConfig(), "f", ClassicalDetector()
        )
        for slide in read_slides(scanned)
    }
    (note,) = entries["solid"].values["notes"]
    assert "no empty glass was found" in note
    assert "glass_variation" not in entries["solid"].values
    assert "notes" not in entries["uneven"].values
    assert entries["uneven"].values["glass_variation"] == pytest.approx(0.19, abs=0.04)


def test_the_dataset_of_an_earlier_detector_is_refused_with_what_to_do(scanned):
    earlier = {"detector": "0123", "detector_parameters": {"name": "classical-2"}}
    claim_identity(scanned, earlier, stage="tissue", versions={})
    before = scanned.identity_file.read_bytes()
    words = "detector classical-2, and this release has classical-3; .* another --dataset"
    with pytest.raises(UserError, match=words):
        main(["tissue", "--dataset", str(scanned.root), "--workers", "1"])
    assert scanned.identity_file.read_bytes() == before
