"""A level of fractional downsample is shown as it is in the file; OpenSlide interpolates it."""

from pathlib import Path

import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.dataset import Slide, fingerprint_of
from pipeline.slides import level_blocks, openslide_reader
from pipeline.slides.level_blocks import block_edges
from pipeline.slides.openslide_reader import OpenSlideReader
from pipeline.slides.region import cut_tiles
from pipeline.slides.resolution import plan_read
from pipeline.tiles.stage import STAGE, VERSION, tile_fingerprint
from pipeline.tissue.stage import tissue_fingerprint
from tests.pipeline.dicom_files import shrink, tissue

CMU = Path(__file__).parents[1] / "data" / "slides" / "CMU-1-Small-Region.svs"
IDENTITY = {
    "resampler": "area", "icc": "ignore", "codec": "png", "mpp": 0.5, "mpp_tolerance": 0.02,
    "tile_px": 224, "seed": 1, "overview_mpp": 8.0,
}  # fmt: skip


@pytest.fixture(scope="module")
def odd_slide(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[np.ndarray]]:
    """A pyramid of odd sizes, without loss, and its levels as they were written."""
    base = tissue(CMU, 2001, 1703)
    levels = [base, shrink(base, 2), shrink(base, 4)]
    path = tmp_path_factory.mktemp("odd") / "odd.tif"
    with tifffile.TiffWriter(path) as tiff:
        for number, level in enumerate(levels):
            tiff.write(
                level, tile=(256, 256), photometric="rgb", compression="zlib", metadata=None,
                subfiletype=min(number, 1), resolution=(40000 / 2**number,) * 2,
                resolutionunit="CENTIMETER",
            )  # fmt: skip
    return path, levels


def white_around(image: np.ndarray, x: int, y: int, width: int, height: int) -> np.ndarray:
    """A window of an image that is white beyond its edges."""
    padded = np.pad(image, ((400, 400), (400, 400), (0, 0)), constant_values=255)
    return padded[y + 400 : y + 400 + height, x + 400 : x + 400 + width]


@pytest.mark.parametrize("block_px", [300, 2048])
def test_windows_are_the_levels_own_pixels(odd_slide, monkeypatch, block_px):
    monkeypatch.setattr(level_blocks, "_BLOCK_PX", block_px)
    path, levels = odd_slide
    rng = np.random.default_rng(4)
    with OpenSlideReader(path) as slide:
        assert slide.levels[1].downsample % 1
        for _ in range(40):
            level = int(rng.integers(0, 3))
            height, width = levels[level].shape[:2]
            window = (*(int(rng.integers(-200, side)) for side in (width, height)), 224, 190)
            expected = white_around(levels[level], *window)
            assert np.array_equal(slide.read(level, *window), expected), (level, window)


def test_tiles_are_the_levels_own_pixels(odd_slide):
    path, levels = odd_slide
    with OpenSlideReader(path) as slide:
        plan = plan_read(slide.levels, 0.25, 0.5, 0.02, 224)
        assert plan.level == 1
        x, y = (axis.ravel() * 448.0 for axis in np.meshgrid(range(3), range(4)))
        for index, tile in cut_tiles(slide, plan, x, y, 224):
            left, top = int(x[index] / 2), int(y[index] / 2)
            assert np.array_equal(tile, white_around(levels[1], left, top, 224, 224))


def test_a_level_out_of_reach_is_reduced_from_level_0(odd_slide, monkeypatch):
    monkeypatch.setattr(openslide_reader, "block_edges", lambda *_: None)
    path, levels = odd_slide
    with OpenSlideReader(path) as slide:
        for level in (1, 2):
            for window in ((0, 0, 300, 200), (57, 91, 224, 224), (240, 300, 224, 224)):
                shown = slide.read(level, *window).astype(int)
                expected = white_around(levels[level], *window)
                # OpenCV rounds halves up, numpy to even.
                assert np.abs(shown - expected).max() <= 1


@settings(max_examples=60)
@given(
    size=st.integers(1, 40_000),
    whole=st.integers(1, 16),
    part=st.floats(-0.02, 0.02, allow_nan=False),
)
def test_blocks_begin_where_nothing_is_interpolated(size, whole, part):
    downsample = max(1.0, whole + part)
    edges = block_edges(size, downsample)
    if size <= 4096:
        assert edges is not None
    if edges is not None:
        assert (edges[0], edges[-1]) == (0, size)
        assert 0 < np.diff(edges).min() <= np.diff(edges).max() <= 4096
        starts = edges[:-1]
        assert np.abs(np.rint(starts * downsample) / downsample - starts).max() < 1 / 512


def make_slide(reader: str, downsample: float, **more: object) -> Slide:
    width = round(8000 / downsample)
    return Slide(
        "a", "a.mrxs", status="ok", reader=reader, mpp=0.25, bytes=5, width=8000, height=8000,
        levels=((8000, 8000, 1.0), (width, width, downsample)), **more,
    )  # fmt: skip


def test_only_tiles_that_were_interpolated_are_made_again():
    for slide, is_new in (
        (make_slide("openslide", 2.0004), True),
        (make_slide("openslide", 2.0), False),
        (make_slide("native", 2.0004), False),
        (make_slide("openslide", 16.01), False),
        (make_slide("openslide", 2.0004, levels_left_out=(1,)), False),
    ):
        values = {key: IDENTITY[key] for key in ("resampler", "icc", "codec")}
        parent = tissue_fingerprint(slide, IDENTITY)
        former = fingerprint_of(stage=STAGE, version=VERSION, parent=parent, **values)
        assert (tile_fingerprint(slide, IDENTITY) != former) == is_new


def test_the_edge_of_a_level_that_is_rounded_up_is_reduced_too(tmp_path, monkeypatch):
    monkeypatch.setattr(openslide_reader, "block_edges", lambda *_: None)
    base = tissue(
        Path(__file__).parents[1] / "data" / "slides" / "CMU-1-Small-Region.svs", 601, 701
    )
    below = np.pad(shrink(base, 2), ((0, 2), (0, 1), (0, 0)), mode="edge")
    with tifffile.TiffWriter(tmp_path / "up.tif") as tiff:
        for number, level in enumerate((base, below)):
            tiff.write(
                level, tile=(256, 256), photometric="rgb", compression="zlib", metadata=None,
                subfiletype=number,
            )  # fmt: skip
    with OpenSlideReader(tmp_path / "up.tif") as slide:
        shown = slide.read(1, 0, 0, 351, 302).astype(int)
    assert np.abs(shown - below)[:300, :350].max() <= 1
    assert np.array_equal(shown[300:], np.repeat(shown[300:301], 2, 0))
