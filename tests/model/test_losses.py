"""Every loss against the same formula written as loops over samples, tokens and pixels."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from model.interpolant import Interpolant
from model.losses import (
    alignment_loss,
    denoising_loss,
    generator_loss,
    hinge_discriminator_loss,
    kl_loss,
    l1_reconstruction,
)


def values(tensor: Tensor) -> list[float]:
    return tensor.flatten().tolist()


def mean(numbers: list[float]) -> float:
    return math.fsum(numbers) / len(numbers)


def loop_l1(a: Tensor, b: Tensor) -> float:
    return mean([abs(x - y) for x, y in zip(values(a), values(b), strict=True)])


def loop_kl(m: Tensor, logvar: Tensor) -> float:
    pairs = zip(values(m), values(logvar), strict=True)
    return math.fsum(0.5 * (x * x + math.exp(v) - 1 - v) for x, v in pairs)


def loop_hinge(real: Tensor, fake: Tensor) -> float:
    on_real = mean([max(0.0, 1 - x) for x in values(real)])
    return 0.5 * (on_real + mean([max(0.0, 1 + x) for x in values(fake)]))


def loop_generator(fake: Tensor) -> float:
    return -mean(values(fake))


def loop_alignment(projected: Tensor, tokens: Tensor) -> float:
    cosines = []
    for p, q in zip(projected.tolist(), tokens.tolist(), strict=True):
        dot = math.fsum(x * y for x, y in zip(p, q, strict=True))
        cosines.append(dot / math.sqrt(sum(x * x for x in p) * sum(y * y for y in q)))
    return -mean(cosines)


def loop_denoising(prediction: Tensor, target: Tensor) -> float:
    return mean([(x - y) ** 2 for x, y in zip(values(prediction), values(target), strict=True)])


IMAGE, LATENT, LOGITS, TOKENS = (3, 3, 4, 5), (3, 4, 2, 3), (3, 1, 4, 4), (3, 6, 8)
CASES = [
    (l1_reconstruction, loop_l1, [IMAGE, IMAGE]),
    (kl_loss, loop_kl, [LATENT, LATENT]),
    (hinge_discriminator_loss, loop_hinge, [LOGITS, LOGITS]),
    (generator_loss, loop_generator, [LOGITS]),
    (alignment_loss, loop_alignment, [TOKENS, TOKENS]),
    (denoising_loss, loop_denoising, [LATENT, LATENT]),
]
BY_NAME = pytest.mark.parametrize(
    ("loss", "oracle", "shapes"), CASES, ids=[case[0].__name__ for case in CASES]
)


@BY_NAME
def test_samples_and_their_mean_equal_the_loops(
    loss: Callable[..., Tensor], oracle: Callable[..., float], shapes: list[tuple[int, ...]]
) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = [2 * torch.randn(shape, generator=generator) for shape in shapes]
    want = [oracle(*(tensor[b] for tensor in inputs)) for b in range(3)]
    per_sample = loss(*inputs, reduction="none")
    assert per_sample.tolist() == pytest.approx(want, rel=1e-5)
    assert loss(*inputs).item() == pytest.approx(mean(want), rel=1e-5)
    with pytest.raises(ValueError, match="reduction"):
        loss(*inputs, reduction="sum")


@BY_NAME
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_inputs_are_computed_in_float32(
    loss: Callable[..., Tensor],
    oracle: Callable[..., float],
    shapes: list[tuple[int, ...]],
    dtype: torch.dtype,
) -> None:
    inputs = [torch.randn(shape).to(dtype) for shape in shapes]
    result = loss(*inputs)
    assert result.dtype == torch.float32
    assert torch.equal(result, loss(*(tensor.float() for tensor in inputs)))


@BY_NAME
def test_gradients_are_those_of_finite_differences(
    loss: Callable[..., Tensor], oracle: Callable[..., float], shapes: list[tuple[int, ...]]
) -> None:
    generator = torch.Generator().manual_seed(1)
    inputs = [torch.randn(shape, generator=generator) for shape in shapes]
    inputs[-1].requires_grad_(True)
    loss(*inputs).backward()
    assert inputs[-1].grad is not None
    direction = torch.randn(shapes[-1], generator=generator)
    step = 1e-3
    ahead, behind = (
        mean([oracle(*(t[b] for t in [*inputs[:-1], end])) for b in range(3)])
        for end in (inputs[-1].detach() + sign * step * direction for sign in (1, -1))
    )
    slope = (inputs[-1].grad * direction).sum().item()
    assert slope == pytest.approx((ahead - behind) / (2 * step), rel=2e-2, abs=1e-4)


def test_alignment_ignores_length_and_survives_zero_tokens() -> None:
    a, b = torch.randn(2, 5, 7), torch.randn(2, 5, 7)
    torch.testing.assert_close(alignment_loss(a, b), alignment_loss(3 * a, 0.1 * b))
    assert alignment_loss(a, a).item() == pytest.approx(-1)
    assert alignment_loss(a, -a).item() == pytest.approx(1)
    zero = torch.zeros(2, 5, 7, dtype=torch.float16, requires_grad=True)
    loss = alignment_loss(zero, b)
    loss.backward()
    assert loss.item() == 0
    assert zero.grad is not None
    assert not zero.grad.isnan().any()


def test_a_perfect_prediction_costs_nothing() -> None:
    x = torch.randn(2, 4, 3, 3)
    assert denoising_loss(x, x).item() == l1_reconstruction(x, x).item() == 0
    assert kl_loss(torch.zeros_like(x), torch.zeros_like(x)).item() == 0
    assert hinge_discriminator_loss(x.abs() + 1, -x.abs() - 1).item() == 0


def test_all_losses_and_both_paths_compile_into_one_graph() -> None:
    torch.manual_seed(0)
    tensors = {name: torch.randn(3, 4, 2, 2) for name in ("image", "latent", "eps", "logits")}
    t = torch.rand(3)

    def everything(image: Tensor, latent: Tensor, eps: Tensor, logits: Tensor, t: Tensor) -> Tensor:
        total = l1_reconstruction(image, latent) + kl_loss(latent, eps)
        total = total + hinge_discriminator_loss(logits, image) + generator_loss(logits)
        for path in (Interpolant("linear"), Interpolant("cosine")):
            x, target = path.x_t(latent, eps, t), path.velocity(latent, eps, t)
            total = total + denoising_loss(x, target)
        return total + alignment_loss(image.flatten(2), latent.flatten(2))

    torch._dynamo.reset()
    compiled = torch.compile(everything, backend="aot_eager", fullgraph=True)
    graphs = torch._dynamo.explain(everything)(*tensors.values(), t)
    assert graphs.graph_break_count == 0, graphs.break_reasons
    tensors["image"].requires_grad_()
    torch.testing.assert_close(compiled(*tensors.values(), t), everything(*tensors.values(), t))
