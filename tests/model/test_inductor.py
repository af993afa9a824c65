"""What torch.compile's own compiler makes of the networks: equal values, fused norms."""

import re
from collections.abc import Callable, Iterator
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._inductor.utils import run_and_get_code

from model.discriminator import Discriminator, DiscriminatorConfig
from model.losses import alignment_loss
from model.perceptual import PerceptualLoss
from model.sit import SiT, SiTConfig
from model.vae import VAE, VAEConfig, group_norm_silu

pytestmark = pytest.mark.full


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    with torch._inductor.utils.fresh_cache():
        yield
    torch._dynamo.reset()


@cache
def obstacle() -> str:
    """Why inductor cannot compile here, for want of a C++ compiler for example; "" if it can."""
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(8))
    except torch._inductor.exc.InductorError as error:
        return str(error).splitlines()[0]
    return ""


def compiled(call: Callable[..., Tensor]) -> Callable[..., Tensor]:
    if obstacle():
        pytest.skip(f"inductor cannot compile here: {obstacle()}")
    return torch.compile(call, fullgraph=True)


def sit_loss() -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    torch.manual_seed(0)
    sit = SiT(SiTConfig.preset("tiny", latent_size=8, depth=2, encoder_depth=1))
    for parameter in sit.parameters():
        nn.init.normal_(parameter, std=0.05)
    t, y, tokens = torch.rand(2), torch.randn(2, 768), torch.randn(2, 16, 768)

    def loss(x: Tensor) -> Tensor:
        velocity, projected = sit(x, t, y, return_tokens=True)
        return velocity.square().mean() + alignment_loss(projected, tokens)

    return sit, loss


def vae_loss() -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    torch.manual_seed(0)
    vae = VAE(VAEConfig.preset("tiny")).to(memory_format=torch.channels_last)
    noise = torch.randn(2, 4, 4, 4)
    return vae, lambda images: (vae(images, noise).reconstruction - images).abs().mean()


def discriminator_loss() -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    torch.manual_seed(0)
    discriminator = Discriminator(DiscriminatorConfig.preset("tiny"))
    return discriminator, lambda images: F.relu(1 - discriminator(images)).mean()


def perceptual_loss() -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    perceptual = PerceptualLoss("random:0")
    return perceptual, lambda images: perceptual(images, -images.detach()).mean()


@pytest.mark.parametrize(
    ("build", "shape"),
    [
        (sit_loss, (2, 4, 8, 8)),
        (vae_loss, (2, 3, 32, 32)),
        (discriminator_loss, (2, 3, 32, 32)),
        (perceptual_loss, (2, 3, 32, 32)),
    ],
)
def test_values_and_gradients_are_the_eager_ones(
    build: Callable[[], tuple[nn.Module, Callable[[Tensor], Tensor]]], shape: tuple[int, ...]
) -> None:
    network, loss = build()
    results = []
    for call in (loss, compiled(loss)):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).requires_grad_()
        network.zero_grad()
        value = call(x)
        value.backward()
        learnt = [p.grad for p in network.parameters() if p.grad is not None]
        results.append([value.detach(), x.grad, *learnt])
    assert len(results[0]) == len(results[1])
    for eager, fused in zip(*results, strict=True):
        torch.testing.assert_close(fused, eager, atol=1e-4, rtol=1e-3)


def test_norm_and_silu_are_one_kernel_without_a_copy() -> None:
    """In channels_last: nothing of the map's size is written but the result, in its layout."""
    norm = nn.GroupNorm(8, 32, eps=1e-6).requires_grad_(False)
    nn.init.normal_(norm.weight)
    x = torch.randn(2, 32, 16, 16).contiguous(memory_format=torch.channels_last)
    fused, (code,) = run_and_get_code(compiled(lambda x: group_norm_silu(x, norm)), x)
    assert len(re.findall(r"^ +cpp_fused_native_group_norm_silu\w*\(", code, re.MULTILINE)) == 1
    assert code.count("empty_strided_cpu((2, 32, 16, 16)") == 1
    assert fused.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(fused, group_norm_silu(x, norm))
