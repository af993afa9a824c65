from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from evaluate_data import make_real

from pipeline.dataset import Dataset


@pytest.fixture
def evaluate_real(tmp_path: Path) -> Callable[..., Dataset]:
    """Make a real dataset under `tmp_path / name`."""

    def make(*args: Any, name: str = "real", **kwargs: Any) -> Dataset:
        return make_real(tmp_path / name, *args, **kwargs)

    return make
