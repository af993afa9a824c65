"""What others made, imported on the real slide: positions, masks, pictures of tiles, h5 files."""

import hashlib
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import openslide
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageCms

from common.errors import UserError
from pipeline.__main__ import main
from pipeline.dataset import (
    Dataset,
    Slide,
    TileStore,
    open_dataset,
    read_candidates,
    read_identity,
    read_selection,
    read_slides,
    write_slides,
)
from pipeline.dataset.grid import rank_keys
from pipeline.imports.h5 import read_patches
from pipeline.imports.picture import read_picture
from pipeline.imports.positions import (
    level_factors,
    match_slides,
    place_tiles,
    ranked_union,
    slide_frames,
    snap_position,
)
from pipeline.imports.tile_folder import (
    TileFolder,
    find_tile_folders,
    tile_order,
    tile_positions,
)

SLIDE = "CMU-1-Small-Region"


@pytest.fixture(scope="session")
def scanned(tmp_path_factory: pytest.TempPathFactory, cmu_slide: Path) -> Path:
    root = tmp_path_factory.mktemp("scanned") / "dataset"
    assert main(["scan", str(cmu_slide), "--dataset", str(root), "--workers", "1"]) == 0
    return root


@pytest.fixture
def dataset(scanned: Path, tmp_path: Path) -> Dataset:
    """The committed slide, scanned; a test may change it."""
    shutil.copytree(scanned, tmp_path / "dataset")
    return Dataset(tmp_path / "dataset")


def run(kind: str, *arguments: str, dataset: Dataset) -> int:
    return main(["import", kind, *map(str, arguments), "--dataset", str(dataset.root)])


def digest(root: Path) -> dict[str, str]:
    """sha256 of every file, journals and staging left out."""
    return {
        path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file() and path.relative_to(root).parts[0] not in ("status", ".tmp")
    }


def does_nothing_again(dataset: Dataset, capsys, *command: str) -> None:
    before = digest(dataset.root)
    journals = sorted((dataset.root / "status").rglob("*.jsonl"))
    capsys.readouterr()
    assert main([*command, "--dataset", str(dataset.root)]) == 0
    assert "nothing to redo" in capsys.readouterr().out
    assert digest(dataset.root) == before
    assert sorted((dataset.root / "status").rglob("*.jsonl")) == journals


def rows_of(dataset: Dataset, selection: str) -> set[tuple[float, float]]:
    """Positions that a selection holds on the committed slide."""
    table = read_candidates(dataset, SLIDE)
    x, y = table["x_level0"].to_pylist(), table["y_level0"].to_pylist()
    return {(x[r], y[r]) for _, ranks in read_selection(dataset, selection).items() for r in ranks}


def write_csv(path: Path, header: str, rows: list[tuple]) -> Path:
    lines = [header, *(",".join(map(str, row)) for row in rows)]
    path.write_text("\n".join(lines) + "\n")
    return path


# Positions


def slides_of_two_levels(mpp: float = 0.25) -> list[Slide]:
    levels = ((40000, 30000, 1.0), (10000, 7500, 4.0002))
    return [
        Slide("TCGA-AA-0001-01Z-00-DX1.UUID", "", mpp=mpp, width=40000, height=30000, levels=levels)
    ]


@given(
    st.lists(st.floats(-1e5, 1e6, allow_nan=False), min_size=1, max_size=30),
    st.sampled_from([0.0, 1.0, 4.0, 3.97]),
)
def test_positions_are_placed_on_whole_pixels_or_256ths(values, step):
    asked = np.array(values)
    placed = snap_position(asked, np.full(len(asked), step))
    assert np.array_equal(placed * 256, np.rint(placed * 256))
    assert np.abs(placed - asked).max() <= max(step, 1 / 256) / 2 + 1 / 512 + 1e-9
    assert np.array_equal(snap_position(placed, np.full(len(asked), step)), placed)
    if step in (1.0, 4.0):
        assert np.array_equal(placed % step, np.zeros_like(placed))


@given(
    st.lists(
        st.tuples(st.integers(0, 6), st.integers(0, 6), st.integers(0, 2)), min_size=1, max_size=60
    ),
    st.randoms(),
)
def test_the_union_holds_each_position_once_in_rank_order(rows, random):
    x, y, part = (np.array(column) for column in zip(*rows, strict=True))
    union = ranked_union(7, "slide", x * 0.5, y * 0.25, part, 3)
    pairs = list(zip(union.x, union.y, strict=True))
    assert len(set(pairs)) == len(pairs)
    keys = rank_keys(7, "slide", union.x, union.y)
    assert np.all(keys[1:] > keys[:-1])
    for k in range(3):
        wanted = [(a * 0.5, b * 0.25) for a, b, p in rows if p == k]
        assert {pairs[rank] for rank in union.ranks[k]} == set(wanted)
        assert union.duplicates[k] == len(wanted) - len(set(wanted))
    mixed = list(rows)
    random.shuffle(mixed)
    x, y, part = (np.array(column) for column in zip(*mixed, strict=True))
    again = ranked_union(7, "slide", x * 0.5, y * 0.25, part, 3)
    assert np.array_equal(again.x, union.x)
    assert all(np.array_equal(a, b) for a, b in zip(again.ranks, union.ranks, strict=True))


def test_levels_and_edges_of_a_slide():
    frames = slide_frames(slides_of_two_levels(), 0.5, 0.02, 224)
    assert (frames.size[0], frames.step[0]) == (448.0, 1.0)
    codes = np.zeros(5, np.int32)
    factors = level_factors(frames, codes, np.array([0.0, 1.0, 2.0, -1.0, 0.5]))
    assert factors[:2].tolist() == [1.0, 4.0]
    assert np.isnan(factors[2:]).all()
    x = np.array([0, 40000 - 448, 40000 - 447, -1, 10.0])
    y = np.array([0, 30000 - 448, 0, 0, 30000 - 447.0])
    assert place_tiles(frames, codes, x, y)[2].tolist() == [True, True, False, False, False]
    resampled = slide_frames(slides_of_two_levels(0.23), 0.5, 0.02, 224)
    assert resampled.step[0] == 0
    assert resampled.size[0] == pytest.approx(224 * 0.5 / 0.23)


def test_slides_are_known_by_id_file_path_and_barcode():
    slides = [
        *slides_of_two_levels(),
        Slide("02", ""), Slide("NA", ""), Slide("twin.1", ""), Slide("twin.2", ""),
    ]  # fmt: skip
    names = [
        "TCGA-AA-0001-01Z-00-DX1.UUID", "TCGA-AA-0001-01Z-00-DX1.UUID.svs",
        "/data/TCGA-AA-0001-01Z-00-DX1.UUID.svs", "TCGA-AA-0001-01Z-00-DX1", "02",
        "C:\\slides\\NA.ome.tiff", "twin", "2", "TCGA-AA-0001",
    ]  # fmt: skip
    known = [slide.slide_id for slide in slides]
    assert match_slides(names, slides, known).tolist() == [0, 0, 0, 0, 1, 2, -1, -1, -1]


def test_a_name_never_means_a_slide_of_another_suffix():
    """case1.B was rejected: its rows are nobody's, and `case1` may mean either."""
    slides = [Slide("case1.A", ""), Slide("case2.A", "")]
    known = ["case1.A", "case1.B", "case2.A"]
    names = ["case1.B.svs", "case1.B", "case1.A.svs", "case1", "case2", "case2.C", "d/case2.svs"]
    assert match_slides(names, slides, known).tolist() == [-1, -1, 0, -1, 1, -1, 1]
    assert match_slides(["case"], [Slide("case.A", "")], ["case", "case.A"]).tolist() == [-1]


def two_suffixes(root: Path, scanned: Path) -> Dataset:
    """The committed slide as case1.A, and a case1.B that scan rejected."""
    (slide,) = read_slides(Dataset(scanned))
    dataset = Dataset(root)
    shutil.copytree(scanned, root)
    rejected = replace(slide, slide_id="case1.B", status="rejected", reason="no trustworthy mpp")
    write_slides(dataset, "run", [replace(slide, slide_id="case1.A"), rejected])
    return dataset


def test_rows_and_h5_files_of_a_rejected_slide_are_given_to_no_other(scanned, tmp_path, capsys):
    rows = [("case1.A.svs", 0, 0), ("case1.B.svs", 500, 500), ("case1", 700, 700)]
    file = write_csv(tmp_path / "t.csv", "slide,x,y", rows)
    dataset = two_suffixes(tmp_path / "coordinates", scanned)
    assert run("coordinates", f"t={file}", dataset=dataset) == 0
    assert "2 rows are of 2 slides that are not among the usable ones" in capsys.readouterr().out
    assert read_candidates(dataset, "case1.A")["x_level0"].to_pylist() == [0]
    clam(tmp_path / "patches" / "case1.A.h5", [(0, 0)])
    clam(tmp_path / "patches" / "case1.B.h5", [(500, 500)])
    dataset = two_suffixes(tmp_path / "h5", scanned)
    assert run("h5", str(tmp_path / "patches"), "--name", "clam", dataset=dataset) == 0
    assert "of no usable slide of this dataset: case1.B.h5" in capsys.readouterr().out
    assert read_candidates(dataset, "case1.A")["x_level0"].to_pylist() == [0]


# import coordinates


def test_tables_become_candidates_selections_and_tiles(dataset, tmp_path, cmu_slide, capsys):
    train = [(f"{SLIDE}.svs", 100, 200), (SLIDE, 101, 777), ("elsewhere", 0, 0), (SLIDE, 100, 200)]
    val = [(SLIDE, 1996, 2743), (SLIDE, 101, 777), (SLIDE, 0, 0)]
    val = [("a", y, slide, x) for slide, x, y in val]
    files = {
        "train": write_csv(tmp_path / "train.csv", "Slide,X,Y", train),
        "val-in": write_csv(tmp_path / "val.csv", "note,y_level0,slide_id,x_level0", val),
    }
    arguments = [f"{name}={file}" for name, file in files.items()]
    assert run("coordinates", *arguments, dataset=dataset) == 0
    said = capsys.readouterr().out
    assert (
        "1 rows are of 1 slides that are not among the usable ones of this dataset: elsewhere"
        in said
    )
    assert "1 rows of 'train' repeat a tile" in said
    assert "1 tiles are in more than one" in said
    assert rows_of(dataset, "train") == {(100, 200), (101, 777)}
    assert rows_of(dataset, "val-in") == {(1996, 2743), (101, 777), (0, 0)}
    table = read_candidates(dataset, SLIDE)
    assert table.num_rows == 4
    assert table["tissue_fraction"].null_count == table["artifact_fraction"].null_count == 4
    keys = rank_keys(0, SLIDE, table["x_level0"].to_numpy(), table["y_level0"].to_numpy())
    assert np.all(keys[1:] > keys[:-1])
    assert read_identity(dataset)["detector"].startswith("imported coordinates ")
    does_nothing_again(dataset, capsys, "import", "coordinates", *arguments)
    assert main(["tile", "--dataset", str(dataset.root), "--workers", "1"]) == 0
    slide = openslide.OpenSlide(cmu_slide)
    for row, tile in zip(
        table.to_pylist(), TileStore(dataset, 224).read(SLIDE, range(4)), strict=True
    ):
        corner = (int(row["x_level0"]), int(row["y_level0"]))
        assert np.array_equal(tile, np.asarray(slide.read_region(corner, 0, (224, 224)))[..., :3])
    does_nothing_again(dataset, capsys, "tile")
    with pytest.raises(UserError, match="imported coordinates"):
        main(["tissue", "--dataset", str(dataset.root)])


def test_units_anchors_and_file_kinds_say_the_same_tiles(scanned, tmp_path):
    """One tile at (300, 500), said in five ways."""
    tables = {
        "level": ("slide,x,y,level", [(SLIDE, 300, 500, 0)]),
        "mpp": ("slide,x,y,mpp", [(SLIDE, 300 * 0.499 / 2, 500 * 0.499 / 2, 2.0)]),
        "center": ("slide,x,y", [(SLIDE, 412, 612)]),
        "named": ("a,b,c", [(SLIDE, 300, 500)]),
    }
    options = {
        "center": ["--anchor", "center"],
        "named": ["--slide-column", "a", "--x-column", "b", "--y-column", "c"],
    }
    files = {k: write_csv(tmp_path / f"{k}.csv", *table) for k, table in tables.items()}
    files["parquet"] = tmp_path / "p.parquet"
    pq.write_table(pa.table({"wsi": [SLIDE], "coord_x": [300], "coord_y": [500]}), files["parquet"])
    candidates = set()
    for name, file in files.items():
        own = Dataset(tmp_path / name)
        shutil.copytree(scanned, own.root)
        assert run("coordinates", f"t={file}", *options.get(name, []), dataset=own) == 0
        candidates.add(own.candidates_file(SLIDE).read_bytes())
        assert rows_of(own, "t") == {(300, 500)}, name
    assert len(candidates) == 1


@pytest.mark.parametrize(
    ("header", "rows", "options", "words"),
    [
        ("slide,x", [(SLIDE, 1)], [], "no y column; expected one of y_level0, y"),
        ("slide,x,y", [(SLIDE, 1, 1)], ["--x-column", "q"], "no column 'q'; there: slide, x, y"),
        ("slide,x,y", [(SLIDE, 1, "a")], [], "cannot be read as a table"),
        ("slide,x,y", [(SLIDE, 1, 1), (SLIDE, "", 1)], [], "no number in 1 rows, first in line 3"),
        ("slide,x,y", [(SLIDE, 1, 1), (SLIDE, 2, 2744)], [], "1 rows are .* line 3 .*y 2744"),
        ("slide,x,y,level", [(SLIDE, 1, 1, 3)], [], "a level that the slide has not: line 2"),
        ("slide,x,y,mpp", [(SLIDE, 1, 1, 0)], [], "an mpp that is not between"),
        ("slide,x,y,mpp,level", [(SLIDE, 1, 1, 1, 0)], [], "--units level0, level or mpp"),
        ("slide,x,y", [("who", 1, 1)], [], "names a usable slide .*such as CMU-1"),
    ],
)  # fmt: skip
def test_mistakes_in_tables_are_one_line_and_write_nothing(
    dataset, tmp_path, header, rows, options, words
):
    before = digest(dataset.root)
    file = write_csv(tmp_path / "t.csv", header, rows)
    with pytest.raises(UserError, match=words) as caught:
        run("coordinates", f"t={file}", *options, dataset=dataset)
    assert "\n" not in str(caught.value)
    assert digest(dataset.root) == before


def test_rows_outside_are_left_out_where_asked(dataset, tmp_path, capsys):
    file = write_csv(tmp_path / "t.csv", "slide,x,y", [(SLIDE, 0, 0), (SLIDE, 2000, 0)])
    assert run("coordinates", f"t={file}", "--drop-outside", dataset=dataset) == 0
    assert "line 3" in capsys.readouterr().out
    assert rows_of(dataset, "t") == {(0, 0)}


def test_other_tables_are_another_dataset(dataset, tmp_path):
    one = write_csv(tmp_path / "1.csv", "slide,x,y", [(SLIDE, 0, 0)])
    two = write_csv(tmp_path / "2.csv", "slide,x,y", [(SLIDE, 9, 9)])
    run("coordinates", f"a={one}", dataset=dataset)
    with pytest.raises(UserError, match=r"imported coordinates .* was asked for"):
        run("coordinates", f"b={two}", dataset=dataset)
    with pytest.raises(UserError, match="given twice"):
        run("coordinates", f"a={one}", f"a={two}", dataset=dataset)
    with pytest.raises(UserError, match="expected NAME=FILE"):
        run("coordinates", str(one), dataset=dataset)


def test_a_lost_candidates_file_is_written_again(dataset, tmp_path):
    file = write_csv(tmp_path / "t.csv", "slide,x,y", [(SLIDE, 0, 0), (SLIDE, 5, 5)])
    run("coordinates", f"t={file}", dataset=dataset)
    before = digest(dataset.root)
    dataset.candidates_file(SLIDE).unlink()
    dataset.selection_file("t").unlink()
    assert run("coordinates", f"t={file}", dataset=dataset) == 0
    assert digest(dataset.root) == before


# import tiles


def real_tiles(dataset: Dataset, count: int, size: int = 224) -> list[tuple[int, int, np.ndarray]]:
    """Tiles of the committed slide: (column, row, RGB), cut by OpenSlide."""
    (slide,) = read_slides(dataset)
    cells = [(column, row) for row in range(4, 9) for column in range(2, 8)][:count]
    with openslide.OpenSlide(slide.path) as image:
        return [
            (c, r, np.asarray(image.read_region((c * 224, r * 224), 0, (size, size)))[..., :3])
            for c, r in cells
        ]


def save_tiles(
    folder: Path, tiles: list[tuple[int, int, np.ndarray]], suffix: str = ".png"
) -> Path:
    folder.mkdir(parents=True)
    for column, row, rgb in tiles:
        Image.fromarray(rgb).save(folder / f"{column}_{row}{suffix}", quality=90)
    return folder


def import_tiles(root: Path, source: Path, *options: str) -> int:
    command = ["import", "tiles", str(source), "--mpp", "0.5", "--dataset", str(root)]
    return main([*command, "--workers", "1", *options])


@pytest.fixture(scope="session")
def tile_folders(scanned: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layouts at once: DSMIL's class folders, and a folder of JPEGs named by a barcode."""
    root = tmp_path_factory.mktemp("pictures")
    tiles = real_tiles(Dataset(scanned), 20)
    save_tiles(root / "single" / "tumor" / "one", tiles)
    save_tiles(root / "TCGA-CR-7395-01Z-00-DX1", tiles[:3], ".jpeg")
    return root


def test_folders_become_a_dataset_of_their_own(tile_folders, scanned, cmu_slide, tmp_path, capsys):
    root = tmp_path / "d"
    assert import_tiles(root, tile_folders, "--names", "col_row") == 0
    dataset = open_dataset(root)
    slides = {slide.slide_id: slide for slide in read_slides(dataset)}
    one, barcode = slides["one"], slides["TCGA-CR-7395-01Z-00-DX1"]
    assert (one.reader, one.codec, one.mpp, one.status) == ("tiles", "png", 0.5, "ok")
    assert (barcode.codec, barcode.patient, barcode.site, barcode.project) == (
        "jpeg", "TCGA-CR-7395", "CR", "TCGA-HNSC",
    )  # fmt: skip
    store = TileStore(dataset, 224)
    expected = {(c * 224.0, r * 224.0): rgb for c, r, rgb in real_tiles(Dataset(scanned), 20)}
    table = read_candidates(dataset, "one")
    x, y = table["x_level0"].to_numpy(), table["y_level0"].to_numpy()
    assert np.all(np.diff(rank_keys(0, "one", x, y).astype(object)) > 0)
    for place_, tile in zip(zip(x, y, strict=True), store.read("one", range(20)), strict=True):
        assert np.array_equal(tile, expected.pop(place_))
    assert not expected
    for name, tile in zip(
        read_candidates(dataset, barcode.slide_id)["source_name"].to_pylist(),
        store.read(barcode.slide_id, range(3)),
        strict=True,
    ):
        assert np.array_equal(tile, np.asarray(Image.open(Path(barcode.path) / name)))
    assert table["source_slide_id"].null_count == 20, "no source is known, as without guidance"
    does_nothing_again(
        dataset, capsys, "import", "tiles", str(tile_folders), "--mpp", "0.5", "--names", "col_row"
    )
    assert main(["select", "--name", "train", "--dataset", str(root)]) == 0
    assert read_selection(dataset, "train").rows == 23 - 2
    assert main(["tile", "--dataset", str(root)]) == 0
    with pytest.raises(UserError, match="is a dataset of imported tiles and `scan`"):
        main(["scan", str(cmu_slide), "--dataset", str(root)])


def test_without_positions_the_rank_comes_from_the_name(tile_folders, tmp_path):
    files = tuple(sorted(path.name for path in (tile_folders / "single/tumor/one").iterdir()))
    folder = TileFolder("one", tile_folders, files)
    assert tile_positions(folder, "none", 224) is None
    order = tile_order(3, folder, None)
    keys = [
        hashlib.blake2b(f"3\0one\0{files[i]}".encode(), digest_size=8).digest()[::-1] for i in order
    ]
    assert keys == sorted(keys)
    turned = TileFolder("one", tile_folders, files[::-1])
    assert [files[i] for i in order] == [files[::-1][i] for i in tile_order(3, turned, None)]


def test_a_corrupt_picture_fails_its_folder_alone_and_is_named(tile_folders, tmp_path, capsys):
    source, root = tmp_path / "pictures", tmp_path / "d"
    shutil.copytree(tile_folders, source)
    victim = source / "single" / "tumor" / "one" / "3_5.png"
    whole = victim.read_bytes()
    victim.write_bytes(whole[: len(whole) // 2])
    assert import_tiles(root, source) == 1
    assert str(victim) in " ".join(capsys.readouterr().out.split())
    dataset = open_dataset(root)
    assert {s.slide_id: s.status for s in read_slides(dataset)} == {
        "one": "failed", "TCGA-CR-7395-01Z-00-DX1": "ok",
    }  # fmt: skip
    assert TileStore(dataset, 224).slide_ids() == ["TCGA-CR-7395-01Z-00-DX1"]
    assert read_candidates(dataset, "TCGA-CR-7395-01Z-00-DX1")["x_level0"].null_count == 3
    victim.write_bytes(whole)
    assert import_tiles(root, source) == 0, "mended, only that folder is read"
    assert "1 done, 1 already done" in capsys.readouterr().out
    assert {s.slide_id: s.status for s in read_slides(dataset)}["one"] == "ok"
    assert len(TileStore(dataset, 224).read("one", range(20))) == 20


def test_pictures_of_other_kinds_and_sizes(tmp_path, scanned):
    (_, _, rgb) = real_tiles(Dataset(scanned), 1, 256)[0]
    path = tmp_path / "t.png"
    Image.fromarray(rgb).save(path)
    with pytest.raises(UserError, match=r"t.png is 256x256 px, expected 224x224: .*--crop"):
        read_picture(path, 224)
    assert np.array_equal(read_picture(path, 224, crop=True).rgb, rgb[16:240, 16:240])
    with pytest.raises(UserError, match=r"expected 512x512: give --tile-px$"):
        read_picture(path, 512, crop=True)
    clear = np.dstack([rgb, np.zeros((256, 256), np.uint8)])
    Image.fromarray(clear).save(path)
    assert (read_picture(path, 256).rgb == 255).all()
    Image.fromarray(rgb[..., 0]).save(path)
    assert np.array_equal(read_picture(path, 256).rgb[..., 2], rgb[..., 0])
    Image.fromarray(rgb[..., 0].astype(np.uint16) * 256).save(path)
    with pytest.raises(UserError, match="I;16, expected 8-bit"):
        read_picture(path, 256)
    red = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB"))
    Image.fromarray(rgb).save(path, icc_profile=red.tobytes())
    assert np.array_equal(read_picture(path, 256).rgb, rgb)
    with pytest.raises(UserError, match="ICC profile is not usable"):
        read_picture(path, 256, icc="srgb")
    path.write_bytes(b"GIF89a")
    with pytest.raises(UserError, match=r"t.png cannot be read as PNG or JPEG"):
        read_picture(path, 256)


def test_a_table_of_pictures(tile_folders, tmp_path):
    folder = tile_folders / "single" / "tumor" / "one"
    table = write_csv(
        tmp_path / "tiles.csv", "path,slide,x,y,patient,site",
        [
            (folder / "2_4.png", "02", 7, 9, "p1", "NA"),
            (folder / "3_4.png", "02", 5, 1, "p1", "NA"),
        ],
    )  # fmt: skip
    (found,) = find_tile_folders(table)
    assert (found.slide_id, found.patient, found.site) == ("02", "p1", "NA")
    x, y = tile_positions(found, "none", 224)
    assert (x.tolist(), y.tolist()) == ([7, 5], [9, 1])
    table.write_text("path,slide,x,y\na.png,s,1,b\n")
    with pytest.raises(UserError, match="line 2: x and y are no numbers"):
        find_tile_folders(table)
    table.write_text("file\na.png\n")
    with pytest.raises(UserError, match="expected a column slide_id or slide"):
        find_tile_folders(table)


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (["path,slide", "a.png,s", "b.png,s", "a.png,s"], "line 4: a.png of slide 's' is .*line 2"),
        (["path,slide", "d/a.png,s", "d/./a.png,s"], "line 3: d/./a.png of slide 's' is .*line 2"),
        (["path,slide,x,y", "a.png,s,0,0", "a.png,s,224,0"], "line 3: a.png .*line 2 already"),
        (
            ["path,slide,patient", "a.png,a b,p1", "b.png,c,p2", "b.png,a_b,p3"],
            "line 4: slide 'a_b' and 'a b' of line 2 would both be called a_b; rename",
        ),
    ],
)
def test_a_table_of_pictures_merges_no_slides_and_counts_no_picture_twice(tmp_path, lines, words):
    table = tmp_path / "tiles.csv"
    table.write_text("\n".join(lines))
    with pytest.raises(UserError, match=words) as caught:
        find_tile_folders(table)
    assert str(caught.value).startswith(f"{table}, line")
    assert "\n" not in str(caught.value)


def test_slides_of_a_table_may_share_a_picture_s_path_and_have_unsafe_names(tmp_path):
    (tmp_path / "tiles.csv").write_text("path,slide\na.png,a b\nb.png, a b \na.png,c\n")
    found = find_tile_folders(tmp_path / "tiles.csv")
    assert [(one.slide_id, one.files) for one in found] == [
        ("a_b", ("a.png", "b.png")), ("c", ("a.png",)),
    ]  # fmt: skip


def test_mistakes_in_folders(tile_folders, tmp_path):
    with pytest.raises(UserError, match="no such folder or CSV"):
        find_tile_folders(tmp_path / "nothing")
    with pytest.raises(UserError, match="has no pictures"):
        find_tile_folders(tmp_path)
    source = tmp_path / "pictures"
    shutil.copytree(tile_folders, source)
    shutil.copytree(source / "single/tumor/one", source / "normal/one")
    taken = [folder for folder in find_tile_folders(source) if folder.taken_by]
    assert [folder.root.name for folder in taken] == ["one"]
    assert taken[0].slide_id.startswith("one.")
    shutil.copytree(source / "normal/one", source / "normal/one/2_4")
    with pytest.raises(UserError, match="two magnifications"):
        find_tile_folders(source)
    names = TileFolder("s", tmp_path, ("12_34.png", "s-12_34.jpg", "tile.png"))
    with pytest.raises(UserError, match=r"tile.png: the name does not end in <x>_<y>"):
        tile_positions(names, "x_y", 224)
    with pytest.raises(UserError, match="has the position of another picture"):
        tile_positions(TileFolder("s", tmp_path, names.files[:2]), "x_y", 224)


# import h5


def write_h5(path: Path, corners: list[tuple[int, int]], **attributes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        coords = file.create_dataset("coords", data=np.array(corners, np.int64))
        for key, value in attributes.items():
            coords.attrs[key] = value
    return path


def clam(path: Path, corners: list[tuple[int, int]], size: int = 256, level: int = 0) -> Path:
    """As CLAM's create_patches_fp.py writes them."""
    return write_h5(
        path, corners, patch_size=size, patch_level=level, downsample=(1.0, 1.0),
        downsampled_level_dim=np.array([2220, 2967]), level_dim=np.array([2220, 2967]),
        name=SLIDE, save_path="patches",
    )  # fmt: skip


def trident(path: Path, corners: list[tuple[int, int]], size_level0: int = 512) -> Path:
    """As TRIDENT's patching writes them."""
    return write_h5(
        path, corners, patch_size=256, patch_size_level0=size_level0, level0_magnification=40,
        target_magnification=20, overlap=0, name=SLIDE, savetodir="20x_256px_0px_overlap",
        level0_width=2220, level0_height=2967,
    )  # fmt: skip


def test_clam_files_become_candidates_at_their_corners(dataset, tmp_path, capsys):
    clam(tmp_path / "patches" / f"{SLIDE}.h5", [(0, 0), (256, 512), (1996, 2743)])
    clam(tmp_path / "patches" / "another.h5", [(0, 0)])
    command = ["h5", str(tmp_path / "patches"), "--name", "clam"]
    assert run(*command, dataset=dataset) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "1 h5 files are of no usable slide of this dataset: another.h5" in said
    assert "3 patches of 1 slides, written by CLAM" in said
    assert "CMU-1-Small-Region 256 against 224 level-0 px" in said
    assert rows_of(dataset, "clam") == {(0, 0), (256, 512), (1996, 2743)}
    does_nothing_again(dataset, capsys, "import", *command)


def test_trident_files_are_centred_on_their_patches(dataset, tmp_path, capsys):
    folder = tmp_path / "patches"
    trident(folder / f"{SLIDE}_patches.h5", [(0, 0), (512, 1024), (1900, 100)])
    command = ["h5", str(folder), "--name", "t", "--anchor", "center"]
    with pytest.raises(UserError, match=r"1 tiles would reach over the edge .*--drop-outside"):
        run(*command, dataset=dataset)
    assert run(*command, "--drop-outside", dataset=dataset) == 0
    assert "written by TRIDENT" in capsys.readouterr().out
    assert rows_of(dataset, "t") == {(144, 144), (656, 1168)}, "(512 - 224) / 2 further"


def test_a_patchs_size_is_read_from_either_tools_attributes(tmp_path):
    (slide,) = slides_of_two_levels()
    sizes = {
        "trident": ({"patch_size": 256, "patch_size_level0": 506}, 506),
        "clam": ({"patch_size": 256, "patch_level": 1, "downsample": (4.0, 4.0)}, 1024),
        "old-clam": ({"patch_size": 256, "patch_level": 0}, 256),
    }
    for name, (attributes, expected) in sizes.items():
        path = write_h5(tmp_path / f"{name}.h5", [(1, 2)], **attributes)
        assert read_patches(path, slide).size == expected
    with pytest.raises(UserError, match="has no such level"):
        read_patches(write_h5(tmp_path / "a.h5", [(1, 2)], patch_size=9, patch_level=7), slide)
    with pytest.raises(UserError, match="neither patch_size_level0"):
        read_patches(write_h5(tmp_path / "b.h5", [(1, 2)]), slide)
    with pytest.raises(UserError, match=r"coords is \[3\], expected \[n, 2\]"):
        read_patches(write_h5(tmp_path / "c.h5", [1, 2, 3], patch_size_level0=9), slide)
    with h5py.File(tmp_path / "d.h5", "w") as file:
        file["features"] = np.zeros(3)
    with pytest.raises(UserError, match="no dataset 'coords'; there: features"):
        read_patches(tmp_path / "d.h5", slide)
    (tmp_path / "e.h5").write_bytes(b"no")
    with pytest.raises(UserError, match="cannot be read as HDF5"):
        read_patches(tmp_path / "e.h5", slide)


def test_without_h5py_it_is_one_line(dataset, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(UserError, match=r"needs the package h5py.*pip install"):
        run("h5", str(tmp_path), "--name", "x", dataset=dataset)
