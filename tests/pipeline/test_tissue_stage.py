"""The tissue stage's files on the real slide: mask, overlay, candidates, journal."""

import hashlib

import cv2
import numpy as np
import pytest

from common.errors import UserError
from pipeline.__main__ import main
from pipeline.dataset import (
    Dataset,
    open_dataset,
    read_candidates,
    read_identity,
    read_journal,
)
from pipeline.tissue.classes import CLASS_NAMES, TissueClass
from pipeline.tissue.config import TissueConfig
from pipeline.tissue.stage import _same_detector
from pipeline.tissue.verdict import judge_tiles

SLIDE = "CMU-1-Small-Region"


def mask_of(dataset) -> np.ndarray:
    return cv2.imread(str(dataset.mask_file(SLIDE)), cv2.IMREAD_UNCHANGED)


def test_the_mask_and_the_journal_say_the_same(tiled):
    (entry,) = read_journal(tiled, "tissue")
    mask = mask_of(tiled)
    um_per_px = entry.values["um_per_px"]
    assert mask.shape == (2967 // 16, 2220 // 16)
    assert um_per_px == pytest.approx(16 * 0.499)
    pixels = np.bincount(mask.ravel(), minlength=len(TissueClass))
    for one, name in CLASS_NAMES.items():
        if one != TissueClass.BACKGROUND:
            area = entry.values["class_mm2"].get(name, 0.0)
            assert area == pytest.approx(pixels[one] * um_per_px**2 / 1e6, abs=1e-4)
    assert all(241 <= level <= 247 for level in entry.values["glass"])
    tiles = entry.values["tiles"]
    assert sum(tiles.values()) == entry.counts["grid tiles"]
    assert tiles["kept"] == entry.counts["candidate tiles"]


def test_the_real_slide_is_sharp_and_not_marked(tiled):
    mask = mask_of(tiled)
    assert not (mask == TissueClass.OUT_OF_FOCUS).any()
    assert not (mask == TissueClass.PEN).any()


def test_candidates_are_the_tiles_that_the_mask_keeps(tiled):
    table = read_candidates(tiled, SLIDE)
    scale = read_journal(tiled, "tissue")[0].values["um_per_px"] / 0.499
    judgement = judge_tiles(
        mask_of(tiled),
        table["x_level0"].to_numpy() / scale,
        table["y_level0"].to_numpy() / scale,
        224 / scale,
        min_tissue=0.5,
        max_artifact=0.1,
        experimental=frozenset({TissueClass.FOLD}),
    )
    assert judgement.kept.all()
    assert np.array_equal(judgement.tissue, table["tissue_fraction"].to_numpy())
    assert np.array_equal(judgement.artifact, table["artifact_fraction"].to_numpy())


def test_the_overlay_is_small_and_shows_the_slide_and_the_legend(tiled):
    path = tiled.overlay_file(SLIDE)
    assert path.stat().st_size < 600_000
    picture = cv2.imread(str(path))
    assert max(picture.shape[:2]) <= 1600 + 100
    assert picture.shape[0] / picture.shape[1] == pytest.approx(2967 / 2220, rel=0.1)


@pytest.mark.full
def test_thresholds_are_the_users(cmu_slide, tmp_path):
    counts = {}
    for share in ("0.1", "0.9"):
        root = tmp_path / share
        main(["scan", str(cmu_slide), "--dataset", str(root), "--workers", "1"])
        main(["tissue", "--dataset", str(root), "--min-tissue", share, "--workers", "1"])
        table = read_candidates(open_dataset(root), SLIDE)
        assert min(table["tissue_fraction"].to_pylist()) >= float(share) - 1e-6
        counts[share] = table.num_rows
    assert counts["0.1"] > counts["0.9"] > 0


def test_a_detector_whose_file_changed_is_refused():
    expected = TissueConfig().identity()["detector"]
    assert _same_detector("classical", expected).um_per_px == 8.0
    with pytest.raises(UserError, match="not the one this dataset was begun with"):
        _same_detector("classical", "another")


def test_the_detectors_values_stand_in_the_identity(tiled):
    identity = read_identity(tiled)
    assert identity["detector_parameters"]["name"].startswith("classical")
    assert identity["detector_parameters"]["focus"]["um_per_px"] == 1.0
    assert len(identity["detector"]) >= 16


@pytest.mark.full
def test_the_second_real_slide_with_padding(tmp_path, shared_data):
    slide = shared_data / "slides" / "TCGA-CR-7395-01A-01-TS1.svs"
    root = tmp_path / "d"
    scan = ["scan", str(slide), "--assume-mpp", "0.5", "--dataset", str(root), "--workers", "1"]
    assert main(scan) == 0
    sums = []
    for _ in range(2):
        assert main(["tissue", "--dataset", str(root), "--workers", "1"]) == 0
        files = sorted((root / "tissue").iterdir()) + sorted((root / "candidates").iterdir())
        sums.append([hashlib.sha256(file.read_bytes()).hexdigest() for file in files])
        for file in files:
            file.unlink()
    assert sums[0] == sums[1], "the same slide gives the same bytes"
    entry = read_journal(open_dataset(root), "tissue")[-1]
    assert 170 <= entry.counts["candidate tiles"] <= 220
    assert all(level < 250 for level in entry.values["glass"]), "padding is no glass"
    assert set(entry.values["tiles"]) == {"no tissue", "kept", "little tissue"}


def test_a_slide_that_is_not_stained_is_rejected_with_its_picture(tmp_path, shared_data):
    name, root = "slideio_test3-DAPI-2-387", tmp_path / "dataset"
    run = ["--dataset", str(root), "--workers", "1"]
    assert main(["scan", str(shared_data / "slides" / f"{name}.ndpi"), *run]) == 0
    assert main(["tissue", *run]) == 0
    (entry,) = read_journal(Dataset(root), "tissue")
    assert entry.outcome == "rejected"
    assert "fluorescence" in entry.reason
    assert [record.path for record in entry.files] == [f"tissue/{name}.jpg"]
    picture = cv2.imread(str(root / "tissue" / f"{name}.jpg"))
    assert (picture[:-40] < 60).mean() > 0.5, "the slide is dark, and so is its picture"
    (root / "tissue" / f"{name}.jpg").unlink()
    assert main(["verify", "--dataset", str(root)]) == 1
    assert main(["tissue", *run]) == 0, "as verify says"
    assert main(["verify", "--dataset", str(root)]) == 0
