"""One step: who is trained by what, which statistics move, and what a bad batch may not do."""

from pathlib import Path

import pytest
import torch
from conftest import small_config
from torch import Tensor, nn

from common.torch_processes import ALONE
from model.interpolant import Interpolant
from model.losses import alignment_loss
from model.noise import RandomStream, normal
from pipeline.dataset import Dataset
from train.config import Config
from train.losses import (
    LossConfig,
    StepInputs,
    discriminator_loss,
    draw_randomness,
    sit_losses,
    vae_alignment,
    vae_losses,
)
from train.networks import Parts, build_parts
from train.reader import Batch, BatchReader
from train.setup import open_data
from train.step import TrainingStep

CPU = torch.device("cpu")


def make_batch(config: Config, step: int = 0) -> Batch:
    inputs = open_data(config)
    slots = range(config.data.batch_size)
    reader = BatchReader(inputs.stream, inputs.source, slots, first_step=step, stop_step=step + 1)
    with reader:
        return next(iter(reader))


def make_step(config: Config, parts: Parts) -> TrainingStep:
    return TrainingStep(config, ALONE, parts)


def state_of(parts: Parts) -> dict[str, Tensor]:
    return {
        f"{name}.{key}": value.clone()
        for name, network in parts.trainees.networks.items()
        for key, value in network.state_dict().items()
    }


def wake(network: nn.Module) -> None:
    """adaLN-Zero starts as the identity with a zero output: give every weight a part to play."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


@pytest.fixture
def config(train_dataset: Dataset, tmp_path: Path) -> Config:
    return small_config(train_dataset, tmp_path / "run")


@pytest.fixture
def prepared(config: Config) -> tuple[Parts, StepInputs]:
    parts = build_parts(config, CPU)
    wake(parts.networks.sit)
    return parts, make_step(config, parts).prepare_inputs(make_batch(config))


def reached(network: nn.Module) -> set[str]:
    """Names of the parameters that a gradient other than zero reached."""
    return {
        name
        for name, parameter in network.named_parameters()
        if parameter.grad is not None and bool(parameter.grad.any())
    }


def test_alignment_of_the_vae_reaches_its_encoder_alone(prepared: tuple[Parts, StepInputs]) -> None:
    networks, inputs = prepared[0].networks, prepared[1]
    output = networks.vae(inputs.images, inputs.draws.posterior_noise)
    before = {name: value.clone() for name, value in networks.sit.named_buffers()}
    vae_alignment(networks.sit, Interpolant(), output.latents, inputs).backward()
    names = reached(networks.vae)
    assert names
    assert all(name.startswith(("encoder.", "quant_conv.")) for name in names)
    assert reached(networks.sit) == set()
    for name, value in networks.sit.named_buffers():
        assert value.equal(before[name])


def test_alignment_of_the_vae_uses_running_statistics_and_the_full_condition(
    prepared: tuple[Parts, StepInputs],
) -> None:
    networks, inputs = prepared[0].networks, prepared[1]
    sit, (t, noise, *_) = networks.sit, inputs.draws
    sit.bn.running_mean.fill_(0.3)
    sit.bn.running_var.fill_(4.0)
    z = torch.randn(noise.shape)
    x0 = (z - 0.3) / (4.0 + 1e-4) ** 0.5
    x_t = (1 - t[:, None, None, None]) * x0 + t[:, None, None, None] * noise
    _, tokens = sit(x_t, t, inputs.condition, return_tokens=True)
    assert inputs.tokens is not None
    expected = alignment_loss(tokens, inputs.tokens)
    torch.testing.assert_close(vae_alignment(sit, Interpolant(), z, inputs), expected)


def test_losses_of_the_vae_reach_the_vae_alone(
    config: Config, prepared: tuple[Parts, StepInputs]
) -> None:
    networks, inputs = prepared[0].networks, prepared[1]
    output = networks.vae(inputs.images, inputs.draws.posterior_noise)
    total, terms = vae_losses(inputs.images, output, networks, config.loss, generate=True)
    total.backward()
    assert set(terms) == {"l1", "kl", "generator"}
    weighted = terms["l1"] + 1e-6 * terms["kl"] + 0.1 * terms["generator"]
    torch.testing.assert_close(total, weighted)
    assert {name.split(".")[0] for name in reached(networks.vae)} == {
        "encoder",
        "decoder",
        "quant_conv",
        "post_quant_conv",
    }
    assert networks.discriminator is not None
    assert reached(networks.discriminator) == reached(networks.sit) == set()


def test_the_discriminators_loss_reaches_it_alone(prepared: tuple[Parts, StepInputs]) -> None:
    networks, inputs = prepared[0].networks, prepared[1]
    assert networks.discriminator is not None
    output = networks.vae(inputs.images, inputs.draws.posterior_noise)
    discriminator_loss(networks.discriminator, inputs.images, output.reconstruction).backward()
    assert reached(networks.discriminator)
    assert reached(networks.vae) == reached(networks.sit) == set()


def test_the_diffusion_loss_never_reaches_the_vae(prepared: tuple[Parts, StepInputs]) -> None:
    networks, inputs = prepared[0].networks, prepared[1]
    sit = networks.sit
    z = networks.vae(inputs.images, inputs.draws.posterior_noise).latents
    _, terms = sit_losses(sit, sit, Interpolant(), z, inputs, LossConfig(), align=True)
    terms["align"].backward(retain_graph=True)
    aligned = reached(sit)
    assert any(name.startswith("projectors.") for name in aligned)
    assert not any(name.startswith(("blocks.1.", "final_layer.")) for name in aligned)
    terms["denoise"].backward()
    assert any(name.startswith("final_layer.") for name in reached(sit))
    assert reached(networks.vae) == set()


def test_the_sit_pass_normalises_by_the_batch_and_moves_the_running_statistics(
    prepared: tuple[Parts, StepInputs],
) -> None:
    networks, inputs = prepared[0].networks, prepared[1]
    sit = networks.sit
    z = 3 + 2 * torch.randn(inputs.draws.noise.shape)
    seen: list[Tensor] = []
    hook = sit.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    sit_losses(sit, sit, Interpolant(), z, inputs, LossConfig(), align=False)
    hook.remove()
    batch = (z - z.mean((0, 2, 3), keepdim=True)) / z.std((0, 2, 3), keepdim=True, correction=0)
    t = inputs.draws.t[:, None, None, None]
    torch.testing.assert_close(
        seen[0], (1 - t) * batch + t * inputs.draws.noise, atol=1e-3, rtol=1e-3
    )
    torch.testing.assert_close(sit.bn.running_mean, 0.1 * z.mean((0, 2, 3)))


@pytest.mark.parametrize(
    ("override", "changed"),
    [
        ("loss.reconstruction=2", {"vae"}),
        ("loss.kl=1", {"vae"}),
        ("loss.generator=0.7", {"vae"}),
        ("loss.vae_align=0.2", {"vae"}),
        ("loss.sit_align=0.1", {"sit"}),
        ("loss.condition_dropout=1", {"sit"}),
        ("optim.lr_sit=1e-4", {"sit"}),
        ("optim.lr_discriminator=1e-2", {"discriminator"}),
        ("optim.lr_vae=1e-4", {"vae"}),
    ],
)
def test_each_network_moves_by_its_own_losses_only(
    config: Config, train_dataset: Dataset, override: str, changed: set[str]
) -> None:
    """The stop-gradient table on real steps: a changed weight moves one network elsewhere."""
    states = []
    for chosen in (config, small_config(train_dataset, Path(config.run.dir), override)):
        parts = build_parts(chosen, CPU)
        wake(parts.networks.sit)
        make_step(chosen, parts)(make_batch(chosen))
        states.append(state_of(parts))
    differing = {
        key.partition(".")[0] for key, value in states[0].items() if not value.equal(states[1][key])
    }
    assert {name.removesuffix("_ema") for name in differing} == changed


def test_a_non_finite_batch_changes_nothing(config: Config) -> None:
    parts = build_parts(config, CPU)
    step = make_step(config, parts)
    step(make_batch(config))
    before = state_of(parts)
    moments = [v.clone() for v in moments_of(parts)]
    batch = make_batch(config, 1)
    assert batch.cls is not None
    batch.cls[2, 0] = float("nan")
    _, skipped, _ = step(batch)
    assert skipped
    after = state_of(parts)
    assert all(after[key].equal(value) for key, value in before.items())
    assert all(a.equal(b) for a, b in zip(moments, moments_of(parts), strict=True))
    _, skipped, _ = step(make_batch(config, 2))
    assert not skipped


def test_recomputing_activations_changes_no_weight(
    config: Config, train_dataset: Dataset, tmp_path: Path
) -> None:
    states = []
    for chosen in (config, small_config(train_dataset, tmp_path, "run.recompute=true")):
        parts = build_parts(chosen, CPU)
        make_step(chosen, parts)(make_batch(chosen))
        states.append(state_of(parts))
    assert parts.networks.sit.recompute
    assert parts.networks.vae.recompute
    for key, value in states[0].items():
        torch.testing.assert_close(states[1][key], value)


def moments_of(parts: Parts) -> list[Tensor]:
    states = [s for o in parts.optimizers.values() for s in o.state_dict()["state"].values()]
    return [value for state in states for value in state.values()]


def test_gradients_are_clipped_for_each_network(train_dataset: Dataset, tmp_path: Path) -> None:
    config = small_config(train_dataset, tmp_path, "optim.clip=1e-3")
    parts = build_parts(config, CPU)
    step = make_step(config, parts)
    norms: list[float] = []
    original = step._update_networks

    def measure(at: int) -> None:
        for optimizer in parts.optimizers.values():
            grads = [p.grad for g in optimizer.param_groups for p in g["params"]]
            norms.append(float(torch.stack([g.norm() for g in grads if g is not None]).norm()))
        original(at)

    step._update_networks = measure  # type: ignore[method-assign]
    metrics, _, _ = step(make_batch(config))
    assert all(metrics[f"grad_norm/{name}"] > 1e-3 for name in parts.optimizers)
    assert norms == pytest.approx([1e-3] * 3, rel=1e-3)


def test_frozen_modes_train_the_sit_alone(train_dataset: Dataset, tmp_path: Path) -> None:
    base = small_config(train_dataset, tmp_path)
    weights = tmp_path / "vae.safetensors"
    build_parts(base, CPU).networks.vae.save(weights)
    metrics = {}
    for mode in ("repa", "ldm"):
        config = small_config(train_dataset, tmp_path, f"run.mode={mode}", f"init.vae={weights}")
        parts = build_parts(config, CPU)
        before = state_of(parts)
        metrics[mode], _, _ = make_step(config, parts)(make_batch(config))
        after = state_of(parts)
        moved = {key.partition(".")[0] for key in after if not after[key].equal(before[key])}
        assert moved == {"sit", "sit_ema"}
        assert set(parts.optimizers) == {"sit"}
    assert "sit/align" in metrics["repa"]
    assert "sit/align" not in metrics["ldm"]
    assert not any(name.startswith(("vae/", "discriminator/")) for name in metrics["repa"])


def test_the_discriminator_waits_for_its_start(train_dataset: Dataset, tmp_path: Path) -> None:
    config = small_config(train_dataset, tmp_path, "loss.generator_start=1")
    step = make_step(config, build_parts(config, CPU))
    first, _, _ = step(make_batch(config, 0))
    second, _, _ = step(make_batch(config, 1))
    assert "discriminator/total" not in first
    assert "vae/generator" not in first
    assert {"discriminator/total", "vae/generator"} <= set(second)


@pytest.mark.parametrize("time", ["uniform", "lognormal"])
def test_randomness_belongs_to_step_and_slot(
    train_dataset: Dataset, tmp_path: Path, time: str
) -> None:
    config = small_config(train_dataset, tmp_path, f"loss.time={time}")
    whole = draw_randomness(config, 7, range(6))
    parts = [draw_randomness(config, 7, range(0, 2)), draw_randomness(config, 7, range(2, 6))]
    for field, value in enumerate(whole):
        assert value.equal(torch.cat([part[field] for part in parts]))
    assert not draw_randomness(config, 8, range(6)).t.equal(whole.t)
    assert bool(((whole.t > 0) & (whole.t < 1)).all())


def test_randomness_is_drawn_without_a_copy_to_the_device(
    train_dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU such a copy waits for all that is queued, four times a step."""
    config = small_config(train_dataset, tmp_path)
    expected = normal(
        config.run.seed, (4, 4, 4), stream=RandomStream.NOISE, step=7, slot=list(range(2, 6))
    )

    def refuse(*arguments: object, **named: object) -> None:
        raise AssertionError("numbers of the host were copied")

    for name in ("tensor", "as_tensor", "from_numpy"):
        monkeypatch.setattr(torch, name, refuse)
    assert draw_randomness(config, 7, range(2, 6)).noise.equal(expected)


def test_the_condition_is_dropped_as_often_as_asked(train_dataset: Dataset, tmp_path: Path) -> None:
    config = small_config(train_dataset, tmp_path)
    drops = torch.cat([draw_randomness(config, step, range(100)).drop for step in range(30)])
    assert abs(float(drops.float().mean()) - 0.1) < 4 * (0.1 * 0.9 / 3000) ** 0.5
