"""A dataset has the kind that its first writer gives it: no command of another kind adds to it."""

from pathlib import Path

import pytest

from common.errors import UserError
from pipeline.__main__ import main
from pipeline.dataset import (
    Dataset,
    DatasetKind,
    Slide,
    claim_identity,
    kind_of,
    new_run_id,
    read_identity,
    write_slides,
)

SLIDES = str(Path(__file__).resolve().parents[1] / "data" / "slides")
GRID = {"grid": "adjacent", "mpp": 0.5, "mpp_tolerance": 0.02, "tile_px": 224, "seed": 0}


def contents(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def make_dataset(root: Path, identity: dict[str, object], reader: str) -> Dataset:
    dataset = Dataset(root)
    if identity:
        claim_identity(dataset, identity, stage="first", versions={})
    write_slides(dataset, new_run_id(), [Slide("a", "", reader=reader, mpp=0.5)])
    return dataset


@pytest.mark.parametrize("is_recorded", [True, False], ids=["with", "without"])
def test_no_stage_of_slides_writes_into_generated_images(tmp_path, is_recorded):
    identity = {"kind": "generated", "tile_px": 224, "mpp": 0.5} if is_recorded else {}
    dataset = make_dataset(tmp_path / "synthetic", identity, "generated")
    masks = tmp_path / "masks"
    masks.mkdir()
    (masks / "a.png").write_bytes(b"")
    commands = [["scan", SLIDES]]
    if is_recorded:
        commands += [["tissue"], ["import", "masks", str(masks)]]
    commands += [["import", "tiles", str(masks), "--mpp", "0.5"]]
    before = contents(dataset.root)
    for command in commands:
        with pytest.raises(UserError, match="is a dataset of generated images"):
            main([*command, "--dataset", str(dataset.root), "--workers", "1"])
    assert contents(dataset.root) == before


@pytest.mark.parametrize(
    ("identity", "kind"),
    [
        (GRID, DatasetKind.IMPORTED_TILES),
        (GRID, DatasetKind.GENERATED),
        ({"tile_px": 224}, DatasetKind.GENERATED),
        ({}, DatasetKind.GENERATED),
        (GRID | {"grid": "imported tiles"}, DatasetKind.SLIDES),
        (GRID | {"grid": "imported tiles"}, DatasetKind.GENERATED),
    ],
)
def test_a_claim_of_another_kind_is_refused_and_changes_nothing(tmp_path, identity, kind):
    dataset = make_dataset(tmp_path / "dataset", identity, "openslide")
    before = contents(dataset.root)
    with pytest.raises(UserError, match="choose another folder"):
        claim_identity(dataset, {"new": 1}, stage="other", versions={}, kind=kind)
    assert contents(dataset.root) == before


def test_a_claim_of_the_same_kind_goes_on(tmp_path):
    dataset = make_dataset(tmp_path / "dataset", GRID, "openslide")
    claim_identity(dataset, {"new": 1}, stage="x", versions={}, kind=DatasetKind.SLIDES)
    identity = read_identity(dataset)
    assert identity["new"] == 1
    assert kind_of(identity) == DatasetKind.SLIDES
    # What was generated under the guidance of such a dataset names the hash of its identity.
    assert "kind" not in identity


@pytest.mark.parametrize(
    ("identity", "reader", "words"),
    [
        (GRID | {"kind": "generated"}, "generated", "says both `generated` and how slides are cut"),
        (GRID, "generated", "1 of the 1 slides in slides.parquet are generated"),
        ({"kind": "generated", "tile_px": 224}, "native", "0 of the 1 slides"),
    ],
)
def test_verify_finds_a_dataset_of_two_kinds(tmp_path, capsys, identity, reader, words):
    dataset = make_dataset(tmp_path / "dataset", identity, reader)
    assert main(["verify", "--dataset", str(dataset.root)]) == 1
    assert words in " ".join(capsys.readouterr().out.replace("│", " ").split())


def test_a_plan_is_not_written_over_a_dataset(tmp_path):
    dataset = make_dataset(tmp_path / "dataset", GRID, "openslide")
    before = contents(dataset.root)
    table = tmp_path / "slides.csv"
    table.write_text("slide_id,patient\na,p\n")
    with pytest.raises(UserError, match="is a dataset, whose slides a plan would replace"):
        main(["plan-cohort", str(table), "--out", str(dataset.root)])
    assert contents(dataset.root) == before
