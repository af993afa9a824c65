"""A run directory or model one received is data: it leads nowhere, and its values are checked.

What is outside it is as it was after each command, and each wrong value is one line.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from common.errors import UserError
from evaluate.report.run_curves import read_run
from model import CytoSyn
from pipeline.dataset import Dataset
from tests.train.conftest import make_dataset, small_config
from train.__main__ import main
from train.checkpoint import RunState, list_checkpoints, remove_unfinished, write_checkpoint
from train.config import Config
from train.loop import train
from train.metrics_log import open_wandb, read_metrics
from train.setup import _WRITTEN_IN_PLACE, is_finished

REPLACED = {"config.yaml", "records.json", "summary.json"}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return make_dataset(tmp_path_factory.mktemp("dataset"))


@pytest.fixture(scope="module")
def made(dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A finished run of 2 steps and its model. Do not write to it."""
    config = small_config(
        dataset, tmp_path_factory.mktemp("runs") / "run", "run.steps=2", "checkpoint.every=1",
        "log.samples_every=2", "log.tensorboard=true",
    )  # fmt: skip
    torch.set_num_threads(1)
    assert train(config) == 0
    assert main(["export", config.run.dir, f"{config.run.dir}/model"]) == 0
    return config


@pytest.fixture
def run(made: Config, tmp_path: Path) -> Config:
    """A copy that a test may change, to be trained one step longer."""
    shutil.copytree(made.run.dir, tmp_path / "run")
    return replace(made, run=replace(made.run, dir=str(tmp_path / "run"), steps=3))


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize("name", [*_WRITTEN_IN_PLACE, *sorted(REPLACED)])
@pytest.mark.full
def test_training_writes_and_removes_nothing_behind_a_link(
    run: Config, name: str, tmp_path: Path
) -> None:
    path, outside = Path(run.run.dir) / name, tmp_path / "outside"
    outside.mkdir()
    target = outside / name
    if path.exists():
        path.rename(target)
        if target.is_dir():  # what a killed run left, which the next one removes
            (target / ".writing-step-00000009").mkdir()
            (target / ".writing-step-00000009/x").write_text("mine")
    else:
        target.write_text("mine\n")
    path.symlink_to(target)
    before = contents(outside)
    if name in REPLACED:
        assert train(run) == 0
        assert not path.is_symlink()
    else:
        with pytest.raises(UserError, match=f"{name} is a link, and training writes"):
            train(run)
    assert contents(outside) == before


@pytest.mark.full
def test_all_that_a_run_writes_is_refused_or_replaced_as_a_link(made: Config) -> None:
    there = {path.name for path in Path(made.run.dir).iterdir()} - {"model"}
    assert {"checkpoints", "metrics.jsonl", "samples", "tensorboard", ".lock"} <= there
    assert there <= {*_WRITTEN_IN_PLACE, *REPLACED}


def test_old_checkpoints_behind_a_link_stay(tmp_path: Path) -> None:
    tensors = {"sit": {"w": torch.zeros(2)}}
    other, run_dir = tmp_path / "other", tmp_path / "run"
    for step in (1, 2):
        write_checkpoint(other, RunState(step, "", ""), tensors, keep=3)
    (other / "checkpoints/.writing-x").mkdir()
    run_dir.mkdir()
    (run_dir / "checkpoints").symlink_to(other / "checkpoints")
    remove_unfinished(run_dir)
    with pytest.raises(UserError, match="checkpoints is a link"):
        write_checkpoint(run_dir, RunState(3, "", ""), tensors, keep=1)
    assert [path.name[-1] for path in list_checkpoints(other)] == ["1", "2"]
    assert (other / "checkpoints/.writing-x").exists()


@pytest.mark.full
def test_a_model_is_not_exported_through_a_link_of_the_run(run: Config, tmp_path: Path) -> None:
    run_dir, outside = Path(run.run.dir), tmp_path / "outside"
    (run_dir / "model").rename(outside)
    before = contents(outside)
    (run_dir / "model").symlink_to(outside)
    with pytest.raises(UserError, match="is a link in the run directory"):
        main(["export", str(run_dir), str(run_dir / "model")])
    assert contents(outside) == before
    (tmp_path / "mine").symlink_to(outside)  # a user's own
    assert main(["export", str(run_dir), str(tmp_path / "mine")]) == 0


@pytest.mark.full
def test_a_run_does_not_say_where_its_log_is_sent(made: Config, tmp_path: Path) -> None:
    (tmp_path / "wandb").mkdir()
    (tmp_path / "wandb/settings").write_text("[default]\nbase_url = https://example.org\n")
    with pytest.raises(UserError, match="wandb/settings would change where"):
        open_wandb(tmp_path, made)


Change = Callable[[Any], object]


def change_json(path: Path, change: Change) -> None:
    values = json.loads(path.read_text())
    changed = change(values)
    path.write_text(json.dumps(values if changed is None else changed))


def setting(*keys: str, to: object) -> Change:
    def change(values: Any) -> None:
        for key in keys[:-1]:
            values = values[key]
        values[keys[-1]] = to

    return change


STATES = [
    *(setting("step", to=value) for value in ("2", 2.0, -2, True, None, [], 10**30, 1)),
    *(setting("seconds", to=value) for value in ("x", [], None, -1, float("nan"), 1e400)),
    setting("untrained", to=[]),
    setting("untrained", to={"psnr": "high"}),
    setting("latents", to={}),
    setting("skipped_tiles", to="many"),
    lambda values: [],
    lambda values: "step",
]


@pytest.mark.full
def test_a_state_with_other_values_is_one_line(run: Config, tmp_path: Path) -> None:
    state = Path(run.run.dir) / "checkpoints/step-00000002/state.json"
    # Its author may leave the sum out, as earlier releases did.
    values = json.loads(state.read_text())
    sound = json.dumps({key: value for key, value in values.items() if key != "state_sha256"})
    for change in STATES:
        state.write_text(sound)
        change_json(state, change)
        assert not is_finished(run)
        with pytest.raises(UserError, match=r"state\.json cannot be read"):
            main(["export", run.run.dir, str(tmp_path / "model")])
    assert not (tmp_path / "model").exists()


@pytest.mark.full
def test_a_checkpoint_under_another_steps_name_removes_no_other(
    run: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    """Named as the newest, it would have had every real one removed as an older one."""
    folder = Path(run.run.dir) / "checkpoints"
    shutil.copytree(folder / "step-00000002", folder / "step-99999999")
    assert train(run) == 0
    said = capsys.readouterr().out
    assert "step-99999999/state.json cannot be read (configuration key 'step'" in said
    assert "going on from step 2" in said
    assert (folder / "damaged-step-99999999").is_dir()
    assert (folder / "step-00000002").is_dir()
    (folder / "damaged-step-99999999").rename(folder / "step-٠٠٠٠٠٠٠٩")
    assert "step-٠٠٠٠٠٠٠٩" not in [path.name for path in list_checkpoints(folder.parent)]


RECORDS = [
    *(lambda values, to=to: to for to in ([], "x", 7, {})),  # type: ignore[misc]
    *(setting("encoder", to=value) for value in ("h0-mini", [], 7)),
    *(setting("dataset", to=value) for value in ("d", [1], 0.5)),
    *(setting("encoder", "encoder", to=value) for value in ({}, [], 7, True)),
    setting("encoder", "weights", to=["hub"]),
    setting("encoder", "random_weights", to="yes"),
    *(setting("dataset", "mpp", to=value) for value in ("0.5", [], -1, float("nan"), True)),
]


@pytest.mark.full
def test_records_with_other_values_are_one_line(run: Config, tmp_path: Path) -> None:
    records = Path(run.run.dir) / "records.json"
    sound = records.read_text()
    for change in RECORDS:
        change_json(records, change)
        with pytest.raises(UserError, match=r"records\.json") as caught:
            main(["export", run.run.dir, str(tmp_path / "model")])
        assert "\n" not in str(caught.value)
        records.write_text(sound)
    assert not (tmp_path / "model").exists()


CONFIGS: list[tuple[tuple[str, ...], object]] = [
    (("model", "sit", "depth"), 10**12),
    (("model", "sit", "hidden_size"), 10**9),
    (("model", "sit", "mlp_ratio"), float("inf")),
    (("model", "vae", "num_res_blocks"), 10**9),
    (("model", "vae", "channel_multipliers"), [1] * 40),
    (("model", "sit", "hidden_size"), 1 << 20),  # in range: 1 TB, if it were made
    (("model", "path"), {"a": 1}),
    (("model", "path"), []),
    (("data", "tile_px"), [224]),
    (("export", "sit"), {}),
    (("export",), 7),
    (("run", "mode"), []),
    (("log", "validation"), {"a": 1}),
]


@pytest.mark.full
def test_a_configuration_with_other_values_is_one_line(run: Config, tmp_path: Path) -> None:
    file = Path(run.run.dir) / "config.yaml"
    sound = file.read_text()
    for keys, value in CONFIGS:
        values = yaml.safe_load(sound)
        setting(*keys, to=value)(values)
        file.write_text(yaml.safe_dump(values))
        with pytest.raises(UserError) as caught:
            main(["export", run.run.dir, str(tmp_path / "model")])
        assert "\n" not in str(caught.value)
        with pytest.raises(UserError):
            train(replace(run, run=replace(run.run, seed=7)))
    assert not (tmp_path / "model").exists()


LOG = b"""\
[]
7
{"step": "3"}
{"step": 1e400, "vae/l1": 1}
{"step": true}
{"step": 1, "vae/l1": "low"}
{"step": %(huge)s, "vae/l1": %(huge)s}
{"step": -1}
{"step": 1, "vae/l1": {"a": 1}}
{"step": 9, "\\ud800": [1]}
{"vae/l1": 1}
\xff\xfe
""" % {b"huge": b"9" * 400}


@pytest.mark.full
def test_lines_that_no_run_writes_are_left_out_of_its_log(run: Config) -> None:
    log = Path(run.run.dir) / "metrics.jsonl"
    sound, rows = log.read_bytes(), read_metrics(log.parent)
    log.write_bytes(LOG + sound)
    assert read_metrics(log.parent) == rows
    curves = read_run(log.parent).series
    assert len(curves["images_per_s"][0]) == len(curves["skipped_steps"][0]) == 1
    assert train(run) == 0
    assert [row["step"] for row in read_metrics(log.parent)][-1] == 3


MODELS = [
    *(lambda values, to=to: to for to in ([], "x", 7)),  # type: ignore[misc]
    setting("sit", "depth", to=10**12),
    setting("sit", "hidden_size", to=1 << 20),
    setting("vae", "channel_multipliers", to=[1] * 40),
    setting("vae", "num_res_blocks", to=10**9),
    setting("path", to=[]),
    setting("path", to={}),
    setting("sha256", to=[1]),
    setting("sha256", to="x"),
    setting("sha256", to={"sit.safetensors": 7}),
    *(setting("records", to=value) for value in ([], "x", 7, None, {"sit": "other"})),
    *(setting("records", "mpp", to=value) for value in ("0.5", [], -1, float("inf"), True)),
    *(setting("records", "tile_px", to=value) for value in ("32", 0, 1.5)),
    setting("records", "encoder_weights", to={"file": "/etc/passwd"}),
]


@pytest.mark.full
def test_a_model_with_other_values_is_one_line(made: Config, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(f"{made.run.dir}/model", model)
    sound = (model / "config.json").read_text()
    for change in MODELS:
        change_json(model / "config.json", change)
        with pytest.raises(UserError, match=r"^(model|weights) ") as caught:
            CytoSyn.from_pretrained(model)
        assert "\n" not in str(caught.value)
        (model / "config.json").write_text(sound)
    assert CytoSyn.from_pretrained(model).records.mpp == 0.5
