"""A run whose small files a power loss has emptied goes on, by what its checkpoint says."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from conftest import small_config, weights_of

from common.errors import UserError
from common.files import write_json
from pipeline.dataset import Dataset
from train.__main__ import main
from train.checkpoint import RunState
from train.config import Config
from train.loop import train
from train.setup import is_finished, read_config


@pytest.fixture(scope="module")
def run(train_dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A finished run of 2 steps."""
    config = small_config(
        train_dataset, tmp_path_factory.mktemp("runs") / "run", "run.steps=2", "checkpoint.every=2"
    )
    torch.set_num_threads(1)
    assert train(config) == 0
    return config


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "zeros": lambda data: bytes(len(data)),
    "cut": lambda data: data[: len(data) // 2],
}


@pytest.mark.full  # a run of 2 steps, and one more opening of it each
@pytest.mark.parametrize("kind", DAMAGES)
@pytest.mark.parametrize("name", ["config.yaml", "records.json", "summary.json"])
def test_a_damaged_file_is_written_again(
    run: Config, name: str, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = Path(run.run.dir)
    file, before = run_dir / name, weights_of(run_dir, 2)
    sound = file.read_bytes()
    file.write_bytes(DAMAGES[kind](sound))
    export = ["export", str(run_dir), str(tmp_path / "model")]
    if name != "summary.json":  # which an export does not read
        with pytest.raises(UserError, match=r"run `python -m train` with the configuration"):
            main(export)
    assert train(run) == 0
    if name != "summary.json":  # which has how long the run took
        assert file.read_bytes() == sound
    assert all(value.equal(before[key]) for key, value in weights_of(run_dir, 2).items())
    assert main(export) == 0
    assert f"{name} " in capsys.readouterr().out


@pytest.mark.parametrize("kind", DAMAGES)
def test_the_checkpoint_says_whose_a_damaged_run_is(
    train_dataset: Dataset, tmp_path: Path, kind: str
) -> None:
    mine = small_config(train_dataset, tmp_path)
    other = small_config(train_dataset, tmp_path, "optim.lr_sit=1e-4")
    file, sound = tmp_path / "config.yaml", mine.to_yaml().encode()
    checkpoint = tmp_path / "checkpoints" / "step-00000006"
    write_json(checkpoint / "state.json", asdict(RunState(6, "", mine.hash)))
    write_json(tmp_path / "summary.json", {})
    file.write_bytes(sound)
    assert is_finished(mine)
    with pytest.raises(UserError, match="is the run of another configuration"):
        is_finished(other)

    file.write_bytes(DAMAGES[kind](sound))
    assert not is_finished(mine)  # it is opened, which writes the file again
    with pytest.raises(UserError, match="another configuration"):
        is_finished(other)
    with pytest.raises(UserError, match=r"run `python -m train` with the configuration"):
        read_config(tmp_path)
    # Without a checkpoint there is nothing that another configuration could spoil.
    checkpoint.rename(tmp_path / "elsewhere")
    assert not is_finished(other)
