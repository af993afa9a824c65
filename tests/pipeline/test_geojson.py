"""Masks to GeoJSON and back: exact polygons, the right pixels, the real slide's round trip."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from common.errors import UserError
from pipeline.__main__ import main
from pipeline.dataset import (
    Dataset,
    Entry,
    claim_identity,
    read_candidates,
    read_identity,
    read_journal,
    read_selection,
    read_slides,
    write_slides,
)
from pipeline.imports.config import CoordinatesExport, MasksConfig
from pipeline.imports.export import SlideExport, export_slide, plan_exports
from pipeline.imports.geojson import features_mask, mask_features, read_features
from pipeline.imports.masks import mask_slide, mask_source, masks_identity, read_png_mask
from pipeline.imports.polygons import (
    Polygon,
    fill_polygon,
    paint_polygon,
    polygon_area,
    trace_polygons,
)
from pipeline.tissue.classes import TissueClass

SLIDE = "CMU-1-Small-Region"
small_masks = hnp.arrays(bool, st.tuples(st.integers(1, 9), st.integers(1, 9)))


def feature(name: str | None, *rings: list[list[float]], kind: str = "Polygon") -> dict:
    classification = {"classification": {"name": name, "color": [1, 2, 3]}} if name else {}
    coordinates = [list(rings)] if kind == "MultiPolygon" else list(rings)
    return {
        "type": "Feature",
        "geometry": {"type": kind, "coordinates": coordinates},
        "properties": {"objectType": "annotation", **classification},
    }


def square(left: float, top: float, right: float, bottom: float) -> list[list[float]]:
    return [[left, top], [right, top], [right, bottom], [left, bottom], [left, top]]


def save(path: Path, *features: dict) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"type": "FeatureCollection", "features": list(features)}))
    return path


# Polygons


@given(small_masks)
def test_what_is_traced_fills_the_same_pixels(mask):
    polygons = trace_polygons(mask)
    again = np.zeros(mask.shape, np.uint8)
    for polygon in polygons:
        paint_polygon(again, polygon, 1)
    assert np.array_equal(again == 1, mask)
    assert sum(map(polygon_area, polygons)) == mask.sum()
    count = cv2.connectedComponents(mask.astype(np.uint8), connectivity=4)[0] - 1
    assert len(polygons) == count
    for ring in (ring for polygon in polygons for ring in polygon.rings):
        assert len({tuple(point) for point in ring}) == len(ring), "no ring passes a point twice"


@given(
    st.lists(st.tuples(st.floats(-3, 12), st.floats(-3, 12)), min_size=3, max_size=8),
    st.integers(1, 10),
    st.integers(1, 10),
)
def test_filling_takes_the_pixels_whose_centres_are_inside(points, height, width):
    ring = np.array(points)
    inside, top, left = fill_polygon(Polygon(ring), (height, width))
    filled = np.zeros((height, width), bool)
    filled[top : top + inside.shape[0], left : left + inside.shape[1]] = inside
    for row in range(height):
        for column in range(width):
            assert filled[row, column] == odd_crossings(ring, column + 0.5, row + 0.5)


def odd_crossings(ring: np.ndarray, x: float, y: float) -> bool:
    """The even-odd rule for one point, edge by edge."""
    odd = False
    for (x0, y0), (x1, y1) in zip(ring, np.roll(ring, -1, 0), strict=True):
        if (y0 <= y) != (y1 <= y) and x0 + (y - y0) / (y1 - y0) * (x1 - x0) <= x:
            odd = not odd
    return odd


def test_a_hole_and_an_island_in_it():
    mask = np.zeros((7, 8), bool)
    mask[1:6, 1:7] = True
    mask[2:5, 2:6] = False
    mask[3, 3] = True
    outer, island = sorted(trace_polygons(mask), key=polygon_area, reverse=True)
    assert [sorted(map(tuple, ring.tolist())) for ring in outer.rings] == [
        [(1, 1), (1, 6), (7, 1), (7, 6)],
        [(2, 2), (2, 5), (6, 2), (6, 5)],
    ]
    assert (polygon_area(outer), polygon_area(island), island.holes) == (18, 1, ())


# GeoJSON


@given(hnp.arrays(np.uint8, (6, 9), elements=st.integers(0, 5)), st.sampled_from([1, 16.0, 16.032]))
def test_classes_come_back_as_they_were(mask, scale):
    features = json.loads(json.dumps(mask_features(mask, scale)))
    assert np.array_equal(features_mask(features, mask.shape, scale, {}), mask)


def test_what_covers_what():
    """Tissue, a cut-out in it, an island in that; a pen stroke larger than the island."""
    features = [
        feature("Tissue", square(8, 8, 12, 12)),
        feature("Pen", square(0, 9, 20, 11)),
        feature("background", square(6, 6, 14, 14), kind="MultiPolygon"),
        feature("tissue", square(2, 2, 18, 18)),
    ]
    mask = features_mask(features, (20, 20), 1.0, {})
    assert mask[10, 10] == mask[10, 0] == TissueClass.PEN
    assert mask[8, 8] == mask[3, 3] == TissueClass.TISSUE
    assert mask[7, 7] == mask[1, 1] == TissueClass.BACKGROUND


def test_names_are_mapped_or_refused_with_the_list():
    features = [feature("Tumor", square(0, 0, 4, 4)), feature(None, square(4, 4, 8, 8))]
    with pytest.raises(UserError, match="unknown classes 'Tumor', 'unclassified'"):
        features_mask(features, (8, 8), 1.0, {})
    own = {"Tumor": TissueClass.TISSUE, "unclassified": TissueClass.FOLD}
    mask = features_mask(features, (8, 8), 1.0, own)
    assert (mask[1, 1], mask[5, 5]) == (TissueClass.TISSUE, TissueClass.FOLD)
    line = feature("pen", [[0, 0], [5, 5]])
    line["geometry"] = {"type": "LineString", "coordinates": [[0, 0], [5, 5]]}
    with pytest.raises(UserError, match="'pen' is a LineString, expected Polygon"):
        features_mask([line], (8, 8), 1.0, {})


# The real slide


@pytest.fixture(scope="session")
def scanned(tmp_path_factory: pytest.TempPathFactory, cmu_slide: Path) -> Path:
    root = tmp_path_factory.mktemp("scanned") / "dataset"
    assert main(["scan", str(cmu_slide), "--dataset", str(root), "--workers", "1"]) == 0
    return root


@pytest.fixture
def dataset(scanned: Path, tmp_path: Path) -> Dataset:
    shutil.copytree(scanned, tmp_path / "dataset")
    return Dataset(tmp_path / "dataset")


def import_masks(dataset: Dataset, folder: Path, *options: str) -> int:
    return main(
        ["import", "masks", str(folder), "--dataset", str(dataset.root), "--workers", "1", *options]
    )


def mask_of(dataset: Dataset) -> np.ndarray:
    return cv2.imread(str(dataset.mask_file(SLIDE)), cv2.IMREAD_UNCHANGED)


def test_the_detectors_mask_comes_back_and_so_do_its_candidates(tiled, dataset, tmp_path, capsys):
    out = tmp_path / "out"
    command = ["geojson", "--dataset", str(tiled.root), "--out", str(out), "--workers", "1"]
    assert main([*command, "--tiles"]) == 0
    file = out / f"{SLIDE}.geojson"
    features = json.loads(file.read_text())["features"]
    kinds = [one["properties"]["objectType"] for one in features]
    assert kinds.count("tile") == read_candidates(tiled, SLIDE).num_rows
    assert import_masks(dataset, out) == 0
    ours, theirs = mask_of(tiled), mask_of(dataset)
    for one in np.unique(ours):
        both, any_ = (ours == one) & (theirs == one), (ours == one) | (theirs == one)
        assert both.sum() / any_.sum() >= 0.99
    assert np.array_equal(ours, theirs)
    assert positions(dataset) < positions(tiled), "an imported fold refuses tiles"
    assert read_identity(dataset)["detector"].startswith("imported masks ")
    assert dataset.overlay_file(SLIDE).stat().st_size > 10_000
    capsys.readouterr()
    assert import_masks(dataset, out) == 0
    assert "1 already done, nothing to redo" in capsys.readouterr().out
    import_slide(dataset, file, classes=("fold=tissue",))
    assert positions(dataset) == positions(tiled)
    before = file.read_bytes()
    (entry,) = read_journal(tiled, "tissue")
    ranks = np.arange(entry.counts["candidate tiles"])
    export_slide(str(tiled.root), SlideExport(SLIDE, 16.0, ranks, 224.0), str(out))
    assert file.read_bytes() == before


def positions(dataset: Dataset) -> set[tuple[float, float]]:
    table = read_candidates(dataset, SLIDE)
    return set(zip(table["x_level0"].to_pylist(), table["y_level0"].to_pylist(), strict=True))


def test_tiles_of_a_selection_lie_where_they_were_cut(tiled, tmp_path):
    (work,) = plan_exports(tiled, CoordinatesExport(selections=("train",)))
    (entry,) = export_slide(str(tiled.root), work, str(tmp_path))
    assert entry.counts["tiles"] == read_selection(tiled, "train").rows
    features = json.loads((tmp_path / f"{SLIDE}.geojson").read_text())["features"]
    squares = {
        one["properties"]["name"]: one["geometry"]["coordinates"][0]
        for one in features
        if one["properties"]["objectType"] == "tile"
    }
    table = read_candidates(tiled, SLIDE).to_pylist()
    assert "rank 0" not in squares, "the reserve is not in the training selection"
    for row in table[1:]:
        x, y = row["x_level0"], row["y_level0"]
        assert squares[f"rank {row['rank']}"] == square(x, y, x + 224, y + 224)


def test_an_asymmetrical_shape_lands_on_its_pixels(dataset, tmp_path):
    """An L of tissue with a hole in its foot: level-0 pixels against the mask's, one by one."""
    corner = [
        [320, 160],
        [640, 160],
        [640, 1600],
        [1600, 1600],
        [1600, 2400],
        [320, 2400],
        [320, 160],
    ]
    hole = square(960, 1760, 1280, 2080)
    file = save(tmp_path / "m" / f"{SLIDE}.geojson", feature("Tissue", corner, hole))
    import_slide(dataset, file, min_tissue=1.0)
    expected = np.zeros((2967 // 16, 2220 // 16), np.uint8)
    expected[10:150, 20:40] = 1
    expected[100:150, 20:100] = 1
    expected[110:130, 60:80] = 0
    assert np.array_equal(mask_of(dataset), expected)
    table = read_candidates(dataset, SLIDE)
    level0 = np.kron(expected, np.ones((16, 16), np.uint8))
    for x, y in zip(table["x_level0"].to_pylist(), table["y_level0"].to_pylist(), strict=True):
        assert level0[int(y) : int(y) + 224, int(x) : int(x) + 224].all()
    grid = [(x, y) for x in range(0, 1996, 224) for y in range(0, 2743, 224)]
    assert table.num_rows == sum(
        bool(level0[y : y + 224, x : x + 224].all()) and y + 224 <= level0.shape[0] for x, y in grid
    )


def test_png_masks_of_any_size_and_of_ours(tiled, dataset, tmp_path):
    folder = tmp_path / "m"
    folder.mkdir()
    shutil.copy(tiled.mask_file(SLIDE), folder / f"{SLIDE}.png")
    file, full = folder / f"{SLIDE}.png", ((185, 138), 16.0, (2220, 2967))
    assert np.array_equal(read_png_mask(file, *full), mask_of(tiled))
    source = mask_source(file, {})
    large = np.zeros((2967, 2220), np.uint8)
    large[500:2000, 300:700] = 255
    Image.fromarray(large).save(file)
    mask = read_png_mask(file, *full)
    assert np.array_equal(mask, (large[8::16, 8::16] == 255)[:185, :138])
    (entry,) = import_slide(dataset, file)
    assert entry.outcome == "done"
    assert np.array_equal(mask_of(dataset), mask)
    assert mask_source(file, {}) != source, "a mask that was mended is taken again"


@pytest.mark.parametrize(
    ("picture", "words"),
    [
        (np.full((300, 222), 7, np.uint8), "pixel values 7; expected 0 and 255"),
        (np.zeros((100, 222), np.uint8), "another shape than the slide"),
        (np.zeros((297, 222, 3), np.uint8), "the picture is RGB"),
    ],
)
def test_wrong_pictures_fail_their_slide_alone(dataset, tmp_path, picture, words):
    (tmp_path / "m").mkdir()
    Image.fromarray(picture).save(tmp_path / "m" / f"{SLIDE}.png")
    (entry,) = import_slide(dataset, tmp_path / "m" / f"{SLIDE}.png")
    assert (entry.outcome, words in entry.reason) == ("failed", True)
    assert not dataset.mask_file(SLIDE).exists()


def import_slide(dataset: Dataset, mask: Path, **options) -> list[Entry]:
    """What the worker does, without a cluster."""
    (slide,) = read_slides(dataset)
    config = MasksConfig(mask.parent, **options)
    claim_identity(dataset, masks_identity(config), stage="tissue", versions={})
    return mask_slide("run", str(dataset.root), slide, mask, config, "mark", "source")


def test_mistakes_in_masks_are_one_line_and_write_nothing(dataset, tmp_path):
    folder = tmp_path / "m"
    with pytest.raises(UserError, match="no such folder"):
        import_masks(dataset, folder)
    save(folder / "other.geojson", feature("tissue", square(0, 0, 9, 9)))
    with pytest.raises(UserError, match=r"no mask of a usable slide; .*there: other\.geojson"):
        import_masks(dataset, folder)
    save(folder / f"{SLIDE}.geojson", feature("Tumor", square(0, 0, 900, 900)))
    with pytest.raises(UserError, match="unknown classes 'Tumor'"):
        import_masks(dataset, folder)
    with pytest.raises(UserError, match="expected NAME=CLASS"):
        import_masks(dataset, folder, "--class", "Tumor=cancer")
    assert "detector" not in read_identity(dataset)
    (entry,) = import_slide(dataset, folder / f"{SLIDE}.geojson", classes=("Tumor=tissue",))
    assert entry.outcome == "done"
    (folder / f"{SLIDE}.geojson").write_text("{")
    with pytest.raises(UserError, match="is not GeoJSON"):
        read_features(folder / f"{SLIDE}.geojson")
    (entry,) = import_slide(dataset, folder / f"{SLIDE}.geojson")
    assert (entry.outcome, "is not GeoJSON" in entry.reason) == ("failed", True)
    with pytest.raises(UserError, match="detector"):
        main(["tissue", "--dataset", str(dataset.root)])


def test_slides_without_a_mask_are_listed_and_have_no_candidates(dataset, tmp_path, capsys):
    (slide,) = read_slides(dataset)
    write_slides(dataset, "run", [replace(slide, slide_id=name) for name in ("one", "two")])
    save(tmp_path / "m" / "one.geojson", feature("tissue", square(0, 0, 2000, 2000)))
    assert import_masks(dataset, tmp_path / "m") == 0
    assert "no mask was imported for this slide" in capsys.readouterr().out
    outcomes = {entry.slide_id: entry.outcome for entry in read_journal(dataset, "tissue")}
    assert outcomes == {"one": "done", "two": "rejected"}
    assert main(["select", "--name", "all", "--dataset", str(dataset.root)]) == 0
    save(tmp_path / "m2" / "two.geojson", feature("tissue", square(0, 0, 2000, 2000)))
    assert import_masks(dataset, tmp_path / "m2") == 0, "masks may come in parts"
    said = " ".join(capsys.readouterr().out.split())
    assert "1 done, 1 already done" in said
    assert "make the selections again" in said
