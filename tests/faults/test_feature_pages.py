"""Feature files that are cut short or replaced while a command reads them."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from common.errors import UserError
from pipeline.dataset import Dataset
from pipeline.dataset.features import FeatureStore
from tests.train.conftest import TILE_PX, make_dataset, small_config, train_features
from train.loop import train
from train.source import BlockSource


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return make_dataset(tmp_path_factory.mktemp("dataset"))


@pytest.fixture
def dataset(made: Dataset, tmp_path: Path) -> Dataset:
    return Dataset(Path(shutil.copytree(made.root, tmp_path / "d")))


def file_of(dataset: Dataset, kind: str) -> Path:
    (found,) = dataset.root.glob(f"features/**/{kind}/S.0-x.0-48.parquet")
    return found


@pytest.fixture(params=["cls", "tokens-float16", "tokens-int8"])
def store(dataset: Dataset, request: pytest.FixtureRequest) -> FeatureStore:
    store = FeatureStore(dataset, tile_px=TILE_PX, encoder="h0-mini", kind=request.param)
    assert len(store.read_block("S.0-x", 0)) == 16  # it is open from now on
    return store


@pytest.mark.parametrize("bytes_left", [0, 100])
def test_a_file_that_is_cut_short_while_it_is_open_is_one_line(
    store: FeatureStore, bytes_left: int
) -> None:
    # Where pages were mapped, this ended the whole process by SIGBUS.
    os.truncate(file_of(store.dataset, store.kind), bytes_left)
    with pytest.raises(UserError, match=r"x\.0-48\.parquet: block 2 is damaged \(the file is cut"):
        store.read_block("S.0-x", 2)


def test_a_file_that_is_replaced_while_it_is_open_is_read_as_it_was(store: FeatureStore) -> None:
    path, before = file_of(store.dataset, store.kind), store.read_block("S.0-x", 2)
    other = path.with_name("other")
    other.write_bytes(b"no Parquet at all")
    other.replace(path)
    assert np.array_equal(store.read_block("S.0-x", 2), before)


def test_bytes_that_are_overwritten_while_it_is_open_are_found(store: FeatureStore) -> None:
    path = file_of(store.dataset, store.kind)
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))
    with pytest.raises(UserError, match="block 2 is damaged"):
        store.read_block("S.0-x", 2)


def test_a_file_of_another_size_than_the_journal_says_is_not_opened(dataset: Dataset) -> None:
    path = file_of(dataset, "cls")
    with path.open("ab") as file:
        file.write(b"more")
    store = FeatureStore(dataset, tile_px=TILE_PX, encoder="h0-mini")
    with pytest.raises(UserError, match=r"48\.parquet is not .*size is another.*`python -m"):
        store.read_block("S.0-x", 0)


def test_values_stay_what_was_read(dataset: Dataset) -> None:
    """A block that training keeps open is its own memory, whatever becomes of the file."""
    source = BlockSource(dataset, tile_px=TILE_PX, encoder="h0-mini")
    block = source.open_block("S.0-x", 1)
    for kind in ("cls", "tokens-float16"):
        os.truncate(file_of(dataset, kind), 0)
    sample = source.read_sample(block, 20, 4)
    cls, tokens = train_features(0, 20)
    assert np.array_equal(sample.cls, cls)
    assert np.array_equal(sample.tokens, tokens)


def test_training_ends_with_the_tiles_name(dataset: Dataset, tmp_path: Path) -> None:
    os.truncate(file_of(dataset, "tokens-float16"), 3000)
    torch.set_num_threads(1)
    with pytest.raises(UserError, match=r"S\.0-x.*48\.parquet"):
        train(small_config(dataset, tmp_path / "run", "run.steps=2"))
