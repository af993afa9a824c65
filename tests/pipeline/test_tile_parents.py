"""`tile` cuts only from the candidates that its fingerprint claims, slide by slide."""

import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from common.errors import UserError
from pipeline.__main__ import main
from pipeline.dataset import (
    Dataset,
    Entry,
    Ledger,
    Run,
    TileStore,
    candidate_count,
    make_selection,
    new_run_id,
    read_identity,
    read_journal,
    read_slides,
    write_selection,
)
from pipeline.dataset.tables.slides import describe_copies
from pipeline.selection.cohort import without_patients
from pipeline.selection.slides import cohort_of_slides
from pipeline.tiles.config import TileConfig
from pipeline.tiles.stage import tile_slide
from pipeline.tissue.stage import tissue_fingerprint
from pipeline.upkeep.status import read_status
from tests.pipeline.faults import ROOT

SLIDE = ROOT / "tests" / "data" / "slides" / "CMU-1-Small-Region.svs"


def run(dataset: Dataset, stage: str, *more: str) -> int:
    engine = () if stage == "select" else ("--workers", "1")
    return main([stage, *more, "--dataset", str(dataset.root), *engine])


@pytest.fixture(scope="module")
def two_selected(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Slides `a` and `b`, with candidates and a selection; the slides lie beside the dataset."""
    top = tmp_path_factory.mktemp("two")
    dataset = Dataset(top / "dataset")
    (top / "slides").mkdir()
    for name in ("a", "b"):
        shutil.copy2(SLIDE, top / "slides" / f"{name}.svs")
    assert run(dataset, "scan", str(top / "slides")) == 0
    assert run(dataset, "tissue") == 0
    assert run(dataset, "select", "--name", "train", "--tiles", "24") == 0
    return top


@pytest.fixture
def two(two_selected: Path, tmp_path: Path) -> Dataset:
    """A copy that a test may change."""
    shutil.copytree(two_selected / "dataset", tmp_path / "dataset")
    return Dataset(tmp_path / "dataset")


def latest(dataset: Dataset, slide_id: str) -> Entry:
    return [e for e in read_journal(dataset, "tile") if e.slide_id == slide_id][-1]


@pytest.mark.full
def test_candidates_of_a_former_slide_are_not_cut(two: Dataset, tmp_path: Path) -> None:
    """The slide was fetched again and scanned, tissue was forgotten; the other slide goes on."""
    slides = tmp_path / "slides"
    slides.mkdir()
    for row in read_slides(two):
        shutil.copy2(row.path, slides)
    os.utime(slides / "b.svs", ns=(1, 1))
    assert run(two, "scan", str(slides)) == 0
    assert run(two, "tile") == 1
    assert latest(two, "a").outcome == "done"
    failed = latest(two, "b")
    assert (failed.outcome, failed.scope, failed.files) == ("failed", "224", ())
    assert "candidates/b.parquet is not of the slide as it is now: run `tissue`" in failed.reason
    assert TileStore(two, 224).slide_ids() == ["a"]
    assert run(two, "tissue") == 0
    assert run(two, "tile") == 0
    assert TileStore(two, 224).slide_ids() == ["a", "b"]


def test_a_slide_that_tissue_rejected_since_is_not_cut(two: Dataset) -> None:
    """Its old candidates file stays, and the selection still names it."""
    slide = next(slide for slide in read_slides(two) if slide.slide_id == "b")
    mark = tissue_fingerprint(slide, read_identity(two))
    with Run(two, "tissue", {}) as one:
        one.append([Entry("b", "rejected", mark, "too pale")])
    assert run(two, "tile") == 1
    assert latest(two, "a").outcome == "done"
    assert "rejected by tissue (too pale): `select` again" in latest(two, "b").reason


def test_lost_candidates_fail_their_slide_alone(two: Dataset) -> None:
    two.candidates_file("b").unlink()
    assert run(two, "tile") == 1
    assert latest(two, "a").outcome == "done"
    assert "run `tissue`" in latest(two, "b").reason


def test_ranks_that_the_candidates_do_not_have_are_told(two: Dataset) -> None:
    """Also where every block of theirs stands: nothing is silently cut short."""
    rows = candidate_count(two, "b")
    assert rows % 16, "the last block is short"
    for last in (rows, rows + 60):
        ranks = {"a": np.arange(16, 24), "b": np.arange(16, last + 1)}
        write_selection(two, new_run_id(), make_selection("stale", ranks, {}))
        assert run(two, "tile") == 1
        assert (
            f"selection 'stale' names rank {last} of {rows} candidates" in latest(two, "b").reason
        )
        two.selection_file("stale").unlink()
        everything = {"b": np.arange(rows)}
        write_selection(two, new_run_id(), make_selection("all", everything, {}))
        assert run(two, "tile") == 0
        assert read_status(two).failures == [], "also where no tile was missing"
    assert latest(two, "a").outcome == "done"


def test_a_selected_slide_that_scan_does_not_know_is_one_line(two: Dataset) -> None:
    ranks = {"gone": np.arange(16, 24)}
    write_selection(two, new_run_id(), make_selection("old", ranks, {}))
    with pytest.raises(UserError, match=r"slide gone of a selection is not in .*slides\.parquet"):
        run(two, "tile")


def test_a_worker_that_can_read_no_identity_fails_its_slide(two: Dataset) -> None:
    slide = read_slides(two)[0]
    two.identity_file.write_text("{")
    config = TileConfig(tile_px=224)
    (entry,) = tile_slide(str(two.root), "run", slide, [range(1)], "mark", config)
    assert (entry.outcome, entry.scope) == ("failed", "224")
    assert "dataset.json is not a dataset's identity" in entry.reason


@pytest.mark.full
def test_a_lost_shard_hides_none_that_holds_its_blocks_since(own_tiled: Dataset) -> None:
    """Its range was written otherwise, for the need had grown; its line must not be read last."""
    name, rows = SLIDE.stem, candidate_count(own_tiled, SLIDE.stem)
    shutil.rmtree(own_tiled.root / "tiles")
    shutil.rmtree(own_tiled.status_dir("tile"))

    def tile_ranks(start: int, stop: int) -> None:
        own_tiled.selection_file("train").unlink()
        chosen = make_selection("train", {name: np.arange(start, stop)}, {})
        write_selection(own_tiled, new_run_id(), chosen)
        assert run(own_tiled, "tile") == 0

    tile_ranks(16, 32)
    (lost,) = read_journal(own_tiled, "tile")
    shutil.rmtree(own_tiled.root / "tiles")
    tile_ranks(0, rows)
    whole = TileStore(own_tiled, 224)
    assert len(whole.read(name, range(rows))) == rows
    # A dataset that was left so by a release before this rule is mended too.
    with Run(own_tiled, "tile", {}) as one:
        one.append([lost])
    with pytest.raises(UserError):
        TileStore(own_tiled, 224).read(name, [20])
    for _ in range(2):
        assert run(own_tiled, "tile") == 0
        assert len(TileStore(own_tiled, 224).read(name, range(rows))) == rows
    assert [e.outcome for e in read_journal(own_tiled, "tile")] == [
        "done", "pruned", "done", "done", "pruned",
    ]  # fmt: skip


def test_only_a_hiding_line_is_taken_back() -> None:
    lost = Entry("s", "done", "f", scope="224", start=16, stop=60)

    def withdrawn(blocks_on_disk: set[int], wanted: set[int]) -> list[Entry]:
        there = [
            Entry("s", "done", "f", scope="224", start=16 * block, stop=16 * block + 16)
            for block in blocks_on_disk
        ]
        ledger = Ledger([*there, lost], lambda entry: entry != lost)
        return list(ledger.missing("s", wanted, "f", ["224"]).withdrawn)

    (line,) = withdrawn({0, 1}, set())
    assert (line.outcome, line.start, line.stop, line.scope) == ("pruned", 16, 60, "224")
    assert withdrawn(set(), {1, 2, 3}) == [], "the same shard is written again"
    assert withdrawn({0, 4}, set()) == [], "nothing else has it: that is verify's to report"


def test_one_file_under_two_names_is_named(
    two: Dataset, two_selected: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The fixture's slides are copies of one file, of which neither has a sum of the whole."""
    assert run(two, "scan", str(two_selected / "slides")) == 0
    assert run(two, "select", "--name", "other", "--tiles", "10") == 0
    output = " ".join(capsys.readouterr().out.split())
    for stage in ("scan", "select"):
        assert f"{stage}: slides that are one file under several names: a = b;" in output
    slides = [replace(slide, patient=slide.slide_id) for slide in read_slides(two)]
    cohort = cohort_of_slides(slides, np.array([1, 1]))
    assert without_patients(cohort, {"held": frozenset({"b"})})[0].slide_id.tolist() == []
    others = [replace(slides[0], series="0"), replace(slides[1], series="1")]
    assert describe_copies(others) == "", "two images of one file are two slides"
    assert describe_copies(slides[:1]) == ""
