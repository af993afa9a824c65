"""Whole runs: exact resume, any number of processes, stopping, refusing, reporting, exporting."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from conftest import HOME, command, environment, make_dataset, small_config, weights_of
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from common.console import EXIT_REQUEUE
from common.errors import UserError
from common.files import write_json
from model.cytosyn import CytoSyn
from pipeline.dataset import Dataset, make_selection, read_selection, write_selection
from train.__main__ import main
from train.checkpoint import list_checkpoints, read_state
from train.config import Config, load_config
from train.loop import Training, TrainingDivergedError, train
from train.metrics_log import read_metrics
from train.reporter import Reporter
from train.setup import open_data
from train.speed import step_flop


@pytest.fixture(scope="module")
def finished(
    train_dataset: Dataset, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Config, Path]:
    """A run of 6 steps in one go, with everything it writes."""
    run_dir = tmp_path_factory.mktemp("finished") / "run"
    config = small_config(train_dataset, run_dir, "log.samples_every=3", "log.tensorboard=true")
    torch.set_num_threads(1)
    assert train(config) == 0
    return config, run_dir


def assert_same_weights(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    different = [name for name in a if not a[name].equal(b[name])]
    assert different == []


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_killed_and_resumed_equals_one_go(
    finished: tuple[Config, Path], train_dataset: Dataset, tmp_path: Path
) -> None:
    """kill -9 while it trains towards a million steps, then to the end in this process."""
    run_dir = tmp_path / "run"
    arguments = command(
        train_dataset, run_dir, "run.steps=1000000", "checkpoint.every=1", "checkpoint.keep=100"
    )
    with subprocess.Popen(
        arguments, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        wait_for(run_dir / "checkpoints" / "step-00000003", process)
        process.send_signal(signal.SIGKILL)
    for late in list_checkpoints(run_dir)[3:]:  # whatever it wrote before the signal came
        late.rename(tmp_path / late.name)
    assert train(small_config(train_dataset, run_dir)) == 0
    assert_same_weights(weights_of(run_dir, 6), weights_of(finished[1], 6))
    lines = read_metrics(run_dir)
    assert [line["step"] for line in lines] == sorted({line["step"] for line in lines})


@pytest.mark.full  # a hundred steps twice
def test_37_steps_a_kill_and_the_rest_equal_100_in_one_go(
    train_dataset: Dataset, tmp_path: Path
) -> None:
    """Killed at some later step; what it wrote after step 37 is taken away.

    All three are processes of their own: a process that ran other tests before may hold other
    threads and libraries, and a hundred steps make a difference of its last bits visible.
    """
    whole, run_dir = tmp_path / "whole", tmp_path / "run"
    options = (
        "run.steps=100", "checkpoint.every=37", "checkpoint.keep=9", "log.samples_every=40",
        "log.every=1",
    )  # fmt: skip
    subprocess.run(command(train_dataset, whole, *options), env=environment(), check=True)
    with subprocess.Popen(
        command(train_dataset, run_dir, *options),
        env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    ) as process:  # fmt: skip
        wait_for(run_dir / "checkpoints" / "step-00000037", process)
        process.send_signal(signal.SIGKILL)
    for late in list_checkpoints(run_dir)[1:]:
        late.rename(tmp_path / late.name)
    subprocess.run(command(train_dataset, run_dir, *options), env=environment(), check=True)
    assert first_difference(run_dir, whole) is None
    assert_same_weights(weights_of(run_dir, 100), weights_of(whole, 100))
    for step in (40, 80):
        name = f"samples/step-{step:08d}.png"
        assert (run_dir / name).read_bytes() == (whole / name).read_bytes()


def test_a_preview_that_fails_is_a_warning(
    train_dataset: Dataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """And it is made up for when the run goes on from that step's checkpoint."""
    run_dir = tmp_path / "run"
    options = ("log.samples_every=3", "log.validation=[train]", "log.validation_every=3")

    def fail(*arguments: object, **named: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. Long advice")

    with monkeypatch.context() as broken:
        broken.setattr("train.reporter.draw_samples", fail)
        broken.setattr("train.reporter.measure_validation", fail)
        assert train(small_config(train_dataset, run_dir, *options)) == 0
    warnings = [line for line in capsys.readouterr().out.splitlines() if "warning" in line]
    # Each kind once, when it begins: a failure that goes on would fill the log.
    assert len(warnings) == 2
    assert warnings[-1] == (
        "warning: the grid of samples of step 3 failed, training goes on: CUDA out of memory"
    )
    assert "reconstruction/psnr" not in read_metrics(run_dir)[-1]

    assert train(small_config(train_dataset, run_dir, *options, "run.steps=7")) == 0
    lines = {line["step"]: line for line in read_metrics(run_dir)}
    assert {"reconstruction/psnr", "train/denoise", "vae/l1"} <= lines[6].keys()
    assert (run_dir / "samples" / "step-00000006.png").exists()
    assert [path.name for path in list_checkpoints(run_dir)][:1] == ["step-00000003"]


def test_too_little_memory_is_one_line_that_says_what_to_set(
    train_dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object, **named: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. Long advice")

    monkeypatch.setattr("train.step.TrainingStep.__call__", fail)
    with pytest.raises(UserError) as caught:
        train(small_config(train_dataset, tmp_path / "run"))
    for named in ("CUDA out of memory: ", "run.recompute=true", "optim.accumulate above 1",
                  "data.batch_size below 5"):  # fmt: skip
        assert named in str(caught.value)


@pytest.mark.full
def test_a_kill_at_any_point_of_a_step_loses_and_repeats_no_line(
    train_dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A death before the checkpoint of step 3, right after it, and in its preview."""
    options = ("log.samples_every=3", "log.every=1", "log.validation=[train]")
    options += ("log.validation_every=3",)
    whole = tmp_path / "whole"
    assert train(small_config(train_dataset, whole, *options)) == 0

    for place in ("_save_checkpoint", "make_previews", "_save_samples", "_validate_selections"):
        run_dir = tmp_path / place
        config = small_config(train_dataset, run_dir, *options)
        with monkeypatch.context() as broken:
            die_at_step_3(broken, place)
            with pytest.raises(KeyboardInterrupt):
                train(config)
        expected = [] if place == "_save_checkpoint" else ["step-00000003"]
        assert [path.name for path in list_checkpoints(run_dir)] == expected
        assert train(config) == 0
        assert names_of_lines(run_dir) == names_of_lines(whole)
        assert first_difference(run_dir, whole) is None
        assert_same_weights(weights_of(run_dir, 6), weights_of(whole, 6))
        for step in (3, 6):
            name = f"samples/step-{step:08d}.png"
            assert (run_dir / name).read_bytes() == (whole / name).read_bytes()


def die_at_step_3(monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    owner = Training if place == "_save_checkpoint" else Reporter
    real = getattr(owner, place)

    def run(self: Training | Reporter, *arguments: object) -> object:
        if self.state.step == 3:
            raise KeyboardInterrupt
        return real(self, *arguments)

    monkeypatch.setattr(owner, place, run)


def names_of_lines(run_dir: Path) -> list[tuple[int, list[str]]]:
    """Step and names of each line of metrics.jsonl, as they stand there."""
    lines = [json.loads(text) for text in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], sorted(line)) for line in lines if line["step"]]


def first_difference(run_dir: Path, other: Path) -> tuple[int, str, float, float] | None:
    """Step, name and values of the first loss that two runs do not share to the last bit."""
    for ours, theirs in zip(read_metrics(run_dir), read_metrics(other), strict=True):
        for name in ours:
            if name.startswith(("vae/", "sit/", "discriminator/")) and ours[name] != theirs[name]:
                return int(ours["step"]), name, ours[name], theirs[name]
    return None


def test_a_run_skips_damaged_tiles_and_names_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset = make_dataset(tmp_path / "dataset")
    path = next(dataset.tiles_dir(32).glob("S.0-x.0-48.tar"))
    data = bytearray(path.read_bytes())
    for rank in range(20, 26):
        at = data.index(f"S.0-x/{rank:08d}.png".encode()) + 512
        data[at + 40 : at + 200] = bytes(160)
    path.write_bytes(bytes(data))
    run_dir = tmp_path / "run"
    options = ("run.steps=14", "log.fixed_tiles=2")
    with pytest.raises(UserError, match=r"S\.0-x\.0-48\.tar: tile 2[0-5] of slide S\.0-x"):
        train(small_config(dataset, tmp_path / "strict", *options))
    assert train(small_config(dataset, run_dir, *options, "data.on_error=skip")) == 0
    lines = (run_dir / "skipped_tiles.jsonl").read_text().splitlines()
    assert all("S.0-x.0-48.tar: tile 2" in json.loads(line)["skipped"] for line in lines)
    assert read_metrics(run_dir)[-1]["skipped_tiles"] == len(lines) > 0
    assert json.loads((run_dir / "summary.json").read_text())["skipped_tiles"] == len(lines)
    assert "skipped: " in capsys.readouterr().out


def test_weights_and_biases_hold_the_same_numbers(
    train_dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb", reason="the optional package wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    run_dir = tmp_path / "run"
    options = ("run.steps=2", "log.wandb=histogen", "log.samples_every=2")
    assert train(small_config(train_dataset, run_dir, *options)) == 0
    assert (run_dir / "wandb_id.txt").read_text()
    kept = next((run_dir / "wandb").glob("offline-run-*/*.wandb")).read_bytes()
    assert b"vae/l1" in kept


def test_a_missing_package_for_logging_is_said_before_training(
    train_dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # as where it is not installed
    with pytest.raises(UserError, match=r"log\.wandb=histogen: the package wandb is not installed"):
        train(small_config(train_dataset, tmp_path / "run", "log.wandb=histogen"))


def free_port() -> int:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return int(held.getsockname()[1])


@pytest.mark.parametrize(
    ("shared", "of_two"),
    [
        pytest.param(("run.sync_discriminator=true",), (), marks=pytest.mark.full),
        pytest.param(("loss.generator=0",), ("optim.accumulate=2",), marks=pytest.mark.full),
    ],
    ids=["whole", "in parts"],
)
def test_two_processes_equal_one(
    train_dataset: Dataset, tmp_path: Path, shared: tuple[str, ...], of_two: tuple[str, ...]
) -> None:
    """A batch of 5 as 2 + 3 over gloo: whole, with the discriminator's batch norm over both
    processes, and each process's tiles in two parts, whose latent statistics are the batch's."""
    one, two = tmp_path / "one", tmp_path / "two"
    overrides = (
        *shared,
        "run.steps=20",
        "checkpoint.every=20",
        "optim.lr_vae=1e-4",
        "optim.lr_sit=1e-4",
    )
    assert train(small_config(train_dataset, one, *overrides)) == 0
    port = str(free_port())
    ranks = [
        subprocess.Popen(
            command(train_dataset, two, *overrides, *of_two),
            env=environment(
                RANK=str(rank),
                LOCAL_RANK=str(rank),
                WORLD_SIZE="2",
                MASTER_ADDR="127.0.0.1",
                MASTER_PORT=port,
            ),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=600)[0] for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], outputs
    a, b = weights_of(one, 20), weights_of(two, 20)
    for name, value in a.items():
        torch.testing.assert_close(b[name], value, atol=1e-4, rtol=1e-4, msg=name)
    moved = weights_of(one, 20)["vae/decoder.conv_in.weight"]
    start = small_config(train_dataset, tmp_path)
    assert not moved.equal(initial_vae(start)["decoder.conv_in.weight"])
    for mine, theirs in zip(read_metrics(one), read_metrics(two), strict=True):
        for name in {"vae/total", "discriminator/total", "vae/align", "sit/denoise"} & mine.keys():
            assert theirs[name] == pytest.approx(mine[name], rel=1e-4, abs=1e-4)
    for run_dir, more in ((one, ()), (two, of_two)):  # the second goes on in one process
        longer = small_config(train_dataset, run_dir, *overrides, *more, "run.steps=23")
        assert train(longer) == 0
    for name, value in weights_of(one, 23).items():
        torch.testing.assert_close(weights_of(two, 23)[name], value, atol=1e-4, rtol=1e-4)


def initial_vae(config: Config) -> dict[str, torch.Tensor]:
    from train.networks import build_networks

    return build_networks(config, torch.device("cpu")).vae.state_dict()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_warning_saves_and_asks_to_be_requeued(
    finished: tuple[Config, Path], train_dataset: Dataset, tmp_path: Path, number: signal.Signals
) -> None:
    run_dir = tmp_path / "run"
    log = run_dir / "metrics.jsonl"

    def warn() -> None:
        while not log.exists() or not log.read_text():
            time.sleep(0.005)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=warn, daemon=True)
    before = signal.getsignal(number)
    thread.start()
    status = train(small_config(train_dataset, run_dir, "run.steps=1000000"))
    assert status == EXIT_REQUEUE
    assert signal.getsignal(number) == before
    stopped_at = int(list_checkpoints(run_dir)[-1].name.removeprefix("step-"))
    assert stopped_at >= 2
    assert not (run_dir / "summary.json").exists()
    assert train(small_config(train_dataset, run_dir, f"run.steps={stopped_at + 1}")) == 0


def test_the_run_directory_holds_what_was_agreed(finished: tuple[Config, Path]) -> None:
    config, run_dir = finished
    assert load_config(run_dir / "config.yaml") == config
    assert "RANDOM encoder weights" in (run_dir / "config.yaml").read_text()
    lines = read_metrics(run_dir)
    assert [line["step"] for line in lines] == [2, 3, 4, 6]
    assert [line["step"] for line in lines if "vae/l1" in line] == [2, 4, 6]
    assert [line["step"] for line in lines if "reconstruction/psnr" in line] == [3, 6]
    expected = {"epoch", "seconds", "images_per_s", "data_wait_s", "latent/mean", "latent/std"}
    expected |= {"mfu", "tflop_per_s", "memory_gb", "skipped_steps", "skipped_tiles"}
    expected |= {f"vae/{term}" for term in ("l1", "kl", "generator", "align", "total")}
    expected |= {"discriminator/total", "sit/denoise", "sit/align", "sit/total"}
    expected |= {f"grad_norm/{name}" for name in ("vae", "discriminator", "sit")}
    assert expected <= set(lines[-1])
    assert "vae/lpips" not in lines[-1]
    assert 0 < lines[-1]["mfu"] < 1
    flop = sum(step_flop(config).values())
    assert lines[-1]["tflop_per_s"] == pytest.approx(lines[-1]["images_per_s"] * flop / 1e12)
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["steps"] == 6
    assert summary["encoder_record"]["random_weights"] is True
    measured = summary["reconstruction"]
    assert measured["tiles"] == 4
    assert measured["psnr_trained"] != measured["psnr_untrained"]
    for step in (3, 6):
        with Image.open(run_dir / "samples" / f"step-{step:08d}.png") as grid:
            assert grid.size == (2 * 32, 2 * 32)
    events = EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"images": 0}).Reload()
    assert expected <= set(events.Tags()["scalars"])
    assert [event.value for event in events.Scalars("vae/l1")] == pytest.approx(
        [line["vae/l1"] for line in lines if "vae/l1" in line]
    )
    assert [event.step for event in events.Images("samples")] == [3, 6]
    assert [p.name for p in list_checkpoints(run_dir)] == ["step-00000003", "step-00000006"]


def test_a_finished_run_is_left_alone(
    finished: tuple[Config, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    config, run_dir = finished
    before = {p: p.stat().st_mtime_ns for p in run_dir.rglob("*")}
    assert train(config) == 0
    assert "is finished (6 steps): nothing to do" in capsys.readouterr().out
    assert before == {p: p.stat().st_mtime_ns for p in run_dir.rglob("*")}


def test_another_configuration_is_refused(
    finished: tuple[Config, Path], train_dataset: Dataset
) -> None:
    other = small_config(train_dataset, finished[1], "optim.lr_sit=0.5")
    with pytest.raises(UserError, match=r"optim\.lr_sit is 0\.002 there, 0\.5 here"):
        train(other)


def test_another_selection_is_refused(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "dataset")
    config = small_config(dataset, tmp_path / "run", "run.steps=1")
    assert train(config) == 0
    fewer = {slide: ranks[1:] for slide, ranks in read_selection(dataset, "train").items()}
    write_selection(dataset, "test", make_selection("train", fewer, {}))
    with pytest.raises(UserError, match="trained on another selection than 'train'"):
        train(small_config(dataset, tmp_path / "run", "run.steps=2"))


def test_never_resuming_refuses_a_directory_with_checkpoints(
    finished: tuple[Config, Path], train_dataset: Dataset
) -> None:
    longer = small_config(train_dataset, finished[1], "run.steps=7")
    with pytest.raises(UserError, match="--resume auto"):
        train(longer, "never")


def test_divergence_stops_with_the_last_good_checkpoint(
    train_dataset: Dataset, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    assert train(small_config(train_dataset, run_dir, "run.steps=3")) == 0
    poison(run_dir / "checkpoints" / "step-00000003")
    config = small_config(train_dataset, run_dir, "run.steps=20", "optim.max_bad_steps=2")
    with pytest.raises(TrainingDivergedError, match=r"2 steps in a row up to step 5 .*00000003"):
        train(config)


def poison(checkpoint: Path) -> None:
    """Finite weights of which no gradient is, as a release without sums wrote them."""
    from safetensors.torch import load_file, save_file

    path = checkpoint / "sit.safetensors"
    tensors = load_file(path)
    tensors["final_layer.linear.bias"].fill_(3e38)
    save_file(tensors, path)
    write_json(checkpoint / "state.json", asdict(read_state(checkpoint)))


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["data.dataset="], "data.dataset is not set"),
        (["run.dir="], "run.dir is not set"),
        (["data.dataset=/nowhere"], "no dataset at /nowhere"),
        (["data.selection=other"], "no selection 'other'"),
        (["data.encoder=uni2-h"], "python -m pipeline cache"),
        (["data.batch_size=50"], "lower data.cursors"),
        (["data.cursors=40"], "lower data.cursors to"),
        (["model.sit.condition_dim=17"], "'model.sit.condition_dim'"),
        (["run.device=cuda"], "set run.device=cpu"),
        (["run.mode=repa", "init.vae=/nowhere.safetensors"], "no such file"),
    ],
)
def test_mistakes_get_one_line_that_says_what_to_do(
    train_dataset: Dataset, tmp_path: Path, overrides: list[str], says: str
) -> None:
    if "run.device=cuda" in overrides and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(UserError) as caught:
        train(small_config(train_dataset, tmp_path / "run", *overrides))
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_more_processes_than_tiles_are_refused(train_dataset: Dataset, tmp_path: Path) -> None:
    from common.torch_processes import Processes
    from train.processes import batch_slots

    with pytest.raises(UserError, match=r"8 processes, but data.batch_size is 5"):
        batch_slots(Processes(7, 8), 5)
    assert open_data(small_config(train_dataset, tmp_path)).stream.batch_size == 5


@pytest.mark.parametrize("weights", ["ema", "raw"])
def test_export_writes_the_chosen_weights_with_their_records(
    finished: tuple[Config, Path], tmp_path: Path, weights: str
) -> None:
    run_dir = finished[1]
    out = tmp_path / "model"
    arguments = ["export", str(run_dir), str(out), "--sit", weights, "--vae", weights]
    assert main(arguments) == 0
    model = CytoSyn.from_pretrained(out)
    suffix = "_ema" if weights == "ema" else ""
    expected = weights_of(run_dir, 6)
    for name in ("sit", "vae"):
        for key, value in getattr(model, name).state_dict().items():
            assert value.equal(expected[f"{name}{suffix}/{key}"])
    assert model.records.encoder_is_random is True
    assert model.records.encoder_weights == "random:0"
    assert (model.records.sit, model.records.vae) == (weights, weights)
    assert (model.records.training_step, model.records.tile_px) == (6, 32)
    assert model.records.mpp == 0.5


def test_export_says_what_is_there(finished: tuple[Config, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no checkpoint of step 5; there: step-00000003"):
        main(["export", str(finished[1]), str(tmp_path), "--step", "5"])
    with pytest.raises(UserError, match="is not a run"):
        main(["export", str(tmp_path), str(tmp_path / "out")])


def test_the_door_prints_one_line_and_exits_with_2(tmp_path: Path) -> None:
    arguments = [sys.executable, "-m", "train", "run.steps=3", "--config", "tiny", "run.stepz=4"]
    done = subprocess.run(arguments, env=environment(), capture_output=True, text=True, cwd=HOME)
    assert done.returncode == 2
    lines = done.stderr.strip().splitlines()
    assert lines == ["error: unknown configuration key 'run.stepz': did you mean 'run.steps'?"]


BLOCKED = ("dask", "distributed", "openslide", "tiffslide", "zarr")


def test_train_imports_without_the_pipelines_libraries() -> None:
    """GPU nodes and images often lack them."""
    script = f"""
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {BLOCKED!r}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Block())
import train, train.__main__, train.loop, train.export
assert not set(sys.modules) & set({BLOCKED!r})
"""
    subprocess.run([sys.executable, "-c", script], env=environment(), check=True, cwd=HOME)


@pytest.mark.full
def test_learning_lowers_the_reconstruction_error(train_dataset: Dataset, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    config = small_config(
        train_dataset, run_dir, "run.steps=60", "ema.warmup=true", "loss.generator=0"
    )
    assert train(config) == 0
    measured = json.loads((run_dir / "summary.json").read_text())["reconstruction"]
    assert measured["psnr_trained"] > measured["psnr_untrained"] + 3
    assert measured["l1_trained"] < 0.7 * measured["l1_untrained"]
