"""A step in parts, compiled or with tokens computed on the spot, equals the plain step."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import small_config
from test_step import ALONE, CPU, make_batch, make_step, state_of, wake
from torch import Tensor, nn
from torch._dynamo.utils import counters

from common.errors import UserError
from model.encoders import load_encoder, table
from model.encoders.construct import TimmConstruction, frozen
from pipeline.dataset import Dataset
from train.config import Config
from train.loop import train
from train.losses import encode_frozen
from train.metrics_log import read_metrics
from train.networks import Parts, build_parts
from train.online import open_encoder
from train.step import TrainingStep, parts_of
from train.sync_norm import SyncedBatchNorm2d, synchronise_norms


def gradients(config: Config, parts: Parts) -> dict[str, Tensor]:
    """Clipped gradients, metrics and statistics of the first step, which is not taken."""
    wake(parts.networks.sit)
    step = make_step(config, parts)
    found: dict[str, Tensor] = {}

    def note(at: int) -> None:
        for network in ("vae", "sit", "discriminator"):
            module = getattr(parts.networks, network)
            for name, parameter in module.named_parameters() if module is not None else ():
                if parameter.grad is not None:
                    found[f"{network}.{name}"] = parameter.grad.clone()

    step._update_networks = note  # type: ignore[method-assign]
    metrics, _, _ = step(make_batch(config))
    buffers = {f"bn.{name}": value.clone() for name, value in parts.networks.sit.named_buffers()}
    return found | metrics | buffers


@pytest.mark.parametrize("parts", [2, 5])
def test_parts_of_a_batch_give_the_whole_batchs_gradients(
    train_dataset: Dataset, tmp_path: Path, parts: int
) -> None:
    """Five tiles as 2 + 3 and one by one; without the discriminator, whose norm sees a part."""
    off = "loss.generator=0"
    whole = small_config(train_dataset, tmp_path, off)
    cut = small_config(train_dataset, tmp_path, off, f"optim.accumulate={parts}")
    one, many = (gradients(config, build_parts(config, CPU)) for config in (whole, cut))
    assert one.keys() == many.keys()
    assert any(name.startswith("sit.blocks.1.") for name in one)
    for name, value in one.items():
        torch.testing.assert_close(many[name], value, atol=1e-5, rtol=1e-4, msg=name)


def test_the_discriminators_norm_sees_a_part_at_a_time(
    train_dataset: Dataset, tmp_path: Path
) -> None:
    """Its gradient is the mean of its gradients on the parts, as on two processes of their own."""
    config = small_config(train_dataset, tmp_path, "data.batch_size=4", "optim.accumulate=2")
    parts = build_parts(config, CPU)
    discriminator, vae = parts.networks.discriminator, parts.networks.vae
    assert discriminator is not None
    step = make_step(config, parts)
    inputs = step.prepare_inputs(make_batch(config))
    sums = [torch.zeros_like(p) for p in discriminator.parameters()]
    for places in (slice(0, 2), slice(2, 4)):
        part = inputs.select_part(places)
        fake = vae(part.images, part.draws.posterior_noise).reconstruction.detach()
        real_logits, fake_logits = discriminator(part.images), discriminator(fake)
        loss = 0.5 * ((1 - real_logits).relu().mean() + (1 + fake_logits).relu().mean())
        for total, grad in zip(
            sums, torch.autograd.grad(loss, discriminator.parameters()), strict=True
        ):
            total += grad / 2
    parts = build_parts(config, CPU)
    found = gradients(config, parts)
    scale = min(1.0, 1.0 / float(found["grad_norm/discriminator"]))
    for total, (name, _) in zip(sums, discriminator.named_parameters(), strict=True):
        expected = total * scale
        torch.testing.assert_close(found[f"discriminator.{name}"], expected, atol=1e-5, rtol=1e-3)
    assert parts.networks.discriminator is not None
    assert int(parts.networks.discriminator.main[3].num_batches_tracked) == 3 * 2


def test_bfloat16_computes_the_networks_and_nothing_else(
    train_dataset: Dataset, tmp_path: Path
) -> None:
    """Losses, gradients and statistics stay float32, and near those of a float32 step."""
    exact = small_config(train_dataset, tmp_path)
    rough = small_config(train_dataset, tmp_path, "run.precision=bf16")
    seen: dict[str, set[torch.dtype]] = {"exact": set(), "rough": set()}
    found = {}
    for name, config in (("exact", exact), ("rough", rough)):
        parts = build_parts(config, CPU)
        for network in (parts.networks.sit.blocks[0].attn, parts.networks.vae.decoder):
            network.register_forward_hook(lambda m, a, out, name=name: seen[name].add(out.dtype))
        found[name] = gradients(config, parts)
    assert seen == {"exact": {torch.float32}, "rough": {torch.bfloat16}}
    floats = [value for value in found["rough"].values() if value.is_floating_point()]
    assert {value.dtype for value in floats} == {torch.float32}
    for name in ("vae/l1", "vae/kl", "sit/denoise", "bn.bn.running_var"):
        torch.testing.assert_close(found["rough"][name], found["exact"][name], rtol=0.03, atol=0.01)
    assert not found["rough"]["vae/l1"].equal(found["exact"]["vae/l1"])


def test_parts_differ_by_one_tile_at_most_and_none_is_empty() -> None:
    assert parts_of(5, 2) == [slice(0, 2), slice(2, 5)]
    assert parts_of(4, 1) == [slice(0, 4)]
    with pytest.raises(UserError, match=r"optim\.accumulate=5, but a process has 4 tiles"):
        parts_of(4, 5)


def test_the_synced_norm_is_batch_norm_in_a_single_process() -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU())
    nn.init.normal_(plain[1].weight)
    nn.init.normal_(plain[1].bias)
    synced = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU())
    synced.load_state_dict(plain.state_dict())
    synchronise_norms(synced)
    assert type(synced[1]) is SyncedBatchNorm2d
    x = 2 + torch.randn(4, 3, 9, 9)
    for _ in range(2):
        one, two = plain(x), synced(x)
        torch.testing.assert_close(two, one)
        one.square().mean().backward()
        two.square().mean().backward()
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(synced.state_dict()[name], value)
    for mine, theirs in zip(plain.parameters(), synced.parameters(), strict=True):
        torch.testing.assert_close(theirs.grad, mine.grad, atol=1e-5, rtol=1e-4)
    plain.eval()
    synced.eval()
    torch.testing.assert_close(synced(x), plain(x))


@pytest.mark.full  # tracing takes about a minute on one core
def test_compiled_parts_are_not_compiled_again(train_dataset: Dataset, tmp_path: Path) -> None:
    """Graphs are counted over steps; the losses are those of the plain step."""
    overrides = ("optim.accumulate=2", "data.batch_size=4")
    plain = small_config(train_dataset, tmp_path, *overrides)
    chosen = small_config(train_dataset, tmp_path, *overrides, "run.compile=eager")
    torch._dynamo.reset()
    counters.clear()
    steps, graphs = [], []
    for config in (plain, chosen):
        parts = build_parts(config, CPU)
        step = make_step(config, parts)
        metrics = []
        for at in range(4):
            metrics.append(step(make_batch(config, at))[0])
            graphs.append(counters["stats"]["unique_graphs"])
        steps.append((metrics, state_of(parts)))
    assert graphs[3] == 0
    assert graphs[4] >= 5
    assert graphs[5:] == [graphs[4]] * 3
    assert not counters["graph_break"]
    for ours, theirs in zip(steps[0][0], steps[1][0], strict=True):
        for name, value in ours.items():
            torch.testing.assert_close(theirs[name], value, atol=1e-5, rtol=1e-4, msg=name)


def test_a_frozen_vae_is_compiled_too(train_dataset: Dataset, tmp_path: Path) -> None:
    """One graph holds its whole encoder; latents and losses are those of the plain step."""
    vae = tmp_path / "vae.safetensors"
    build_parts(small_config(train_dataset, tmp_path), CPU).networks.vae.save(vae)
    options = ("run.mode=ldm", f"init.vae={vae}")
    convolutions: list[int] = []

    def count(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        called = [str(node.target) for node in graph.graph.nodes]
        convolutions.append(sum("conv2d" in target for target in called))
        return graph.forward

    def compile_encoder(call: Callable[..., object], **named: object) -> Callable[..., object]:
        return real(call, backend=count, dynamic=False) if call is encode_frozen else call

    real, metrics = torch.compile, []
    torch._dynamo.reset()
    for more in ((), ("run.compile=eager",)):
        config = small_config(train_dataset, tmp_path, *options, *more)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "compile", compile_encoder)
            step = make_step(config, build_parts(config, CPU))
        metrics.append(step(make_batch(config))[0])
    assert len(convolutions) == 1
    assert convolutions[0] > 10
    for name, value in metrics[0].items():
        torch.testing.assert_close(metrics[1][name], value, atol=1e-5, rtol=1e-4, msg=name)


@pytest.fixture
def small_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    """A ViT for 32 px tiles in the place of h0-mini: 4 patch tokens of width 192."""
    spec = replace(
        table.UNI,
        name="h0-mini",
        construction=TimmConstruction("vit_tiny_patch16_224", frozen(img_size=32, depth=2)),
        dim=192,
        token_dim=192,
        native_grid=2,
        token_grid=2,
        input_px=32,
    )
    monkeypatch.setattr(table, "ENCODERS", {"h0-mini": spec})


ONLINE = ("alignment.source=online", "alignment.weights=random:3")


@pytest.mark.usefixtures("small_encoder")
def test_online_tokens_give_the_caches_loss(train_dataset: Dataset, tmp_path: Path) -> None:
    config = small_config(train_dataset, tmp_path, *ONLINE)
    batch = make_batch(config)
    assert batch.tokens is None
    encode = open_encoder(config, {}, CPU)
    assert encode is not None
    cached = load_encoder("h0-mini", "random:3").encode(batch.tiles).tokens
    assert cached is not None
    losses = []
    for tokens, online in ((None, encode), (cached.half(), None)):
        parts = build_parts(config, CPU)
        wake(parts.networks.sit)
        step = TrainingStep(config, ALONE, parts, encode=online)
        losses.append(step(replace(batch, tokens=tokens))[0])
    for name in ("sit/align", "vae/align", "sit/total", "vae/total"):
        assert losses[0][name] == pytest.approx(float(losses[1][name]), abs=1e-3)
        assert losses[0][name] != 0


@pytest.mark.usefixtures("small_encoder")
def test_a_run_with_online_tokens(train_dataset: Dataset, tmp_path: Path) -> None:
    more = ("run.steps=2", "log.validation=[train]", "log.validation_tiles=3")
    config = small_config(train_dataset, tmp_path / "run", *ONLINE, *more)
    assert train(config) == 0
    assert {"sit/align", "train/align_mean_token"} <= set(read_metrics(tmp_path / "run")[-1])
    with pytest.raises(UserError, match="made with other weights"):
        open_encoder(config, {"weights_sha256": "0" * 64, "weights": "hub"}, CPU)
    with pytest.raises(UserError, match=r"alignment\.source=cache with a view"):
        open_encoder(small_config(train_dataset, tmp_path, *ONLINE, "data.view=jpeg70"), {}, CPU)
    with pytest.raises(UserError, match=r"leave model\.sit\.token_dim out"):
        open_encoder(
            small_config(train_dataset, tmp_path, *ONLINE, "model.sit.token_dim=12"), {}, CPU
        )
