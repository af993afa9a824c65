"""A small real dataset for the train room: two slides of tiles, CLS and patch tokens."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from safetensors.torch import load_file
from torch import Tensor

from pipeline.dataset import (
    Dataset,
    Entry,
    HashingFile,
    Run,
    claim_identity,
    commit_bytes,
    commit_file,
    commit_json,
    encode_png,
    make_selection,
    software_versions,
    write_selection,
    write_tar,
)
from pipeline.dataset.features import (
    cls_table,
    feature_scope,
    open_writer,
    token_table,
    write_blocks,
)
from pipeline.dataset.features.quantise import quantise_tokens
from train.config import Config, load_config

HOME = Path(__file__).parents[2]

TILE_PX = 32
TOKENS = (4, 12)
DIM = 16


def train_tile(slide: int, rank: int) -> np.ndarray:
    """A tile whose pixels say where it comes from, with some structure to learn."""
    rng = np.random.default_rng([slide, rank])
    y, x = np.mgrid[:TILE_PX, :TILE_PX] / TILE_PX
    waves = np.stack([x, y, np.sin(6 * (x + y) + rank)], axis=2) * 120 + 60
    tile = np.clip(waves + rng.normal(0, 8, waves.shape), 0, 255).astype(np.uint8)
    tile[0, 0] = (slide, rank % 256, rank // 256)
    return tile


def train_features(slide: int, rank: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng([7, slide, rank])
    cls = rng.standard_normal(DIM).astype(np.float32)
    return cls, rng.standard_normal(TOKENS).astype(np.float16)


def _table_writer(table: pa.Table) -> Callable[[HashingFile], None]:
    def write(file: HashingFile) -> None:
        with open_writer(file, table.schema) as writer:
            write_blocks(writer, table)

    return write


def add_shard(dataset: Dataset, slide: int, start: int, stop: int) -> None:
    """Tiles and features of ranks [start, stop), as the pipeline's stages commit them."""
    slide_id = f"S.{slide}-x"
    ranks = range(start, stop)
    with Run(dataset, "tile", software_versions()) as run:
        index: list[bytes] = []

        def write(file: HashingFile) -> None:
            tiles = [encode_png(train_tile(slide, rank)) for rank in ranks]
            index.append(write_tar(file, slide_id, start, tiles))

        path = dataset.tiles_dir(TILE_PX) / f"{slide_id}.{start}-{stop}.tar"
        tar = commit_file(dataset, run.run_id, path, write)
        idx = commit_bytes(dataset, run.run_id, path.with_suffix(".idx"), index[0])
        files = (tar, idx)
        run.append(
            [Entry(slide_id, "done", "f", scope=str(TILE_PX), start=start, stop=stop, files=files)]
        )
    features = [train_features(slide, rank) for rank in ranks]
    tables = {
        "cls": cls_table(start, np.stack([cls for cls, _ in features])),
        "tokens-float16": token_table(np.stack([tokens for _, tokens in features])),
        "tokens-int8": token_table(*quantise_tokens(np.stack([tokens for _, tokens in features]))),
    }
    record = {"encoder": "h0-mini", "weights": "random:0", "random_weights": True, "dim": DIM,
              "tokens_shape": list(TOKENS)}  # fmt: skip
    with Run(dataset, "cache", software_versions()) as run:
        for kind, table in tables.items():
            folder = dataset.features_dir(TILE_PX, "h0-mini") / kind
            name = f"{slide_id}.{start}-{stop}.parquet"
            done = commit_file(dataset, run.run_id, folder / name, _table_writer(table))
            commit_json(dataset, run.run_id, folder / "encoder.json", record)
            scope = feature_scope(TILE_PX, "h0-mini", "", kind)
            entry = Entry(slide_id, "done", "f", scope=scope, start=start, stop=stop, files=(done,))
            run.append([entry])


def make_dataset(root: Path) -> Dataset:
    """Slides of 48 and 37 tiles; selection `train` leaves out the first ranks of each."""
    dataset = Dataset(root)
    versions = software_versions()
    claim_identity(dataset, {"tile_px": TILE_PX, "mpp": 0.5}, stage="scan", versions=versions)
    add_shard(dataset, 0, 0, 48)
    add_shard(dataset, 1, 0, 37)
    chosen = {
        "S.0-x": np.arange(1, 48, dtype=np.int32),
        "S.1-x": np.delete(np.arange(2, 37, dtype=np.int32), [5, 20]),
    }
    write_selection(dataset, "test", make_selection("train", chosen, {}))
    return dataset


@pytest.fixture(scope="session")
def train_dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Shared, for tests that only read."""
    return make_dataset(tmp_path_factory.mktemp("dataset"))


SMALL = [
    "run.device=cpu",
    "run.steps=6",
    f"data.tile_px={TILE_PX}",
    "data.batch_size=5",
    "data.cursors=2",
    "data.threads=2",
    "model.sit={latent_size: 4, hidden_size: 32, depth: 2, num_heads: 2, encoder_depth: 1, "
    "projector_dim: 24}",
    "model.vae={base_channels: 4, channel_multipliers: [1, 1, 2, 2], num_res_blocks: 1, "
    "norm_groups: 2}",
    "model.discriminator.base_channels=4",
    "loss.perceptual_weights=none",
    "optim.lr_vae=2e-3",
    "optim.lr_sit=2e-3",
    "ema.sit=0.9",
    "ema.vae=0.8",
    "log.every=2",
    "log.tensorboard=false",
    "log.samples_every=0",
    "log.samples=2",
    "log.sample_steps=2",
    "log.fixed_tiles=4",
    "checkpoint.every=3",
]
"""A run of the real networks at a size that trains in well under a second a step."""


def small_config(dataset: Dataset, run_dir: Path, *overrides: str) -> Config:
    """The small run on that dataset."""
    places = [f"data.dataset={dataset.root}", f"run.dir={run_dir}"]
    return load_config(None, [*SMALL, *places, *overrides])


def command(dataset: Dataset, run_dir: Path, *overrides: str) -> list[str]:
    """The same small run as a command line of another process."""
    config = run_dir.parent / f"{run_dir.name}.yaml"
    config.parent.mkdir(parents=True, exist_ok=True)
    config.write_text(small_config(dataset, run_dir).to_yaml())
    return [sys.executable, "-m", "train", "--config", str(config), *overrides]


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HOME), **more}


def weights_of(run_dir: Path, step: int) -> dict[str, Tensor]:
    """Every tensor of a checkpoint, optimizers among them, by file and name."""
    folder = run_dir / "checkpoints" / f"step-{step:08d}"
    return {
        f"{path.stem}/{name}": value
        for path in sorted(folder.glob("*.safetensors"))
        for name, value in load_file(path).items()
    }
