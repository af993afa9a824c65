"""A damaged product of one slide stops no other; what the message says to run makes it again."""

import shutil
from pathlib import Path

import pytest

from common.errors import UserError
from pipeline.dataset import (
    Dataset,
    Ledger,
    TileStore,
    read_candidates,
    read_selection,
    read_slides,
)
from pipeline.run.withdraw import find_damaged
from pipeline.selection.config import SelectConfig
from pipeline.selection.select import select
from tests.faults.small_slides import tissue_pixels, write_part
from tests.pipeline.cohort_data import slides_of, tissue_dataset, trap_rows
from tests.pipeline.faults import contents, pipeline

WORKERS = ("--workers", "1")


def flip(path: Path) -> None:
    """Other bytes in the middle, as many as before.

    A run of them: a single one may lie where it changes nothing that is read (a page's statistics).
    """
    data = bytearray(path.read_bytes())
    middle = slice(len(data) * 2 // 5, len(data) * 3 // 5)
    data[middle] = bytes(byte ^ 0xFF for byte in data[middle])
    path.write_bytes(data)


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def test_select_names_the_slides_whose_candidates_cannot_be_read(tmp_path: Path) -> None:
    """Without them it would be another selection, under the name of the whole."""
    slides = slides_of(trap_rows())
    dataset = tissue_dataset(tmp_path / "d", slides, [40] * len(slides))
    lost, unreadable = slides[4].slide_id, slides[5].slide_id
    dataset.candidates_file(lost).unlink()
    file = dataset.candidates_file(unreadable)
    file.write_bytes(bytes(file.stat().st_size))
    with pytest.raises(UserError, match="whose tissue result is lost or damaged: 2") as refused:
        select(dataset, SelectConfig("train"))
    assert all(slide_id in str(refused.value) for slide_id in (lost, unreadable))
    assert dataset.selection_names() == []


def test_select_leaves_lost_slides_out_where_it_is_asked_to(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same rows as where those slides never had a result; whole again once they have one."""
    slides = slides_of(trap_rows())
    dataset = tissue_dataset(tmp_path / "d", slides, [40] * len(slides))
    select(dataset, SelectConfig("whole"))
    file = dataset.candidates_file(slides[4].slide_id)
    good = file.read_bytes()
    file.unlink()
    assert select(dataset, SelectConfig("train"), skip_lost=True) == 0
    assert "tissue result lost or damaged" in capsys.readouterr().out
    whole = read_selection(dataset, "whole").slide_ids
    rows = read_selection(dataset, "train").slide_ids
    assert list(rows) == [slide_id for slide_id in whole if slide_id != slides[4].slide_id]
    file.write_bytes(good)
    select(dataset, SelectConfig("train"))
    assert read_selection(dataset, "train").slide_ids == whole


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two slides, and the dataset `d` of them with tiles of both."""
    folder = tmp_path_factory.mktemp("made")
    pixels = tissue_pixels()
    for name, shift in (("a", 0), ("b", 100)):
        write_part(folder / "in" / f"{name}.tif", pixels, shift)
    run_well(folder / "d", "scan", str(folder / "in"), *WORKERS)
    run_well(folder / "d", "tissue", *WORKERS)
    run_well(folder / "d", "select", "--name", "train")
    run_well(folder / "d", "tile", *WORKERS)
    return folder


@pytest.fixture
def own(made: Path, tmp_path: Path) -> Dataset:
    """A copy of the dataset that a test may change; its slides are where they were."""
    shutil.copytree(made / "d", tmp_path / "d")
    return Dataset(tmp_path / "d")


def run_well(root: Path, stage: str, *options: str) -> str:
    return run(root, stage, *options, status=0)


def run(root: Path, stage: str, *options: str, status: int) -> str:
    """What a command says, on one line; it must end with this status."""
    done = pipeline(stage, "--dataset", str(root), *options)
    # Without the lines of tables, which break a reason between any two words.
    said = " ".join((done.stdout + done.stderr).replace("│", " ").split())
    assert done.returncode == status, said
    return said


@pytest.mark.full
def test_damaged_candidates_fail_their_slide_alone_and_tissue_makes_them_again(
    own: Dataset,
) -> None:
    before = contents(own.root)
    shutil.rmtree(own.root / "tiles")
    shutil.rmtree(own.status_dir("tile"))
    flip(own.candidates_file("b"))
    said = run(own.root, "tile", *WORKERS, status=1)
    assert "b.parquet is damaged" in said
    assert "run `tissue`" in said
    lines = Ledger.read(own, "tile")["224"]
    assert [lines.latest(name).outcome for name in ("a", "b")] == ["done", "failed"]
    assert "slides: 1 done, 1 already done" in run_well(own.root, "tissue", *WORKERS)
    run_well(own.root, "tile", *WORKERS)
    assert contents(own.root) == before
    run_well(own.root, "verify")


@pytest.mark.full
def test_candidates_that_are_cut_off_are_named_by_select_and_tile(own: Dataset) -> None:
    before = contents(own.root)
    cut_off(own.candidates_file("b"))
    assert "run `tissue`" in run(own.root, "select", "--name", "train", status=2)
    assert "run `tissue`" in run(own.root, "tile", *WORKERS, status=1)
    run_well(own.root, "tissue", *WORKERS)
    run_well(own.root, "select", "--name", "train")
    run_well(own.root, "tile", *WORKERS)
    assert contents(own.root) == before


@pytest.mark.full
def test_what_readers_say_of_a_damaged_shard_is_what_makes_it_again(own: Dataset) -> None:
    before = contents(own.root)
    (shard,) = own.tiles_dir(224).glob("b.*.tar")
    flip(shard)
    store = TileStore(own, 224)
    store.read("a", [0])
    with pytest.raises(UserError, match="run `python -m pipeline verify --repair`, then `tile`"):
        store.read("b", range(read_candidates(own, "b").num_rows))
    run(own.root, "verify", "--repair", status=1)
    run_well(own.root, "tile", *WORKERS)
    assert contents(own.root).items() >= before.items()
    run_well(own.root, "verify")


@pytest.mark.full
def test_a_damaged_mask_and_overlay_stop_no_other_slide(own: Dataset, tmp_path: Path) -> None:
    before = contents(own.root)
    for path in (own.mask_file("b"), own.overlay_file("b")):
        path.write_bytes(bytes(path.stat().st_size))
    out = tmp_path / "json"
    said = run(own.root, "geojson", "--out", str(out), *WORKERS, status=1)
    assert "run `pipeline verify --repair`, then `tissue`" in said
    assert [path.name for path in out.iterdir()] == ["a.geojson"]
    run(own.root, "verify", "--repair", status=1)
    run_well(own.root, "tissue", *WORKERS)
    assert contents(own.root).items() >= before.items()


@pytest.mark.full
def test_a_damaged_selection_and_table_of_slides_are_made_again_as_the_message_says(
    own: Dataset, made: Path
) -> None:
    before = contents(own.root)
    flip(own.selection_file("train"))
    said = run(own.root, "tile", *WORKERS, status=2)
    assert "remove it, then make it again with `python -m pipeline select`" in said
    own.selection_file("train").unlink()
    run_well(own.root, "select", "--name", "train")
    run_well(own.root, "tile", *WORKERS)
    flip(own.slides_file)
    said = run(own.root, "tissue", *WORKERS, status=2)
    assert "remove it, then run `python -m pipeline scan`" in said
    own.slides_file.unlink()
    run_well(own.root, "scan", str(made / "in"), *WORKERS)
    run_well(own.root, "tissue", *WORKERS)
    assert contents(own.root) == before


def test_any_byte_of_the_table_of_slides_is_either_unused_or_its_damage_is_noticed(
    own: Dataset,
) -> None:
    slides, data = read_slides(own), own.slides_file.read_bytes()
    refused = 0
    for position in range(0, len(data), 5):
        damaged = bytearray(data)
        damaged[position] ^= 0xFF
        own.slides_file.write_bytes(damaged)
        try:
            assert read_slides(own) == slides, f"byte {position}"
        except UserError:
            refused += 1
    assert refused > len(data) / 5 / 2


def test_a_file_that_cannot_be_read_is_not_taken_for_damaged(tmp_path: Path) -> None:
    slides = slides_of(trap_rows())[:2]
    dataset = tissue_dataset(tmp_path / "d", slides, [40, 40])
    ledger = Ledger.read(dataset, "tissue")[""]
    first, second = (ledger.latest(slide.slide_id) for slide in slides)
    assert first is not None
    assert second is not None
    dataset.candidates_file(first.slide_id).unlink()
    dataset.candidates_file(first.slide_id).mkdir()
    flip(dataset.candidates_file(second.slide_id))
    assert find_damaged(dataset, first) == []
    assert find_damaged(dataset, second) == [second.files[0].path]
