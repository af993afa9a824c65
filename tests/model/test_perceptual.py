"""LPIPS: equal to the lpips package on the same weights, and honest about where they come from."""

import hashlib
from pathlib import Path

import lpips
import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from common.errors import UserError
from model.perceptual import PerceptualLoss


@pytest.fixture(scope="module")
def published() -> lpips.LPIPS:
    """The package's LPIPS with its published heads on a VGG16 of random weights."""
    torch.manual_seed(0)
    return lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False).eval()


@pytest.fixture(scope="module")
def vgg16(published: lpips.LPIPS) -> dict[str, Tensor]:
    """The package's VGG16 under torchvision's names, with a classifier to be left out."""
    slices = {k.split(".", 1)[1]: v for k, v in published.net.state_dict().items()}
    features = {f"features.{key}": value for key, value in slices.items()}
    return {**features, "classifier.6.bias": torch.zeros(1000)}


@pytest.fixture(scope="module")
def loss() -> PerceptualLoss:
    return PerceptualLoss("random:0")


@pytest.fixture(scope="module")
def images() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(3, 3, 64, 64, generator=generator) * 2 - 1
    blurred = torch.nn.functional.avg_pool2d(images, 5, stride=1, padding=2)
    return images, blurred


def test_it_equals_the_lpips_package(
    published: lpips.LPIPS,
    vgg16: dict[str, Tensor],
    images: tuple[Tensor, Tensor],
    tmp_path: Path,
) -> None:
    torch.save(vgg16, tmp_path / "vgg16.pth")  # without heads: the package's are taken
    ours = PerceptualLoss(str(tmp_path / "vgg16.pth"))
    with torch.no_grad():
        want = published(*images).flatten()
        torch.testing.assert_close(ours(*images), want, atol=1e-6, rtol=1e-4)
        torch.testing.assert_close(ours(*reversed(images)), want, atol=1e-6, rtol=1e-4)
        assert ours(images[0], images[0]).tolist() == [0, 0, 0]
        legacy = PerceptualLoss(str(tmp_path / "vgg16.pth"), legacy_lpips_range=True)
        doubled = published(*images, normalize=True).flatten()  # maps x to 2x - 1 first
        torch.testing.assert_close(legacy(*images), doubled, atol=1e-6, rtol=1e-4)
    assert not ours.is_random


def test_the_packages_heads_are_those_that_the_reference_fetches() -> None:
    """The file that REPA-E's loss downloads for itself, known by its md5."""
    heads = Path(lpips.__file__).parent / "weights" / "v0.1" / "vgg.pth"
    assert hashlib.md5(heads.read_bytes()).hexdigest() == "d507d7349b931f0638a25a48a722f98a"


def test_heads_in_the_file_are_used(
    vgg16: dict[str, Tensor], images: tuple[Tensor, Tensor], tmp_path: Path
) -> None:
    widths = (64, 128, 256, 512, 512)
    heads = {
        f"lin{i}.model.1.weight": torch.full((1, w, 1, 1), 1 / w) for i, w in enumerate(widths)
    }
    save_file({**vgg16, **heads}, tmp_path / "whole.safetensors")
    whole = PerceptualLoss(str(tmp_path / "whole.safetensors"))
    torch.save(vgg16, tmp_path / "vgg16.pth")
    package = PerceptualLoss(str(tmp_path / "vgg16.pth"))
    assert not torch.allclose(whole(*images), package(*images))
    assert whole.weights_sha256 != package.weights_sha256


def test_gradients_reach_the_image_alone_and_are_finite(
    loss: PerceptualLoss, images: tuple[Tensor, Tensor]
) -> None:
    for position in (0, 1):
        pair = [image.clone() for image in images]
        pair[position].requires_grad_(True)
        loss(*pair).sum().backward()
        assert pair[position].grad is not None
        assert pair[position].grad.isfinite().all()
        assert pair[position].grad.abs().sum() > 0
    assert all(p.grad is None for p in loss.parameters())


def test_a_position_without_features_has_no_nan_gradient() -> None:
    loss = PerceptualLoss("random:0")
    with torch.no_grad():
        loss.features[0].bias.fill_(-1e3)  # the first ReLU gives 0 everywhere
    images = torch.rand(1, 3, 32, 32, requires_grad=True)
    loss(images, torch.rand(1, 3, 32, 32)).sum().backward()
    assert images.grad is not None
    assert images.grad.isfinite().all()


def test_random_weights_depend_on_the_seed_alone(
    loss: PerceptualLoss, images: tuple[Tensor, Tensor]
) -> None:
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    first = PerceptualLoss("random:0")
    assert torch.equal(torch.random.get_rng_state(), before)
    assert first.is_random
    assert loss.weights_sha256 == first.weights_sha256
    assert PerceptualLoss("random:1").weights_sha256 != first.weights_sha256
    assert (first(*images) > 0).all()


def test_none_switches_the_term_off(images: tuple[Tensor, Tensor]) -> None:
    off = PerceptualLoss("none")
    assert off.is_off
    assert off(*images).tolist() == [0, 0, 0]
    assert not list(off.parameters())


def test_operations_a_224_px_tile() -> None:
    loss = PerceptualLoss("random:0")
    with torch.device("meta"):
        image = torch.zeros(1, 3, 224, 224)
    with FlopCounterMode(display=False) as counter:
        loss.to("meta")(image, image)
    assert counter.get_total_flops() / 2e9 == pytest.approx(30.7, abs=0.05)  # two images


def test_it_compiles_without_graph_breaks(
    loss: PerceptualLoss, images: tuple[Tensor, Tensor]
) -> None:
    torch._dynamo.reset()
    report = torch._dynamo.explain(loss)(images[0].clone().requires_grad_(True), images[1])
    assert report.graph_break_count == 0, report.break_reasons


def test_weights_that_cannot_be_had_are_one_clear_line(
    vgg16: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    part = {key: value for key, value in vgg16.items() if not key.startswith("features.28")}
    save_file(part, tmp_path / "part.safetensors")
    for weights, words in (
        (str(tmp_path / "absent.pth"), "no such file"),
        (str(tmp_path / "part.safetensors"), "missing features.28.weight"),
        ("random", "seed"),
    ):
        with pytest.raises(UserError, match=words) as caught:
            PerceptualLoss(weights)
        assert "\n" not in str(caught.value)


def test_the_cache_is_used_and_its_absence_explained(
    vgg16: dict[str, Tensor],
    images: tuple[Tensor, Tensor],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    # a server that is not there: what a compute node without a network sees
    published = torchvision.models.VGG16_Weights.IMAGENET1K_V1
    unreachable = f"http://127.0.0.1:9/{published.url.rsplit('/', 1)[1]}"
    monkeypatch.setattr(published.value, "url", unreachable, raising=True)
    with pytest.raises(UserError) as caught:
        PerceptualLoss("hub")
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in ("vgg16-397923af.pth", "random:SEED", "none"))
    cache = tmp_path / "hub" / "checkpoints"
    cache.mkdir(parents=True, exist_ok=True)
    torch.save(vgg16, cache / "vgg16-397923af.pth")
    torch.save(vgg16, tmp_path / "vgg16.pth")
    from_cache, from_file = PerceptualLoss("hub"), PerceptualLoss(str(tmp_path / "vgg16.pth"))
    assert from_cache.weights_sha256 == from_file.weights_sha256
