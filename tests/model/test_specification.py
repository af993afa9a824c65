"""Operation counts of the specification's section 7.1, for a whole training step and an image.

The parts' own tests hold their forward counts; here are the shares that only passes and
gradients make, and the sums. One multiply-add is two operations.
"""

from collections import Counter
from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from model.discriminator import Discriminator
from model.encoders import encoder_spec
from model.perceptual import PerceptualLoss
from model.sampler import Guidance, time_nodes
from model.sit import SiT, SiTConfig
from model.vae import VAE

PEAKS = {"A100": 312e12, "H200": 989e12}  # dense bf16 FLOP/s of the data sheets


def gflop(call: Callable[[], object]) -> float:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops() / 1e9


def empty(*shape: int, grad: bool = False) -> Tensor:
    return torch.empty(shape, device="meta", requires_grad=grad)


@cache
def networks() -> tuple[VAE, SiT, Discriminator]:
    with torch.device("meta"):
        return VAE(), SiT(SiTConfig()), Discriminator()


def encode_and_back(vae: VAE) -> None:
    posterior = vae.encode(empty(1, 3, 224, 224))
    (posterior.mean.sum() + posterior.logvar.sum()).backward()


def sit_and_back(sit: SiT) -> None:
    latents, t, y = empty(1, 4, 28, 28), empty(1), empty(1, 768)
    velocity, tokens = sit(latents, t, y, return_tokens=True)
    (velocity.sum() + tokens.sum()).backward()


def judge_and_back(discriminator: Discriminator) -> None:
    real, fake = empty(1, 3, 224, 224), empty(1, 3, 224, 224)
    (discriminator(real).sum() + discriminator(fake).sum()).backward()


@cache
def training_step() -> dict[str, float]:
    """GFLOP a tile of each share of a step, counted while it runs on shapes alone."""
    vae, sit, discriminator = networks()
    image, latents = empty(1, 3, 224, 224, grad=True), empty(1, 4, 28, 28, grad=True)
    perceptual = PerceptualLoss("random:0").to("meta")
    with torch.device("meta"):
        encoder = encoder_spec("h0-mini").construction.build_network()
    generator = gflop(lambda: discriminator(image, frozen=True).sum().backward())
    return {
        "encoder": gflop(lambda: encode_and_back(vae)),
        "decoder": gflop(lambda: vae.decode(latents).sum().backward()),
        "sit": gflop(lambda: sit_and_back(sit)),
        "align": gflop(lambda: sit.align_tokens(latents, empty(1), empty(1, 768)).sum().backward()),
        "lpips": gflop(lambda: perceptual(image, empty(1, 3, 224, 224)).sum().backward()),
        "patchgan": generator + gflop(lambda: judge_and_back(discriminator)),
        "h0-mini": gflop(lambda: encoder(empty(1, 3, 224, 224))),
    }


@pytest.mark.parametrize(
    ("part", "expected"),
    [
        ("encoder", 625),
        ("decoder", 1428),
        ("sit", 550),
        # The specification's 109 counts input gradients as one forward; attention's own products
        # have two inputs, so 8 blocks cost 4 T² D each more, 1.4 in all.
        ("align", 110.6),
        ("lpips", 92),
        ("patchgan", 38),
        ("h0-mini", 47.1),
    ],
)
def test_operations_of_a_training_step(part: str, expected: float) -> None:
    assert training_step()[part] == pytest.approx(expected, abs=0.5)


def test_operations_of_a_whole_training_step_and_their_shares() -> None:
    step = training_step()
    total = sum(step.values())
    assert total == pytest.approx(2890, abs=3)
    assert total - step["h0-mini"] == pytest.approx(2843, abs=3)
    assert 640 * total / 1e6 == pytest.approx(1.85, abs=0.005)  # PFLOP at the report's batch
    flop = 400_000 * 640 * total * 1e9
    assert flop == pytest.approx(7.4e20, rel=0.001)
    hours = {name: flop / (0.4 * peak) / 3600 for name, peak in PEAKS.items()}
    assert hours == pytest.approx({"A100": 1650, "H200": 520}, rel=0.003)
    tiles_per_s = {name: peak / (total * 1e9) for name, peak in PEAKS.items()}
    assert tiles_per_s == pytest.approx({"A100": 108, "H200": 342}, rel=0.002)
    shares = {"encoder": 21.6, "decoder": 49.4, "sit": 19.0, "align": 3.8, "lpips": 3.2}
    shares |= {"patchgan": 1.3, "h0-mini": 1.6}
    for part, percent in shares.items():
        assert 100 * step[part] / total == pytest.approx(percent, abs=0.06), part


def test_attentions_own_products_are_a_small_share_of_a_block() -> None:
    T, D = 196, 1152
    block = gflop(lambda: networks()[1].blocks[0](empty(1, T, D), empty(1, D)))
    assert 4 * T**2 * D / 1e9 / block == pytest.approx(0.0275, abs=5e-5)


def test_operations_at_256_px() -> None:
    vae, _, _ = networks()
    assert gflop(lambda: vae.encode(empty(1, 3, 256, 256))) == pytest.approx(272.7, abs=0.05)
    assert gflop(lambda: vae.decode(empty(1, 4, 32, 32))) == pytest.approx(622.2, abs=0.05)
    with torch.device("meta"):
        sit = SiT(SiTConfig(latent_size=32))
    latents, t, y = empty(1, 4, 32, 32), empty(1), empty(1, 768)
    assert gflop(lambda: sit(latents, t, y, return_tokens=True)) == pytest.approx(241.4, abs=0.05)


def test_operations_of_an_image_of_the_reports_sampler() -> None:
    vae, sit, _ = networks()
    guidance = Guidance(2.5, 0.0, 0.75)
    starts = time_nodes("sde", 250)[:-1]
    evaluations = sum(2 if guidance.active(t) else 1 for t in starts)
    once = gflop(lambda: sit(empty(1, 4, 28, 28), empty(1), empty(1, 768)))
    decode = gflop(lambda: vae.decode(empty(1, 4, 28, 28)))
    assert evaluations == 435
    image = evaluations * once + decode
    assert image / 1e3 == pytest.approx(78.9, abs=0.05)  # TFLOP
    assert image * 1e9 / PEAKS["H200"] == pytest.approx(0.080, abs=5e-4)  # s at the peak


class OutputCount(TorchDispatchMode):
    """Elements that each kind of operator has put out."""

    def __init__(self) -> None:
        super().__init__()
        self.elements: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        first = out[0] if isinstance(out, tuple | list) else out
        if isinstance(first, Tensor):
            self.elements[func.overloadpacket.__name__] += first.numel()
        return out


def test_elements_of_the_vaes_maps_a_tile() -> None:
    """What memory and bandwidth go to: 0.87 GB in bf16 if all is kept, 0.34 with recompute."""
    vae, _, _ = networks()
    with torch.no_grad(), OutputCount() as count:
        vae.decode(vae.encode(empty(1, 3, 224, 224)).mean)
    norms, convolutions = (count.elements[k] / 1e6 for k in ("native_group_norm", "convolution"))
    assert norms == pytest.approx(134.5, abs=0.05)
    assert count.elements["silu"] / 1e6 == pytest.approx(norms - 2 * 512 * 28**2 / 1e6)
    assert norms + convolutions == pytest.approx(302, abs=0.5)
    assert 2e6 * (2 * norms + convolutions) / 1e9 == pytest.approx(0.87, abs=0.005)
    assert 2e6 * convolutions / 1e9 == pytest.approx(0.34, abs=0.005)


def test_a_conditioner_of_two_layers_would_count_684_million() -> None:
    """The published "683M" fits either: the count does not tell the report's conditioner."""
    with torch.device("meta"):
        rest = SiT(SiTConfig(conditioning="none"))
        two_layers = nn.Sequential(nn.Linear(768, 1152), nn.Linear(1152, 1152))
    modules = (rest, two_layers)
    total = sum(p.numel() for m in modules for p in m.parameters() if p.requires_grad)
    assert total == pytest.approx(684.0e6, abs=0.05e6)
