"""Pictures of tiles in one folder: which are of one slide, and which sections are frozen."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from common.errors import UserError
from pipeline.__main__ import main
from pipeline.dataset import open_dataset, read_selection, read_slides
from pipeline.imports import tile_folder, tiles
from pipeline.imports.config import TilesConfig
from pipeline.imports.picture_names import name_slides
from pipeline.imports.tile_folder import (
    Listing,
    TileFolder,
    describe_folders,
    doubtful_folders,
    find_tile_folders,
)
from pipeline.imports.tiles import ImportTilesStage

BARCODES = (
    "TCGA-18-5592-01Z-00-DX1", "TCGA-44-2665-01B-06-BS6", "TCGA-AO-A0J2-01A-01-BSA",
    "TCGA-2Z-A9J9-01A-01-TS1.0A1B2C3D-0000-4000-8000-0123456789AB", "TCGA-NA-0001-11A-01-MS1",
)  # fmt: skip


def fill(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")
    return folder


def grouped(folders: list[TileFolder]) -> dict[str, int]:
    return {folder.slide_id: len(folder.files) for folder in folders}


# Names


@pytest.mark.parametrize(
    ("names", "slides"),
    [
        (["s_0_0", "s_0_224", "t_0_0"], ["s", "s", "t"]),
        (["case_1_0_0", "case_2_0_224"], ["case_1", "case_2"]),
        (["case-1_12", "case-2_12"], ["case-1", "case-2"]),
        (["a_tile_12", "b_tile_3"], ["a", "b"]),
        (["a_1_tile_0_1", "a_2_tile_0_1"], ["a_1", "a_2"]),
        (["b7-0001-0002", "b8-0001-0002"], ["b7", "b8"]),
        (["B17-1234-5-6", "B17-1235-5-7"], ["B17-1234", "B17-1235"]),
        (["s_0_0_512_512", "t_512_0_512_512"], ["s", "t"]),
        (["s_0_0_20", "s_9_0_20"], ["s", "s"]),
        (["1234_0_0", "1235_0_9"], ["1234", "1235"]),
        (["s1 [x=0,y=512,w=512,h=512]", "s2 [d=2.5,x=0,y=5,w=9,h=9]"], ["s1", "s2"]),
        (["s_(12,34)", "t_(13,34)"], ["s", "t"]),
        (["10253_idx5_x51_y1251_class0", "9_idx5_x1_y1_class1"], ["10253", "9"]),
        (["s_row3_col4", "t_r3_c4"], ["s", "t"]),
        (["blk-AA-TCGA-CM-5348-01Z-00-DX1"], ["TCGA-CM-5348-01Z-00-DX1"]),
        (["TCGA-18-5592-12", "TCGA-18-5593-12"], ["TCGA-18-5592", "TCGA-18-5593"]),
        (["TCGA-18-5592_a_1_2", "TCGA-18-5592_b_1_2"], ["TCGA-18-5592_a", "TCGA-18-5592_b"]),
        # Only a place or a number, or no tile's name at all.
        (["0_0", "224_0"], ["", ""]),
        (["0_0_512", "512_0_512"], ["", ""]),
        (["x0_y0", "tile_7", "img_0001", "000001"], ["", "", "", ""]),
        (["case_c3", "a8f3"], ["case_c3", "a8f3"]),
    ],
)
def test_a_name_begins_with_its_slide(names, slides):
    assert name_slides([f"{name}.png" for name in names]) == slides


patterns = st.sampled_from(
    ["{s}_{x}_{y}", "{s}-{x}-{y}", "{s}_tile_{n}", "{s}_patch_{x}_{y}", "{s}_x{x}_y{y}",
     "{s} [x={x},y={y},w=224,h=224]", "{s}_{x}_{y}_224_224"]
)  # fmt: skip


@given(
    st.lists(st.from_regex(r"[A-Z][a-z]{1,4}[0-9]{0,3}[a-z]", fullmatch=True), min_size=1,
             max_size=5, unique=True),
    patterns,
)  # fmt: skip
def test_every_pattern_gives_the_slides_back(slides, pattern):
    names, expected = [], []
    for slide in slides:
        for n in range(3):
            names.append(pattern.format(s=slide, x=224 * n, y=224 * (n % 2), n=n) + ".png")
            expected.append(slide)
    assert name_slides(names) == expected


@given(st.lists(st.sampled_from(BARCODES), min_size=1, max_size=5, unique=True), patterns)
def test_a_barcode_is_the_slide_in_every_pattern(slides, pattern):
    names = [pattern.format(s=slide, x=224, y=0, n=1) + ".png" for slide in slides]
    assert name_slides(names) == slides
    assert name_slides([f"blk-AXA-{name}" for name in names]) == slides


# Folders


def test_a_flat_folder_of_many_slides_is_many_slides(tmp_path):
    names = [f"{b.partition('.')[0]}_{x}_0.png" for b in BARCODES for x in (0, 276)]
    folders = find_tile_folders(fill(tmp_path / "flat", *names))
    assert grouped(folders) == {b.partition(".")[0]: 2 for b in BARCODES}
    by_id = {folder.slide_id: folder for folder in folders}
    first = by_id["TCGA-18-5592-01Z-00-DX1"]
    assert (first.patient, first.site, first.sample_type, first.preparation) == (
        "TCGA-18-5592", "18", "01", "ffpe",
    )  # fmt: skip
    assert by_id["TCGA-NA-0001-11A-01-MS1"].sample_type == "11"
    assert Counter(f.preparation for f in folders) == {"ffpe": 1, "frozen": 4}
    line = "10 tiles of 5 slides by the TCGA barcodes in their names, such as TCGA-18"
    assert describe_folders(folders).startswith(line)
    plain = fill(tmp_path / "plain", "a_0_0.png", "a_0_1.png", "b-1_0_0.jpg", "b-1_0_1.jpg")
    folders = find_tile_folders(plain)
    assert grouped(folders) == {"a": 2, "b-1": 2}
    assert "by what their names begin with" in describe_folders(folders)
    assert not doubtful_folders(folders)


def test_the_44_slides_of_a_public_set(shared_data):
    folders = find_tile_folders(shared_data / "tiles_224")
    assert (len(folders), {len(folder.files) for folder in folders}) == (44, {4})
    assert sum(folder.preparation == "frozen" for folder in folders) == 19
    assert len({folder.patient for folder in folders}) == 44


def test_classes_are_no_slides_where_barcodes_say_so(tmp_path):
    names = [f"{c}/{b}-{i}_1_2.png" for i, c in enumerate(("MSI", "MSS")) for b in BARCODES[:2]]
    folders = find_tile_folders(fill(tmp_path / "d", *names))
    assert grouped(folders) == {BARCODES[0]: 2, BARCODES[1]: 2}
    assert folders[0].files == (f"MSI/{BARCODES[0]}-0_1_2.png", f"MSS/{BARCODES[0]}-1_1_2.png")


@pytest.mark.parametrize(
    "names",
    [
        ("s/0_0.png", "s/0_1.png", "t/0_0.png"),
        ("s/tile_1.png", "t/tile_1.png"),
        ("s/af3c.png", "s/b001.png"),
        (f"{BARCODES[0]}/{BARCODES[0]}_0_0.png", "t/x_1_2.png"),
    ],
)
def test_folders_that_are_slides_stay_slides(tmp_path, names):
    folders = find_tile_folders(fill(tmp_path / "d", *names))
    assert sorted(grouped(folders)) == sorted({name.partition("/")[0] for name in names})
    assert {folder.rule for folder in folders} == {"folder"}


def test_what_may_be_several_slides_is_said(tmp_path):
    hashes = find_tile_folders(fill(tmp_path / "hashes", "af3c.png", "b001.png"))
    assert grouped(hashes) == {"hashes": 2}
    assert "hashes (2: af3c, b001)" in doubtful_folders(hashes)[0]
    names = ("d/s/tumour_1.png", "d/s/tumour_2.png", "d/s/normal_1.png", "d/s/normal_2.png")
    inner = find_tile_folders(fill(tmp_path, *names) / "d")
    assert grouped(inner) == {"s": 4}
    assert "(2: normal, tumour)" in doubtful_folders(inner)[0]


def test_the_rule_may_be_given(tmp_path):
    source = fill(tmp_path / "d", "p1/c_7_0_0.png", "p1/c_8_0_0.png", "p2/u_0_0.png")
    assert grouped(find_tile_folders(source, "folder")) == {"p1": 2, "p2": 1}
    assert grouped(find_tile_folders(source, "name")) == {"c_7": 1, "c_8": 1, "u": 1}
    assert grouped(find_tile_folders(source, r"^(p\d)/")) == {"p1": 2, "p2": 1}
    assert grouped(find_tile_folders(source, r"(p\d/[a-z]+)_")) == {"p1_c": 2, "p2_u": 1}
    for rule, words in (
        ("(", "is no regular expression"), ("slide", "with one group in parentheses"),
        (r"(c_\d)", "1 of 3 pictures name no slide, such as p2/u_0_0.png"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=words):
            find_tile_folders(source, rule)
    with pytest.raises(UserError, match="2 of 2 pictures name no slide"):
        find_tile_folders(fill(tmp_path / "e", "0_0.png", "0_1.png"), "name")
    with pytest.raises(UserError, match="slide 'a_b' and 'a b' would both be called a_b"):
        find_tile_folders(fill(tmp_path / "f", "a b_1.png", "a_b_1.png"), "name")


def test_a_table_states_how_a_section_was_prepared(tmp_path):
    table = tmp_path / "t.csv"
    table.write_text(f"path,slide,preparation\na.png,s,Frozen\nb.png,{BARCODES[1]},ffpe\n")
    assert [folder.preparation for folder in find_tile_folders(table)] == ["ffpe", "frozen"]


# The command


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for barcode in BARCODES[:2]:
        for x in (0, 64, 128):
            tile = rng.integers(0, 255, (64, 64, 3), np.uint8)
            Image.fromarray(tile).save(folder / f"{barcode}_{x}_0.png")
    return folder


def import_pictures(source: Path, root: Path, *options: str) -> int:
    command = ["import", "tiles", str(source), "--mpp", "0.5", "--tile-px", "64", "--workers", "1"]
    return main([*command, "--dataset", str(root), *options])


def test_frozen_sections_are_refused_as_scan_s_are(pictures, tmp_path, capsys):
    root = tmp_path / "d"
    assert import_pictures(pictures, root, "--names", "x_y") == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "import: 6 tiles of 2 slides by the TCGA barcodes in their names" in said
    assert "1 of 2 slides are frozen sections, which `select` leaves out without --frozen" in said
    dataset = open_dataset(root)
    assert [(s.slide_id, s.preparation) for s in read_slides(dataset)] == [
        (BARCODES[0], "ffpe"), (BARCODES[1], "frozen"),
    ]  # fmt: skip
    assert main(["select", "--name", "paraffin", "--dataset", str(root)]) == 0
    assert main(["select", "--name", "all", "--frozen", "--dataset", str(root)]) == 0
    assert [s for s, _ in read_selection(dataset, "paraffin").items()] == [BARCODES[0]]
    assert [s for s, _ in read_selection(dataset, "all").items()] == list(BARCODES[:2])
    with pytest.raises(UserError, match=r"already, as slide .* and not pictures: give the same"):
        import_pictures(pictures, root, "--slide-from", "folder")


def test_a_dataset_of_one_slide_a_folder_stays_one(pictures, tmp_path, capsys):
    """As an earlier release made it: the same tiles shall not come a second time."""
    root = tmp_path / "d"
    assert import_pictures(pictures, root, "--slide-from", "folder") == 0
    assert "their pictures' names begin in several ways" in " ".join(
        capsys.readouterr().out.split()
    )
    stage = ImportTilesStage(open_dataset(root), TilesConfig(pictures, 0.5, 64))
    assert grouped(stage.folders) == {"pictures": 6}
    with pytest.raises(UserError, match="already, as slide pictures and not TCGA-18"):
        import_pictures(pictures, root, "--slide-from", "name")


def test_rows_of_earlier_releases_stay_valid(tmp_path, monkeypatch):
    """Fingerprints as 83ec21c made them; what it did not know matters for frozen sections only."""
    monkeypatch.setattr(tiles, "list_files", lambda folder: Listing(10, 10**18, "sha"))
    config = TilesConfig(tmp_path, 0.5, 64)
    rows = {}
    for name in OLD_ROWS:
        folder = TileFolder(name, Path("/pictures") / name, ("0_0.png",))
        barcoded = tile_folder._with_barcode(folder)
        rows[name] = tiles._list_folder(barcoded, config, config.identity()).fingerprints.row
    same = [name for name, row in rows.items() if row == OLD_ROWS[name]]
    assert same == ["one", BARCODES[0]]


OLD_ROWS = {
    "one": "20991b5e560b15a7255b8bd542700ead",
    "TCGA-18-5592-01Z-00-DX1": "4e9e71783d925ab8ddac7d9ee9f721b5",
    "TCGA-44-2665-01B-06-BS6": "69118a9668aa54f5d08c3a2ef7b4e739",
}
