"""Commands at the same time on one dataset: nothing is lost, and nothing leaks."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import tifffile

from pipeline.dataset import Dataset, read_journal, read_selection, read_slides
from tests.faults.at_once import (
    end,
    slow_renames,
    start,
    start_pipeline,
    wait_until_there,
)
from tests.pipeline.cohort_data import slides_of, tissue_dataset, trap_rows
from tests.pipeline.faults import contents, pipeline

SLIDE = Path(__file__).resolve().parents[1] / "data" / "slides" / "CMU-1-Small-Region.svs"


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Dataset:
    slides = slides_of(trap_rows())
    return tissue_dataset(tmp_path_factory.mktemp("cohort") / "d", slides, [40] * len(slides))


@pytest.fixture
def cohort(made, tmp_path) -> Dataset:
    shutil.copytree(made.root, tmp_path / "d")
    return Dataset(tmp_path / "d")


def write_slide(path: Path, seed: int) -> Path:
    """A slide of 512 px that says nothing but its seed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (512, 512, 3), np.uint8)
    tifffile.imwrite(path, pixels, photometric="rgb", tile=(256, 256), metadata=None,
                     resolution=(20000, 20000), resolutionunit="CENTIMETER")  # fmt: skip
    return path


@pytest.mark.full
def test_two_scans_of_different_folders_are_both_in_the_table(tmp_path, preload_shim) -> None:
    root = tmp_path / "d"
    for number in (1, 2):
        write_slide(tmp_path / f"in{number}" / f"{number}.tif", number)
    slow = slow_renames(preload_shim, "slides.parquet", 4)
    first = start_pipeline("scan", root, str(tmp_path / "in1"), "--workers", "1", **slow)
    wait_until_there(lambda: root.glob(".tmp/*/*-slides.parquet"), first)
    second = start_pipeline("scan", root, str(tmp_path / "in2"), "--workers", "1")
    assert [end(second)[0], end(first)[0]] == [0, 0]
    assert [slide.slide_id for slide in read_slides(Dataset(root))] == ["1", "2"]
    assert pipeline("verify", "--dataset", str(root)).returncode == 0


@pytest.mark.full
def test_two_scans_of_equal_names_never_share_an_id(tmp_path) -> None:
    """Each is started while the other opens its slides; the one that comes second is refused."""
    root = tmp_path / "d"
    paths = [write_slide(tmp_path / f"in{number}" / "1.tif", number) for number in (1, 2)]
    scans = [start_pipeline("scan", root, str(path), "--workers", "1") for path in paths]
    statuses, said = zip(*map(end, scans), strict=True)
    assert sorted(statuses) == [0, 1], said
    rows = {slide.path: slide for slide in read_slides(Dataset(root))}
    assert rows.keys() == set(map(str, paths))
    assert sorted(slide.status for slide in rows.values()) == ["failed", "ok"]
    assert "slide id '1' is that of" in said[statuses.index(1)]
    taken = next(path for path, slide in rows.items() if slide.slide_id == "1")
    assert rows[taken].status == "ok"


@pytest.mark.full
def test_a_hold_out_and_a_training_selection_share_nothing(cohort, preload_shim) -> None:
    slow = slow_renames(preload_shim, "selections/", 4)
    first = start_pipeline(
        "select", cohort.root, "--name", "val-out", "--hold-out", "12", "--tiles", "100", **slow
    )
    wait_until_there(lambda: cohort.root.glob(".tmp/*/*-val-out*.parquet"), first)
    second = start_pipeline("select", cohort.root, "--name", "train", "--tiles", "1000")
    status, said = end(second)
    assert (end(first)[0], status) == (0, 0), said
    assert "select: waits for another command that changes the selections" in said
    patient = {slide.slide_id: slide.patient for slide in read_slides(cohort)}
    sides = [
        {patient[slide_id] for slide_id in read_selection(cohort, name).slide_ids}
        for name in ("val-out", "train")
    ]
    assert all(sides)
    assert not sides[0] & sides[1]


@pytest.mark.full
def test_many_selections_at_once_are_as_one_after_the_other(cohort) -> None:
    """Whatever their order, each is made from the others that were there before it."""
    names = [f"val-out{number}" for number in range(4)]
    processes = [
        start_pipeline("select", cohort.root, "--name", name, "--hold-out", "4", "--tiles", "40")
        for name in names
    ]
    said = [end(process) for process in processes]
    assert [status for status, _ in said] == [0] * 4, said
    held = [set(read_selection(cohort, name).slide_ids) for name in names]
    assert len(set().union(*held)) == sum(map(len, held)), "no slide is in two of them"


@pytest.mark.full
def test_a_selection_that_is_removed_is_not_drawn_from_meanwhile(cohort, preload_shim) -> None:
    assert pipeline("select", "--dataset", str(cohort.root), "--name", "a", "--tiles", "100")
    slow = slow_renames(preload_shim, "selections/", 3)
    part = start_pipeline(
        "select", cohort.root, "--name", "b", "--from", "a", "--tiles", "50", **slow
    )
    wait_until_there(lambda: cohort.root.glob(".tmp/*/*-b.parquet"), part)
    removal = start_pipeline("select", cohort.root, "--remove", "a")
    status, said = end(removal)
    assert end(part)[0] == 0
    assert status == 2
    assert "'b' was drawn from it" in said
    assert cohort.selection_names() == ["a", "b"]


_ZARR = """
import sys, pathlib
from pipeline.dataset import Dataset
from pipeline.dataset.tiles.zarr_shard import commit_zarr, encode_chunk
import numpy as np
root, run, seed = pathlib.Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
tile = np.random.default_rng(seed).integers(0, 255, (8, 8, 3), np.uint8)
chunks = [encode_chunk(tile)] * 16
dataset = Dataset(root)
while not (root / "go").exists():
    pass
for turn in range(60):
    files = commit_zarr(dataset, run, dataset.tiles_dir(8) / "s.0-16.zarr", 8, chunks)
print(*(file.sha256 for file in files))
"""


@pytest.mark.parametrize("seeds", [(1, 1), (1, 2)], ids=["same tiles", "other tiles"])
def test_two_writers_of_one_zarr_shard_both_end_well(tmp_path, seeds) -> None:
    from pipeline.dataset.tiles.zarr_shard import ZarrShard

    writers = [
        start(["-c", _ZARR, str(tmp_path), f"run{number}", str(seed)])
        for number, seed in enumerate(seeds)
    ]
    (tmp_path / "go").touch()
    ends = [end(writer) for writer in writers]
    assert [status for status, _ in ends] == [0, 0], ends
    shard = ZarrShard.open(tmp_path / "tiles" / "8" / "s.0-16.zarr")
    assert len(shard.read_block(0)) == 16
    sums = contents(tmp_path)
    written = sums["tiles/8/s.0-16.zarr/zarr.json"], sums["tiles/8/s.0-16.zarr/c/0/0/0/0"]
    assert " ".join(written) in {said for _, said in ends}
    assert list((tmp_path / ".tmp").glob("*/*")) == []


@pytest.mark.full
@pytest.mark.parametrize("format_", ["png", "zarr"])
def test_two_tile_runs_at_once_give_what_one_gives(tmp_path, format_) -> None:
    root = tmp_path / "d"
    for stage in (["scan", str(SLIDE)], ["tissue"], ["select", "--name", "train"]):
        more = [] if stage[0] == "select" else ["--workers", "1"]
        assert pipeline(stage[0], "--dataset", str(root), *stage[1:], *more).returncode == 0
    alone = tmp_path / "alone"
    shutil.copytree(root, alone)
    options = ["--workers", "1", "--format", format_]
    assert pipeline("tile", "--dataset", str(alone), *options).returncode == 0
    runs = [start_pipeline("tile", root, *options) for _ in range(2)]
    ends = [end(run) for run in runs]
    assert [status for status, _ in ends] == [0, 0], ends
    assert contents(root) == contents(alone)
    assert pipeline("verify", "--dataset", str(root)).returncode == 0


_CLAIM = """
import sys, pathlib
from pipeline.dataset import Dataset, DatasetKind, claim_identity
claims = {"grid": "adjacent"} if sys.argv[2] == "slides" else {"kind": "generated"}
claim_identity(Dataset(pathlib.Path(sys.argv[1])), claims, stage=sys.argv[2], versions={},
               kind=DatasetKind(sys.argv[2]))
"""


def test_a_dataset_is_never_of_two_kinds(tmp_path, preload_shim) -> None:
    """`scan` and `generate` into one new folder at the same time."""
    slow = slow_renames(preload_shim, "dataset.json", 2)
    first = start(["-c", _CLAIM, str(tmp_path / "d"), "slides"], **slow)
    wait_until_there(lambda: (tmp_path / "d").glob(".tmp/*/*-dataset.json"), first)
    second = start(["-c", _CLAIM, str(tmp_path / "d"), "generated"])
    (status, _), (refused, said) = end(first), end(second)
    assert (status, refused) == (0, 1)
    assert "is a dataset of tiles cut from slides" in said


_ENCODER = """
import sys, pathlib
from pipeline.dataset import Dataset, Run
from pipeline.features.config import CacheConfig
from pipeline.features.stage import claim_encoder
dataset, weights = Dataset(pathlib.Path(sys.argv[1])), sys.argv[2]
with Run(dataset, "cache", {}) as run:
    record = {"encoder": "h0-mini", "weights_sha256": weights}
    claim_encoder(dataset, run, 224, CacheConfig(weights=weights, tokens="none"), record)
"""


@pytest.mark.full
def test_features_are_never_of_two_networks(tmp_path, preload_shim) -> None:
    slow = slow_renames(preload_shim, "encoder.json", 4)
    first = start(["-c", _ENCODER, str(tmp_path), "one"], **slow)
    wait_until_there(lambda: tmp_path.glob(".tmp/*/*-encoder.json"), first)
    second = start(["-c", _ENCODER, str(tmp_path), "other"])
    (status, _), (refused, said) = end(first), end(second)
    assert (status, refused) == (0, 1), said
    assert "these features were made with weights_sha256 'one', 'other' was asked for" in said
    assert len(read_journal(Dataset(tmp_path), "cache")) == 1
