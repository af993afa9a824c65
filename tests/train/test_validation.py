"""Validation: the blind predictors against their closed forms, and the same noise every time."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import small_config
from torch import nn

from model.interpolant import Interpolant
from pipeline.dataset import Dataset
from train.loop import train
from train.metrics_log import read_metrics
from train.networks import build_parts
from train.preview import read_fixed_tiles
from train.setup import open_data
from train.validation import (
    fixed_noise,
    gaussian_velocity,
    mean_token_cosine,
    measure_validation,
)

CPU = torch.device("cpu")


@pytest.mark.parametrize("path", ["linear", "cosine"])
def test_the_gaussian_predictor_is_the_best_affine_one(path: str) -> None:
    """Least squares of v on x_t, over many draws of a Gaussian channel, finds the same line."""
    generator = torch.Generator().manual_seed(0)
    interpolant = Interpolant(path)  # type: ignore[arg-type]
    mean, std, t = torch.tensor([0.7]), torch.tensor([1.8]), torch.full((1,), 0.35)
    x0 = mean + std * torch.randn(1, 1, 400, 400, generator=generator, dtype=torch.float64)
    eps = torch.randn(x0.shape, generator=generator, dtype=torch.float64)
    x_t, v = interpolant.x_t(x0, eps, t), interpolant.velocity(x0, eps, t)
    design = torch.stack([x_t.flatten(), torch.ones(x_t.numel())], dim=1)
    fitted = design @ torch.linalg.lstsq(design, v.reshape(-1, 1)).solution
    closed = gaussian_velocity(interpolant, x_t, t, mean, std.square())
    assert (fitted.flatten() - closed.flatten()).abs().max() < 0.05
    assert (v - closed).square().mean() <= (v - v.mean()).square().mean()


def test_on_white_noise_nothing_beats_half_pi(train_dataset: Dataset, tmp_path: Path) -> None:
    """The integral of 1 / (t² + (1 - t)²) over times, which the fixed noise must reproduce."""
    config = small_config(train_dataset, tmp_path)
    path, errors = Interpolant(), []
    for index in range(4):
        at = fixed_noise(config, 200, 4, index)
        x0 = torch.randn(at.noise.shape, generator=torch.Generator().manual_seed(index))
        x_t, v = path.x_t(x0, at.noise, at.t), path.velocity(x0, at.noise, at.t)
        blind = gaussian_velocity(path, x_t, at.t, torch.zeros(4), torch.ones(4))
        errors.append((v - blind).square().mean())
        assert bool(((at.t > index / 4) & (at.t < (index + 1) / 4)).all())
    assert float(torch.stack(errors).mean()) == pytest.approx(math.pi / 2, abs=0.03)


def test_no_constant_token_is_nearer_than_the_mean() -> None:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(5, 7, 3, generator=generator) + torch.tensor([1.0, 0.5, 0.0])
    best = mean_token_cosine(tokens)
    others = F.normalize(torch.randn(20_000, 3, generator=generator), dim=1)
    reached = torch.einsum("ntd,kd->k", F.normalize(tokens, dim=-1), others) / 35
    assert float(reached.max()) <= best + 1e-6
    assert float(reached.max()) == pytest.approx(best, abs=1e-3)


def test_the_same_networks_give_the_same_losses(train_dataset: Dataset, tmp_path: Path) -> None:
    config = small_config(train_dataset, tmp_path, "log.validation_draws=2")
    inputs = open_data(config)
    fixed = read_fixed_tiles(inputs.source, inputs.stream.table.spread_rows(11))
    networks = build_parts(config, CPU).networks
    nn.init.normal_(networks.sit.final_layer.linear.weight, std=0.1)
    networks.sit.bn.running_var.fill_(0.25)
    before = {name: value.clone() for name, value in networks.sit.state_dict().items()}
    torch.manual_seed(1)
    one = measure_validation(config, networks.sit, networks.vae, fixed, align=True)
    torch.manual_seed(2)
    two = measure_validation(config, networks.sit, networks.vae, fixed, align=True)
    assert one == two
    assert set(one) == {"denoise", "denoise_gaussian", "align", "align_mean_token", "psnr"}
    assert networks.sit.training
    assert all(value.equal(before[name]) for name, value in networks.sit.state_dict().items())
    blind = measure_validation(config, networks.sit, networks.vae, fixed, align=False)
    assert "align" not in blind
    assert blind["denoise"] == pytest.approx(one["denoise"])


def test_a_run_logs_them_before_between_and_after(train_dataset: Dataset, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    validation = ("log.validation=[train]", "log.validation_every=3", "log.validation_tiles=5")
    config = small_config(
        train_dataset, run_dir, *validation, "run.steps=4", "loss.generator=0", "log.every=2"
    )
    assert train(config) == 0
    lines = {int(line["step"]): line for line in read_metrics(run_dir)}
    assert list(lines) == [0, 2, 3, 4]
    assert [step for step, line in lines.items() if "train/denoise" in line] == [0, 3, 4]
    assert lines[0]["train/denoise"] != lines[3]["train/denoise"] != lines[4]["train/denoise"]
    assert {"train/denoise_gaussian", "train/align", "sit/denoise"} <= set(lines[4])
