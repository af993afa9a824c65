"""PNG, JPEG and BMP pictures as slides: taken where they are named, refused in words."""

from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from pipeline.__main__ import main
from pipeline.dataset import Dataset, read_slides
from pipeline.slides.entries import find_slides
from pipeline.slides.open import best_reader, open_slide
from pipeline.slides.picture_reader import MOST_PIXELS, PictureReader
from pipeline.slides.reader import SlideOpenError, SlideReadError
from pipeline.slides.readers import PICTURE_SUFFIXES, SLIDE_SUFFIXES
from tests.pipeline.dicom_files import tissue


@pytest.fixture(scope="module")
def image() -> np.ndarray:
    return tissue(Path(__file__).parents[1] / "data" / "slides" / "CMU-1-Small-Region.svs")


@pytest.mark.parametrize("suffix", ["png", "jpg", "jpeg", "bmp", "PNG"])
def test_windows_are_the_pictures_pixels(tmp_path, image, suffix):
    path = tmp_path / f"region.{suffix}"
    Image.fromarray(image).save(path, dpi=(72, 72))
    decoded = np.asarray(Image.open(path))
    slide, _ = best_reader(path)
    with slide:
        assert (slide.name, slide.codec) == ("picture", str(Image.open(path).format).lower())
        assert [(v.width, v.height, v.downsample) for v in slide.levels] == [(900, 700, 1.0)]
        assert (slide.resolution.vendor, slide.resolution.tiff) == (None, None)
        assert np.array_equal(slide.read(0, 31, 47, 224, 224), decoded[47:271, 31:255])
        assert (slide.read(0, 890, 0, 20, 5)[:, 10:] == 255).all()


def test_grey_palette_and_transparency_become_rgb_over_white(tmp_path, image):
    grey = Image.fromarray(image).convert("L")
    clear = np.dstack([image, np.full(image.shape[:2], 255, np.uint8)])
    clear[:, :400, 3] = 0
    over = image.copy()
    over[:, :400] = 255
    palette = Image.fromarray(image).convert("P")
    for name, picture, expected in (
        ("grey", grey, np.dstack([np.asarray(grey)] * 3)),
        ("rgba", Image.fromarray(clear), over),
        ("palette", palette, np.asarray(palette.convert("RGB"))),
    ):
        picture.save(tmp_path / f"{name}.png")
        with PictureReader(tmp_path / f"{name}.png") as slide:
            assert np.array_equal(slide.read(0, 0, 0, 900, 700), expected), name


def test_an_exif_rotation_is_not_applied(tmp_path, image):
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(image).save(tmp_path / "a.jpg", exif=exif)
    with PictureReader(tmp_path / "a.jpg") as slide:
        assert (slide.levels[0].width, slide.levels[0].height) == (900, 700)


def test_what_is_no_picture_of_tissue_is_refused_in_words(tmp_path, image):
    picture = Image.fromarray(image)
    picture.convert("CMYK").save(tmp_path / "cmyk.jpg")
    picture.convert("1").save(tmp_path / "mask.png")
    picture.save(tmp_path / "gif.png", format="GIF")
    cv2.imwrite(str(tmp_path / "deep.png"), image.astype(np.uint16) * 257)
    cv2.imwrite(str(tmp_path / "deep_grey.png"), image[..., 0].astype(np.uint16) * 257)
    Image.new("1", (13_000, 12_000)).save(tmp_path / "large.png")
    Image.new("1", (20_000, 20_000)).save(tmp_path / "bomb.png")
    for name, reason in (
        ("cmyk.jpg", "its pixels are CMYK, expected 8-bit RGB or grey"),
        ("mask.png", "its pixels are 1, expected 8-bit RGB or grey"),
        ("gif.png", "not a PNG, JPEG or BMP picture"),
        ("deep.png", "its pixels have 16 bits"),
        ("deep_grey.png", "its pixels are I;16"),
        ("large.png", rf"too large \(13000x12000 px\), expected at most {MOST_PIXELS:,} pixels"),
        ("bomb.png", "the picture is too large"),
    ):
        with pytest.raises(SlideOpenError, match=reason):
            open_slide(tmp_path / name)


@pytest.mark.parametrize("suffix", ["png", "jpg", "bmp"])
def test_a_picture_that_is_cut_off_is_an_error(tmp_path, image, suffix):
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(image).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with PictureReader(path) as slide, pytest.raises(SlideReadError, match="truncated"):
        slide.read(0, 0, 0, 10, 10)


def test_pictures_are_slides_where_they_are_named(tmp_path, image, cmu_slide):
    for name in ("a", "b"):
        Image.fromarray(image).save(tmp_path / f"{name}.png")
    (tmp_path / "slide.svs").symlink_to(cmu_slide)
    assert not PICTURE_SUFFIXES & SLIDE_SUFFIXES
    assert [entry.slide_id for entry in find_slides([str(tmp_path)])] == ["slide"]
    assert [entry.slide_id for entry in find_slides([str(tmp_path / "*.png")])] == ["a", "b"]


@pytest.mark.full
def test_regions_are_tiled_with_the_resolution_of_a_table(tmp_path, image):
    Image.fromarray(image).save(tmp_path / "region.png", dpi=(25_400, 25_400))
    (tmp_path / "regions.csv").write_text("path,mpp\nregion.png,0.5\n")
    root = tmp_path / "dataset"
    arguments = ["--dataset", str(root), "--workers", "1"]
    assert main(["scan", str(tmp_path / "regions.csv"), *arguments]) == 0
    (slide,) = read_slides(Dataset(root))
    assert (slide.reader, slide.mpp, slide.mpp_source) == ("picture", 0.5, "table")
    assert main(["tissue", *arguments]) == 0
    assert main(["select", "--name", "train", "--dataset", str(root)]) == 0
    assert main(["tile", *arguments]) == 0
    assert list(Dataset(root).tiles_dir(224).glob("region.*.tar"))
    without = tmp_path / "without"
    main(["scan", str(tmp_path / "region.png"), "--dataset", str(without), "--workers", "1"])
    (slide,) = read_slides(Dataset(without))
    assert slide.status == "rejected"
    assert "no trustworthy mpp" in slide.reason
