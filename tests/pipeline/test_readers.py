from importlib import import_module
from pathlib import Path

import numpy as np
import openslide
import pytest
from PIL import Image

from common.errors import UserError
from pipeline.slides.entries import find_slides, slide_id_of
from pipeline.slides.open import open_slide
from pipeline.slides.reader import SlideOpenError, SlideReadError, over_white
from pipeline.slides.readers import (
    READERS,
    SLIDE_SUFFIXES,
    ReaderEntry,
    reader_choices,
    readers_for,
)
from pipeline.slides.region import read_overview, read_region, read_tile
from pipeline.slides.resolution import ResolutionError, plan_read


@pytest.mark.parametrize("reader", ["openslide", "tiffslide"])
def test_levels_and_resolution_of_the_real_slide(cmu_slide, reader):
    with open_slide(cmu_slide, reader) as slide:
        assert [(v.width, v.height) for v in slide.levels] == [(2220, 2967)]
        assert slide.resolution.vendor == (0.499, 0.499)


def test_both_readers_give_the_same_pixels(cmu_slide):
    with open_slide(cmu_slide, "openslide") as one, open_slide(cmu_slide, "tiffslide") as other:
        for x, y in [(0, 0), (777, 1033), (1900, 2700)]:
            a, b = (s.read(0, x, y, 300, 250).astype(int) for s in (one, other))
            assert np.abs(a - b).max() <= 1


@pytest.mark.parametrize("reader", ["openslide", "tiffslide"])
def test_outside_of_the_slide_is_white(cmu_slide, reader):
    with open_slide(cmu_slide, reader) as slide:
        region = slide.read(0, 2220 - 40, 2967 - 30, 100, 100)
        assert region.shape == (100, 100, 3)
        assert (region[:, 40:] == 255).all()
        assert (region[30:] == 255).all()
        assert (region[:30, :40] < 255).any()
        assert (slide.read(0, -500, -500, 60, 60) == 255).all()


def test_a_tile_equals_openslide_itself(cmu_slide):
    with open_slide(cmu_slide) as slide:
        plan = plan_read(slide.levels, 0.499, 0.5, 0.02, 224)
        tile = read_tile(slide, plan, 896.0, 1344.0, 224)
    direct = openslide.OpenSlide(cmu_slide).read_region((896, 1344), 0, (224, 224)).convert("RGB")
    assert np.array_equal(tile, np.asarray(direct))


def test_a_two_fold_reduction_is_the_mean_of_four(cmu_slide):
    with open_slide(cmu_slide) as slide:
        plan = plan_read(slide.levels, 0.25, 0.5, 0.02, 224)
        tile = read_tile(slide, plan, 448.0, 896.0, 224)
        full = slide.read(0, 448, 896, 448, 448)
    means = full.reshape(224, 2, 224, 2, 3).mean((1, 3))
    assert np.abs(tile - means).max() <= 0.51


def test_resampled_neighbours_share_no_pixel_and_leave_none_out(cmu_slide):
    """At 0.2325 mpp a tile is 481.72 px wide: two tiles together equal one of twice the width."""
    with open_slide(cmu_slide) as slide:
        plan = plan_read(slide.levels, 0.2325, 0.5, 0.02, 224)
        wide = plan_read(slide.levels, 0.2325, 0.5, 0.02, 448)
        stride = round(plan.stride_level0 * 256) / 256
        both = read_tile(slide, wide, 0.0, 400.0, 448)
        left = read_tile(slide, plan, 0.0, 400.0, 224)
        right = read_tile(slide, plan, stride, 400.0, 224)
    assert not plan.aligned
    joined = np.concatenate([left, right], 1).astype(int)
    # One grey level: positions are kept in 1/256 px.
    assert np.abs(joined - both[:224].astype(int)).max() <= 1


def test_an_overview_is_made_of_whole_cells(cmu_slide):
    with open_slide(cmu_slide) as slide:
        overview, um_per_px = read_overview(slide, 0.499, 8.0)
        cell = slide.read(0, 16 * 50, 16 * 90, 16, 16)
    assert um_per_px == pytest.approx(16 * 0.499)
    assert overview.shape == (2967 // 16, 2220 // 16, 3)
    assert np.abs(overview[90, 50] - cell.reshape(-1, 3).mean(0)).max() <= 0.51


def test_transparent_black_becomes_white():
    rgba = np.zeros((2, 2, 4), np.uint8)
    rgba[0, 0] = (10, 20, 30, 255)
    rgba[0, 1] = (0, 0, 0, 128)
    assert over_white(rgba)[0, 0].tolist() == [10, 20, 30]
    assert over_white(rgba)[0, 1].tolist() == [127, 127, 127]
    assert over_white(rgba)[1, 1].tolist() == [255, 255, 255]


def test_a_read_error_names_slide_and_place_and_is_never_white(shared_data):
    with (
        open_slide(shared_data / "bad_slides" / "bad_unreadable.svs") as slide,
        pytest.raises(SlideReadError, match=r"bad_unreadable.*x=0, y=0"),
    ):
        slide.read(0, 0, 0, 16, 16)


def test_a_truncated_slide_fails_with_a_reason(cmu_slide, tmp_path):
    whole = cmu_slide.read_bytes()
    broken = tmp_path / "broken.svs"
    broken.write_bytes(whole[: len(whole) // 2])
    with pytest.raises((SlideOpenError, SlideReadError)) as failure:
        _read_all(broken)
    assert "\n" not in str(failure.value)


def _read_all(path):
    with open_slide(path) as slide:
        for y in range(0, 2900, 200):
            for x in range(0, 2200, 200):
                slide.read(0, x, y, 200, 200)


def test_not_slides_are_named_for_what_they_are(tmp_path):
    empty, pointer = tmp_path / "a.svs", tmp_path / "b.svs"
    empty.write_bytes(b"")
    pointer.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(SlideOpenError, match="empty"):
        open_slide(empty)
    with pytest.raises(SlideOpenError, match="git lfs pull"):
        open_slide(pointer)


@pytest.mark.parametrize(
    ("name", "slide_id"),
    [
        ("TCGA-CR-7395-01A-01-TS1.svs", "TCGA-CR-7395-01A-01-TS1"),
        ("OS-1-detail.ome.tif", "OS-1-detail"),
        ("a b(1).ndpi", "a_b_1_"),
        ("TCGA-3C-AALI-01Z-00-DX1.F6E9A5DF.svs", "TCGA-3C-AALI-01Z-00-DX1.F6E9A5DF"),
    ],
)
def test_slide_ids_are_safe_names(tmp_path, name, slide_id):
    path = tmp_path / name
    path.touch()
    assert slide_id_of(path) == slide_id


def test_two_slides_of_one_name_do_not_stop_the_others(tmp_path):
    for name in ("a/x.svs", "b/x.svs", "b/y.svs"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    sources = find_slides([str(tmp_path)])
    assert [bool(source.taken_by) for source in sources] == [False, True, False]
    assert sources[1].taken_by == str(tmp_path / "a/x.svs")


def test_a_table_gives_path_id_mpp_and_site(tmp_path):
    table = tmp_path / "slides.csv"
    table.write_text("path,slide_id,mpp,tss,patient\nx.svs,S1,0.25,NA,P1\ny.svs,S2,,02,P2\n")
    first, second = find_slides([str(table)])
    assert (first.slide_id, first.mpp, first.site) == ("S1", 0.25, "NA")
    assert (second.mpp, second.site, second.path) == (None, "02", tmp_path / "y.svs")


@pytest.mark.parametrize("inputs", [("slides", "t.csv"), ("t.csv", "slides"), ("t.csv", "*/*")])
def test_a_table_s_row_holds_wherever_else_the_path_is_given(tmp_path, inputs):
    (tmp_path / "slides").mkdir()
    for name in ("x.svs", "y.svs"):
        (tmp_path / "slides" / name).touch()
    (tmp_path / "t.csv").write_text("path,slide_id,patient,mpp,md5\nslides/x.svs,S,P1,0.25,AB\n")
    one, other = find_slides([str(tmp_path / text) for text in inputs])
    assert (one.slide_id, one.patient, one.mpp, one.md5) == ("S", "P1", 0.25, "ab")
    assert (other.slide_id, other.patient, other.mpp, other.md5) == ("y", "", None, "")


def test_two_rows_of_one_path_say_the_same_or_are_refused(tmp_path):
    one, two = tmp_path / "one.csv", tmp_path / "two.csv"
    one.write_text("path,patient,mpp\na.svs,P0,\nx.svs,P1,0.25\n")
    two.write_text("path,patient,mpp\n./x.svs,P1,0.250\n")
    assert len(find_slides([str(one), str(two), str(one)])) == 2
    for row, words in (
        ("P2,0.25", r"two.csv, line 2: patient 'P2' of .*x.svs, but 'P1' in .*one.csv, line 3"),
        ("P1,", r"two.csv, line 2: mpp '' of .*x.svs, but '0.25' in"),
    ):
        two.write_text(f"path,patient,mpp\nx.svs,{row}\n")
        with pytest.raises(UserError, match=words) as caught:
            find_slides([str(one), str(tmp_path), str(two)])
        assert "\n" not in str(caught.value)
    one.write_text("path,patient\nx.svs,P1\nx.svs,P2\n")
    with pytest.raises(UserError, match="line 3: patient 'P2'"):
        find_slides([str(one)])


def test_a_region_is_asked_for_in_mpp(cmu_slide):
    with open_slide(cmu_slide) as slide:
        whole = read_region(slide, 0.499, 480, 700, 64, 0.998, tolerance=0.0)
        pixels = slide.read(0, 480, 700, 128, 128).astype(np.float64)
        means = pixels.reshape(64, 2, 64, 2, 3).mean((1, 3))
        assert np.abs(whole - means).max() <= 0.5
        assert np.array_equal(
            read_region(slide, 0.499, 480, 700, 64, 0.5), slide.read(0, 480, 700, 64, 64)
        ), "0.499 lies within 2% of 0.5: whole pixels"
        exact = read_region(slide, 0.499, 480, 700, 64, 0.5, tolerance=0.0)
        assert not np.array_equal(exact, slide.read(0, 480, 700, 64, 64))
        with pytest.raises(ResolutionError, match="never enlarged"):
            read_region(slide, 0.499, 480, 700, 64, 0.25)


def test_a_dicom_folder_is_the_slide_that_it_was_made_from(cmu_slide, shared_data):
    """The copy at hand was compressed anew: pixels differ, places and colours do not."""
    folder = shared_data / "slides" / "CMU-1-Small-Region.dcm"
    with open_slide(folder) as dicom, open_slide(cmu_slide) as aperio:
        assert dicom.levels == aperio.levels
        assert dicom.resolution.vendor == pytest.approx(aperio.resolution.vendor)
        window = (0, 800, 1200, 448, 448)
        ours, theirs = (slide.read(*window).astype(float) for slide in (dicom, aperio))
        assert np.abs((ours - theirs).mean((0, 1))).max() < 0.5
        for move in (1, -1):
            moved = np.roll(theirs, move, 1)
            assert np.abs(ours - theirs).mean() < 0.5 * np.abs(ours - moved).mean()


def test_the_registry_names_every_reader_as_it_names_itself(cmu_slide):
    for name, entry in READERS.items():
        module, _, cls = entry.location.partition(":")
        assert getattr(import_module(module), cls).name == name
    assert reader_choices() == ["auto", "native", "openslide", "tiffslide", "dicom", "picture"]
    assert {".svs", ".ndpi", ".mrxs", ".dcm", ".czi"} <= SLIDE_SUFFIXES
    assert readers_for(Path("a.SVS")) == ["native", "openslide", "tiffslide"]
    assert readers_for(Path("a.dcm")) == ["openslide", "dicom"]
    assert readers_for(Path("a.unknown")) == list(READERS)
    with pytest.raises(UserError, match="no reader 'x': expected one of auto, native"):
        open_slide(cmu_slide, "x")


def test_a_reader_is_one_module_and_one_line(tmp_path, monkeypatch):
    (tmp_path / "gif_reader.py").write_text(
        "import numpy as np\nfrom PIL import Image\n"
        "from pipeline.slides.reader import Level, ResolutionTags, SlideReader\n"
        "class GifReader(SlideReader):\n"
        "    name = 'gif'\n"
        "    def __init__(self, path, series=''):\n"
        "        self.path, self.vendor = path, 'gif'\n"
        "        self._pixels = np.asarray(Image.open(path).convert('RGB'))\n"
        "        self.levels = (Level(*self._pixels.shape[1::-1], 1.0),)\n"
        "        self.resolution = ResolutionTags()\n"
        "    def _read_window(self, level, x, y, width, height):\n"
        "        return self._pixels[y : y + height, x : x + width]\n"
        "    def close(self):\n"
        "        pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(READERS, "gif", ReaderEntry("gif_reader:GifReader", ".gif"))
    Image.new("RGB", (40, 30), (200, 120, 180)).save(tmp_path / "a.gif")
    with open_slide(tmp_path / "a.gif") as slide:
        assert (slide.name, slide.levels[0].width) == ("gif", 40)
        assert slide.read(0, 38, 0, 4, 1)[0, :, 0].tolist() == [200, 200, 255, 255]
    assert readers_for(tmp_path / "a.gif") == ["gif"]
