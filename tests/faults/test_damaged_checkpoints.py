"""A damaged checkpoint is set aside, and the run goes on from the one before."""

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from common.errors import UserError
from common.files import write_json
from common.torch_processes import ALONE
from pipeline.dataset import Dataset
from tests.train.conftest import make_dataset, small_config, weights_of
from train.__main__ import main
from train.checkpoint import list_checkpoints, read_state
from train.config import Config
from train.loop import train
from train.metrics_log import read_metrics
from train.setup import checkpoint_files, is_finished, open_data, open_run


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return make_dataset(tmp_path_factory.mktemp("dataset"))


def configure(dataset: Dataset, run_dir: Path, *more: str) -> Config:
    return small_config(dataset, run_dir, "run.steps=4", "checkpoint.every=2", "log.every=1", *more)


@pytest.fixture(scope="module")
def finished(dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with checkpoints of steps 2 and 4, to be copied."""
    run_dir = tmp_path_factory.mktemp("runs") / "run"
    torch.set_num_threads(1)
    assert train(configure(dataset, run_dir)) == 0
    return run_dir


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) * 2 // 3] ^= 4
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def drop_sums(checkpoint: Path) -> None:
    """As a release without sums wrote it."""
    write_json(checkpoint / "state.json", asdict(read_state(checkpoint)))


def put_nan(path: Path) -> None:
    tensors = load_file(path)
    next(value for key, value in tensors.items() if value.ndim).view(-1)[0] = float("nan")
    save_file(tensors, path)
    drop_sums(path.parent)


DAMAGES: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "a flipped bit": ("sit.safetensors", flip, "its sha256 is another"),
    "a flipped bit in a moment": ("optimizer_vae.safetensors", flip, "its sha256 is another"),
    "cut": ("vae.safetensors", cut, "its sha256 is another"),
    "empty": ("sit_ema.safetensors", empty, "is another"),
    "missing": ("optimizer_sit.safetensors", Path.unlink, "No such file"),
    "a flipped bit in the state": ("state.json", flip, "state.json cannot be read"),
    "an empty state": ("state.json", empty, "cannot be read"),
    "no state": ("state.json", Path.unlink, "No such file"),
    "a moment that is no number": ("optimizer_sit.safetensors", put_nan, "' is not finite"),
}
# Of an older release's checkpoint, which has no sums, only this is seen.
OLD_DAMAGES = ("cut", "empty", "missing")
CASES = [*((kind, False) for kind in DAMAGES), *((kind, True) for kind in OLD_DAMAGES)]


@pytest.mark.parametrize(("kind", "is_old"), CASES)
def test_a_damaged_checkpoint_is_set_aside(
    dataset: Dataset, run: Path, kind: str, is_old: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    name, damage, says = DAMAGES[kind]
    newest = run / "checkpoints" / "step-00000004"
    if is_old:
        drop_sums(newest)
        says = "cannot be read"
    damage(newest / name)
    damaged = {path.name: path.read_bytes() for path in newest.iterdir()}
    config = configure(dataset, run)
    if not is_old:  # what is complete is not looked at as closely without sums
        assert kind == "a moment that is no number" or not is_finished(config)
    start = open_run(config, open_data(config), ALONE, "auto")
    assert (start.state.step, start.checkpoint) == (2, run / "checkpoints" / "step-00000002")
    aside = run / "checkpoints" / "damaged-step-00000004"
    assert {path.name: path.read_bytes() for path in aside.iterdir()} == damaged
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 1, said
    assert says in said[0]
    assert said[0].endswith(f"set aside as {aside}")


def test_the_files_that_a_checkpoint_must_have_are_those_it_has(
    dataset: Dataset, run: Path
) -> None:
    written = {path.name for path in (run / "checkpoints" / "step-00000004").iterdir()}
    assert {*checkpoint_files(configure(dataset, run)), "state.json"} == written


def test_the_run_goes_on_to_the_same_weights_and_log(
    dataset: Dataset, run: Path, finished: Path, tmp_path: Path
) -> None:
    flip(run / "checkpoints" / "step-00000004" / "sit_ema.safetensors")
    with pytest.raises(UserError, match=r"sit_ema\.safetensors is damaged .* training command"):
        main(["export", str(run), str(tmp_path / "model"), "--sit", "ema"])
    lost = {"step": 3, "skipped": "a tile"}
    (run / "skipped_tiles.jsonl").write_text(
        f"{json.dumps(lost | {'step': 2})}\n{json.dumps(lost)}"
    )
    with (run / "metrics.jsonl").open("ab") as file:  # what a damaged disk left there
        file.write(b'7\n{"st\xff": 1}\n[1]\n')
    assert train(configure(dataset, run)) == 0
    mine, theirs = weights_of(run, 4), weights_of(finished, 4)
    assert mine.keys() == theirs.keys()
    assert all(value.equal(theirs[key]) for key, value in mine.items())
    lines = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert lines == [line["step"] for line in read_metrics(finished)] == [1, 2, 3, 4]
    skipped = (run / "skipped_tiles.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in skipped] == [2]
    main(["export", str(run), str(tmp_path / "model"), "--sit", "ema"])


def test_a_run_without_a_sound_checkpoint_does_not_begin_anew(
    dataset: Dataset, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in list_checkpoints(run):
        flip(path / "vae.safetensors")
    before = (run / "metrics.jsonl").read_bytes()
    for _ in range(2):  # the second finds nothing but what the first set aside
        with pytest.raises(UserError, match=r"no sound checkpoint, and 2 damaged .* run\.dir"):
            train(configure(dataset, run))
    assert capsys.readouterr().out.count("set aside as") == 2
    assert (run / "metrics.jsonl").read_bytes() == before
    aside = run / "checkpoints" / "damaged-step-00000002"
    with pytest.raises(UserError, match="has checkpoints"):
        train(configure(dataset, run), "never")
    flip(aside / "vae.safetensors")  # which restores it
    aside.rename(aside.with_name("step-00000002"))
    assert train(configure(dataset, run)) == 0


def test_a_checkpoint_of_another_model_is_one_line_and_stays(
    dataset: Dataset, run: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    wide = [f"run.dir={other}", "model.discriminator.base_channels=8"]
    assert train(configure(dataset, other, *wide)) == 0
    for name in ("step-00000002", "step-00000004"):
        shutil.rmtree(run / "checkpoints" / name)
    shutil.move(other / "checkpoints" / "step-00000002", run / "checkpoints")
    with pytest.raises(UserError, match=r"discriminator\.safetensors: do not fit Discriminator"):
        train(configure(dataset, run))
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000002"]


def test_a_configuration_that_was_edited_is_refused(dataset: Dataset, run: Path) -> None:
    path = run / "config.yaml"
    sound = path.read_text()
    path.write_text(sound.replace("lr_sit: 0.002", "lr_sit: 0.004"))
    assert path.read_text() != sound
    edited = configure(dataset, run, "optim.lr_sit=4e-3", "run.steps=5")
    with pytest.raises(UserError, match=r"config\.yaml was changed after .*step-00000004 was"):
        train(edited)
    assert is_finished(configure(dataset, run))  # the checkpoint's own configuration goes on
