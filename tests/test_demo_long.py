"""`make demo-long` from the slide to the pictures, with few tiles and steps."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.full
def test_the_long_demo_runs_to_its_pictures_and_holds_out_the_lower_part(tmp_path: Path) -> None:
    environment = {**os.environ, "DEMO": str(tmp_path), "PY": sys.executable, "CROP_STEP": "128"}
    short = ["run.steps=2", "log.samples_every=0", "log.validation_tiles=2", "log.fixed_tiles=4",
             "log.every=1", "model.sit.depth=3"]  # fmt: skip
    done = subprocess.run(
        ["bash", "tests/demo_long.sh", *short],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    for name in (
        "report.html",
        "picture.png",
        "variations.png",
        "interpolation.png",
        "model/README.md",
    ):
        assert (tmp_path / name).stat().st_size > 0, name
    # Terms go from the slide and the encoder to all that descends from them.
    results = json.loads((tmp_path / "results.json").read_text())
    expected = {("slides", "CC0-1.0"), ("encoder efficientnet-lite0", "Apache-2.0")}
    assert {(one["covers"], one["licence"]) for one in results["terms"]} == expected
    for name in ("model/README.md", "synthetic/README.md", "report.html"):
        text = (tmp_path / name).read_text()
        assert all(f"{covers}: {licence}" in text for covers, licence in expected), name
    rows = pq.read_table(tmp_path / "dataset/candidates/CMU-1-Small-Region.parquet")
    places = dict(zip(rows["rank"].to_pylist(), rows["y_level0"].to_pylist(), strict=True))
    chosen = {
        name: pq.read_table(tmp_path / f"dataset/selections/{name}.parquet")["rank"].to_pylist()
        for name in ("train", "val-below")
    }
    assert max(places[r] for r in chosen["train"]) + 224 <= min(
        places[r] for r in chosen["val-below"]
    )
