"""Counted operations against the specification's figures, and the rates beside them."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from model.perceptual import PerceptualLoss
from train.config import load_config
from train.speed import matrix_rate, peak_memory_gb, step_flop

CONFIGS = Path(__file__).parents[2] / "train" / "configs"


@pytest.mark.full
def test_the_papers_step_is_2843_gflop_a_tile() -> None:
    """By part, as model.md's section 7.1 has them; the encoder's share there is not a step's."""
    config = load_config(CONFIGS / "cytosyn-40m.yaml")
    perceptual = PerceptualLoss("random:0")
    gflop = {name: flop / 1e9 for name, flop in step_flop(config, perceptual).items()}
    generator_pass = 9.6  # of PatchGAN's 38, forward and input gradient
    assert gflop["vae"] == pytest.approx(625 + 1428 + 92 + generator_pass, abs=1)
    assert gflop["discriminator"] == pytest.approx(38 - generator_pass, abs=0.5)
    assert gflop["align"] == pytest.approx(110.6, abs=0.5)
    assert gflop["sit"] == pytest.approx(550, abs=0.5)
    assert sum(gflop.values()) == pytest.approx(2843, abs=3)


def test_what_is_off_is_not_counted() -> None:
    tiny = load_config(CONFIGS / "tiny.yaml")
    whole = step_flop(tiny)
    without = step_flop(replace(tiny, loss=replace(tiny.loss, generator=0, vae_align=0)))
    assert set(whole) == {"vae", "align", "discriminator", "sit"}
    assert set(without) == {"vae", "sit"}
    assert without["sit"] == whole["sit"]
    assert without["vae"] < whole["vae"]
    frozen = load_config(CONFIGS / "tiny.yaml", ["run.mode=repa", "init.vae=vae.safetensors"])
    counted = step_flop(frozen)
    assert counted["sit"] == whole["sit"]
    assert counted["vae"] < without["vae"] / 6  # the encoder forward alone


def test_rates_and_memory_are_those_of_a_real_machine() -> None:
    rate = matrix_rate(torch.device("cpu"), torch.float32)
    assert 1e8 < rate < 1e15
    assert 0.05 < peak_memory_gb(torch.device("cpu")) < 4000
