"""The samplers against a Gaussian target, whose velocity, flow and discrete moments are exact."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from common.errors import UserError
from model.interpolant import Interpolant
from model.noise import RandomStream, normal
from model.sampler import Guidance, GuidedVelocity, Solver, integrate, sample, time_nodes
from model.sit import SiT, SiTConfig

MEAN, STD = 0.3, 0.6


def gaussian_velocity(
    mean: float, std: float, path: Interpolant
) -> Callable[[Tensor, float], Tensor]:
    """E[velocity | x_t = x] for data N(mean, std^2): the regression of two joint Gaussians."""

    def velocity(x: Tensor, t: float) -> Tensor:
        time = torch.tensor(t, dtype=torch.float64)
        alpha, sigma = path.alpha(time), path.sigma(time)
        deviation = x - alpha * mean
        variance = (alpha * std) ** 2 + sigma**2
        data = mean + alpha * std**2 / variance * deviation
        noise = sigma / variance * deviation
        return path.d_alpha(time) * data + path.d_sigma(time) * noise

    return velocity


def sde_as_affine_map(path: Interpolant, steps: int) -> tuple[Tensor, Tensor]:
    """The sampler's offset [] and its weight of the start and of each step's noise [steps].

    For a Gaussian target the sampler is affine in (x_1, noise_0, ..., noise_{steps-2}): row k of
    the batch has the k-th of these at 1 and the others at 0, the last row has none.
    """
    start = torch.zeros(steps + 1, dtype=torch.float64)
    start[0] = 1

    def noise(index: int) -> Tensor:
        unit = torch.zeros(steps + 1, dtype=torch.float64)
        unit[index + 1] = 1
        return unit

    ends = integrate(
        gaussian_velocity(MEAN, STD, path), start, steps=steps, interpolant=path, noise=noise
    )
    return ends[-1], ends[:-1] - ends[-1]


def recursion_of_moments(mean: float, std: float, steps: int) -> tuple[float, float]:
    """Mean and variance of Euler-Maruyama on the linear path, by the scalar recursion.

    v = a x + b with a, b of the Gaussian; drift (2-t) v + x; x' = x + d dt + sqrt(2t |dt|) eps.
    """
    nodes = [1 - 0.96 * k / (steps - 1) for k in range(steps)] + [0.0]
    m, variance = 0.0, 1.0
    for k in range(steps):
        t, dt = nodes[k], nodes[k + 1] - nodes[k]
        total = (1 - t) ** 2 * std**2 + t**2
        a = (t - (1 - t) * std**2) / total
        b = -mean - a * (1 - t) * mean
        factor = 1 + dt * ((2 - t) * a + 1)
        m = factor * m + dt * (2 - t) * b
        variance = factor**2 * variance + (2 * t * -dt if k < steps - 1 else 0)
    return m, variance


@pytest.mark.parametrize("steps", [2, 10, 250])
def test_sde_moments_equal_the_exact_discrete_recursion(steps: int) -> None:
    offset, weights = sde_as_affine_map(Interpolant(), steps)
    mean, variance = recursion_of_moments(MEAN, STD, steps)
    assert float(offset) == pytest.approx(mean, abs=1e-12)
    assert float(weights.square().sum()) == pytest.approx(variance, rel=1e-11)


def test_sde_of_250_steps_gives_a_unit_gaussian_the_known_bias() -> None:
    assert math.sqrt(recursion_of_moments(0, 1, 250)[1]) == pytest.approx(0.9952, abs=5e-5)
    velocity = gaussian_velocity(0, 1, Interpolant())
    start = torch.eye(251, dtype=torch.float64)[0]
    ends = integrate(
        velocity, start, steps=250, noise=lambda k: torch.eye(251, dtype=torch.float64)[k + 1]
    )
    assert float(ends.norm()) == pytest.approx(0.9952, abs=5e-5)


def test_sde_approaches_the_target_on_the_cosine_path() -> None:
    offset, weights = sde_as_affine_map(Interpolant("cosine"), 500)
    assert float(offset) == pytest.approx(MEAN, abs=0.01)
    assert float(weights.norm()) == pytest.approx(STD, abs=0.01)


def test_sde_draws_have_the_moments_of_the_recursion() -> None:
    seeds = torch.arange(4)
    shape = (5000,)

    def noise(index: int) -> Tensor:
        return normal(
            seeds, shape, stream=RandomStream.SAMPLE_STEP, step=index, dtype=torch.float64
        )

    start = normal(seeds, shape, stream=RandomStream.SAMPLE_START, dtype=torch.float64)
    ends = integrate(
        gaussian_velocity(MEAN, STD, Interpolant()), start, steps=40, noise=noise
    ).flatten()
    mean, variance = recursion_of_moments(MEAN, STD, 40)
    n = ends.numel()
    assert abs(float(ends.mean()) - mean) < 4 * (variance / n) ** 0.5
    assert abs(float(ends.var()) / variance - 1) < 4 * (2 / n) ** 0.5


@pytest.mark.parametrize("path", ["linear", "cosine"])
@pytest.mark.parametrize(("solver", "order"), [("ode", 1), ("heun", 2), ("dpm", 2)])
def test_order_of_convergence_from_the_slope_of_the_error(
    path: str, solver: Solver, order: int
) -> None:
    interpolant = Interpolant(path)  # type: ignore[arg-type]
    x = torch.tensor([-1.7, 0.4, 2.2], dtype=torch.float64)
    # The flow keeps the standardised value: x_1 ~ N(0, 1) goes to mean + std x_1.
    exact = MEAN + STD * x
    velocity = gaussian_velocity(MEAN, STD, interpolant)

    def error(steps: int) -> float:
        end = integrate(velocity, x, steps=steps, solver=solver, interpolant=interpolant)
        return float((end - exact).abs().max())

    assert math.log2(error(160) / error(320)) == pytest.approx(order, abs=0.1)
    assert error(320) < (1e-2 if order == 1 else 1e-3)


def test_dpm_solver_is_exact_for_a_single_point() -> None:
    """One data point: the data prediction is constant, which the exponential integrator solves."""
    path = Interpolant()
    x = torch.tensor([2.0, -1.0], dtype=torch.float64)
    end = integrate(gaussian_velocity(0.7, 0.0, path), x, steps=5, solver="dpm")
    assert torch.allclose(end, torch.full_like(end, 0.7), atol=1e-12)


class CountingVelocity:
    """A velocity that counts its calls and remembers their times."""

    def __init__(self, value: float) -> None:
        self.value = value
        self.times: list[float] = []

    def __call__(self, x: Tensor, t: float) -> Tensor:
        self.times.append(t)
        return self.value * torch.ones_like(x)


def count(solver: Solver, steps: int, guidance: Guidance) -> tuple[list[float], list[float]]:
    conditional, null = CountingVelocity(1.0), CountingVelocity(0.5)
    integrate(
        GuidedVelocity(conditional, null, guidance),
        torch.zeros(1),
        steps=steps,
        solver=solver,
        noise=lambda index: torch.zeros(1),
    )
    return conditional.times, null.times


def test_cytosyn_setting_takes_435_network_evaluations() -> None:
    conditional, null = count("sde", 250, Guidance(2.5, 0.0, 0.75))
    assert (len(conditional), len(null)) == (250, 185)
    assert max(null) <= 0.75


@pytest.mark.parametrize(("solver", "evaluations"), [("sde", 20), ("ode", 20), ("heun", 39)])
def test_evaluations_without_guidance(solver: Solver, evaluations: int) -> None:
    conditional, null = count(solver, 20, Guidance(1.0))
    assert (len(conditional), len(null)) == (evaluations, 0)


def test_guidance_interval_includes_both_ends() -> None:
    _, null = count("ode", 4, Guidance(2.0, 0.25, 0.75))
    assert null == [0.75, 0.5, 0.25]


def test_heun_corrector_is_gated_by_the_start_of_its_step() -> None:
    _, null = count("heun", 4, Guidance(2.0, 0.5, 0.75))
    # Steps 0.75->0.5 and 0.5->0.25 are guided wholly; the corrector of 1->0.75 is not.
    assert null == [0.75, 0.5, 0.5, 0.25]


def test_guidance_extrapolates_from_the_null_velocity() -> None:
    x = torch.randn(3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    guided = GuidedVelocity(lambda x, t: 2 * x, lambda x, t: x + 1, Guidance(2.5, 0.2, 0.6))
    expected = (x + 1) + 2.5 * (2 * x - (x + 1))
    assert torch.allclose(guided(x, 0.3, 0.6), expected)
    assert torch.equal(guided(x, 0.6, 0.61), 2 * x)


def test_guiding_the_velocity_equals_guiding_the_drift() -> None:
    generator = torch.Generator().manual_seed(1)
    x, v, v_null = torch.randn(3, 50, dtype=torch.float64, generator=generator)
    for path in (Interpolant("linear"), Interpolant("cosine")):
        t = torch.tensor(0.37, dtype=torch.float64)
        of_velocity = path.drift(v_null + 2.5 * (v - v_null), x, t)
        drift, drift_null = path.drift(v, x, t), path.drift(v_null, x, t)
        assert torch.allclose(of_velocity, drift_null + 2.5 * (drift - drift_null))


def test_time_nodes() -> None:
    nodes = time_nodes("sde", 250)
    assert len(nodes) == 251
    assert nodes[0] == 1
    assert nodes[-2:] == [pytest.approx(0.04), 0.0]
    assert nodes[0] - nodes[1] == pytest.approx(0.96 / 249)
    assert time_nodes("sde", 1) == [1.0, 0.0]
    assert time_nodes("heun", 4) == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert time_nodes("dpm", 3) == [1.0, pytest.approx(0.75), pytest.approx(0.25), 0.0]


@pytest.mark.parametrize("solver", ["sde", "ode", "heun", "dpm"])
def test_the_state_is_float64_from_the_start_to_the_end(solver: Solver) -> None:
    seen: set[torch.dtype] = set()

    def velocity(x: Tensor, t: float) -> Tensor:
        seen.add(x.dtype)
        return 0.5 * x

    end = integrate(
        GuidedVelocity(velocity, velocity, Guidance(2.0)),
        torch.ones(3),  # float32
        steps=5,
        solver=solver,
        noise=lambda index: torch.ones(3, dtype=torch.float64),
    )
    assert seen == {torch.float64}
    assert end.dtype == torch.float64


def test_progress_is_told_of_every_step() -> None:
    told: list[tuple[int, int]] = []
    integrate(
        CountingVelocity(1),
        torch.zeros(1),
        steps=3,
        solver="ode",
        progress=lambda done, steps: told.append((done, steps)),
    )
    assert told == [(1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: time_nodes("rk4", 5), "solver is 'rk4'"),  # type: ignore[arg-type]
        (lambda: time_nodes("ode", 0), "steps is 0"),
        (lambda: Guidance(-1), "guidance_scale is -1"),
        (lambda: Guidance(2, 0.8, 0.2), "guidance interval"),
        (lambda: integrate(CountingVelocity(1), torch.zeros(1), steps=3), "needs noise"),
    ],
)
def test_settings_out_of_range_are_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        call()


# --- sample: the same core with a SiT ------------------------------------------------------------


@pytest.fixture(scope="module")
def sit() -> SiT:
    """A tiny SiT whose output depends on its input, time and condition."""
    torch.manual_seed(0)
    model = SiT(SiTConfig.preset("tiny", latent_size=8, condition_dim=16)).eval()
    for name, parameter in model.named_parameters():
        if "adaLN" in name or "final_layer" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return model


@pytest.fixture(scope="module")
def features() -> Tensor:
    return torch.randn(3, 16, generator=torch.Generator().manual_seed(5))


SETTINGS = {"steps": 6, "guidance_scale": 2.5, "guidance_high": 0.75}


@pytest.mark.parametrize("solver", ["sde", "ode", "heun", "dpm"])
def test_an_image_does_not_depend_on_the_batch(sit: SiT, features: Tensor, solver: str) -> None:
    together = sample(sit, features, seeds=[11, 12, 13], solver=solver, **SETTINGS)
    alone = sample(sit, features[1:2], seeds=[12], solver=solver, **SETTINGS)
    assert together.shape == (3, 4, 8, 8)
    assert together.dtype == torch.float32
    assert torch.allclose(together[1:2], alone, atol=1e-5)
    assert not torch.allclose(together[0], together[1], atol=0.1)


def test_sample_equals_the_doubled_batch_loop(sit: SiT, features: Tensor) -> None:
    """The slow oracle: full t, doubled batch, closed-form drift, one explicit loop."""
    seeds = [3, 4, 2**64 - 1]
    fast = sample(sit, features, seeds=seeds, **SETTINGS)
    shape = (4, 8, 8)
    x = normal(seeds, shape, stream=RandomStream.SAMPLE_START, dtype=torch.float64)
    nodes = [*torch.linspace(1, 0.04, 6, dtype=torch.float64).tolist(), 0.0]
    for index in range(6):
        t, dt = nodes[index], nodes[index + 1] - nodes[index]
        doubled = torch.cat([x, x]).float()
        drop = torch.tensor([False] * 3 + [True] * 3)
        with torch.no_grad():
            v = sit(doubled, torch.full((6,), t), torch.cat([features, features]), drop=drop)
        cond, null = v.double().chunk(2)
        v = null + 2.5 * (cond - null) if t <= 0.75 else cond
        x = x + dt * ((2 - t) * v + x)
        if index < 5:
            eps = normal(
                seeds, shape, stream=RandomStream.SAMPLE_STEP, step=index, dtype=torch.float64
            )
            x = x + math.sqrt(2 * t * -dt) * eps
    assert torch.allclose(fast, x.float(), atol=1e-5)


def test_network_evaluations_and_their_rows(sit: SiT, features: Tensor) -> None:
    rows: list[tuple[int, int]] = []

    def network(x: Tensor, c: Tensor) -> Tensor:
        rows.append((len(x), len(c)))
        return sit.forward_from_condition(x, c)

    sample(sit, features, seeds=[1, 2, 3], network=network, **SETTINGS)
    unguided = 2  # of the starts 1, .808, .616, .424, .232, .04 two are above 0.75
    assert rows.count((3, 3)) == 6  # the conditional branch, never a doubled batch
    assert rows.count((3, 1)) == 6 - unguided  # the null branch, its condition a single row
    assert len(rows) == 12 - unguided


@pytest.mark.parametrize(("scale", "null_rows"), [(2.5, 1), (1.0, 0)])
def test_the_null_branchs_modulation_is_computed_for_one_row_a_step(
    sit: SiT, features: Tensor, scale: float, null_rows: int
) -> None:
    rows: list[int] = []
    linear = sit.blocks[0].adaLN_modulation[1]
    hook = linear.register_forward_hook(lambda module, given, output: rows.append(len(given[0])))
    sample(sit, features, seeds=[1, 2, 3], solver="ode", steps=4, guidance_scale=scale)
    hook.remove()
    assert rows == ([3] + [1] * null_rows) * 4


def test_a_compiled_network_is_two_graphs_for_a_whole_run(features: Tensor) -> None:
    """One for the conditional rows and one for the null row, whatever the time."""
    torch.manual_seed(0)
    shape = {"latent_size": 8, "condition_dim": 16, "depth": 1, "encoder_depth": 1}
    sit = SiT(SiTConfig.preset("tiny", **shape)).eval()
    for parameter in sit.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    torch._dynamo.reset()
    counter = CompileCounter()
    network = torch.compile(sit.forward_from_condition, backend=counter, fullgraph=True)
    compiled = sample(sit, features, seeds=[1, 2, 3], network=network, **SETTINGS)
    assert counter.frame_count == 2
    assert torch.allclose(compiled, sample(sit, features, seeds=[1, 2, 3], **SETTINGS), atol=1e-6)


def test_without_features_the_null_condition_is_sampled(sit: SiT) -> None:
    plain = sample(sit, None, seeds=[1, 2], steps=4)
    guided = sample(sit, None, seeds=[1, 2], steps=4, guidance_scale=2.5)
    assert torch.equal(plain, guided)


def test_sample_runs_in_lower_precision(sit: SiT, features: Tensor) -> None:
    full = sample(sit, features, seeds=[1, 2, 3], **SETTINGS)
    low = sample(sit, features, seeds=[1, 2, 3], dtype=torch.bfloat16, **SETTINGS)
    assert not torch.equal(full, low)
    assert torch.allclose(full, low, atol=0.1)


def test_sample_leaves_no_graph(sit: SiT, features: Tensor) -> None:
    assert not sample(sit, features, seeds=[1, 2, 3], steps=2).requires_grad


def test_features_and_seeds_must_agree(sit: SiT, features: Tensor) -> None:
    with pytest.raises(UserError, match="3 features for 2 seeds"):
        sample(sit, features, seeds=[1, 2])
