"""Latent statistics of a VAE that is given: an oracle's, fixed where it is frozen, and exported."""

import copy
import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import command, make_dataset, small_config, weights_of
from safetensors.torch import load_file, save_file
from test_processes import run_two
from test_step import CPU, make_batch, make_step, wake
from torch import Tensor

from common.console import EXIT_REQUEUE
from common.errors import UserError
from common.torch_processes import ALONE
from model.cytosyn import CytoSyn
from model.images import from_uint8
from model.sit import SiT
from model.vae import VAE
from model.weights import seeded_init
from pipeline.dataset import Dataset, TileStore
from train import latents, loop
from train.__main__ import main
from train.config import Config
from train.latents import measure_latents, read_latent_scale, set_latent_scale
from train.loop import train
from train.networks import build_parts
from train.setup import open_data

NAMES = ("running_mean", "running_var")


@pytest.fixture(scope="module")
def vae_file(train_dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A VAE of sharp posteriors of small latents, whose channels differ: far from 0 and 1."""
    folder = tmp_path_factory.mktemp("vae")
    with seeded_init(77):
        vae = VAE(small_config(train_dataset, folder).model.vae)
    with torch.no_grad():
        vae.quant_conv.weight[:4].mul_(torch.tensor([0.2, 1.0, 3.0, 0.5])[:, None, None, None])
        biases = torch.tensor([3.0, -0.5, 0.0, 20.0, -6.0, -4.0, -2.0, -5.0])
        vae.quant_conv.get_parameter("bias").copy_(biases)
    vae.save(folder / "vae.safetensors")
    return folder / "vae.safetensors"


def frozen(dataset: Dataset, run_dir: Path, vae: Path, *more: str) -> Config:
    return small_config(dataset, run_dir, "run.mode=repa", f"init.vae={vae}", *more)


def oracle(dataset: Dataset, config: Config, vae: VAE) -> tuple[Tensor, Tensor]:
    """Mean and expected unbiased variance of posterior samples, all in float64 on all tiles."""
    rows = open_data(config).stream.table.spread_rows(config.init.statistics_tiles)
    store, exact = TileStore(dataset, config.data.tile_px), copy.deepcopy(vae).double()
    tiles = torch.stack([torch.from_numpy(store.read(slide, [rank])[0]) for slide, rank in rows])
    with torch.no_grad():
        posterior = exact.encode(from_uint8(tiles).double())
    variance, mean = torch.var_mean(posterior.mean, dim=(0, 2, 3))
    return mean, variance + posterior.logvar.exp().mean(dim=(0, 2, 3))


@pytest.mark.parametrize("count", [1, 8, 30, 10_000])
def test_statistics_are_those_of_a_float64_oracle(
    train_dataset: Dataset, tmp_path: Path, vae_file: Path, count: int
) -> None:
    config = frozen(train_dataset, tmp_path, vae_file, f"init.statistics_tiles={count}")
    vae, data = build_parts(config, CPU).networks.vae, open_data(config)
    rows = data.stream.table.spread_rows(count)
    scale = measure_latents(vae, train_dataset, rows, config, ALONE)
    assert scale is not None
    mean, variance = oracle(train_dataset, config, vae)
    torch.testing.assert_close(scale.mean, mean, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(scale.variance, variance, atol=0, rtol=1e-6)
    assert scale.source == f"{min(count, 80)} tiles of selection 'train'"
    slow = replace(config, data=replace(config.data, threads=1, batch_size=3))
    again = measure_latents(vae, train_dataset, rows, slow, ALONE)
    assert again is not None
    assert again.mean.equal(scale.mean)
    assert again.variance.equal(scale.variance)


@pytest.mark.parametrize("mode", ["repa", "ldm"])
def test_training_moves_none_of_them_and_the_exported_model_has_the_same(
    train_dataset: Dataset,
    tmp_path: Path,
    vae_file: Path,
    mode: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run_dir, more = tmp_path / "run", (f"run.mode={mode}", "ema.sit=0.7", "optim.accumulate=2")
    config = frozen(train_dataset, run_dir, vae_file, *more, "checkpoint.every=1")
    assert train(config) == 0
    said = [line for line in capsys.readouterr().out.splitlines() if "latent statistics" in line]
    assert len(said) == 1
    assert "of 80 tiles of selection 'train'; fixed from here on" in said[0]

    norm = SiT(config.model.sit).bn
    expected = oracle(train_dataset, config, VAE.load(vae_file, config.model.vae))
    for name, value in zip(NAMES, expected, strict=True):
        norm.get_buffer(name).copy_(value)
    # Continued, they are read from the checkpoint and not computed again.
    monkeypatch.setattr(loop, "measure_latents", None)
    assert train(frozen(train_dataset, run_dir, vae_file, *more, "run.steps=8")) == 0
    first, last = weights_of(run_dir, 6), weights_of(run_dir, 8)
    for name in NAMES:
        torch.testing.assert_close(
            first[f"sit/bn.{name}"], norm.get_buffer(name), rtol=1e-6, atol=1e-6
        )
        for key in (f"sit/bn.{name}", f"sit_ema/bn.{name}"):
            assert first[key].equal(first[f"sit/bn.{name}"])
            assert last[key].equal(first[key])
    assert last["sit/bn.num_batches_tracked"] == 0
    for weights in ("ema", "raw"):
        out = tmp_path / weights
        assert main(["export", str(run_dir), str(out), "--sit", weights]) == 0
        exported = CytoSyn.from_pretrained(out).sit.bn
        for name in NAMES:
            assert exported.get_buffer(name).equal(first[f"sit/bn.{name}"])
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["latents"]["source"] == "80 tiles of selection 'train'"
    assert summary["latents"]["mean"] == first["sit/bn.running_mean"].tolist()


@pytest.mark.parametrize("mode", ["repa", "ldm"])
def test_a_tiles_loss_does_not_depend_on_the_batch_it_is_in(
    train_dataset: Dataset, tmp_path: Path, vae_file: Path, mode: str
) -> None:
    config = frozen(train_dataset, tmp_path, vae_file, f"run.mode={mode}")
    parts = build_parts(config, CPU)
    wake(parts.networks.sit)
    scale = measure_latents(
        parts.networks.vae, train_dataset, open_data(config).fixed_rows, config, ALONE
    )
    assert scale is not None
    set_latent_scale([parts.networks.sit.bn], scale)
    step = make_step(config, parts)
    inputs = step.prepare_inputs(make_batch(config))

    def losses(places: slice) -> dict[str, Tensor]:
        part = inputs.select_part(places)
        step._parts = [slice(0, places.stop - places.start)]
        return step._compute_gradients(part, 0)

    whole = losses(slice(0, 5))
    alone = [losses(slice(k, k + 1)) for k in range(5)]
    for name in [name for name in whole if name.startswith("sit/")]:
        mean = torch.stack([each[name] for each in alone]).mean()
        torch.testing.assert_close(mean, whole[name], atol=1e-6, rtol=1e-5)
    for name in NAMES:
        value = getattr(scale, {"running_mean": "mean", "running_var": "variance"}[name])
        assert parts.networks.sit.bn.get_buffer(name).equal(value.float())


@pytest.mark.full
def test_one_and_two_processes_have_the_same_bits(
    train_dataset: Dataset, tmp_path: Path, vae_file: Path
) -> None:
    more = ("run.mode=ldm", f"init.vae={vae_file}", "run.steps=1")
    one, two = tmp_path / "one", tmp_path / "two"
    torch.set_num_threads(1)
    assert train(small_config(train_dataset, one, *more, "data.batch_size=3")) == 0
    statuses, outputs = run_two(command(train_dataset, two, *more))
    assert statuses == [0, 0], outputs
    assert sum(text.count("latent statistics: mean") for text in outputs) == 1
    for name in NAMES:
        for network in ("sit", "sit_ema"):
            key = f"{network}/bn.{name}"
            assert weights_of(two, 1)[key].equal(weights_of(one, 1)[key])


def test_a_joint_run_begins_there_and_moves_on(
    train_dataset: Dataset, tmp_path: Path, vae_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = small_config(train_dataset, tmp_path / "run", f"init.vae={vae_file}", "run.steps=1")
    assert train(config) == 0
    assert "; where the running ones begin" in capsys.readouterr().out
    weights = weights_of(tmp_path / "run", 1)
    mean, _ = oracle(train_dataset, config, VAE.load(vae_file, config.model.vae))
    moved = (weights["sit/bn.running_mean"].double() - mean).abs()
    lagging = (weights["sit_ema/bn.running_mean"].double() - mean).abs()
    assert float(moved.max()) > 1e-3
    assert bool((lagging < moved).all()), "the average's are averaged, as in REPA-E"
    assert weights["sit/bn.num_batches_tracked"] == 1


def test_a_run_of_a_version_that_moved_them_goes_on_with_what_it_has(
    train_dataset: Dataset, tmp_path: Path, vae_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    assert train(frozen(train_dataset, run_dir, vae_file, "run.steps=3")) == 0
    folder = run_dir / "checkpoints" / "step-00000003"
    state = json.loads((folder / "state.json").read_text())
    for later in ("latents", "sha256", "state_sha256"):
        del state[later]
    (folder / "state.json").write_text(json.dumps(state))
    tensors = load_file(folder / "sit.safetensors")
    tensors["bn.running_mean"].fill_(0.25)
    save_file(tensors, folder / "sit.safetensors")
    capsys.readouterr()
    for steps in (5, 6):
        assert train(frozen(train_dataset, run_dir, vae_file, f"run.steps={steps}")) == 0
        said = capsys.readouterr().out
        assert "of this run's batches up to step 3, by an older version; fixed" in said
        for network in ("sit", "sit_ema"):
            mean = weights_of(run_dir, steps)[f"{network}/bn.running_mean"]
            assert mean.tolist() == [0.25] * 4


def test_statistics_that_come_with_the_weights(
    train_dataset: Dataset, tmp_path: Path, vae_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_config(train_dataset, tmp_path)
    model = CytoSyn(SiT(config.model.sit), VAE.load(vae_file, config.model.vae))
    model.sit.bn.running_mean.copy_(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    model.sit.bn.running_var.copy_(torch.tensor([0.25, 4.0, 9.0, 1.0]))
    model.save_pretrained(tmp_path / "model")
    # Of a SiT that is given: whatever init.statistics says.
    monkeypatch.setattr(loop, "measure_latents", None)
    both = (f"init.sit={tmp_path / 'model'}", "run.steps=1")
    only = ("init.statistics=vae", "run.steps=1")
    for name, more in (("both", both), ("only", only)):
        assert train(frozen(train_dataset, tmp_path / name, tmp_path / "model", *more)) == 0
        for network in ("sit", "sit_ema"):
            bn = {key: weights_of(tmp_path / name, 1)[f"{network}/bn.{key}"] for key in NAMES}
            assert bn["running_mean"].tolist() == [1, 2, 3, 4]
            assert bn["running_var"].tolist() == [0.25, 4, 9, 1]

    folder = tmp_path / "published"
    folder.mkdir()
    model.vae.save(folder / "vae.safetensors")
    with pytest.raises(UserError, match=r"brings no latent statistics.*init\.statistics=tiles"):
        read_latent_scale(str(folder))
    (folder / "config.json").write_text('{"scaling_factor": 0.5, "shift_factor": 0.25}')
    assert read_latent_scale(str(folder))[:2] == (torch.tensor(0.25), torch.tensor(4.0))
    stats = {"latents_scale": torch.full((1, 4, 1, 1), 2.0), "latents_bias": torch.ones(1, 4, 1, 1)}
    torch.save(stats, folder / "e2e-latents-stats.pt")
    torch.save(model.vae.state_dict(), folder / "e2e.pt")
    mean, variance, _ = read_latent_scale(str(folder / "e2e.pt"))
    assert mean.tolist() == [1] * 4
    assert variance.tolist() == [0.25] * 4
    for wrong in (mean[:3], torch.tensor(float("inf")), -mean):
        with pytest.raises(UserError, match=r"x: has latent statistics of \d channels that do no"):
            set_latent_scale([model.sit.bn], latents.LatentScale(wrong, wrong, "x"))
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json: cannot be read .*init\.statistics=tiles"):
        read_latent_scale(str(folder / "vae.safetensors"))


def test_a_damaged_tile_stops_it_or_is_left_out(
    tmp_path: Path, vae_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset = make_dataset(tmp_path / "dataset")
    path = next(dataset.tiles_dir(32).glob("S.0-x.0-48.tar"))
    data = bytearray(path.read_bytes())
    at = data.index(b"S.0-x/00000020.png") + 512
    data[at + 40 : at + 200] = bytes(160)
    path.write_bytes(bytes(data))
    more = ("log.fixed_tiles=1", "run.steps=1")
    with pytest.raises(UserError, match=r"tile 20 of slide S\.0-x is damaged"):
        train(frozen(dataset, tmp_path / "strict", vae_file, *more))
    assert train(frozen(dataset, tmp_path / "run", vae_file, *more, "data.on_error=skip")) == 0
    said = capsys.readouterr().out
    assert "left out of the latent statistics: " in said
    assert "of 79 tiles of selection 'train'; fixed" in said


def test_latents_that_are_not_finite_are_refused(
    train_dataset: Dataset, tmp_path: Path, vae_file: Path
) -> None:
    tensors = load_file(vae_file)
    tensors["quant_conv.weight"].fill_(float("nan"))
    save_file(tensors, tmp_path / "vae.safetensors")
    with pytest.raises(UserError, match=r"init\.vae=.*are not finite; give other weights"):
        train(frozen(train_dataset, tmp_path / "run", tmp_path / "vae.safetensors"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_before_they_are_known_leaves_nothing_behind(
    train_dataset: Dataset,
    tmp_path: Path,
    vae_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    number: signal.Signals,
) -> None:
    real = latents._sum_moments

    def interrupt(vae: VAE, tiles: np.ndarray) -> Tensor:
        os.kill(os.getpid(), number)
        return real(vae, tiles)

    monkeypatch.setattr(latents, "_sum_moments", interrupt)
    config = frozen(train_dataset, tmp_path / "run", vae_file, "run.steps=1")
    with pytest.raises(SystemExit) as left:
        train(config)
    assert left.value.code == EXIT_REQUEUE
    assert "stopped on request before the first step" in capsys.readouterr().out
    assert not (tmp_path / "run" / "checkpoints").exists()
