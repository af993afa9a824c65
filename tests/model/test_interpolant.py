import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from common.errors import UserError
from model.interpolant import Interpolant, PathName

PATHS: list[PathName] = ["linear", "cosine"]
times = st.floats(0.01, 0.99)


def scalar(t: float) -> Tensor:
    return torch.tensor(t, dtype=torch.float64)


def batch(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x0, eps = torch.randn(2, 5, 4, 3, 3, dtype=torch.float64, generator=generator)
    return x0, eps


@pytest.mark.parametrize("path", PATHS)
def test_ends_are_data_and_noise(path: PathName) -> None:
    x0, eps = batch()
    interpolant = Interpolant(path)
    assert torch.allclose(interpolant.x_t(x0, eps, scalar(0)), x0)
    assert torch.allclose(interpolant.x_t(x0, eps, scalar(1)), eps)


@pytest.mark.parametrize("path", PATHS)
@given(t=times)
def test_derivatives_are_those_of_alpha_and_sigma(path: PathName, t: float) -> None:
    interpolant = Interpolant(path)
    h = 1e-6
    for value, derivative in (
        (interpolant.alpha, interpolant.d_alpha),
        (interpolant.sigma, interpolant.d_sigma),
    ):
        slope = (value(scalar(t + h)) - value(scalar(t - h))) / (2 * h)
        assert float(derivative(scalar(t))) == pytest.approx(float(slope), abs=1e-8)


def test_linear_path_in_closed_form() -> None:
    x0, eps = batch()
    t = torch.linspace(0.1, 0.9, 5, dtype=torch.float64)
    linear = Interpolant()
    for b in range(5):
        x = linear.x_t(x0, eps, t)[b]
        assert torch.allclose(x, (1 - t[b]) * x0[b] + t[b] * eps[b])
        assert torch.equal(linear.velocity(x0, eps, t)[b], eps[b] - x0[b])


@pytest.mark.parametrize("path", PATHS)
def test_data_and_noise_invert_the_path(path: PathName) -> None:
    x0, eps = batch()
    t = torch.tensor([0.0, 0.2, 0.5, 0.9, 1.0], dtype=torch.float64)
    interpolant = Interpolant(path)
    x, v = interpolant.x_t(x0, eps, t), interpolant.velocity(x0, eps, t)
    assert torch.allclose(interpolant.data(v, x, t), x0)
    assert torch.allclose(interpolant.noise(v, x, t), eps)


@given(t=times)
def test_linear_drift_is_its_closed_form(t: float) -> None:
    x, v = batch(1)
    drift = Interpolant("linear").drift(v, x, scalar(t))
    assert torch.allclose(drift, (2 - t) * v + x)


@pytest.mark.parametrize("path", PATHS)
@given(t=times)
def test_score_and_drift_agree_with_the_general_form(path: PathName, t: float) -> None:
    """REPA's form: s = (r v - x) / (sigma^2 - r sigma' sigma), r = alpha / alpha'; d = v - t s."""
    x, v = batch(2)
    if path == "linear":
        alpha, d_alpha, sigma, d_sigma = 1 - t, -1.0, t, 1.0
    else:
        angle = math.pi / 2 * t
        alpha, sigma = math.cos(angle), math.sin(angle)
        d_alpha, d_sigma = -math.pi / 2 * sigma, math.pi / 2 * alpha
    ratio = alpha / d_alpha
    score = (ratio * v - x) / (sigma**2 - ratio * d_sigma * sigma)
    interpolant = Interpolant(path)
    assert torch.allclose(interpolant.score(v, x, scalar(t)), score, rtol=1e-8)
    assert torch.allclose(interpolant.drift(v, x, scalar(t)), v - t * score, rtol=1e-8)


@pytest.mark.parametrize("path", PATHS)
def test_score_is_the_gradient_of_a_gaussians_log_density(path: PathName) -> None:
    mean, std = 0.4, 1.3
    interpolant = Interpolant(path)
    x = torch.linspace(-3, 3, 7, dtype=torch.float64, requires_grad=True)
    for t in (0.05, 0.5, 1.0):
        time = scalar(t)
        alpha, sigma = interpolant.alpha(time), interpolant.sigma(time)
        spread = ((alpha * std) ** 2 + sigma**2).sqrt()
        density = torch.distributions.Normal(alpha * mean, spread).log_prob(x).sum()
        (gradient,) = torch.autograd.grad(density, x)
        deviation = (x - alpha * mean).detach() / spread**2
        data, noise = mean + alpha * std**2 * deviation, sigma * deviation
        v = interpolant.velocity(data, noise, time)
        assert torch.allclose(interpolant.score(v, x.detach(), time), gradient)


@pytest.mark.parametrize("path", PATHS)
def test_everything_is_finite_at_pure_noise(path: PathName) -> None:
    x, v = batch(3)
    assert Interpolant(path).drift(v, x, scalar(1)).isfinite().all()


@pytest.mark.parametrize("path", PATHS)
@given(n=st.floats(-4, 4))
def test_time_from_normal_has_the_given_log_ratio(path: PathName, n: float) -> None:
    interpolant = Interpolant(path)
    t = interpolant.time_from_normal(scalar(n))
    assert float(torch.log(interpolant.sigma(t) / interpolant.alpha(t))) == pytest.approx(n)


def test_a_scalar_time_keeps_the_states_dtype() -> None:
    x = torch.zeros(2, 3)
    assert Interpolant().drift(x, x, scalar(0.5)).dtype == torch.float32


def test_unknown_path_is_refused() -> None:
    with pytest.raises(UserError, match="path is 'sigmoid'; expected one of linear, cosine"):
        Interpolant("sigmoid")  # type: ignore[arg-type]
