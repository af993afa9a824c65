import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from model.latent_norm import LatentNorm, latent_statistics

CHANNELS = 4


def latents(batch: int = 6, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    scale = torch.tensor([0.5, 1.0, 3.0, 0.01])[:, None, None]
    shift = torch.tensor([0.0, -2.0, 10.0, 0.5])[:, None, None]
    return torch.randn(batch, CHANNELS, 7, 7, generator=generator) * scale + shift


def oracle() -> nn.BatchNorm2d:
    return nn.BatchNorm2d(CHANNELS, eps=1e-4, momentum=0.1, affine=False)


def test_training_equals_batch_norm_and_moves_the_same_statistics() -> None:
    norm, expected = LatentNorm(CHANNELS), oracle()
    for seed in range(3):
        z = latents(seed=seed)
        assert torch.allclose(norm.normalise(z), expected(z), atol=1e-4)
    assert torch.allclose(norm.running_mean, expected.running_mean)
    assert torch.allclose(norm.running_var, expected.running_var, rtol=1e-5)
    assert int(norm.num_batches_tracked) == 3


def test_evaluation_uses_the_running_statistics_and_leaves_them() -> None:
    norm, expected = LatentNorm(CHANNELS), oracle()
    norm(latents()), expected(latents())
    norm.eval(), expected.eval()
    before = norm.running_mean.clone()
    z = latents(seed=9)
    assert torch.allclose(norm(z), expected(z), atol=1e-4)
    assert torch.equal(norm.running_mean, before)


def test_the_batch_variance_is_biased_and_the_running_one_unbiased() -> None:
    norm = LatentNorm(CHANNELS, eps=0.0, momentum=1.0)
    z = latents(batch=1)[:, :, :2, :2]
    x = norm.normalise(z)
    assert torch.allclose(x.var(dim=(0, 2, 3), correction=0), torch.ones(CHANNELS), rtol=1e-4)
    assert torch.allclose(norm.running_var, z.var(dim=(0, 2, 3), correction=1), rtol=1e-4)


def test_use_batch_overrides_the_mode() -> None:
    norm = LatentNorm(CHANNELS)
    z = latents()
    running = norm.normalise(z, use_batch=False)
    assert torch.allclose(running, z / (1 + 1e-4) ** 0.5)
    assert int(norm.num_batches_tracked) == 0
    norm.eval()
    norm.normalise(z, use_batch=True)
    assert int(norm.num_batches_tracked) == 1


def test_starts_at_mean_zero_and_variance_one() -> None:
    norm = LatentNorm(CHANNELS)
    assert norm.running_mean.tolist() == [0] * CHANNELS
    assert norm.running_var.tolist() == [1] * CHANNELS


def test_denormalise_takes_no_eps() -> None:
    norm = LatentNorm(CHANNELS).eval()
    norm(latents()), norm.update(latent_statistics(latents(seed=2)))
    x = latents(seed=3)
    std, mean = norm.running_var.sqrt(), norm.running_mean
    assert torch.allclose(norm.denormalise(x), x * std[:, None, None] + mean[:, None, None])


def test_denormalise_inverts_normalise_but_for_eps() -> None:
    norm = LatentNorm(CHANNELS, eps=0.0).eval()
    norm.update(latent_statistics(latents()))
    z = latents(seed=4)
    assert torch.allclose(norm.denormalise(norm.normalise(z)), z, atol=1e-4)


def test_batch_norms_state_loads() -> None:
    other = oracle()
    other(latents())
    norm = LatentNorm(CHANNELS)
    norm.load_state_dict(other.state_dict())
    assert torch.equal(norm.running_var, other.running_var)
    assert set(norm.state_dict()) == {"running_mean", "running_var", "num_batches_tracked"}


def test_half_precision_latents_are_normalised_in_float32() -> None:
    z = latents()[:, :2]
    x = LatentNorm(2).normalise(z.bfloat16())
    assert x.dtype == torch.float32
    assert torch.allclose(x, LatentNorm(2).normalise(z.bfloat16().float()))


def test_micro_batches_with_the_whole_batchs_statistics_equal_one_batch() -> None:
    whole, parts = LatentNorm(CHANNELS), LatentNorm(CHANNELS)
    z = latents(batch=8)
    expected = whole.normalise(z)
    statistics = latent_statistics(z)
    parts.update(statistics)
    chunks = [parts.normalise_with(c, statistics.mean, statistics.variance) for c in z.split(3)]
    assert torch.equal(torch.cat(chunks), expected)
    assert torch.equal(parts.running_var, whole.running_var)


def test_align_gradient_is_affine_and_batch_gradient_is_batch_norms() -> None:
    z, weight = latents().requires_grad_(), latents(seed=7)
    norm, expected = LatentNorm(CHANNELS), oracle()
    (running,) = torch.autograd.grad((norm.normalise(z, use_batch=False) * weight).sum(), z)
    assert torch.allclose(running, weight / (1 + 1e-4) ** 0.5)
    (batch,) = torch.autograd.grad((norm.normalise(z) * weight).sum(), z)
    (reference,) = torch.autograd.grad((expected(z) * weight).sum(), z)
    assert torch.allclose(batch, reference, rtol=1e-3, atol=1e-3)


def test_no_graph_break() -> None:
    norm = LatentNorm(CHANNELS)
    for use_batch in (False, True):
        torch._dynamo.reset()
        explained = torch._dynamo.explain(norm.normalise)(latents(), use_batch=use_batch)
        assert explained.graph_break_count == 0, explained.break_reasons


def _rank(rank: int, world: int, store: str, sizes: list[int], out: str) -> None:
    """One rank: normalise its share, backpropagate, save what came out."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    z = latents(batch=sum(sizes)).split(sizes)[rank].clone().requires_grad_()
    weight = latents(batch=sum(sizes), seed=7).split(sizes)[rank]
    norm = LatentNorm(CHANNELS)
    x = norm.normalise(z)
    (x * weight).sum().backward()
    compiled = torch.compile(LatentNorm(CHANNELS).normalise, backend="eager", fullgraph=True)
    values = {"x": x.detach(), "compiled": compiled(z.detach()), "grad": z.grad}
    torch.save(values | norm.state_dict(), Path(out) / f"rank{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # seen once on a loaded machine: the process aborted while it shut down


@pytest.mark.full
def test_ranks_of_different_batch_size_act_as_one_batch(tmp_path: Path) -> None:
    sizes = [1, 5]
    mp.spawn(_rank, args=(2, str(tmp_path / "store"), sizes, str(tmp_path)), nprocs=2)
    ranks = [torch.load(tmp_path / f"rank{r}.pt", weights_only=True) for r in range(2)]
    norm = LatentNorm(CHANNELS)
    z = latents(batch=6).requires_grad_()
    x = norm.normalise(z)
    (x * latents(batch=6, seed=7)).sum().backward()
    assert z.grad is not None
    assert torch.allclose(torch.cat([r["x"] for r in ranks]), x, atol=1e-4)
    assert torch.allclose(torch.cat([r["grad"] for r in ranks]), z.grad, rtol=1e-3, atol=1e-3)
    for values in ranks:
        assert torch.allclose(values["compiled"], values["x"], atol=1e-6)
        assert torch.allclose(values["running_mean"], norm.running_mean, rtol=1e-5)
        assert torch.allclose(values["running_var"], norm.running_var, rtol=1e-5)


@pytest.mark.parametrize("shift", [0.0, 100.0])
def test_statistics_do_not_cancel(shift: float) -> None:
    z = latents(seed=1) + shift
    statistics = latent_statistics(z)
    exact = z.double().var(dim=(0, 2, 3), correction=0)
    assert torch.allclose(statistics.variance.double(), exact, rtol=1e-4)
    assert float(statistics.num_values) == 6 * 49
