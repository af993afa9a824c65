"""Imported selections: what they are for, what is drawn beside them, what an import may change."""

import hashlib
from pathlib import Path

import pytest

from common.errors import UserError
from pipeline.__main__ import main
from pipeline.dataset import (
    Dataset,
    Entry,
    Run,
    Slide,
    claim_identity,
    make_selection,
    read_selection,
    write_selection,
    write_slides,
)
from pipeline.dataset.tables.selections import read_plan
from pipeline.selection.ties import held_out, read_ties
from pipeline.slides.config import ScanConfig

SLIDES = (
    ("a", "p0", "01", ""), ("b", "p1", "11", "f" * 32), ("c", "p1", "11", ""),
    ("d", "p2", "11", "f" * 32), ("e", "p3", "01", ""),
)  # fmt: skip
"""Slide, patient, sample type and md5: p1 and p2 share a file."""


def scanned(root: Path) -> Dataset:
    """A dataset as scan leaves it, without any slide file."""
    dataset = Dataset(root)
    claim_identity(dataset, ScanConfig(()).identity(), stage="scan", versions={})
    known = {"mpp": 0.5, "tile_mpp": 0.5, "width": 9000, "height": 9000, "bytes": 1, "mtime_ns": 1}
    slides = [
        Slide(name, f"{name}.svs", patient=patient, sample_type=kind, md5=md5,
              levels=((9000, 9000, 1.0),), **known)
        for name, patient, kind, md5 in SLIDES
    ]  # fmt: skip
    write_slides(dataset, "run", slides)
    return dataset


def import_tables(dataset: Dataset, *tables: str) -> int:
    return main(["import", "coordinates", *tables, "--dataset", str(dataset.root)])


@pytest.fixture
def split(tmp_path: Path) -> tuple[Dataset, list[str]]:
    """A dataset with an imported split, and the tables that it was imported from."""
    dataset = scanned(tmp_path / "split")
    rows = {
        "train": [(slide, x, 0) for slide in "ae" for x in range(3)],
        "val-in": [("a", x, 300) for x in range(4)],
        "val-out": [("b", 0, 0), ("b", 9, 0)],
        "other": [("a", 700, 0)],
    }
    tables = []
    for name, own in rows.items():
        file = tmp_path / f"{name}.csv"
        file.write_text("\n".join(["slide,x,y", *(",".join(map(str, row)) for row in own)]))
        tables.append(f"{name}={file}")
    assert import_tables(dataset, *tables) == 0
    return dataset, tables


def tiles_of(dataset: Dataset, name: str) -> set[tuple[str, int]]:
    return {(s, int(r)) for s, ranks in read_selection(dataset, name).items() for r in ranks}


def digest(root: Path) -> dict[str, str]:
    """sha256 of every file, journals left out."""
    return {
        str(path): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file() and "status" not in path.parts
    }


def select(dataset: Dataset, *arguments: str) -> int:
    return main(["select", "--dataset", str(dataset.root), *arguments])


def test_imported_selections_state_what_they_are_for(split):
    dataset, _ = split
    known = read_ties(dataset)
    roles = {name: (read_plan(dataset, name).get("role"), known[name].role) for name in known}
    assert roles == {
        "train": ("train", "train"), "val-in": ("val-in", "val-in"),
        "val-out": ("val-out", "val-out"), "other": (None, "train"),
    }  # fmt: skip
    assert held_out(known) == {"val-out": frozenset({"p1", "p2"})}, "p2 shares a file with p1"
    assert select(dataset, "--name", "val-small", "--from", "val-out", "--tiles", "1") == 0
    assert read_plan(dataset, "val-small")["role"] == "val-out"
    dataset.selection_file("val-out").unlink()
    assert set(held_out(read_ties(dataset))) == {"val-out"}, "the journal says it too"


@pytest.mark.parametrize(
    "more", [["--tiles", "3"], ["--pool", "reserve"], ["--pool", "all"], ["--hold-out", "1"]]
)
def test_nothing_is_drawn_beside_an_imported_split(split, more):
    dataset, _ = split
    with pytest.raises(UserError, match=r"'other', 'train', 'val-in', 'val-out'.*--from NAME"):
        select(dataset, "--name", "new", *more)
    assert select(dataset, "--name", "small", "--from", "train", "--tiles", "3") == 0
    assert tiles_of(dataset, "small") < tiles_of(dataset, "train")
    with pytest.raises(UserError, match="one by one"):
        select(dataset, "--name", "new", *more)


def test_once_the_imported_selections_are_removed_their_tiles_are_there_to_draw_from(split):
    dataset, _ = split
    for name in dataset.selection_names():
        select(dataset, "--remove", name)
    assert select(dataset, "--name", "val-out", "--hold-out", "1") == 0
    assert select(dataset, "--name", "train") == 0


def test_an_import_changes_no_selection_that_others_rely_on(split, capsys):
    dataset, tables = split
    assert select(dataset, "--remove", "train") == 0
    assert select(dataset, "--name", "train", "--from", "val-in", "--tiles", "3") == 0
    assert select(dataset, "--name", "small", "--from", "train", "--tiles", "1") == 0
    before = digest(dataset.root)
    with pytest.raises(UserError, match=r"import 'train': 'small' was drawn from it"):
        import_tables(dataset, *tables)
    assert digest(dataset.root) == before
    select(dataset, "--remove", "small")
    capsys.readouterr()
    assert import_tables(dataset, *tables) == 0
    assert read_selection(dataset, "train").rows == 6
    assert "selection 'train' is replaced: 6 tiles of" in capsys.readouterr().out


def test_an_import_takes_no_hold_out_s_place(split):
    dataset, tables = split
    for name in dataset.selection_names():
        select(dataset, "--remove", name)
    select(dataset, "--name", "val-out", "--hold-out", "1", "--sample-types", "01")
    select(dataset, "--name", "mine", "--tiles", "1")
    with pytest.raises(UserError, match="'val-out' holds out 1 patients that 'mine' leaves"):
        import_tables(dataset, *tables)
    assert dataset.selection_names() == ["mine", "val-out"]


def test_what_was_drawn_from_a_lost_or_older_selection_does_not_bar_the_import(split):
    dataset, tables = split
    select(dataset, "--name", "small", "--from", "val-out", "--tiles", "1")
    whole = dataset.selection_file("val-out").read_bytes()
    dataset.selection_file("val-out").unlink()
    assert import_tables(dataset, *tables) == 0
    assert dataset.selection_file("val-out").read_bytes() == whole
    # As an earlier release left it: the same rows, no ties, another fingerprint.
    ranks = dict(read_selection(dataset, "val-out").items())
    with Run(dataset, "select", {}) as older:
        record = write_selection(dataset, "run", make_selection("val-out", ranks, {}))
        older.append([Entry("val-out", "done", "older", files=(record,))])
    assert import_tables(dataset, *tables) == 0
    assert dataset.selection_file("val-out").read_bytes() == whole
