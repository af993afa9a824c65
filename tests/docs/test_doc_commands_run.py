"""What README and docs show is run, command by command, on a cohort of four small slides.

Numbers of a real cohort are replaced by small ones, weights that nobody has here by random ones;
`REPLACED` is all that differs from the text. What cannot run is marked in the page itself:
`<!-- not run: reason -->` above the block.
"""

import csv
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.dataset import open_dataset
from tests.docs.doc_commands import ROOT, Block, blocks, words

pytestmark = pytest.mark.full

SLIDE = ROOT / "tests" / "data" / "slides" / "CMU-1-Small-Region.svs"
BARCODES = ("TCGA-02-0001-01Z-00-DX1", "TCGA-2E-A9G8-01Z-00-DX1", "TCGA-AA-3488-01Z-00-DX1")
REPLACED = (
    (r"/path/to/slides", "slides"),
    (r"SLIDES\.\.\.", "slides"),
    (r"DATASET", "dataset"),
    (r"(weights/)?h0-mini\.safetensors", "random:0"),
    (r"(import tiles|cache) (.*)--encoder h0-mini$", r"\1 \2--encoder h0-mini --weights random:0"),
    (r"WSI/tcga/single", "pictures"),
    (r"--tiles 1_000_000", "--tiles 24"),
    (r"--hold-out 1012 --cover project,site --tiles 100_000", "--hold-out 1 --tiles 8"),
    (r"--tiles 40_000_000", "--tiles 32"),
    (r"--pool reserve --tiles 100_000", "--pool reserve --tiles 2"),
    (r"--from train-40m --tiles 100_000", "--from train-40m --tiles 16"),
    (r"--recall 0.99", "--recall 0.99 --folds 3"),  # of four patients, one is held out
    (
        r"--config single-gpu",
        "--config tiny data.encoder=h0-mini run.steps=2 log.samples_every=2 log.sample_steps=2",
    ),
    (r"--limit 10000", "--limit 8 --steps 2"),
    (r"\s+\[--[^\]]*\]", ""),  # what may be left out of a synopsis is left out
)
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONSAFEPATH": "1"}
RUN = [block for block in blocks() if not block.not_run]


def run(command: str, folder: Path) -> None:
    for pattern, replacement in REPLACED:
        command = re.sub(pattern, replacement, command)
    split = [sys.executable if word == "python" else word for word in words(command)]
    done = subprocess.run(
        split, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, f"$ {command}\n{done.stdout[-1500:]}\n{done.stderr[-1500:]}"


@pytest.fixture(scope="module")
def scanned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `slides` and the dataset `scanned` that scan and tissue made of them."""
    folder = tmp_path_factory.mktemp("docs")
    (folder / "slides").mkdir()
    shutil.copy(SLIDE, folder / "slides")
    for number, barcode in enumerate(BARCODES, 1):
        copy = folder / "slides" / f"{barcode}.svs"
        copy.write_bytes(SLIDE.read_bytes() + bytes(number))  # another file to every checksum
    run("python -m pipeline scan slides --dataset scanned", folder)
    run("python -m pipeline tissue --dataset scanned", folder)
    return folder


def new_dataset(folder: Path, name: str) -> None:
    """The scanned dataset under another name."""
    shutil.rmtree(folder / name, ignore_errors=True)
    shutil.copytree(folder / "scanned", folder / name)


@pytest.fixture(scope="module")
def trained(scanned: Path) -> Path:
    """The folder after README's commands: `dataset`, `runs/first` and its model."""
    new_dataset(scanned, "dataset")
    for block in RUN:
        if block.page == "README.md" and block.is_shell:
            for command in block.commands():
                run(command, scanned)
    assert (scanned / "runs" / "first" / "report.html").stat().st_size > 100_000
    return scanned


def test_readme(trained: Path) -> None:
    assert (trained / "runs" / "first" / "results.json").exists()


ON_README_DATASET = (
    "docs/index.md",
    "docs/slides.md",
    "docs/tissue.md",
    "docs/qc_report.md",
    "docs/tile.md",
    "docs/encoders.md",
    "docs/operations.md",
)


def test_pages_that_use_the_dataset_of_readme(trained: Path) -> None:
    for block in shell_blocks(*ON_README_DATASET):
        for command in block.commands():
            run(command, trained)


def test_selections_features_verify(scanned: Path) -> None:
    new_dataset(scanned, "D")
    pages = ("docs/selections.md", "docs/features.md", "docs/verify.md")
    for block in shell_blocks(*pages):
        for command in block.commands():
            if " curate " in command:
                _label(scanned)
            if "--selection train " in command:
                command = command.replace("--selection train ", "--selection train-40m ")
            run(command, scanned)


def _label(folder: Path) -> None:
    """Features of D, and a third of its tiles called artifacts, some of every patient."""
    run("python -m pipeline cache --dataset D --encoder h0-mini --weights random:0", folder)
    table = pq.read_table(folder / "D" / "selections" / "train-40m.parquet").to_pylist()
    with (folder / "labels.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["slide_id", "rank", "label"])
        for number, row in enumerate(table):
            label = "usable" if number % 3 else "artifact"
            writer.writerow([row["slide_id"], row["rank"], label])


def test_import(scanned: Path) -> None:
    _bring(scanned)
    for block in shell_blocks("docs/import.md"):
        shutil.rmtree(scanned / "ds", ignore_errors=True)
        if "geojson" in block.body:
            new_dataset(scanned, "ds")
        elif "scan slides" not in block.body:
            run("python -m pipeline scan slides --dataset ds", scanned)
        for command in block.commands():
            run(command, scanned)


def _bring(folder: Path) -> None:
    """Tables, h5 files, masks and pictures of tiles as other tools would leave them."""
    dataset = open_dataset(folder / "scanned")
    rows = [
        {"slide_id": path.stem, "x": float(row["x_level0"]), "y": float(row["y_level0"])}
        for path in sorted((dataset.root / "candidates").glob("*.parquet"))
        for row in pq.read_table(path).to_pylist()[:8]
    ]
    with (folder / "train.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["slide_id", "x", "y"])
        writer.writeheader()
        writer.writerows(rows[::2])
    pq.write_table(pa.Table.from_pylist(rows[1::2]), folder / "val.parquet")
    (folder / "clam" / "patches").mkdir(parents=True)
    (folder / "masks").mkdir()
    for slide_id in {row["slide_id"] for row in rows}:
        corners = np.array([[r["x"], r["y"]] for r in rows if r["slide_id"] == slide_id], np.int64)
        with h5py.File(folder / "clam" / "patches" / f"{slide_id}.h5", "w") as file:
            coordinates = file.create_dataset("coords", data=corners)
            coordinates.attrs["patch_level"], coordinates.attrs["patch_size"] = 0, 224
        mask = np.zeros((297, 222), np.uint8)
        mask[60:240, 40:180] = 255
        Image.fromarray(mask).save(folder / "masks" / f"{slide_id}.png")
    for barcode in BARCODES[:2]:
        (folder / "pictures" / barcode).mkdir(parents=True)
        for column in range(4):
            pixels = np.random.default_rng(column).integers(90, 240, (224, 224, 3), np.uint8)
            Image.fromarray(pixels).save(folder / "pictures" / barcode / f"{column}_0.png")


def shell_blocks(*pages: str) -> Iterator[Block]:
    return (block for page in pages for block in RUN if block.page == page and block.is_shell)


HERE = {
    "README.md",
    *ON_README_DATASET,
    "docs/features.md",
    "docs/import.md",
    "docs/selections.md",
    "docs/verify.md",
}


def test_no_page_is_forgotten() -> None:
    shown = {block.page for block in RUN if block.is_shell}
    assert shown <= HERE, f"run or mark the commands of {sorted(shown - HERE)}"


@pytest.mark.parametrize(
    "block",
    [
        pytest.param(block, id=f"{block.page}:{block.line}")
        for block in RUN
        if block.language == "python"
    ],
)
def test_python(block: Block, trained: Path) -> None:
    shutil.copy(SLIDE, trained / "slide.svs")
    done = subprocess.run(
        [sys.executable, "-c", block.body],
        cwd=trained, env=ENVIRONMENT, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, f"{block.page}, line {block.line}\n{done.stderr[-1500:]}"
