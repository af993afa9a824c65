from dataclasses import replace

import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.dataset import Slide
from pipeline.slides.config import ScanConfig
from pipeline.slides.describe import describe_slide
from pipeline.slides.entries import SlideEntry
from pipeline.slides.metadata import read_description
from pipeline.slides.open import open_slide
from pipeline.slides.reader import Level, ResolutionTags
from pipeline.slides.resolution import (
    MppContradictionError,
    ResolutionError,
    area_resample,
    level_downsamples,
    plan_read,
    resolve_mpp,
)

APERIO = [Level(100_000, 80_000, 1.0), Level(25_000, 20_000, 4.00012), Level(6250, 5000, 16.0013)]


def test_mpp_comes_in_the_stated_order():
    tags = ResolutionTags(vendor=(0.25, 0.25), tiff=(0.3, 0.3))
    assert resolve_mpp(tags, table=0.4, assumed=0.6).source == "table"
    assert resolve_mpp(tags, table=None, assumed=0.6).source == "vendor"
    only_tiff = ResolutionTags(tiff=(0.3, 0.3))
    assert resolve_mpp(only_tiff, table=None, assumed=0.6).source == "tiff-tags"
    assert resolve_mpp(ResolutionTags(), table=None, assumed=0.6).source == "assumed"
    with pytest.raises(ResolutionError, match="--assume-mpp"):
        resolve_mpp(ResolutionTags(), table=None, assumed=None)


def test_tiff_tags_outside_the_window_are_not_believed():
    with pytest.raises(ResolutionError, match=r"352\.8"):
        resolve_mpp(ResolutionTags(tiff=(352.8, 352.8)), table=None, assumed=None)


def test_pixels_that_are_not_square_are_rejected():
    with pytest.raises(ResolutionError, match="not square"):
        resolve_mpp(ResolutionTags(vendor=(0.25, 0.26)), table=None, assumed=None)
    assert resolve_mpp(ResolutionTags(vendor=(0.25, 0.2505)), table=None, assumed=None)


def _resolve(*, table=None, assumed=None, believed="auto", **tags):
    pairs = {k: (v, v) if k in ("vendor", "tiff", "ome") else v for k, v in tags.items()}
    return resolve_mpp(ResolutionTags(**pairs), table=table, assumed=assumed, believed=believed)


@pytest.mark.parametrize("other", ["tiff", "ome"])
def test_a_contradiction_beyond_a_tenth_is_said(other):
    assert _resolve(vendor=0.25, **{other: 0.27}).notes == ()
    mpp = _resolve(vendor=0.25, **{other: 0.3})
    assert (mpp.value, mpp.source) == (0.25, "vendor")
    assert "vendor's metadata says 0.25 µm" in mpp.notes[0]
    assert "0.3" in mpp.notes[0]


@pytest.mark.parametrize("factor", [0.5, 2.0, 4.0, 1.97])
@pytest.mark.parametrize(("one", "other"), [("vendor", "tiff"), ("vendor", "ome"), ("tiff", "ome")])
def test_a_factor_of_two_is_rejected_until_it_is_decided(one, other, factor):
    tags = {one: 0.24, other: 0.24 * factor}
    names = {"vendor": "vendor", "tiff": "tiff-tags", "ome": "ome-xml"}
    with pytest.raises(MppContradictionError, match="--mpp-from") as caught:
        _resolve(**tags)
    assert f"--mpp-from {names[one]} or {names[other]}" in str(caught.value)
    assert f"{0.24 * factor:.4g}" in str(caught.value)
    for name in (one, other):
        mpp = _resolve(**tags, believed=names[name])
        assert (mpp.value, mpp.source) == (pytest.approx(tags[name]), names[name])
        assert len(mpp.notes) == 1
    assert (_resolve(**tags, table=0.7).value, _resolve(**tags, table=0.7).source) == (0.7, "table")
    with pytest.raises(MppContradictionError):
        _resolve(**tags, assumed=0.5)


@pytest.mark.parametrize(
    ("vendor", "power", "outcome"),
    [
        (0.2325, 40, "taken"), (0.2527, 40, "taken"), (0.499, 20, "taken"), (0.32, 40, "taken"),
        (0.36, 40, "said"), (0.17, 40, "said"), (0.499, 40, "refused"), (0.25, 20, "refused"),
        (0.05, 20, "refused"), (1.0, 5, "refused"),
    ],
)  # fmt: skip
def test_a_magnification_is_nominal(vendor, power, outcome):
    if outcome == "refused":
        with pytest.raises(MppContradictionError, match=f"{power}x is about"):
            _resolve(vendor=vendor, magnification=power)
        assert _resolve(vendor=vendor, magnification=power, believed="vendor").value == vendor
        mpp = _resolve(vendor=vendor, magnification=power, believed="objective")
        assert (mpp.value, mpp.source) == (10 / power, "objective")
        return
    for believed in ("auto", "objective"):
        mpp = _resolve(vendor=vendor, magnification=power, believed=believed)
        assert (mpp.value, mpp.source) == (vendor, "vendor")
        assert bool(mpp.notes) == (outcome == "said")


def test_a_lens_says_less_than_a_magnification():
    """Pannoramic and Axio Scan slides have 0.17 to 0.24 µm behind a lens of 20x."""
    for vendor in (0.1725, 0.2325, 0.25):
        mpp = _resolve(vendor=vendor, lens=20)
        assert (mpp.value, len(mpp.notes)) == (vendor, 1)
    with pytest.raises(MppContradictionError):
        _resolve(vendor=0.05, lens=20)


def test_the_objective_alone_is_taken_only_where_it_is_asked_for():
    with pytest.raises(ResolutionError, match=r"20x is about 0\.5.*--mpp-from objective"):
        _resolve(magnification=20)
    assert _resolve(magnification=20, believed="objective").value == 0.5
    assert _resolve(lens=40, believed="objective").value == 0.25
    assert _resolve(magnification=20, assumed=0.45, believed="auto").source == "assumed"
    with pytest.raises(ResolutionError, match="no trustworthy mpp"):
        _resolve(believed="objective")


def test_the_objective_decides_between_two_others():
    mpp = _resolve(vendor=0.25, tiff=0.5, magnification=20, believed="objective")
    assert (mpp.value, mpp.source, len(mpp.notes)) == (0.5, "tiff-tags", 1)


def test_a_vendor_that_states_two_values_is_not_settled_by_its_name():
    for believed in ("auto", "vendor"):
        with pytest.raises(MppContradictionError, match="give a CSV with an mpp column"):
            _resolve(vendor=0.25, others=((0.5, 0.5),), believed=believed)
    assert _resolve(vendor=0.25, others=((0.5, 0.5),), table=0.5).value == 0.5
    assert _resolve(vendor=0.5, others=((0.49, 0.49),)).notes == ()


def test_what_cannot_be_a_slide_s_resolution_contradicts_nothing():
    assert _resolve(vendor=0.25, tiff=352.8).notes == ()
    assert _resolve(vendor=0.25, ome=1.0).notes == (), "1 is written where it is not known"
    with pytest.raises(ResolutionError, match=r"500.*500 nm would be 0\.5 µm"):
        _resolve(vendor=500.0)
    with pytest.raises(ResolutionError, match=r"0\.0005 mm would be 0\.5 µm"):
        _resolve(ome=0.0005)


@pytest.mark.parametrize(
    ("size", "unit", "mpp"),
    [
        (0.25, "µm", 0.25), (0.25, "\u03bcm", 0.25), (0.25, None, 0.25), (0.25, "Âµm", 0.25),
        (250, "nm", 0.25), (0.00025, "mm", 0.25), (2.5e-7, "m", 0.25), (0.25, "pixel", None),
        (0, "µm", None),
    ],
)  # fmt: skip
def test_units_of_ome_xml(size, unit, mpp):
    units = "" if unit is None else f' PhysicalSizeXUnit="{unit}" PhysicalSizeYUnit="{unit}"'
    label = '<Pixels SizeX="80" SizeY="60" PhysicalSizeX="9" PhysicalSizeY="9"/>'
    text = (
        '<?xml version="1.0"?><OME><Instrument><Objective ID="1" NominalMagnification="40.0"/>'
        f'</Instrument><Image>{label}</Image><Image><Pixels SizeX="800" SizeY="600" '
        f'PhysicalSizeX="{size}" PhysicalSizeY="{size}"{units}></Pixels></Image></OME>'
    )
    tags = read_description(ResolutionTags(), text, "generic-tiff", 800, 600)
    assert tags.ome == (None if mpp is None else pytest.approx((mpp, mpp)))
    assert tags.lens == 40


def test_aperio_s_description():
    text = "Aperio Image Library v11\r\n9x9 (256x256) JPEG/RGB Q=70|AppMag = 20|{}"
    for stated, others in (
        ("MPP = 0.5", ()), ("MPP = 0.5|MPP = 0.25", ((0.25, 0.25),)), ("MPP=0,5", ()),
        ("MPP = 5.0e-01", ()),
    ):  # fmt: skip
        tags = read_description(
            ResolutionTags(vendor=(0.5, 0.5)), text.format(stated), "aperio", 9, 9
        )
        assert (tags.magnification, tags.others) == (20.0, others)


def _write_tiff(path, pixels, description="", ome=None, mpp=None):
    """Tiled JPEG; with the TIFF tags of a resolution where there is one."""
    tags = {"resolution": (10_000 / mpp,) * 2, "resolutionunit": "CENTIMETER"} if mpp else {}
    tifffile.imwrite(
        path, pixels, tile=(256, 256), photometric="rgb", compression="jpeg",
        description=description or None, metadata=ome, ome=ome is not None, **tags,
    )  # fmt: skip
    return path


def _describe(path, mpp_from="auto", table=None):
    config = ScanConfig(inputs=("x",), mpp_from=mpp_from)
    return describe_slide(Slide("a", str(path)), path, SlideEntry(path, "a", mpp=table), config)[0]


APERIO_TEXT = "Aperio Image Library v11\r\n900x900 (256x256) JPEG/RGB Q=70|AppMag = {}|MPP = {}"


def test_scan_compares_what_an_aperio_slide_states(cmu_slide, tmp_path):
    pixels = tifffile.imread(cmu_slide, key=0)[1000:1900, 300:1200]
    right = _describe(
        _write_tiff(tmp_path / "a.svs", pixels, APERIO_TEXT.format(20, 0.499), mpp=0.5)
    )
    assert (right.status, right.reader, right.mpp, right.notes) == ("ok", "native", 0.499, ())
    said = _describe(_write_tiff(tmp_path / "b.svs", pixels, APERIO_TEXT.format(20, 0.5), mpp=0.4))
    assert (said.status, said.mpp) == ("ok", 0.5)
    assert said.notes == ("the vendor's metadata says 0.5 µm per pixel, but the TIFF tags say 0.4",)
    path = _write_tiff(tmp_path / "c.svs", pixels, APERIO_TEXT.format(20, 0.25))
    refused = _describe(path)
    assert (refused.status, refused.mpp) == ("rejected", None)
    assert "--mpp-from vendor or objective" in refused.reason
    for mpp_from, mpp, source in (("vendor", 0.25, "vendor"), ("objective", 0.5, "objective")):
        slide = _describe(path, mpp_from)
        assert (slide.status, slide.mpp, slide.mpp_source) == ("ok", mpp, source)
    slide = _describe(path, table=0.5)
    assert (slide.status, slide.mpp, slide.mpp_source, len(slide.notes)) == ("ok", 0.5, "table", 1)


def test_readers_agree_on_what_a_slide_states(cmu_slide, tmp_path):
    pixels = tifffile.imread(cmu_slide, key=0)[1000:1900, 300:1200]
    path = _write_tiff(tmp_path / "a.svs", pixels, APERIO_TEXT.format(20, 0.499), mpp=0.51)
    found = {}
    for reader in ("native", "openslide"):
        with open_slide(path, reader) as slide:
            found[reader] = slide.resolution
    assert found["native"].tiff == pytest.approx(found["openslide"].tiff, rel=1e-6)
    assert replace(found["native"], tiff=None) == replace(found["openslide"], tiff=None)


@pytest.mark.parametrize(("size", "unit"), [(500.0, "nm"), (0.0005, "mm"), (0.5, None)])
def test_scan_reads_ome_xml_in_every_unit(cmu_slide, tmp_path, size, unit):
    pixels = tifffile.imread(cmu_slide, key=0)[1000:1900, 300:1200]
    ome = {"axes": "YXS", "PhysicalSizeX": size, "PhysicalSizeY": size}
    if unit:
        ome |= {"PhysicalSizeXUnit": unit, "PhysicalSizeYUnit": unit}
    alone = _describe(_write_tiff(tmp_path / "a.ome.tif", pixels, ome=ome))
    assert (alone.status, alone.mpp) == ("ok", 0.5)
    path = _write_tiff(tmp_path / "b.ome.tif", pixels, ome=ome, mpp=0.25)
    assert _describe(path).status == "rejected"
    slide = _describe(path, "tiff-tags")
    assert (slide.status, slide.mpp, slide.mpp_source) == ("ok", 0.25, "tiff-tags")


@pytest.mark.parametrize(
    ("mpp", "factor", "aligned", "true_mpp"),
    [
        (0.25, 2, True, 0.5),
        (0.2525, 2, True, 0.505),
        (0.499, 1, True, 0.499),
        (0.5, 1, True, 0.5),
        (0.125, 1, True, 0.5),
        (0.2325, 0.5 / 0.2325, False, 0.5),
    ],
)
def test_integer_multiples_within_tolerance_are_aligned(mpp, factor, aligned, true_mpp):
    plan = plan_read(APERIO, mpp, 0.5, 0.02, 224)
    assert plan.factor == pytest.approx(factor)
    assert plan.aligned is aligned
    assert plan.mpp == pytest.approx(true_mpp)
    assert plan.level == (1 if mpp == 0.125 else 0)


def test_tolerance_zero_forces_exactness():
    plan = plan_read(APERIO, 0.2525, 0.5, 0.0, 224)
    assert not plan.aligned
    assert plan.mpp == pytest.approx(0.5, abs=1e-12)
    assert plan_read(APERIO, 0.25, 0.5, 0.0, 224).aligned


def test_nothing_is_enlarged():
    with pytest.raises(ResolutionError, match="never enlarged"):
        plan_read([Level(1472, 690, 1.0)], 0.987, 0.5, 0.02, 224)
    assert plan_read([Level(1472, 690, 1.0)], 0.505, 0.5, 0.02, 224).factor == 1


@given(mpp=st.floats(0.1, 0.5), target=st.floats(0.5, 2.0), tolerance=st.sampled_from([0, 0.02]))
@settings(max_examples=100, deadline=None)
def test_plans_hold_their_promises(mpp, target, tolerance):
    plan = plan_read(APERIO, mpp, target, tolerance, 224)
    assert plan.factor >= 1 - tolerance
    assert abs(plan.mpp - target) <= tolerance * target + 1e-9
    assert plan.stride_level0 * mpp == pytest.approx(224 * plan.mpp)
    if plan.aligned:
        assert plan.factor == round(plan.factor)


def test_downsamples_of_rounded_levels_are_the_whole_ones_that_were_meant():
    base = Level(44_443, 35_671, 1.0)
    levels = [
        base,
        Level(11_110, 8_917, (44_443 / 11_110 + 35_671 / 8_917) / 2),
        Level(2_777, 2_229, (44_443 / 2_777 + 35_671 / 2_229) / 2),
        Level(17_777, 14_268, 2.5),
    ]
    assert levels[1].downsample != 4
    assert level_downsamples(levels) == [1.0, 4.0, 16.0, 2.5]
    off = Level(22_111, 17_747, 44_443 / 22_111)
    assert level_downsamples([base, off]) == [1.0, off.downsample], "110 px away at the far edge"
    thin = Level(2_500, 10, (10_000 / 2_500 + 42 / 10) / 2)
    assert level_downsamples([Level(10_000, 42, 1.0), thin]) == [1.0, 4.0], "10 rows are 10.5"


def test_area_resample_equals_the_plain_mean_for_integer_factors():
    image = np.random.default_rng(0).integers(0, 256, (448, 448, 3), dtype=np.uint8)
    means = image.reshape(224, 2, 224, 2, 3).mean((1, 3))
    assert np.abs(area_resample(image, 0, 0, 448, 224) - means).max() <= 0.5


def test_area_resample_at_sub_pixels_equals_an_oversampled_mean():
    rng = np.random.default_rng(1)
    image = rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)
    # Edges at multiples of 1/8 px: start 0.375, cells of 2.125 px.
    fine = np.kron(image.astype(float), np.ones((8, 8, 1)))
    cell = 17
    expected = np.array(
        [
            [
                fine[5 + i * cell : 5 + (i + 1) * cell, 3 + j * cell : 3 + (j + 1) * cell].mean(
                    (0, 1)
                )
                for j in range(16)
            ]
            for i in range(16)
        ]
    )
    found = area_resample(image, 0.375, 0.625, 16 * 2.125, 16)
    assert np.abs(found - expected).max() <= 0.501
