"""DICOM slides show each level's own pixels, in every way that frames are stored."""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pydicom import dcmread
from pydicom.dataset import Dataset as DicomDataset

from pipeline.__main__ import main
from pipeline.dataset import Dataset, read_slides
from pipeline.slides import dicom_series
from pipeline.slides.compare import find_disagreement
from pipeline.slides.dicom_reader import DicomReader
from pipeline.slides.dicom_series import group_series, series_files
from pipeline.slides.open import best_reader, open_slide
from pipeline.slides.reader import SlideOpenError, SlideReadError
from tests.pipeline.dicom_files import (
    STORED,
    VOLUME,
    cut_frames,
    jpeg,
    shrink,
    tissue,
    write_dicom,
)

LOSSLESS = (
    "jpeg2000",
    "jpeg2000 alone",
    "jpeg lossless",
    "jpegls",
    "htj2k",
    "rle",
    "raw",
    "raw implicit",
)
KNOWN_TO_OPENSLIDE = ("jpeg", "jpeg rgb", "jpeg2000", "jpeg2000 alone", "raw")
UID = "1.2.826.0.1.3680043.8.498"


@pytest.fixture(scope="module")
def image(request: pytest.FixtureRequest) -> np.ndarray:
    return tissue(Path(__file__).parents[1] / "data" / "slides" / "CMU-1-Small-Region.svs")


def write_series(
    folder: Path, images: Sequence[np.ndarray], series: str = f"{UID}.1", **how: Any
) -> Path:
    """One file per level; returns the first."""
    folder.mkdir(exist_ok=True)
    for number, level in enumerate(images):
        mpp = 0.5 * images[0].shape[1] / level.shape[1]
        write_dicom(folder / f"{series[-1]}-{number}.dcm", level, series, mpp=mpp, **how)
    return folder / f"{series[-1]}-0.dcm"


def read_level(reader: Any, level: int) -> np.ndarray:
    size = reader.levels[level]
    return reader.read(level, 0, 0, size.width, size.height)


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("sparse", [False, True])
def test_every_level_is_what_was_written(tmp_path, image, stored, sparse):
    images = [image, shrink(image, 4)]
    path = write_series(tmp_path, images, stored=stored, sparse=sparse)
    with DicomReader(path) as slide:
        assert [(v.width, v.height, v.downsample) for v in slide.levels] == [
            (900, 700, 1.0),
            (225, 175, 4.0),
        ]
        for level, written in enumerate(images):
            difference = np.abs(read_level(slide, level).astype(int) - written)
            assert difference.max() == 0 if stored in LOSSLESS else difference.mean() < 4
        assert slide.resolution.vendor == pytest.approx((0.5, 0.5))
        if stored in KNOWN_TO_OPENSLIDE:
            with open_slide(path, "openslide") as reference:
                assert find_disagreement(slide, reference) == ""
                for level in range(2):
                    assert np.array_equal(read_level(slide, level), read_level(reference, level))
        else:
            with pytest.raises(SlideOpenError):
                open_slide(path, "openslide")
            with best_reader(path)[0] as chosen:
                assert chosen.name == "dicom"


@pytest.mark.parametrize("table", ["basic", "extended", "none"])
@pytest.mark.parametrize("fragments", [1, 3])
def test_frames_are_found_with_and_without_a_table(tmp_path, image, table, fragments):
    if table == "extended" and fragments > 1:
        pytest.skip("the extended table is for frames of one fragment")
    write_series(tmp_path / "a", [image])
    write_series(tmp_path / "b", [image], table=table, fragments=fragments)
    with DicomReader(tmp_path / "a") as one, DicomReader(tmp_path / "b") as other:
        assert np.array_equal(read_level(one, 0), read_level(other, 0))


def test_a_level_of_fractional_downsample_is_its_own_pixels(tmp_path, image):
    odd = np.ascontiguousarray(image[:699, :897])
    images = [odd, shrink(odd, 2), shrink(odd, 4)]
    path = write_series(tmp_path / "odd", images, stored="jpeg2000")
    with best_reader(path)[0] as slide:
        assert slide.name == "dicom"
        for level in range(3):
            assert np.array_equal(read_level(slide, level), images[level])
    even = [image, shrink(image, 2)]
    with best_reader(write_series(tmp_path / "even", even))[0] as slide:
        assert slide.name == "openslide", "what OpenSlide reads rightly keeps its fingerprint"
    root = tmp_path / "dataset"
    assert main(["scan", str(tmp_path / "odd"), "--dataset", str(root), "--workers", "1"]) == 0
    (row,) = read_slides(Dataset(root))
    assert (row.reader, row.vendor, row.codec, row.mpp) == ("dicom", "dicom", "jpeg2000", 0.5)


def test_a_level_in_several_files_is_whole_or_refused(tmp_path, image):
    count = len(cut_frames(image, 128))
    whole = {"ConcatenationUID": f"{UID}.7", "InConcatenationTotalNumber": 3}
    for number, (start, stop) in enumerate(((0, 20), (20, 30), (30, count)), 1):
        write_dicom(
            tmp_path / f"{number}.dcm", image, f"{UID}.1", stored="raw", keep=range(start, stop),
            InConcatenationNumber=number, ConcatenationFrameOffsetNumber=start, **whole,
        )  # fmt: skip
    with DicomReader(tmp_path / "2.dcm") as slide:
        assert np.array_equal(read_level(slide, 0), image)
    (tmp_path / "3.dcm").unlink()
    with pytest.raises(SlideOpenError, match=r"1 of 3 files of a level are missing; there: 1\.dcm"):
        DicomReader(tmp_path)


def test_labels_and_overviews_are_never_levels(tmp_path, image):
    path = write_series(tmp_path, [image])
    for kind in ("LABEL", "OVERVIEW", "THUMBNAIL"):
        label = np.full((2000, 2000, 3), 9, np.uint8)
        kinds = ("ORIGINAL", "PRIMARY", kind, "NONE")
        write_dicom(tmp_path / f"0-{kind}.dcm", label, f"{UID}.1", kind=kinds, tile=2000)
    with DicomReader(path) as slide:
        assert [(v.width, v.height) for v in slide.levels] == [(900, 700)]
    with DicomReader(tmp_path / "0-LABEL.dcm") as slide:
        assert slide.levels[0].width == 900


def test_a_folder_of_several_slides(tmp_path, image):
    others = [np.ascontiguousarray(np.roll(image, 100 * n, 1)) for n in range(3)]
    for n, level in enumerate(others):
        write_series(tmp_path, [level, shrink(level, 4)], f"{UID}.{n}", stored="raw")
    (tmp_path / "._0-0.dcm").write_bytes(b"\0\5\x16\7" + bytes(400))
    (tmp_path / "notes.dcm").write_text("not DICOM")
    groups = group_series(tmp_path)
    assert [[file.name for file in files] for files in groups.values()] == [
        [f"{n}-0.dcm", f"{n}-1.dcm"] for n in range(3)
    ]
    for n, level in enumerate(others):
        assert series_files(tmp_path / f"{n}-1.dcm") == list(groups[f"{UID}.{n}"])
        for reader in ("dicom", "openslide"):
            with open_slide(tmp_path / f"{n}-1.dcm", reader) as slide:
                assert len(slide.levels) == 2
                assert np.array_equal(read_level(slide, 0), level)
            with open_slide(tmp_path, reader, f"{UID}.{n}") as slide:
                assert np.array_equal(read_level(slide, 0), level)
    with pytest.raises(SlideOpenError, match="a folder of 3 DICOM slides; give one file of each"):
        open_slide(tmp_path)
    with pytest.raises(SlideOpenError, match=rf"it is of series {UID}\.0, not {UID}\.1"):
        open_slide(tmp_path / "0-0.dcm", "dicom", f"{UID}.1")


def test_a_head_is_read_once_and_again_when_the_file_changes(tmp_path, image, monkeypatch):
    path = write_series(tmp_path, [image])
    assert [*group_series(tmp_path)] == [f"{UID}.1"]
    write_dicom(path, image[:200], f"{UID}.2")
    assert [*group_series(tmp_path)] == [f"{UID}.2"]
    monkeypatch.setattr(dicom_series, "read_header", None)
    assert dicom_series.read_head(path).image_type == VOLUME


def test_the_middle_plane_of_the_first_path_is_read_and_named(tmp_path, image):
    planes = [np.full_like(image, 10 * n) for n in range(6)]
    planes[1] = image
    frames = [frame for plane in planes for frame in cut_frames(plane, 128)]
    write_dicom(
        tmp_path / "a.dcm", image, f"{UID}.1", stored="raw", frames=frames,
        TotalPixelMatrixFocalPlanes=3, NumberOfOpticalPaths=2,
    )  # fmt: skip
    with DicomReader(tmp_path / "a.dcm") as slide:
        assert np.array_equal(read_level(slide, 0), image)
        assert slide.notes == ("optical path 1 of 2 is read", "focal plane 2 of 3 is read")


def test_a_focus_of_each_frames_own_is_no_plane(tmp_path, image):
    path = write_series(tmp_path, [image], stored="raw", sparse=True)
    data = dcmread(path)
    for number, group in enumerate(data.PerFrameFunctionalGroupsSequence):
        group.PlanePositionSlideSequence[0].ZOffsetInSlideCoordinateSystem = number * 0.37
    data.save_as(path)
    with DicomReader(path) as slide:
        assert np.array_equal(read_level(slide, 0), image)
        assert slide.notes == ()


def test_luma_and_chroma_that_the_codec_does_not_convert(tmp_path, image):
    ybr = np.asarray(Image.fromarray(image).convert("YCbCr"))
    for stored in ("raw", "rle", "jpegls", "jpeg2000 alone"):
        path = write_series(
            tmp_path / stored, [ybr], stored=stored, PhotometricInterpretation="YBR_FULL"
        )
        with DicomReader(path) as slide:
            # Pillow's own way there and back is off by as much.
            assert np.abs(read_level(slide, 0).astype(int) - image).max() <= 3, stored


def test_focal_planes_in_files_of_their_own(tmp_path, image):
    for n, z in enumerate((0.002, 0.0, 0.001)):
        origin = DicomDataset()
        origin.ZOffsetInSlideCoordinateSystem = z
        level = image if z == 0.001 else np.full_like(image, 10 * n)
        write_dicom(
            tmp_path / f"{n}.dcm", level, f"{UID}.1", stored="raw",
            TotalPixelMatrixOriginSequence=[origin],
        )  # fmt: skip
    with DicomReader(tmp_path) as slide:
        assert np.array_equal(read_level(slide, 0), image)
        assert slide.notes == ("3 images of 900x700 px in the series, 2.dcm is read",)


def test_frames_that_a_sparse_level_leaves_out_are_white(tmp_path, image):
    write_dicom(tmp_path / "a.dcm", image, f"{UID}.1", stored="raw", sparse=True, keep=[9, 1])
    with DicomReader(tmp_path) as slide:
        shown = read_level(slide, 0)
    expected = np.full_like(image, 255)
    for y, x in ((0, 128), (128, 128)):
        expected[y : y + 128, x : x + 128] = image[y : y + 128, x : x + 128]
    assert np.array_equal(shown, expected)


def test_each_frame_is_decoded_once_and_let_go(tmp_path, image):
    with DicomReader(write_series(tmp_path, [image])) as slide:
        windows = np.array([(x, y, 300, 300) for y in (0, 300) for x in (0, 300, 600)])
        slide.expect_windows(0, windows)
        for x, y, w, h in windows:
            slide.read(0, int(x), int(y), int(w), int(h))
        assert slide.decoded == 5 * 8
        assert slide._cached_bytes == 0


@pytest.mark.parametrize("table", ["basic", "extended", "none"])
@pytest.mark.parametrize("stored", ["jpeg", "raw"])
def test_a_file_that_is_cut_off_is_refused(tmp_path, image, table, stored):
    path = write_series(tmp_path, [image], table=table, stored=stored)
    path.write_bytes(path.read_bytes()[:-3000])
    with pytest.raises(SlideOpenError, match=r"the file is cut off: \d+ of 48 frames are there"):
        DicomReader(path)


def test_a_damaged_frame_is_an_error_and_never_grey(tmp_path, image):
    path = write_series(tmp_path, [image])
    data = bytearray(path.read_bytes())
    frame = jpeg(cut_frames(image, 128)[9])
    at = data.index(frame) + len(frame) // 2
    data[at : at + 200] = bytes(200)
    path.write_bytes(data)
    with DicomReader(path) as slide:
        with pytest.raises(SlideReadError, match=r"1-0\.dcm: cannot read level 0 at x=128"):
            slide.read(0, 128, 128, 128, 128)
        assert slide.read(0, 0, 0, 128, 128).shape == (128, 128, 3)


@pytest.mark.parametrize("stored", ["jpeg", "htj2k", "rle"])
@pytest.mark.filterwarnings("error")
def test_bytes_that_were_changed_raise_nothing_unexpected(tmp_path, image, stored):
    path = write_series(tmp_path, [image[:256, :256]], stored=stored, sparse=stored == "rle")
    written = path.read_bytes()
    rng = np.random.default_rng(8)
    for _ in range(30):
        data = bytearray(written)
        for at in rng.integers(132, min(len(data), 4000), 4):
            data[at] = int(rng.integers(0, 256))
        path.write_bytes(data)
        with suppress(SlideOpenError, SlideReadError), DicomReader(path) as slide:
            slide.read(0, 0, 0, 256, 256)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"BitsAllocated": 16}, "3 x 16-bit YBR_FULL_422 pixels, expected 3 x 8-bit colour"),
        ({"SamplesPerPixel": 1, "PhotometricInterpretation": "MONOCHROME2"}, "1 x 8-bit MONOCHR"),
        ({"ImageType": ["ORIGINAL", "PRIMARY", "LABEL", "NONE"]}, "no image of type VOLUME"),
        ({"Rows": 65535, "Columns": 65535}, "rows and columns of frame and level are"),
        ({"NumberOfFrames": 90}, "the file is cut off: 48 of 90 frames"),
        ({"TotalPixelMatrixRows": 5000}, "48 of 320 frames of a level are there"),
    ],
)
def test_what_cannot_be_read_is_refused_in_words(tmp_path, image, change, reason):
    path = write_series(tmp_path, [image], **change)
    with pytest.raises(SlideOpenError, match=reason):
        DicomReader(path)


def test_resolution_falls_back_to_the_size_of_what_was_imaged(tmp_path, image):
    path = write_series(tmp_path, [image], SharedFunctionalGroupsSequence=[])
    with DicomReader(path) as slide:
        assert slide.resolution.vendor == pytest.approx((0.5, 0.5))
    path = write_series(
        tmp_path, [image], SharedFunctionalGroupsSequence=[], ImagedVolumeWidth=None
    )
    with DicomReader(path) as slide:
        assert slide.resolution.vendor is None


def test_the_shared_dicom_slide_is_openslides(shared_data):
    path = shared_data / "slides" / "CMU-1-Small-Region.dcm"
    with DicomReader(path) as slide, open_slide(path, "openslide") as reference:
        assert find_disagreement(slide, reference) == ""
        assert np.array_equal(read_level(slide, 0), read_level(reference, 0))
        assert slide.icc_profile == reference.icc_profile
