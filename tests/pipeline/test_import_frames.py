"""The corner that coordinates count from: QuPath's is the scanned area's, ours the slide's."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import cv2
import h5py
import numpy as np
import openslide
import pytest
import tifffile
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from common.errors import UserError
from pipeline.__main__ import main
from pipeline.dataset import (
    Dataset,
    Run,
    Slide,
    claim_identity,
    read_candidates,
    read_identity,
    read_slides,
    write_slides,
)
from pipeline.imports import mask_fit
from pipeline.imports.config import CoordinatesExport, MasksConfig
from pipeline.imports.export import export_slide, plan_exports
from pipeline.imports.frames import with_bounds
from pipeline.imports.geojson import class_areas, mask_features, paint_areas
from pipeline.imports.mask_fit import place_mask
from pipeline.imports.masks import (
    MaskFile,
    find_masks,
    mask_slide,
    mask_source,
    masks_identity,
)
from pipeline.imports.polygons import Affine
from pipeline.slides.open import open_scanned
from pipeline.slides.region import read_overview

CORNER, SCANNED, CANVAS = (2200, 1700), (3000, 2500), (7000, 6000)
BOUNDS = (*CORNER, *SCANNED)
RING = [[300, 400], [2500, 400], [2500, 2200], [300, 2200], [300, 400]]
"""As QuPath shows it: on the scanned area."""
_VIEW = (
    '<view sizeX="{0}" sizeY="{1}" offsetX="{2}" offsetY="{3}" spacingZ="0"/><scanSettings>'
    "<objectiveSettings><objective>{4}</objective></objectiveSettings><illuminationSettings>"
    "<illuminationSource>brightfield</illuminationSource></illuminationSettings></scanSettings>"
)


def write_scn(path: Path, cmu: Path) -> Path:
    """A Leica SCN of real tissue: 3000x2500 px scanned at (2200, 1700) of a canvas of 7000x6000."""
    pixels = tifffile.imread(cmu, key=0)[:2500, :2200]
    pixels = np.ascontiguousarray(np.concatenate([pixels, pixels[:, ::-1]], 1)[:, : SCANNED[0]])
    quarter = cv2.resize(pixels, (SCANNED[0] // 4, SCANNED[1] // 4), interpolation=cv2.INTER_AREA)
    nm = 500
    whole = _VIEW.format(CANVAS[0] * nm, CANVAS[1] * nm, 0, 0, 0.6)
    part = _VIEW.format(*(v * nm for v in SCANNED), *(v * nm for v in CORNER), 20)
    sizes = "".join(
        f'<dimension sizeX="{SCANNED[0] // f}" sizeY="{SCANNED[1] // f}" r="{r}" ifd="{r + 1}"/>'
        for r, f in enumerate((1, 4))
    )
    device = '<device model="SCN400" version="1"/>'
    description = (
        '<?xml version="1.0"?><scn xmlns="http://www.leica-microsystems.com/scn/2010/10/01">'
        f'<collection name="c" uuid="u" sizeX="{CANVAS[0] * nm}" sizeY="{CANVAS[1] * nm}">'
        f'<barcode>x</barcode><image name="macro" uuid="m">{device}<pixels sizeX="700" '
        f'sizeY="600"><dimension sizeX="700" sizeY="600" r="0" ifd="0"/></pixels>{whole}</image>'
        f'<image name="main" uuid="n">{device}<pixels sizeX="{SCANNED[0]}" sizeY="{SCANNED[1]}">'
        f"{sizes}</pixels>{part}</image></collection></scn>"
    )
    options = {
        "photometric": "rgb", "compression": "jpeg", "compressionargs": {"level": 90},
        "tile": (256, 256), "metadata": None, "resolutionunit": "CENTIMETER",
    }  # fmt: skip
    with tifffile.TiffWriter(path, bigtiff=True) as tiff:
        tiff.write(np.full((600, 700, 3), 240, np.uint8), description=description, **options)
        tiff.write(pixels, resolution=(20000, 20000), **options)
        tiff.write(quarter, resolution=(5000, 5000), **options)
    return path


@pytest.fixture(scope="module")
def scanned(tmp_path_factory: pytest.TempPathFactory, cmu_slide: Path) -> Path:
    folder = tmp_path_factory.mktemp("scn")
    write_scn(folder / "slide.scn", cmu_slide)
    assert main(["scan", str(folder), "--dataset", str(folder / "d"), "--workers", "1"]) == 0
    return folder / "d"


@pytest.fixture
def dataset(scanned: Path, tmp_path: Path) -> Dataset:
    """The SCN slide, scanned; a test may change it."""
    shutil.copytree(scanned, tmp_path / "dataset")
    return Dataset(tmp_path / "dataset")


@pytest.fixture(scope="module")
def overview(scanned: Path) -> tuple[Slide, np.ndarray, float]:
    (slide,) = read_slides(Dataset(scanned))
    with open_scanned(slide, Path(slide.path)) as reader:
        return slide, *read_overview(reader, float(slide.mpp), 8.0)


def moved(ring: list[list[float]], dx: float = 0, dy: float = 0, scale: float = 1) -> list:
    return [[x * scale + dx, y * scale + dy] for x, y in ring]


def save_ring(path: Path, *rings: list[list[float]], **members: object) -> Path:
    features = [
        {
            "type": "Feature",
            "geometry": {"type": "Polygon", "coordinates": [ring]},
            "properties": {"objectType": "annotation", "classification": {"name": "tissue"}},
        }
        for ring in rings
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"type": "FeatureCollection", **members, "features": features}))
    return path


def box_mask(shape: tuple[int, int], left: float, top: float, right: float, bottom: float):
    """Pixels of 16 level-0 px whose centres are in the box: the oracle, without polygons."""
    x, y = (np.arange(shape[1]) + 0.5) * 16, (np.arange(shape[0]) + 0.5) * 16
    return np.outer((y > top) & (y < bottom), (x > left) & (x < right)).astype(np.uint8)


RIGHT = (2500, 2100, 4700, 3900)


def detect(overview, path: Path, frame: str = "auto") -> tuple[np.ndarray, str]:
    slide, rgb, um_per_px = overview
    file = MaskFile(path, slide, {}, frame)
    return file.detect(rgb, um_per_px).mask, file.note


def import_mask(dataset: Dataset, path: Path, frame: str = "auto"):
    """What a worker does, without a cluster."""
    (slide,) = read_slides(dataset)
    config = MasksConfig(path.parent, frame=frame)
    claim_identity(dataset, masks_identity(config), stage="tissue", versions={})
    (entry,) = mask_slide("run", str(dataset.root), slide, path, config, "mark", "source")
    with Run(dataset, "tissue", {}) as run:
        run.append([entry])
    return entry


def mask_of(dataset: Dataset) -> np.ndarray:
    return cv2.imread(str(dataset.mask_file("slide")), cv2.IMREAD_UNCHANGED)


# Bounds


def test_scan_records_the_scanned_area_and_only_where_one_is_stated(scanned, cmu_slide):
    (slide,) = read_slides(Dataset(scanned))
    assert (slide.bounds, (slide.width, slide.height)) == (BOUNDS, CANVAS)
    with openslide.OpenSlide(cmu_slide) as image:
        assert openslide.PROPERTY_NAME_BOUNDS_X not in image.properties


def test_of_an_older_dataset_the_scanned_area_is_read_from_the_file(dataset, tmp_path):
    (slide,) = read_slides(dataset)
    old = replace(slide, bounds=None)
    assert with_bounds(old) == slide
    assert with_bounds(replace(old, vendor="aperio", path="nothing")).bounds is None
    with pytest.raises(UserError, match=r"cannot be opened .*run `scan` again, or give --frame"):
        with_bounds(replace(old, path=str(tmp_path / "moved.scn")))
    write_slides(dataset, "run", [old])
    assert read_slides(dataset)[0].bounds is None
    save_ring(tmp_path / "m" / "slide.geojson", RING)
    command = ["import", "masks", str(tmp_path / "m"), "--dataset", str(dataset.root)]
    assert main([*command, "--workers", "1"]) == 0
    mask = mask_of(dataset)
    assert np.array_equal(mask, box_mask(mask.shape, *RIGHT))


# Masks


def test_a_ring_of_qupath_falls_on_the_same_tissue(dataset, tmp_path):
    entry = import_mask(dataset, save_ring(tmp_path / "m" / "slide.geojson", RING))
    mask = mask_of(dataset)
    assert np.array_equal(mask, box_mask(mask.shape, *RIGHT))
    table = read_candidates(dataset, "slide")
    x, y = table["x_level0"].to_numpy(), table["y_level0"].to_numpy()
    assert (x.min() >= 2500 - 112) & (x.max() <= 4700 - 112)
    assert (y.min() >= 2100 - 112) & (y.max() <= 3900 - 112)
    (note,) = entry.values["notes"]
    assert note.startswith("counted from the corner of the scanned area (2200, 1700): ")


def test_the_frame_is_found_or_stated(overview, tmp_path):
    bounds = save_ring(tmp_path / "b" / "slide.geojson", RING)
    canvas = save_ring(tmp_path / "c" / "slide.geojson", moved(RING, *CORNER))
    shape = overview[1].shape[:2]
    right, wrong = box_mask(shape, *RIGHT), box_mask(shape, 300, 400, 2500, 2200)
    for path, frame, expected in (
        (bounds, "auto", right), (bounds, "bounds", right), (bounds, "canvas", wrong),
        (canvas, "auto", right), (canvas, "canvas", right),
    ):  # fmt: skip
        assert np.array_equal(detect(overview, path, frame)[0], expected), (path, frame)
    assert "from the corner of the whole slide:" in detect(overview, canvas)[1]
    assert "0% of the mask is on tissue" in detect(overview, bounds, "canvas")[1]
    # A file of ours says it itself, also where the tissue says otherwise.
    stated = save_ring(tmp_path / "s" / "slide.geojson", RING, coordinates_from="bounds")
    assert np.array_equal(detect(overview, stated)[0], right)


def test_where_both_frames_fit_qupath_is_believed_and_it_is_said(tmp_path, monkeypatch, overview):
    everywhere = np.ones(overview[1].shape[:2], bool)
    monkeypatch.setattr(mask_fit, "find_tissue", lambda rgb, um_per_px: (everywhere, True))
    mask, note = detect(overview, save_ring(tmp_path / "slide.geojson", RING))
    assert np.array_equal(mask, box_mask(mask.shape, *RIGHT))
    assert "both fit; if that was meant, give --frame canvas" in note


@pytest.mark.parametrize(
    ("ring", "words"),
    [
        (moved(RING, scale=4), r"of the annotated area is on the slide of 7000x6000 px"),
        (moved(RING, scale=1 / 4), r"0% of the mask is on this slide's tissue"),
        ([[CANVAS[0] - x, y] for x, y in RING], r"0% of the mask is on this slide's tissue"),
        (moved(RING, 9000, 9000), r"0.0% of the annotated area is on the slide"),
    ],
    ids=["four times", "a quarter", "mirrored", "beyond"],
)
def test_what_plainly_does_not_fit_is_refused(overview, tmp_path, ring, words):
    path = save_ring(tmp_path / "slide.geojson", ring)
    with pytest.raises(UserError, match=words + r".*--frame canvas takes it as it is"):
        detect(overview, path)
    detect(overview, path, "canvas")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda p, slide: p / 4, "pixels of level 1"),
        (lambda p, slide: p * slide.mpp, r"(micrometres|multiplied by 2)"),
        (lambda p, slide: p * 2, "divided by 2"),
        (lambda p, slide: (slide.width, 0) + p * (-1, 1), "x is mirrored"),
        (lambda p, slide: (0, slide.height) + p * (1, -1), "y is mirrored"),
        (lambda p, slide: p[:, ::-1], "x and y are swapped"),
    ],
)
def test_outlines_in_another_scale_or_mirrored_are_named(change, words, monkeypatch, tmp_path):
    """An outline of an irregular piece of tissue, given as others give it by mistake."""
    tissue = np.zeros((375, 437), bool)
    tissue[20:160, 60:120] = True
    tissue[120:170, 100:250] = True
    slide = Slide("slide", "", mpp=0.5, width=7000, height=6000,
                  levels=((7000, 6000, 1.0), (1750, 1500, 4.0)))  # fmt: skip
    monkeypatch.setattr(mask_fit, "find_tissue", lambda rgb, um_per_px: (tissue, True))
    areas = class_areas(mask_features(tissue.astype(np.uint8), 16.0), {})
    rgb = np.zeros((*tissue.shape, 3), np.uint8)

    def place(affine_of):
        changed = [(v, replace(p, shell=np.asarray(affine_of(p.shell)))) for v, p in areas]
        paint = lambda affine: paint_areas(changed, tissue.shape, 16.0, affine)  # noqa: E731
        return place_mask(paint, slide, "auto", rgb, 8.0, usual="bounds")

    assert np.array_equal(place(lambda p: p).mask, tissue)
    with pytest.raises(UserError, match=rf"; it fits if .*{words}"):
        place(lambda p: change(p, slide))


def test_a_picture_is_of_the_whole_slide_or_of_the_scanned_area(overview, tmp_path):
    slide, rgb, _ = overview
    file, shape = tmp_path / "slide.png", rgb.shape[:2]
    expected = box_mask(shape, *RIGHT)
    part = np.zeros((1250, 1500), np.uint8)
    part[200:1100, 150:1250] = 255
    Image.fromarray(part).save(file)
    assert np.array_equal(detect(overview, file)[0], expected)
    # Of a canvas of the same proportions the tissue decides.
    alike = replace(slide, bounds=(2200, 1700, 2917, 2500))
    Image.fromarray(part[:, :1458].copy()).save(file)
    mask, note = detect((alike, rgb, 8.0), file)
    assert (mask != expected).mean() < 0.001
    assert "of the scanned area" in note
    whole = np.zeros((3000, 3500), np.uint8)
    whole[1050:1950, 1250:2350] = 255
    Image.fromarray(whole).save(file)
    assert np.array_equal(detect(overview, file)[0], expected)
    Image.fromarray(np.roll(whole, 1400, 1)).save(file)
    with pytest.raises(UserError, match="0% of the mask is on this slide's tissue"):
        detect(overview, file)
    Image.fromarray(whole[:, :2000].copy()).save(file)
    with pytest.raises(UserError, match=r"\(7000x6000\); .*or of the scanned area \(3000x2500\)"):
        detect(overview, file)


def test_only_slides_with_two_frames_are_imported_anew(overview, dataset, tmp_path):
    slide = overview[0]
    path = save_ring(tmp_path / "slide.geojson", RING)
    assert mask_source(path, {}) == mask_source(path, {}, {})
    assert mask_source(path, {}, {"frame": "auto", "bounds": BOUNDS}) != mask_source(path, {})
    assert find_masks(tmp_path, [slide]) == {"slide": path}


# GeoJSON out, and back


@given(
    hnp.arrays(np.uint8, st.tuples(st.integers(1, 9), st.integers(1, 9)),
               elements=st.integers(0, 5)),
    st.sampled_from([1, 16.0, 16.032, 15.9744]),
    st.tuples(st.integers(0, 5000), st.integers(0, 5000)),
)  # fmt: skip
def test_what_counts_from_a_corner_comes_back_to_it(mask, scale, corner):
    features = json.loads(json.dumps(mask_features(mask, scale, corner)))
    shift = Affine(shift=corner)
    painted = paint_areas(class_areas(features, {}), mask.shape, scale, shift)
    assert np.array_equal(painted.mask, mask)
    if mask.any():
        assert painted.inside == pytest.approx(1, abs=1e-3), "points have three decimals"


@pytest.mark.parametrize(
    ("frame", "corner"), [("auto", CORNER), ("bounds", CORNER), ("canvas", (0, 0))]
)
def test_geojson_opens_at_the_right_place_and_comes_back(dataset, tmp_path, frame, corner):
    import_mask(dataset, save_ring(tmp_path / "m" / "slide.geojson", RING))
    before = mask_of(dataset)
    config = CoordinatesExport(tiles=True, frame=frame)
    (export,) = plan_exports(dataset, config)
    (entry,) = export_slide(str(dataset.root), export, str(tmp_path / "out"))
    file = tmp_path / "out" / "slide.geojson"
    document = json.loads(file.read_text())
    region, *tiles = document["features"]
    ring = np.array(region["geometry"]["coordinates"][0])
    # The mask's pixels are of 16 level-0 px.
    expected = np.array(RIGHT, float).reshape(2, 2) - corner
    assert np.abs(ring.min(0) - expected[0]).max() <= 8
    assert np.abs(ring.max(0) - expected[1]).max() <= 8
    table = read_candidates(dataset, "slide")
    first = tiles[0]["geometry"]["coordinates"][0][0]
    assert first == [table["x_level0"][0].as_py() - corner[0],
                     table["y_level0"][0].as_py() - corner[1]]  # fmt: skip
    assert entry.counts["tiles"] == len(tiles) == table.num_rows
    dataset.mask_file("slide").unlink()
    assert import_mask(dataset, file).outcome == "done"
    assert np.array_equal(mask_of(dataset), before)
    # As QuPath writes it again, without what we said of it.
    document.pop("coordinates_from")
    file.write_text(json.dumps(document))
    assert import_mask(dataset, file).outcome == "done"
    assert np.array_equal(mask_of(dataset), before)


def test_slides_without_a_scanned_area_are_written_as_ever(dataset, tmp_path):
    import_mask(dataset, save_ring(tmp_path / "m" / "slide.geojson", RING))
    (slide,) = read_slides(dataset)
    write_slides(dataset, "run", [replace(slide, bounds=(0, 0, *CANVAS))])
    (export,) = plan_exports(dataset, CoordinatesExport())
    export_slide(str(dataset.root), export, str(tmp_path))
    text = (tmp_path / "slide.geojson").read_text()
    assert text.startswith('{"type":"FeatureCollection","features":[\n')


# Positions


def tile_corners(dx: int = 0, dy: int = 0) -> list[tuple[int, int]]:
    """Tiles over the ring, from the corner of the scanned area."""
    return [(x + dx, y + dy) for y in range(400, 1976, 224) for x in range(300, 2276, 224)]


def import_positions(dataset: Dataset, path: Path, corners, *options: str, columns="x,y") -> int:
    rows = [f"slide,{x},{y}" for x, y in corners]
    path.write_text("\n".join([f"slide,{columns}", *rows]) + "\n")
    return main(
        ["import", "coordinates", f"train={path}", "--dataset", str(dataset.root), *options]
    )


def placed(dataset: Dataset) -> set[tuple[float, float]]:
    table = read_candidates(dataset, "slide")
    return set(zip(table["x_level0"].to_pylist(), table["y_level0"].to_pylist(), strict=True))


@pytest.mark.parametrize(
    ("given", "frame"),
    [("bounds", "auto"), ("canvas", "auto"), ("bounds", "bounds"), ("canvas", "canvas")],
)
def test_positions_count_from_the_corner_that_fits(dataset, tmp_path, capsys, given, frame):
    corners = tile_corners(*(CORNER if given == "canvas" else (0, 0)))
    assert import_positions(dataset, tmp_path / "t.csv", corners, "--frame", frame) == 0
    assert placed(dataset) == set(tile_corners(*CORNER))
    said = " ".join(capsys.readouterr().out.split())
    assert "read x and y (columns x, y) as level-0 pixels of each tile's upper left corner" in said
    if frame == "auto":
        name = "scanned area" if given == "bounds" else "whole slide"
        assert f"count from: slide: the corner of the {name} (" in said
    has_moved = "from_bounds" in read_identity(dataset)["detector_parameters"]
    assert has_moved == (given == "bounds"), "what is as before has the fingerprint of before"


def test_positions_that_are_in_the_scanned_area_both_ways_go_to_the_tissue(
    dataset, tmp_path, capsys
):
    (slide,) = read_slides(dataset)
    write_slides(dataset, "run", [replace(slide, bounds=(900, 900, 6100, 5100))])
    corners = tile_corners(CORNER[0] - 900, CORNER[1] - 900)
    assert import_positions(dataset, tmp_path / "t.csv", corners) == 0
    assert placed(dataset) == set(tile_corners(*CORNER))
    assert "of its tiles on tissue against" in " ".join(capsys.readouterr().out.split())


def test_positions_on_glass_are_refused_and_few_are_only_reported(dataset, tmp_path, capsys):
    glass = [(x, y) for x in range(0, 1400, 224) for y in range(0, 1400, 224)]
    corners = [(x + 5300, y + 200) for x, y in glass]
    with pytest.raises(UserError, match=r"t.csv: 0 of 49 tiles are on tissue \(slide\); are units"):
        import_positions(dataset, tmp_path / "t.csv", corners)
    assert "detector" not in read_identity(dataset), "nothing was written"
    assert import_positions(dataset, tmp_path / "t.csv", corners[:3]) == 0
    assert "0 of 3 tiles are on tissue" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("columns", "row", "options", "words"),
    [
        ("x_level0,y_level0", "2500,2100", (), "(columns x_level0, y_level0) as level-0 pixels"),
        ("x,y,level", "625,525,1", (), "as pixels of level 1 (column level)"),
        ("x,y,mpp", "1250,1050,1.0", (), "as pixels of 1 µm (column mpp)"),
        ("x,y", "2612,2212", ("--anchor", "center"), "of each tile's centre"),
    ],
)
def test_how_columns_are_understood_is_said(
    dataset, tmp_path, capsys, columns, row, options, words
):
    path = tmp_path / "t.csv"
    path.write_text(f"slide,{columns}\nslide,{row}\n")
    command = ["import", "coordinates", f"train={path}", "--dataset", str(dataset.root)]
    assert main([*command, *options]) == 0
    assert words in " ".join(capsys.readouterr().out.split())
    assert placed(dataset) == {(2500.0, 2100.0)}


def write_trident(folder: Path, corners, size: tuple[int, int]) -> Path:
    folder.mkdir()
    with h5py.File(folder / "slide_patches.h5", "w") as file:
        coords = file.create_dataset("coords", data=np.array(corners))
        coords.attrs["patch_size_level0"] = 224
        coords.attrs["level0_width"], coords.attrs["level0_height"] = size
    return folder


def test_h5_files_count_from_the_corner_of_the_size_that_they_state(dataset, tmp_path):
    command = ["import", "h5", "--name", "train", "--dataset", str(dataset.root)]
    folder = write_trident(tmp_path / "other", tile_corners(), (9000, 8000))
    with pytest.raises(
        UserError, match="made from a slide of 9000x8000 px, but slide is 7000x6000"
    ):
        main([*command, str(folder)])
    folder = write_trident(tmp_path / "area", tile_corners(), SCANNED)
    assert main([*command, str(folder)]) == 0
    assert placed(dataset) == set(tile_corners(*CORNER))
