"""A run does not go on with other tiles or features than it began with."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import TILE_PX, make_dataset, small_config

from common.errors import UserError
from common.torch_processes import ALONE
from pipeline.dataset import Ledger, Run
from train.checkpoint import RunState, write_checkpoint
from train.setup import checkpoint_files, open_data, open_run


def test_other_features_or_tiles_end_a_resumed_run(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "dataset")
    for file in dataset.root.glob("features/*/*/*/encoder.json"):
        file.write_text(json.dumps(json.loads(file.read_text()) | {"weights_sha256": "a" * 64}))
    config = small_config(dataset, tmp_path / "run")

    def resume() -> None:
        open_run(config, open_data(config), ALONE, "auto")

    resume()
    state = RunState(3, open_data(config).stream.table.content_hash, config.hash)
    files = {Path(name).stem: {"x": torch.zeros(1)} for name in checkpoint_files(config)}
    write_checkpoint(tmp_path / "run", state, files, keep=1)
    resume()
    records = tmp_path / "run" / "records.json"
    before = records.read_bytes()

    # Features of other weights, under the encoder's name.
    for file in dataset.root.glob("features/*/*/*/encoder.json"):
        file.write_text(json.dumps(json.loads(file.read_text()) | {"weights_sha256": "b" * 64}))
    with pytest.raises(UserError, match=r"records.json: .* with weights_sha256 'aaa.*another run"):
        resume()
    for file in dataset.root.glob("features/*/*/*/encoder.json"):
        file.write_text(json.dumps(json.loads(file.read_text()) | {"weights_sha256": "a" * 64}))
    resume()

    # The same ranks of other candidates: the selection's rows are as they were.
    tiles = Ledger.read(dataset, "tile")[str(TILE_PX)].entries("S.1-x")
    with Run(dataset, "tile", {}) as run:
        run.append([replace(entry, fingerprint="g") for entry in tiles])
    with pytest.raises(UserError, match="tiles were made again since the run began"):
        resume()
    assert records.read_bytes() == before
    values = json.loads(before)
    records.write_text(json.dumps({k: v for k, v in values.items() if k != "tiles_sha256"}))
    resume()
