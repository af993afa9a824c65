"""Levels are believed where their size and their pixels are reductions of level 0."""

from pathlib import Path

import cv2
import numpy as np
import pytest
import tifffile
from PIL import Image

from pipeline.dataset import Slide
from pipeline.slides.config import ScanConfig
from pipeline.slides.describe import describe_slide
from pipeline.slides.entries import SlideEntry
from pipeline.slides.levels import without_levels
from pipeline.slides.open import open_scanned, open_slide
from pipeline.slides.pyramid import find_difference, find_false_levels
from pipeline.slides.region import read_region

GLASS = 243
JPEG = {"compression": "jpeg", "compressionargs": {"level": 80}}
DEFLATE = {"compression": "zlib"}


@pytest.fixture(scope="module")
def tissue(cmu_slide) -> np.ndarray:
    """Real H&E and glass, [2967, 2220, 3]."""
    return tifffile.imread(cmu_slide, key=0)


def write_pyramid(path: Path, levels, *, mpp=0.25, **codec) -> Path:
    """Tiled TIFF of these images, the first of which is level 0."""
    with tifffile.TiffWriter(path) as writer:
        for number, image in enumerate(levels):
            writer.write(
                image, tile=(256, 256), photometric="rgb", metadata=None,
                subfiletype=int(number > 0), resolution=(10_000 / mpp,) * 2,
                resolutionunit="CENTIMETER", **(codec or JPEG),
            )  # fmt: skip
    return path


def reduced(image: np.ndarray, factor: int, kernel: str = "box") -> np.ndarray:
    height, width = image.shape[0] // factor, image.shape[1] // factor
    whole = image[: height * factor, : width * factor]
    if kernel == "nearest":
        return np.ascontiguousarray(whole[::factor, ::factor])
    if kernel == "lanczos":
        return np.array(Image.fromarray(whole).resize((width, height), Image.Resampling.LANCZOS))
    means = whole.reshape(height, factor, width, factor, 3).mean((1, 3))
    if kernel == "sharpened":
        means += means - cv2.GaussianBlur(means, (0, 0), 1.5)
    return np.clip(np.rint(means), 0, 255).astype(np.uint8)


def padded(image: np.ndarray, height: int, width: int, fill: int = 255) -> np.ndarray:
    canvas = np.full((height, width, 3), fill, np.uint8)
    canvas[: image.shape[0], : image.shape[1]] = image[:height, :width]
    return canvas


def false_levels(path: Path, reader: str = "auto") -> dict[int, str]:
    with open_slide(path, reader) as slide:
        return find_false_levels(slide)


@pytest.mark.parametrize("codec", [DEFLATE, {**JPEG, "compressionargs": {"level": 30}}])
@pytest.mark.parametrize("kernel", ["nearest", "box", "lanczos", "sharpened"])
def test_reductions_are_kept(tissue, tmp_path, kernel, codec):
    levels = [tissue, *(reduced(tissue, f, kernel) for f in (2, 4, 16))]
    for levels_of_one in (levels, [tissue, levels[-1]]):
        assert false_levels(write_pyramid(tmp_path / "a.tif", levels_of_one, **codec)) == {}


@pytest.mark.parametrize("rounding", [np.floor, np.ceil, np.rint])
def test_sizes_may_be_rounded_in_any_way(tissue, tmp_path, rounding):
    levels, size = [tissue], np.array(tissue.shape[1::-1])
    for _ in range(5):
        size = rounding(size / 2).astype(int)
        levels.append(cv2.resize(tissue, size.tolist(), interpolation=cv2.INTER_AREA))
    assert false_levels(write_pyramid(tmp_path / "a.tif", levels)) == {}


def test_a_downsample_need_not_be_whole(tissue, tmp_path):
    levels = [
        cv2.resize(tissue, None, fx=1 / f, fy=1 / f, interpolation=cv2.INTER_AREA)
        for f in (1, 1.5, 2.5)
    ]
    assert false_levels(write_pyramid(tmp_path / "a.tif", levels)) == {}


def _shifted(level, x, y=0):
    return np.roll(level, (y, x), (0, 1))


def _scaled(level, factor):
    """The level's picture, larger or smaller by a factor, in the level's own size."""
    size = [round(level.shape[1] * factor), round(level.shape[0] * factor)]
    return padded(cv2.resize(level, size, interpolation=cv2.INTER_AREA), *level.shape[:2], GLASS)


def _macro(level):
    """The slide as a small picture on a grey table, with its label."""
    canvas = np.full_like(level, 180)
    small = cv2.resize(level, None, fx=0.4, fy=0.4, interpolation=cv2.INTER_AREA)
    canvas[100 : 100 + small.shape[0], 200 : 200 + small.shape[1]] = small
    canvas[100:400, 20:180] = (250, 250, 240)
    return canvas


def _label(level):
    canvas = np.full_like(level, 245)
    cv2.putText(canvas, "S24-1187", (40, 300), cv2.FONT_HERSHEY_SIMPLEX, 5, (10, 10, 60), 12)
    return canvas


def _half_missing(level):
    part = level.copy()
    part[:, level.shape[1] // 2 :] = 255
    return part


DAMAGES = {
    "mirrored": (lambda v: v[:, ::-1], "does not show"),
    "upside down": (lambda v: v[::-1, ::-1], "level 0"),
    "shifted by 3 px": (lambda v: _shifted(v, 3), "shifted by 3.|shifted by 2."),
    "shifted by 4 px up": (lambda v: _shifted(v, 0, -4), "shifted by 4.|shifted by 3."),
    "shifted by 40 px": (lambda v: _shifted(v, 40, 25), "level 0"),
    "larger by 1 %": (lambda v: _scaled(v, 1.01), "level 0|shifted"),
    "smaller by 5 %": (lambda v: _scaled(v, 0.95), "level 0|shifted"),
    "macro": (_macro, "level 0"),
    "label": (_label, "level 0"),
    "blank": (lambda v: np.full_like(v, 255), "blank where level 0 is not"),
    "half missing": (_half_missing, "level 0"),
    "inverted": (lambda v: 255 - v, "does not show"),
    "darker": (lambda v: (v * 0.85).astype(np.uint8), "colours are not those"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_other_pictures_are_left_out_wherever_they_are(tissue, tmp_path, name):
    damage, words = DAMAGES[name]
    whole = [reduced(tissue, f) for f in (2, 4)]
    false = [np.ascontiguousarray(damage(level)) for level in whole]
    for levels, expected in (([false[0]], {1}), ([whole[0], false[1]], {2}), (false, {1, 2})):
        path = write_pyramid(tmp_path / "a.tif", [tissue, *levels])
        found = false_levels(path)
        assert set(found) == expected, found
        assert all(np.any([w in reason for w in words.split("|")]) for reason in found.values())


def test_the_level_of_another_slide_is_left_out(tissue, tmp_path):
    one, other = tissue[:1400, :2200], tissue[1500:2900, :2200]
    path = write_pyramid(tmp_path / "a.tif", [one, reduced(other, 2), reduced(one, 4)])
    assert set(false_levels(path)) == {1}


def test_padded_and_cropped_levels_are_left_out_by_their_sizes(tissue, tmp_path):
    half = reduced(tissue, 2)
    for level in (padded(half, 1536, 1536), half[:-200, :-100], half[:, :-20]):
        path = write_pyramid(tmp_path / "a.tif", [tissue, np.ascontiguousarray(level)])
        found = false_levels(path)
        across, down = 2220 / level.shape[1], 2967 / level.shape[0]
        assert list(found) == [1]
        assert f"{level.shape[1]}x{level.shape[0]} px is {across:.4g} of level 0" in found[1]
        assert f"{down:.4g} down" in found[1]


def test_padding_in_one_ratio_is_found_by_its_pixels(tissue, tmp_path):
    """A square slide whose level is padded alike on both sides: 2.1 for 2 is no contradiction."""
    square = tissue[700:2700, 100:2100]
    path = write_pyramid(
        tmp_path / "a.tif", [square, padded(reduced(square, 2), 1050, 1050, GLASS)]
    )
    assert "level 0" in false_levels(path)[1]


def test_a_small_piece_is_found_on_much_glass(tissue, tmp_path):
    """One piece of tissue on 4 % of the slide; the blank level says nothing of where it is."""
    canvas = np.full((5000, 4000, 3), GLASS, np.uint8)
    canvas[3300:4300, 2300:3100] = tissue[1300:2300, 400:1200]
    blank = np.full((2500, 2000, 3), GLASS, np.uint8)
    half = reduced(canvas, 2)
    for levels, expected in (
        ([blank], {1}),
        ([blank, reduced(canvas, 16)], {1}),
        ([blank, _label(reduced(canvas, 4))], {1, 2}),
        ([half, np.ascontiguousarray(blank[::2, ::2])], {2}),
        ([half, reduced(canvas, 4)], set()),
    ):
        path = write_pyramid(tmp_path / "a.tif", [canvas, *levels])
        assert set(false_levels(path)) == expected


def test_levels_of_bare_glass_are_taken_by_their_sizes(tmp_path):
    noise = np.random.default_rng(0).normal(GLASS, 2.0, (2000, 3000, 3))
    glass = np.clip(np.rint(noise), 0, 255).astype(np.uint8)
    levels = [glass, reduced(glass, 2), np.full((500, 750, 3), GLASS, np.uint8)]
    assert false_levels(write_pyramid(tmp_path / "a.tif", levels)) == {}


def test_a_straight_edge_alone_is_no_shift():
    edge = np.full((74, 74, 3), 240, np.uint8)
    edge[:, 37:] = 20
    rng = np.random.default_rng(0)
    noisy = np.clip(edge + rng.normal(0, 3, edge.shape), 0, 255).astype(np.uint8)
    assert find_difference(edge, noisy) == ""
    assert "shifted by" in find_difference(edge, np.roll(noisy, 4, 1))


def test_real_slides_keep_their_levels(shared_data):
    for name in ("TCGA-CR-7395-01A-01-TS1.svs", "diag_packer_example.tif", "openslide_boxes.tiff",
                 "slideio_test3-DAPI-2-387.ndpi"):  # fmt: skip
        assert false_levels(shared_data / "slides" / name) == {}, name


def test_tiles_come_from_the_right_place_without_the_false_level(tissue, tmp_path):
    """The padded level would be read at a downsample of 1.7: the tile is level 0's reduction."""
    half = reduced(tissue, 2)
    entry = SlideEntry(tmp_path / "a.tif", "a")
    described = {}
    for name, levels in (("a", [tissue, padded(half, 1536, 1536)]), ("b", [tissue])):
        path = write_pyramid(tmp_path / f"{name}.tif", levels)
        slide, _ = describe_slide(Slide("a", str(path)), path, entry, ScanConfig(inputs=("x",)))
        described[name] = slide
    slide = described["a"]
    assert (slide.status, slide.levels_left_out) == ("ok", (1,))
    assert slide.levels == described["b"].levels == ((2220, 2967, 1.0),)
    assert slide.notes == (
        "level 1 left out: 1536x1536 px is 1.445 of level 0 across and 1.932 down",
    )
    tiles = []
    for name, slide in described.items():
        with open_scanned(slide, tmp_path / f"{name}.tif") as reader:
            tiles.append(read_region(reader, 0.25, 900, 1300, 224, 0.5))
    assert np.array_equal(*tiles)
    with open_slide(tmp_path / "a.tif") as reader:
        kept = without_levels(reader, [1])
        assert np.array_equal(read_region(kept, 0.25, 900, 1300, 224, 0.5), tiles[0])
        assert not np.array_equal(read_region(reader, 0.25, 900, 1300, 224, 0.5), tiles[0])
