"""A small dataset of two slides with tiles, features and a selection, to be given bad tables."""

import importlib.util
import shutil
from pathlib import Path
from types import ModuleType

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.dataset import (
    CANDIDATES_SCHEMA,
    Dataset,
    Entry,
    Run,
    Slide,
    software_versions,
    write_candidates,
    write_slides,
)

ROOT = Path(__file__).resolve().parents[2]
COUNTS = {"S.0-x": 48, "S.1-x": 37}
TILE_PX = 32


def _load_train_room() -> ModuleType:
    """tests/train/conftest.py, which makes such a dataset, under a name of its own."""
    path = ROOT / "tests" / "train" / "conftest.py"
    spec = importlib.util.spec_from_file_location("train_room", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


train_room = _load_train_room()


def candidates_of(count: int) -> pa.Table:
    ranks = np.arange(count, dtype=np.int32)
    ones = np.ones(count, np.float32)
    return pa.table(
        [ranks, ranks * 32.0, np.zeros(count), ones, 0 * ones], schema=CANDIDATES_SCHEMA
    )


def make_dataset(root: Path) -> Dataset:
    """Two slides of 48 and 37 candidates, all of them tiles with features; selection `train`."""
    dataset = train_room.make_dataset(root)
    slides = [
        Slide(name, f"/slides/{name}.svs", reader="tiff", vendor="v", mpp=0.5, width=4096,
              height=4096, levels=((4096, 4096, 1.0),), bytes=1, mtime_ns=1, patient=f"P{number}")
        for number, name in enumerate(COUNTS)
    ]  # fmt: skip
    with Run(dataset, "scan", software_versions()) as run:
        write_slides(dataset, run.run_id, slides)
    with Run(dataset, "tissue", software_versions()) as run:
        for name, count in COUNTS.items():
            record = write_candidates(dataset, run.run_id, name, candidates_of(count))
            counts = {"candidate tiles": count}
            run.append([Entry(name, "done", "f", files=(record,), counts=counts)])
    return dataset


def copy_dataset(dataset: Dataset, root: Path) -> Dataset:
    shutil.copytree(dataset.root, root)
    return Dataset(root)


def forge_selection(dataset: Dataset, name: str, slides: list[str], ranks: object) -> Path:
    """A selection that another tool wrote."""
    path = dataset.selection_file(name)
    path.parent.mkdir(exist_ok=True)
    pq.write_table(pa.table({"slide_id": slides, "rank": ranks}), path)
    return path
