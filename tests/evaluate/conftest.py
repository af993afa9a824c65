from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from evaluate_data import DIM, DOOR_PX, DOOR_RECORD, export_model, make_real

from pipeline.dataset import Dataset


@pytest.fixture
def evaluate_real(tmp_path: Path) -> Callable[..., Dataset]:
    """Make a real dataset under `tmp_path / name`."""

    def make(*args: Any, name: str = "real", **kwargs: Any) -> Dataset:
        return make_real(tmp_path / name, *args, **kwargs)

    return make


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported model of 32 px tiles."""
    return export_model(tmp_path_factory.mktemp("export"), DOOR_PX, DIM, DOOR_RECORD)


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return make_real(tmp_path_factory.mktemp("real") / "real", record=DOOR_RECORD)


@pytest.fixture
def command(model: Path, real: Dataset, tmp_path: Path) -> Callable[..., list[str]]:
    """The arguments of `generate` into a dataset under tmp_path."""

    def make(out: str, *more: str) -> list[str]:
        fixed = ["--guidance", str(real.root), "--selection", "train", "--steps", "2"]
        where = ["--model", str(model), "--out", str(tmp_path / out), "--device", "cpu"]
        return ["generate", *fixed, *where, *more]

    return make
