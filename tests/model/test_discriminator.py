"""PatchGAN: counts, keys, initialisation, and the frozen call."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from common.errors import UserError
from model.discriminator import Discriminator, DiscriminatorConfig


def tiny() -> Discriminator:
    torch.manual_seed(0)
    return Discriminator(DiscriminatorConfig.preset("tiny"))


def test_counts_keys_output_and_operations() -> None:
    with torch.device("meta"):
        network = Discriminator()
        assert sum(p.numel() for p in network.parameters()) == 2_765_633
        with FlopCounterMode(display=False) as counter:
            logits = network(torch.zeros(2, 3, 224, 224))
    assert logits.shape == (2, 1, 26, 26)
    assert counter.get_total_flops() / 2e9 == pytest.approx(4.79, abs=0.005)
    widths = (3, 64, 128, 256, 512, 1)
    expected: dict[str, tuple[int, ...]] = {"main.0.bias": (64,), "main.11.bias": (1,)}
    for index, before, here in zip((0, 2, 5, 8, 11), widths[:-1], widths[1:], strict=True):
        expected[f"main.{index}.weight"] = (here, before, 4, 4)
    for index, width in ((3, 128), (6, 256), (9, 512)):
        for name in ("weight", "bias", "running_mean", "running_var"):
            expected[f"main.{index}.{name}"] = (width,)
        expected[f"main.{index}.num_batches_tracked"] = ()
    assert {key: tuple(v.shape) for key, v in network.state_dict().items()} == expected


def test_a_logit_sees_seventy_pixels() -> None:
    network = tiny().eval()
    images = torch.randn(1, 3, 224, 224, requires_grad=True)
    network(images)[0, 0, 13, 13].backward()
    assert images.grad is not None
    seen = images.grad.abs().sum((0, 1)) > 0
    rows, columns = seen.any(1).nonzero(), seen.any(0).nonzero()
    assert rows.max() - rows.min() + 1 == columns.max() - columns.min() + 1 == 70


def test_initialisation() -> None:
    torch.manual_seed(0)
    for module in Discriminator().modules():
        if isinstance(module, nn.Conv2d):
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.1)
            assert abs(module.weight.mean().item()) < 0.002
        elif isinstance(module, nn.BatchNorm2d):
            assert module.weight.mean().item() == pytest.approx(1, abs=0.01)
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.3)
            assert not module.bias.any()


def test_a_frozen_call_is_the_same_call_without_parameter_gradients() -> None:
    images = torch.randn(2, 3, 64, 64)
    plain, frozen = tiny(), tiny()
    inputs = [images.clone().requires_grad_(True) for _ in range(2)]
    logits = [plain(inputs[0]), frozen(inputs[1], frozen=True)]
    assert torch.equal(*logits)
    for output in logits:
        output.sum().backward()
    assert inputs[0].grad is not None
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad)
    assert all(p.grad is not None for p in plain.parameters())
    assert all(p.grad is None and p.requires_grad for p in frozen.parameters())
    for key, value in plain.state_dict().items():  # the running statistics moved alike
        assert torch.equal(value, frozen.state_dict()[key]), key
    assert frozen.state_dict()["main.3.num_batches_tracked"] == 1


@pytest.mark.parametrize("frozen", [False, True])
def test_it_compiles_without_graph_breaks(frozen: bool) -> None:
    network = tiny()
    torch._dynamo.reset()
    report = torch._dynamo.explain(network)(torch.randn(2, 3, 32, 32), frozen=frozen)
    assert report.graph_break_count == 0, report.break_reasons


def test_hinge_steps_tell_two_kinds_of_images_apart() -> None:
    from model.losses import hinge_discriminator_loss

    network = tiny()
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3)
    generator = torch.Generator().manual_seed(0)
    losses = []
    for _ in range(15):
        real = torch.rand(4, 3, 48, 48, generator=generator)
        fake = torch.randn(4, 3, 48, 48, generator=generator) * 0.3
        loss = hinge_discriminator_loss(network(real), network(fake))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_wrong_settings_are_refused() -> None:
    with pytest.raises(UserError, match="base_channels"):
        DiscriminatorConfig(base_channels=0)
    with pytest.raises(UserError, match="tiny"):
        DiscriminatorConfig.preset("huge")
    assert DiscriminatorConfig.preset("tiny").base_channels == 8
