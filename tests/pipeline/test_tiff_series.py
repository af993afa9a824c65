"""TIFF files of every kind: the slide among a file's images, its own pixels, and honest words.

The oracle is tifffile's reading of whole pages. All files are made from the committed slide.
"""

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile

from pipeline.__main__ import main
from pipeline.dataset import Dataset, Slide, read_slides
from pipeline.slides.open import best_reader, open_scanned, open_slide
from pipeline.slides.reader import SlideOpenError, SlideReader
from pipeline.slides.tiff_extent import what_is_missing, what_is_unwritten
from pipeline.slides.tiffslide_reader import TiffSlideReader

KEYWORDS: dict[str, Any] = {
    "tile": (128, 128), "compression": "zlib", "photometric": "rgb",
    "resolution": (20_000, 20_000), "resolutionunit": "CENTIMETER",
}  # fmt: skip
REDUCED = {"subfiletype": 1}
APERIO = "Aperio Image Library v12.0.15\r\n%dx%d [0,0 %dx%d] (128x128) JPEG/RGB|MPP = 0.5000"


@pytest.fixture(scope="module")
def picture(request) -> np.ndarray:
    """H&E of odd size, [601, 703, 3]."""
    path = Path(request.config.rootpath) / "tests/data/slides/CMU-1-Small-Region.svs"
    with tifffile.TiffFile(path) as tiff:
        return np.ascontiguousarray(tiff.pages.first.asarray()[900:1501, 700:1403])


@pytest.fixture(scope="module")
def label() -> np.ndarray:
    image = np.full((300, 400, 3), 245, np.uint8)
    image[50:250, 50:350] = (200, 30, 160)
    return image


def shrink(image: np.ndarray, factor: int = 2) -> np.ndarray:
    height, width = (size // factor * factor for size in image.shape[:2])
    cells = image[:height, :width].reshape(height // factor, factor, width // factor, factor, -1)
    return np.rint(cells.mean((1, 3))).astype(image.dtype)


def write_ome(path: Path, images: list[tuple[np.ndarray, str, str, dict[str, Any]]]) -> Path:
    """Series of (pixels, name, axes, keywords)."""
    with tifffile.TiffWriter(path, ome=True) as tiff:
        for pixels, name, axes, keywords in images:
            tiff.write(pixels, metadata={"axes": axes, "Name": name}, **(KEYWORDS | keywords))
    return path


def write_pages(path: Path, pages: list[tuple[np.ndarray, dict[str, Any]]], **options) -> Path:
    with tifffile.TiffWriter(path, **options) as tiff:
        for pixels, keywords in pages:
            tiff.write(pixels, **({"metadata": None} | KEYWORDS | keywords))
    return path


def read_level(reader: SlideReader, level: int = 0) -> np.ndarray:
    """All of a level, read in windows that fit no tile."""
    size = reader.levels[level]
    image = np.zeros((size.height, size.width, 3), np.uint8)
    for y in range(0, size.height, 97):
        for x in range(0, size.width, 113):
            w, h = min(113, size.width - x), min(97, size.height - y)
            image[y : y + h, x : x + w] = reader.read(level, x, y, w, h)
    return image


def channels_first(image: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(image.transpose(2, 0, 1))


@pytest.mark.parametrize("name", ["label", "Macro image", "scan - label", "thumbnail 1", ""])
def test_the_slide_of_an_ome_tiff_is_read_and_never_its_label(tmp_path, picture, label, name):
    path = write_ome(
        tmp_path / "x.ome.tif", [(label, name, "YXS", {}), (picture, "slide", "YXS", {})]
    )
    reader, why = best_reader(path)
    with reader:
        assert (reader.name, reader.series, why) == ("native", "1:slide", "")
        assert np.array_equal(read_level(reader), tifffile.TiffFile(path).series[1].asarray())
        assert "1:slide" in " ".join(reader.notes)
        assert reader.resolution.tiff == (0.5, 0.5)


def test_scan_records_the_series_and_later_stages_open_it(tmp_path, picture, label):
    path = write_ome(
        tmp_path / "x.ome.tif", [(label, "label", "YXS", {}), (picture, "slide", "YXS", {})]
    )
    assert main(["scan", str(path), "--dataset", str(tmp_path / "d"), "--workers", "1"]) == 0
    (slide,) = read_slides(Dataset(tmp_path / "d"))
    assert (slide.width, slide.height, slide.series) == (703, 601, "1:slide")
    assert "image 1:slide (703x601 px) of the file is read" in slide.notes[0]
    with open_scanned(slide, path) as reader:
        assert np.array_equal(read_level(reader), picture)
    # What an earlier version recorded showed the label.
    for name in ("openslide", "tiffslide"):
        with pytest.raises(SlideOpenError, match="what the file begins with"):
            open_scanned(Slide("x", str(path), reader=name), path)


def test_a_series_is_chosen_by_index_name_and_plane(tmp_path, picture, label):
    planes = np.stack([picture, picture[:, ::-1], 255 - picture])
    path = write_ome(
        tmp_path / "x.ome.tif",
        [(label, "label", "YXS", {}), (planes, "a", "ZYXS", {}), (picture[:500], "b", "YXS", {})],
    )
    for series, recorded, expected in (
        ("", "1:a", planes[0]), ("1", "1:a", planes[0]), ("a", "1:a", planes[0]),
        ("1:a/z2", "1:a/z2", planes[2]), ("1/z1", "1:a/z1", planes[1]), ("b", "2:b", planes[0]),
    ):  # fmt: skip
        with best_reader(path, series)[0] as reader:
            assert reader.series == recorded
            assert np.array_equal(read_level(reader), expected[: reader.levels[0].height])
            assert series.startswith(("2", "b")) or "one of 3" in " ".join(reader.notes)
    for series, words in (
        ("7", r"no series '7'; the file has 0:label \(400x300 px, a label or the like\), 1:a"),
        ("c", "no series 'c'"),
        ("label", "is never tiled"),
        ("0", "is never tiled"),
    ):
        with pytest.raises(SlideOpenError, match=words) as caught:
            best_reader(path, series)
        assert "\n" not in str(caught.value)


def test_a_series_comes_from_the_command_and_from_a_table(tmp_path, picture):
    other = picture[:480, :520]
    path = write_ome(tmp_path / "x.ome.tif", [(picture, "a", "YXS", {}), (other, "b", "YXS", {})])
    (tmp_path / "t.csv").write_text("path,series\nx.ome.tif,b\n")
    for number, arguments in enumerate(([str(path), "--series", "1"], [str(tmp_path / "t.csv")])):
        root = tmp_path / f"d{number}"
        assert main(["scan", *arguments, "--dataset", str(root), "--workers", "1"]) == 0
        (slide,) = read_slides(Dataset(root))
        assert (slide.series, slide.width, slide.height) == ("1:b", 520, 480)


def test_a_file_that_begins_with_the_slide_keeps_its_reader(tmp_path, picture, label):
    planes = np.stack([picture, 255 - picture])
    for number, (first, axes, said) in enumerate(
        ((picture, "YXS", 0), (planes, "ZYXS", 1), (picture, "YXS", 0))
    ):
        images = [(first, "slide", axes, {}), (label, "label", "YXS", {})]
        path = write_ome(tmp_path / f"{number}.ome.tif", images[: 2 - number // 2])
        with best_reader(path)[0] as reader:
            assert (reader.name, reader.series, len(reader.notes)) == ("openslide", "", said)
            assert np.array_equal(read_level(reader), picture)


def test_channels_of_their_own_are_read_as_rgb(tmp_path, picture, label):
    apart = channels_first(picture)
    kinds = {
        "pages": (apart, "CYX", {"photometric": "minisblack"}),
        "planes": (apart, "SYX", {"planarconfig": "separate"}),
        "strips": (picture, "YXS", {"tile": None, "rowsperstrip": 30}),
        "jpeg 2000": (picture, "YXS", {"compression": "jpeg2000"}),
        "16 bits": (picture.astype(np.uint16) * 257, "YXS", {}),
        "time": (np.stack([picture, 255 - picture]), "TYXS", {}),
    }
    for name, (pixels, axes, keywords) in kinds.items():
        path = write_ome(
            tmp_path / f"{name}.ome.tif",
            [(label, "label", "YXS", {}), (pixels, "slide", axes, keywords)],
        )
        with best_reader(path)[0] as reader:
            assert (reader.name, reader.series) == ("native", "1:slide"), name
            assert np.array_equal(read_level(reader), picture), name
    path = write_ome(tmp_path / "x.ome.tif", [(apart, "", "CYX", {"photometric": "minisblack"})])
    with best_reader(path)[0] as reader:
        assert np.array_equal(read_level(reader), picture)
        assert (reader.series, reader.notes[0][:19]) == ("", "its three channels,")


def test_fluorescence_is_passed_over_for_rgb(tmp_path, picture):
    stack = np.zeros((4, 900, 900), np.uint16)
    path = write_ome(
        tmp_path / "x.ome.tif",
        [(stack, "IF", "CYX", {"photometric": "minisblack"}), (picture, "HE", "YXS", {})],
    )
    with best_reader(path)[0] as reader:
        assert reader.series == "1:HE"
        assert np.array_equal(read_level(reader), picture)


def test_the_levels_of_a_chosen_series_are_its_subifds(tmp_path, picture, label):
    path = tmp_path / "x.ome.tif"
    size = {f"PhysicalSize{axis}": 250 for axis in "XY"}
    size |= {f"PhysicalSize{axis}Unit": "nm" for axis in "XY"}
    with tifffile.TiffWriter(path, ome=True) as tiff:
        tiff.write(label, metadata={"axes": "YXS", "Name": "label"}, **KEYWORDS)
        tiff.write(picture, subifds=1, metadata={"axes": "YXS", "Name": "slide"} | size, **KEYWORDS)
        tiff.write(shrink(picture), **REDUCED, **KEYWORDS)
    with best_reader(path)[0] as reader:
        assert len(reader.levels) == 2
        assert np.array_equal(read_level(reader, 1), shrink(picture))


@pytest.mark.parametrize("order", ["label first", "named", "strip first", "smallest first"])
def test_pages_of_a_plain_tiff_in_any_order(tmp_path, picture, label, order):
    small, smaller = (shrink(picture), REDUCED), (shrink(picture, 4), REDUCED)
    strip = {"tile": None, "rowsperstrip": 16}
    pages = {
        "label first": [(label, {}), (picture, {}), small, smaller],
        "named": [(picture, {}), small, smaller, (label, {"description": "label"})],
        "strip first": [(shrink(picture, 8), strip), (picture, {}), small, smaller],
        "smallest first": [smaller, small, (picture, {})],
    }[order]
    for big in (False, True):
        path = write_pages(tmp_path / f"{big}.tif", pages, bigtiff=big)
        with best_reader(path)[0] as reader:
            assert [(v.width, v.height) for v in reader.levels] == [
                (703, 601),
                (351, 300),
                (175, 150),
            ]
            for level, expected in enumerate((picture, small[0], smaller[0])):
                assert np.array_equal(read_level(reader, level), expected)


def test_pages_of_an_aperio_file_in_any_order(tmp_path, picture, label):
    height, width = picture.shape[:2]
    aperio = {"description": APERIO % (width, height, width, height), "compression": 33005}
    aperio |= {"compressionargs": {"level": 0, "reversible": True, "codecformat": "j2k"}}
    label_page = (label, aperio | {"description": "Aperio Image Library\r\nlabel 400x300"})
    base, small = (picture, aperio), (shrink(picture), aperio)
    blurred = (np.roll(picture, 9, 1), aperio)
    for number, pages in enumerate(
        (
            [label_page, base, small],
            [base, small, label_page],
            [small, base],
            [base, small, blurred],
        )
    ):
        path = write_pages(tmp_path / f"{number}.svs", pages)
        with best_reader(path)[0] as reader:
            assert (reader.name, reader.series) == ("native", "")
            assert [v.width for v in reader.levels] == [703, 351]
            assert np.array_equal(read_level(reader), picture)
            assert np.array_equal(read_level(reader, 1), shrink(picture))
    with best_reader(path, "0/z1")[0] as reader:
        assert np.array_equal(read_level(reader), blurred[0])


def test_a_file_without_a_slide_is_refused_with_its_list(tmp_path, label):
    path = write_ome(
        tmp_path / "x.ome.tif", [(label, "label", "YXS", {}), (label[:200], "macro", "YXS", {})]
    )
    with pytest.raises(
        SlideOpenError, match=r"no image .* can be the slide; it has 0:label .*1:macro"
    ):
        open_slide(path)


ODD_KINDS: dict[str, dict[str, Any]] = {
    "deflate": {}, "lzw": {"compression": "lzw"}, "zstd": {"compression": "zstd"},
    "packbits": {"compression": "packbits"}, "none": {"compression": None},
    "webp": {"compression": "webp", "compressionargs": {"lossless": True}},
    "jpegxl": {"compression": "jpegxl"}, "jpeg2000": {"compression": "jpeg2000"},
    "lerc": {"compression": "lerc"}, "predictor": {"predictor": True},
    "strips": {"tile": None, "rowsperstrip": 50},
    "one strip": {"tile": None, "compression": None, "rowsperstrip": 601},
}  # fmt: skip


@pytest.mark.parametrize("kind", ODD_KINDS)
def test_a_level_of_fractional_downsample_has_its_own_pixels(tmp_path, picture, kind):
    """OpenSlide and tiffslide place them by level-0 pixels: up to 61 grey levels off."""
    levels = [picture, shrink(picture), shrink(picture, 4)]
    pages = [(im, ODD_KINDS[kind] | (REDUCED if i else {})) for i, im in enumerate(levels)]
    path = write_pages(tmp_path / "x.tif", pages)
    with best_reader(path)[0] as reader, tifffile.TiffFile(path) as tiff:
        assert reader.name == "native"
        for level, page in enumerate(tiff.pages):
            assert np.array_equal(read_level(reader, level), page.asarray())


@pytest.mark.parametrize("kind", ["planes", "alpha", "16 bits", "big endian"])
def test_layouts_of_fractional_downsample_have_their_own_pixels(tmp_path, picture, kind):
    change, keywords = {
        "planes": (channels_first, {"planarconfig": "separate"}),
        "alpha": (
            lambda image: np.dstack([image, np.full(image.shape[:2], 255, np.uint8)]),
            {"extrasamples": ["unassalpha"]},
        ),
        "16 bits": (lambda image: image.astype(np.uint16) * 257 - (image > 0) * np.uint16(99), {}),
        "big endian": (lambda image: image.astype(np.uint16) * 257, {}),
    }[kind]
    levels = [picture, shrink(picture)]
    pages = [(change(im), keywords | (REDUCED if i else {})) for i, im in enumerate(levels)]
    path = write_pages(tmp_path / "x.tif", pages, byteorder=">" if kind == "big endian" else "<")
    with best_reader(path)[0] as reader:
        assert reader.name == "native"
        for level, expected in enumerate(levels):
            assert np.array_equal(read_level(reader, level), expected)


def test_tiffslide_reads_a_level_s_own_pixels(tmp_path, picture):
    webp = {"compression": "webp", "compressionargs": {"lossless": True}}
    levels = [picture, shrink(picture)]
    path = write_pages(
        tmp_path / "x.tif", [(im, webp | (REDUCED if i else {})) for i, im in enumerate(levels)]
    )
    with TiffSlideReader(path) as reader:
        for level, expected in enumerate(levels):
            assert np.array_equal(read_level(reader, level), expected)


def test_levels_of_whole_downsample_stay_with_their_reader(tmp_path, picture):
    even = picture[:600, :700]
    webp = {"compression": "webp", "compressionargs": {"lossless": True}}
    for name, keywords in (("openslide", {}), ("tiffslide", webp)):
        pages = [(even, keywords), (shrink(even), keywords | REDUCED)]
        with best_reader(write_pages(tmp_path / f"{name}.tif", pages))[0] as reader:
            assert (reader.name, reader.series, reader.notes) == (name, "", ())
            assert np.array_equal(read_level(reader, 1), shrink(even))


def test_aperio_s_ycbcr_is_converted_as_openslide_converts_it(tmp_path, picture):
    height, width = picture.shape[:2]
    coded = {
        "description": APERIO % (width, height, width, height), "photometric": "ycbcr",
        "compression": 33003, "compressionargs": {"level": 0, "reversible": True,
        "codecformat": "j2k", "mct": False},
    }  # fmt: skip
    # Any bytes will do for Y, Cb and Cr; those of noise have every combination.
    noise = np.random.default_rng(1).integers(0, 256, picture.shape, dtype=np.uint8)
    path = write_pages(tmp_path / "x.svs", [(noise, coded), (shrink(noise), coded)])
    with best_reader(path)[0] as reader, open_slide(path, "openslide") as reference:
        assert reader.name == "native"
        assert np.array_equal(read_level(reader), read_level(reference))
        whole = (1, 0, 0, reader.levels[1].width, reader.levels[1].height)
        assert np.array_equal(reader.read(*whole), reference.read(*whole))


def leave_out(path: Path, page: int, tiles: list[int]) -> None:
    """Set offset and size of native tiles to 0, as sparse files have it."""
    with tifffile.TiffFile(path) as tiff:
        tags = [tiff.pages[page].tags[code] for code in (324, 325)]
        fields = [(tag.valueoffset, int(tag.dtype), list(tag.value)) for tag in tags]
    with path.open("r+b") as file:
        for offset, kind, values in fields:
            for tile in tiles:
                values[tile] = 0
            file.seek(offset)
            file.write(struct.pack(f"<{len(values)}{ {3: 'H', 4: 'I', 16: 'Q'}[kind] }", *values))


@pytest.mark.parametrize("codec", ["jpeg", "zlib", "webp"])
def test_a_lower_level_with_gaps_is_not_used(tmp_path, picture, codec):
    even = picture[:512, :640]
    pages = [(even, {}), (shrink(even), REDUCED), (shrink(even, 4), REDUCED)]
    path = write_pages(tmp_path / "x.tif", [(im, k | {"compression": codec}) for im, k in pages])
    leave_out(path, 1, [1, 4])
    with best_reader(path)[0] as reader, tifffile.TiffFile(path) as tiff:
        assert [v.downsample for v in reader.levels] == [1, 4]
        assert reader.notes == ("level 1 is not used: 2 of its 6 tiles are not in the file",)
        if codec != "jpeg":  # which tifffile converts in its own way
            assert np.array_equal(read_level(reader), tiff.pages[0].asarray())
            assert np.array_equal(read_level(reader, 1), tiff.pages[2].asarray())


@pytest.mark.parametrize("codec", ["jpeg", "zlib", "webp"])
def test_gaps_of_all_levels_are_white_and_counted(tmp_path, picture, codec):
    even = picture[:512, :640]
    pages = [(even, {}), (shrink(even), REDUCED)]
    path = write_pages(tmp_path / "x.tif", [(im, k | {"compression": codec}) for im, k in pages])
    leave_out(path, 0, [0, 1, 5, 6])
    leave_out(path, 1, [0])
    with best_reader(path)[0] as reader:
        assert reader.notes == ("4 of 20 tiles are not in the file: shown as white",)
        for level, side in ((0, 256), (1, 128)):
            assert (read_level(reader, level)[:side, :side] == 255).all()
            assert not (read_level(reader, level)[side:] == 255).all()


GROWING: dict[str, dict[str, Any]] = {
    "raw tiles": {"compression": None},
    "raw strips": {"compression": None, "tile": None, "rowsperstrip": 8},
    "one raw strip": {"compression": None, "tile": None, "rowsperstrip": 601},
    "deflate": {}, "lzw": {"compression": "lzw"}, "jpeg": {"compression": "jpeg"},
    "packbits": {"compression": "packbits"}, "jpeg 2000": {"compression": "jpeg2000"},
    "webp": {"compression": "webp"},
}  # fmt: skip


@pytest.mark.parametrize("kind", GROWING)
def test_a_file_that_is_still_copied_into_its_full_size_is_refused(tmp_path, picture, kind):
    path = write_pages(tmp_path / "x.tif", [(picture, GROWING[kind])])
    whole = path.read_bytes()
    assert what_is_unwritten(path) == ""
    for share in (0.1, 0.33, 0.5, 0.71, 0.9):
        cut = int(len(whole) * share)
        path.write_bytes(whole[:cut] + bytes(len(whole) - cut))
        assert what_is_missing(path) == ""
        assert "are zeros at byte" in what_is_unwritten(path), share
    assert main(["scan", str(path), "--dataset", str(tmp_path / "d"), "--workers", "1"]) == 1
    (slide,) = read_slides(Dataset(tmp_path / "d"))
    assert "the file is not whole" in slide.reason
    assert "is it still being copied?" in slide.reason


@pytest.mark.parametrize("kind", ["raw tiles", "raw strips", "one raw strip"])
@pytest.mark.parametrize("black", ["below", "right", "left", "around", "corner", "blob"])
def test_black_parts_of_an_uncompressed_slide_are_a_picture(tmp_path, picture, kind, black):
    image = picture.copy()
    y, x = np.mgrid[: image.shape[0], : image.shape[1]]
    image[
        {
            "below": y > 400, "right": x > 390, "left": x < 200,
            "around": (y < 100) | (y > 450) | (x < 130) | (x > 500),
            "corner": (y > 300) & (x > 300),
            "blob": (y - 300) ** 2 + (x - 350) ** 2 > 220**2,
        }[black]
    ] = 0  # fmt: skip
    path = write_pages(tmp_path / "x.tif", [(image, GROWING[kind])])
    assert what_is_unwritten(path) == ""


def test_16_bits_in_strips_are_scaled_to_8_and_said(tmp_path, picture):
    deep = np.random.default_rng(2).integers(0, 65536, picture.shape, dtype=np.uint16)
    for number, keywords in enumerate(
        ({"rowsperstrip": 40}, {"rowsperstrip": 601, "compression": None})
    ):
        path = write_pages(tmp_path / f"{number}.tif", [(deep, {"tile": None} | keywords)])
        with best_reader(path)[0] as reader:
            assert reader.name == "native"
            assert np.array_equal(read_level(reader), np.rint(deep / 257).astype(np.uint8))
            assert reader.notes == ("16 bits per sample are scaled to 8 (divided by 257)",)


@pytest.mark.parametrize("tile", [None, (128, 128)])
def test_layouts_that_are_no_rgb_are_named_and_never_called_damaged(tmp_path, picture, tile):
    grey = picture.mean(-1)
    kinds: dict[str, tuple[np.ndarray, dict[str, Any]]] = {
        "32-bit float": ((picture / 255).astype(np.float32), {}),
        "16-bit float": ((picture / 255).astype(np.float16), {}),
        "8-bit signed": ((picture.astype(int) - 128).astype(np.int8), {}),
        "32-bit integer": (picture.astype(np.uint32), {}),
        "1 bit": (grey > 128, {"photometric": "minisblack"}),
    }
    if tile is None:  # OpenSlide shows these in tiles
        kinds |= {
            "grey": (grey.astype(np.uint8), {"photometric": "minisblack"}),
            "CMYK": (255 - np.dstack([picture, picture[..., :1]]), {"photometric": "separated"}),
            "CIELab": (picture, {"photometric": "cielab"}),
            "2 samples": (
                np.ascontiguousarray(picture[..., :2]),
                {"photometric": "minisblack", "planarconfig": "contig"},
            ),
            "5 samples": (
                np.dstack([picture, picture[..., :2]]), {"extrasamples": ["unspecified"] * 2},
            ),
            "palette": (
                picture[..., 0].copy(),
                {
                    "photometric": "palette",
                    "colormap": np.stack([np.arange(256, dtype=np.uint16) * 257] * 3),
                },
            ),
        }  # fmt: skip
    for number, (words, (pixels, keywords)) in enumerate(kinds.items()):
        path = write_pages(tmp_path / f"{number}.tif", [(pixels, {"tile": tile} | keywords)])
        with pytest.raises(SlideOpenError, match=words) as caught:
            best_reader(path)
        assert "damaged" not in str(caught.value)
