"""The native reader shows every slide at hand exactly as OpenSlide does, or is not chosen."""

import struct
from pathlib import Path

import numpy as np
import openslide
import pytest
import tifffile

from pipeline.__main__ import main
from pipeline.dataset import Dataset, read_journal, read_slides
from pipeline.slides.compare import TILES_COMPARED, find_disagreement, sampled_tiles
from pipeline.slides.native_reader import NativeReader
from pipeline.slides.open import best_reader, open_slide
from pipeline.slides.reader import SlideOpenError, SlideReadError

SHARED_TIFFS = [
    "TCGA-CR-7395-01A-01-TS1.svs",
    "diag_packer_example.tif",
    "openslide_small.svs",
]


def assert_same_pixels(path: Path) -> int:
    """Every native tile that OpenSlide can address; returns how many."""
    compared = 0
    with NativeReader(path) as native, open_slide(path, "openslide") as reference:
        assert [(v.width, v.height) for v in native.levels] == [
            (v.width, v.height) for v in reference.levels
        ]
        assert native.resolution == reference.resolution
        for level, (width, height) in enumerate(native.native_tiles):
            whole = native.levels[level].downsample == round(native.levels[level].downsample)
            rows, columns = native.native[level].rows, native.native[level].columns
            for row in range(rows if whole else 1):
                for column in range(columns if whole else 1):
                    window = (level, column * width, row * height, width, height)
                    assert np.array_equal(native.read(*window), reference.read(*window)), window
                    compared += 1
    return compared


def test_the_committed_slide_is_the_same_in_every_tile(cmu_slide):
    assert assert_same_pixels(cmu_slide) == 130


@pytest.mark.parametrize("name", SHARED_TIFFS)
def test_the_shared_slides_are_the_same_in_every_tile(shared_data, name):
    assert assert_same_pixels(shared_data / "slides" / name) >= 1


def test_windows_across_tiles_and_edges(cmu_slide):
    rng = np.random.default_rng(3)
    with NativeReader(cmu_slide) as native, open_slide(cmu_slide, "openslide") as reference:
        for _ in range(12):
            x, y = int(rng.integers(-300, 2300)), int(rng.integers(-300, 3100))
            w, h = (int(v) for v in rng.integers(1, 700, 2))
            assert np.array_equal(native.read(0, x, y, w, h), reference.read(0, x, y, w, h))


def write_tiff(path: Path, photometric: str, codec: str = "jpeg", levels: int = 2) -> np.ndarray:
    """A plain tiled pyramid of smooth colour; returns level 0."""
    y, x = np.mgrid[0:500, 0:700]
    image = np.stack([x % 256, (x + y) // 5, 255 - y // 2], -1).astype(np.uint8)
    with tifffile.TiffWriter(path) as tiff:
        for level in range(levels):
            step = 2**level
            tiff.write(
                image[::step, ::step], tile=(128, 128), photometric=photometric,
                compression=codec, compressionargs={"level": 90} if codec == "jpeg" else None,
                subfiletype=1 if level else 0, resolution=(40_000, 40_000),
                resolutionunit="CENTIMETER", metadata=None,
            )  # fmt: skip
    return image


@pytest.mark.parametrize("photometric", ["rgb", "ycbcr"])
def test_generic_tiffs_in_both_colour_spaces(tmp_path, photometric):
    image = write_tiff(tmp_path / "x.tif", photometric)
    assert assert_same_pixels(tmp_path / "x.tif") == 24 + 6
    with NativeReader(tmp_path / "x.tif") as native:
        found = native.read(0, 0, 0, 700, 500).astype(int)
        assert native.resolution.tiff == pytest.approx((0.25, 0.25))
    if photometric == "rgb":
        # tifffile takes the array of the other file for YCbCr as it stands.
        assert np.abs(found - image).mean() < 4


def patched_tile(source: Path, target: Path, index: int, *, size: int | None, cut: bool) -> None:
    """A copy whose native tile has another size in the table, or a second half of zeros."""
    data = bytearray(source.read_bytes())
    with tifffile.TiffFile(source) as tiff:
        page = tiff.pages.first
        tag = page.tags["TileByteCounts"]
        offset, count = page.dataoffsets[index], page.databytecounts[index]
        assert tag.dtype == 4
        if size is not None:
            data[tag.valueoffset + 4 * index : tag.valueoffset + 4 * index + 4] = struct.pack(
                "<I", size
            )
        if cut:
            data[offset + count // 2 : offset + count // 2 + 40] = bytes(40)
    target.write_bytes(data)


def test_a_tile_that_the_file_leaves_out_is_white_as_openslide_shows_it(tmp_path, cmu_slide):
    patched_tile(cmu_slide, tmp_path / "x.svs", 60, size=0, cut=False)
    with NativeReader(tmp_path / "x.svs") as native, open_slide(tmp_path / "x.svs") as reference:
        window = (0, -20, 1400, 300, 300)
        assert np.array_equal(native.read(*window), reference.read(*window))
        assert (native.read(0, 0, 1440, 240, 240) == 255).all()


@pytest.mark.parametrize(("size", "cut"), [(900, False), (None, True)])
def test_a_damaged_tile_is_an_error_and_never_grey(tmp_path, cmu_slide, size, cut):
    patched_tile(cmu_slide, tmp_path / "x.svs", 60, size=size, cut=cut)
    with open_slide(tmp_path / "x.svs", "openslide") as reference, pytest.raises(SlideReadError):
        reference.read(0, 0, 1440, 240, 240)
    with NativeReader(tmp_path / "x.svs") as native:
        with pytest.raises(SlideReadError, match=r"x\.svs: cannot read level 0 at x=0, y=1440"):
            native.read(0, 0, 1440, 240, 240)
        assert native.read(0, 480, 1440, 240, 240).shape == (240, 240, 3)


def test_a_file_that_ends_early_is_an_error(tmp_path, cmu_slide):
    with NativeReader(cmu_slide) as native:
        offsets = native.native[0].offsets
    patched = tmp_path / "y.svs"
    patched_tile(cmu_slide, patched, int(offsets.argmax()), size=1 << 24, cut=False)
    row, column = divmod(int(offsets.argmax()), 10)
    with NativeReader(patched) as native, pytest.raises(SlideReadError, match="the file ends"):
        native.read(0, column * 240, row * 240, 10, 10)


def test_each_native_tile_is_decoded_once_and_let_go(cmu_slide):
    with NativeReader(cmu_slide) as native:
        windows = np.array([(x, y, 448, 448) for y in range(0, 2400, 448) for x in (0, 448, 896)])
        native.expect_windows(0, windows)
        for x, y, w, h in windows:
            native.read(0, int(x), int(y), int(w), int(h))
        assert native.decoded == 6 * 12
        assert native._cached_bytes == 0
        assert not native._cache


def test_the_cache_is_bounded(cmu_slide, monkeypatch):
    monkeypatch.setattr(NativeReader, "cache_bytes", 5 * 240 * 240 * 3)
    with NativeReader(cmu_slide) as native:
        native.read(0, 0, 0, 2220, 480)
        assert len(native._cache) == 5
        assert native._cached_bytes == 5 * 240 * 240 * 3


def test_sixteen_tiles_are_compared_with_the_heaviest_among_them(cmu_slide):
    with NativeReader(cmu_slide) as native:
        tiles = sampled_tiles(native)
        heaviest = divmod(int(native.native[0].sizes.argmax()), native.native[0].columns)
    assert len(tiles) == len(set(tiles)) == TILES_COMPARED
    assert (0, *heaviest) in tiles


def test_one_grey_level_in_one_tile_is_noticed(cmu_slide, monkeypatch):
    with NativeReader(cmu_slide) as native, open_slide(cmu_slide, "openslide") as reference:
        level, row, column = sampled_tiles(native)[-1]
        decode = native.decode_native

        def altered(at_level, at_row, at_column):
            tile = decode(at_level, at_row, at_column)
            if (at_level, at_row, at_column) == (level, row, column):
                tile[3, 5, 1] ^= 1
            return tile

        monkeypatch.setattr(native, "decode_native", altered)
        assert f"native tile {column}, {row} of level 0 differs by 1" in find_disagreement(
            native, reference
        )


def test_a_slide_that_agrees_agrees(cmu_slide):
    with NativeReader(cmu_slide) as native, open_slide(cmu_slide, "openslide") as reference:
        assert find_disagreement(native, reference) == ""


def test_scan_records_the_reader_and_why_not_native(tmp_path, cmu_slide):
    folder = tmp_path / "slides"
    folder.mkdir()
    (folder / "a.svs").symlink_to(cmu_slide)
    write_tiff(folder / "b.tif", "rgb", codec="zlib")
    root = tmp_path / "d"
    assert main(["scan", str(folder), "--dataset", str(root), "--workers", "1"]) == 0
    slides = {slide.slide_id: slide for slide in read_slides(Dataset(root))}
    assert (slides["a"].reader, slides["a"].codec) == ("native", "jpeg")
    assert slides["b"].reader == "openslide"
    (entry,) = [e for e in read_journal(Dataset(root), "scan") if e.slide_id == "b"]
    assert "read by openslide: native: TIFF compression 8" in entry.reason
    forced = tmp_path / "forced"
    main(["scan", str(cmu_slide), "--dataset", str(forced), "--reader", "openslide"])
    assert read_slides(Dataset(forced))[0].reader == "openslide"


def test_best_reader_leaves_other_formats_to_the_others(shared_data):
    for name, reader in (
        ("OS-1-detail.ome.tif", "tiffslide"),
        ("slideio_test3-DAPI-2-387.ndpi", "openslide"),
        ("openslide_boxes.tiff", "openslide"),
        ("CMU-1-Small-Region.dcm", "openslide"),
        ("TCGA-CR-7395-01A-01-TS1.svs", "native"),
    ):
        slide, why = best_reader(shared_data / "slides" / name)
        with slide:
            assert slide.name == reader, why
            assert bool(why) == (reader != "native")


def test_the_profile_is_the_one_that_openslide_finds(shared_data):
    path = shared_data / "slides" / "TCGA-CR-7395-01A-01-TS1.svs"
    with NativeReader(path) as native, openslide.OpenSlide(path) as slide:
        assert native.icc_profile
        assert len(native.icc_profile) == int(slide.properties["openslide.icc-size"])


def test_what_is_no_rgb_tiff_is_refused_in_one_line(tmp_path):
    (tmp_path / "x.svs").write_bytes(b"garbage" * 40)
    tifffile.imwrite(tmp_path / "grey.tif", np.zeros((64, 64), np.uint8), tile=(16, 16))
    tifffile.imwrite(tmp_path / "float.tif", np.zeros((64, 64, 3), np.float32))
    for name in ("x.svs", "grey.tif", "float.tif"):
        with pytest.raises(SlideOpenError, match="native:"):
            NativeReader(tmp_path / name)
