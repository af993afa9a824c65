"""A dataset of the committed slide, made once a session by the stages themselves."""

import shutil
from pathlib import Path

import pytest
from hypothesis import settings

from pipeline.__main__ import main
from pipeline.dataset import Dataset

# A machine shared with others stalls for half a second at times; that is no failure of the code.
settings.register_profile("shared machine", deadline=None)
settings.load_profile("shared machine")

SLIDES = Path(__file__).resolve().parents[1] / "data" / "slides"


@pytest.fixture(scope="session")
def tiled(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """scan, tissue, select and tile of the committed slide. Do not write to it."""
    root = tmp_path_factory.mktemp("tiled") / "dataset"
    for stage in (
        ["scan", str(SLIDES), "--workers", "1"],
        ["tissue", "--workers", "1"],
        ["select", "--name", "train"],
        ["tile", "--workers", "1"],
    ):
        assert main([stage[0], "--dataset", str(root), *stage[1:]]) == 0
    return Dataset(root)


@pytest.fixture
def own_tiled(tiled: Dataset, tmp_path: Path) -> Dataset:
    """A copy of the tiled dataset that a test may change."""
    shutil.copytree(tiled.root, tmp_path / "dataset")
    return Dataset(tmp_path / "dataset")
