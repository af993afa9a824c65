"""Samplers from noise (t=1) to data (t=0), with guidance in an interval of time.

Sources: SiT (Ma et al., arXiv 2401.08740, section 2.4) for the reverse SDE and its drift, REPA
(Yu et al., arXiv 2410.06940, appendix) for its diffusion g^2 = 2t and its last step, Karras et
al. (arXiv 2206.00364) for Heun, Lu et al. (arXiv 2211.01095, algorithm 2) for DPM-Solver++(2M),
Ho & Salimans (arXiv 2207.12598) and Kynkäänniemi et al. (arXiv 2404.07724) for guidance in an
interval. `integrate` is the core and knows no network: a velocity is a function of (x, t).
"""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from common.errors import UserError
from model.interpolant import Interpolant
from model.noise import RandomStream, normal, seed_tensor
from model.sit import SiT

Solver = Literal["sde", "ode", "heun", "dpm"]
Velocity = Callable[[Tensor, float], Tensor]
"""v(x, t) for a state x [B, ...] (float64) and one time t for all of it."""
Noise = Callable[[int], Tensor]
"""Standard normal noise of the state's shape for a step number, counted from 0."""
Progress = Callable[[int, int], None]
"""Called after each step with the number of steps done and of all steps."""

SDE_LAST_TIME = 0.04
"""Where the SDE's noisy steps end; one step without noise goes from there to 0."""


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance of a scale, active where low <= t <= high and the scale is above 1.

    Raises UserError for a negative scale or an interval outside [0, 1].
    """

    scale: float = 1.0
    low: float = 0.0
    high: float = 1.0

    def __post_init__(self) -> None:
        if not self.scale >= 0:
            raise UserError(f"guidance_scale is {self.scale}; expected a number of 0 or more")
        if not 0 <= self.low <= self.high <= 1:
            raise UserError(
                f"guidance interval is [{self.low}, {self.high}]; expected 0 <= low <= high <= 1"
            )

    def active(self, t: float) -> bool:
        """Whether a step that starts at time t is guided; both ends of the interval are in it."""
        return self.scale > 1 and self.low <= t <= self.high


class GuidedVelocity:
    """v_null + scale (v_cond - v_null) where guidance is active, v_cond alone elsewhere.

    The null velocity is not evaluated where guidance is inactive. Without a null velocity the
    conditional one is taken everywhere.
    """

    def __init__(
        self, conditional: Velocity, null: Velocity | None = None, guidance: Guidance | None = None
    ) -> None:
        self.conditional = conditional
        self.null = null
        self.guidance = guidance or Guidance()

    def active(self, t: float) -> bool:
        """Whether a step that starts at time t is guided."""
        return self.null is not None and self.guidance.active(t)

    def __call__(self, x: Tensor, t: float, t_start: float) -> Tensor:
        """The velocity at (x, t) within the step that starts at t_start, which decides guidance."""
        velocity = self.conditional(x, t)
        if self.null is None or not self.active(t_start):
            return velocity
        return torch.lerp(self.null(x, t), velocity, self.guidance.scale)


def time_nodes(solver: Solver, steps: int) -> list[float]:
    """The steps + 1 times from 1 to 0 between which a solver moves.

    Evenly spaced for "ode" and "heun"; for "sde" evenly from 1 to 0.04 with one last step to 0.
    For "dpm" the squares of evenly spaced cosines, dense at both ends: on even times its steps
    in log(alpha/sigma) do not shrink there, and its error was that of order 1.8 instead of 2.
    Raises UserError for an unknown solver or fewer than 1 step.
    """
    if solver not in get_args(Solver):
        raise UserError(f"solver is {solver!r}; expected one of {', '.join(get_args(Solver))}")
    if steps < 1:
        raise UserError(f"steps is {steps}; expected 1 or more")
    if solver == "sde":
        nodes = torch.linspace(1, SDE_LAST_TIME, steps, dtype=torch.float64)
        return [*nodes.tolist(), 0.0]
    if solver == "dpm":
        return [math.cos(math.pi / 2 * k / steps) ** 2 for k in range(steps)] + [0.0]
    return torch.linspace(1, 0, steps + 1, dtype=torch.float64).tolist()


def integrate(
    velocity: Velocity | GuidedVelocity,
    x: Tensor,
    *,
    steps: int,
    solver: Solver = "sde",
    interpolant: Interpolant | None = None,
    noise: Noise | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """Carry a state x [B, ...] from t=1 to t=0 under a velocity; float64 within and returned.

    "sde" is Euler-Maruyama on dx = (v - t s) dt + sqrt(2t) dw and needs `noise`; "ode" is Euler
    and "heun" Heun's second-order method on dx = v dt; "dpm" is DPM-Solver++(2M). Evaluations of
    the unguided velocity: `steps`, for "heun" 2 steps - 1. The interpolant defaults to the
    linear one, and to "ode" and "heun" makes no difference.
    Raises UserError for an unknown solver, fewer than 1 step, or an SDE without noise.
    """
    nodes = time_nodes(solver, steps)
    guided = velocity if isinstance(velocity, GuidedVelocity) else GuidedVelocity(velocity)
    step = _step_function(solver, guided, interpolant or Interpolant(), noise)
    x = x.double()
    for index in range(steps):
        x = step(index, x, nodes[index], nodes[index + 1])
        if progress is not None:
            progress(index + 1, steps)
    return x


_Step = Callable[[int, Tensor, float, float], Tensor]


def _step_function(
    solver: Solver, velocity: GuidedVelocity, interpolant: Interpolant, noise: Noise | None
) -> _Step:
    """The step (index, x, t, t_next) -> x_next of a solver."""
    if solver == "sde":
        if noise is None:
            raise UserError("solver 'sde' needs noise; pass noise or choose 'ode', 'heun' or 'dpm'")
        return _euler_maruyama(velocity, interpolant, noise)
    if solver == "ode":
        return _euler(velocity)
    if solver == "heun":
        return _heun(velocity)
    return _dpm_solver(velocity, interpolant)


def _euler_maruyama(velocity: GuidedVelocity, interpolant: Interpolant, noise: Noise) -> _Step:
    def step(index: int, x: Tensor, t: float, t_next: float) -> Tensor:
        time = _scalar(t)
        moved = x + (t_next - t) * interpolant.drift(velocity(x, t, t), x, time)
        if t_next == 0:
            return moved
        std = float((interpolant.diffusion(time) * (t - t_next)).sqrt())
        return moved + std * noise(index)

    return step


def _euler(velocity: GuidedVelocity) -> _Step:
    def step(index: int, x: Tensor, t: float, t_next: float) -> Tensor:
        return x + (t_next - t) * velocity(x, t, t)

    return step


def _heun(velocity: GuidedVelocity) -> _Step:
    def step(index: int, x: Tensor, t: float, t_next: float) -> Tensor:
        slope = velocity(x, t, t)
        predicted = x + (t_next - t) * slope
        if t_next == 0:
            return predicted
        return x + (t_next - t) * 0.5 * (slope + velocity(predicted, t_next, t))

    return step


def _dpm_solver(velocity: GuidedVelocity, interpolant: Interpolant) -> _Step:
    """DPM-Solver++(2M) in the data prediction, on h = difference of log(alpha/sigma).

    exp(-h) is formed from alpha and sigma themselves, which are 0 at the ends. A step is of
    first order where the previous prediction says nothing on the slope: the first two (the log
    ratio starts at minus infinity), the last (it ends at infinity) and where guidance switches.
    """
    previous: tuple[Tensor, float, bool] | None = None  # data prediction, time, guided

    def step(index: int, x: Tensor, t: float, t_next: float) -> Tensor:
        nonlocal previous
        time, time_next = _scalar(t), _scalar(t_next)
        guided = velocity.active(t)
        data = interpolant.data(velocity(x, t, t), x, time)
        target = data
        if previous is not None and previous[1] < 1 and t_next > 0 and previous[2] == guided:
            past = _log_ratio(interpolant, time) - _log_ratio(interpolant, _scalar(previous[1]))
            ahead = _log_ratio(interpolant, time_next) - _log_ratio(interpolant, time)
            target = data + 0.5 * float(ahead / past) * (data - previous[0])
        previous = (data, t, guided)
        keep = interpolant.sigma(time_next) / interpolant.sigma(time)
        add = interpolant.alpha(time_next) - interpolant.alpha(time) * keep
        return float(keep) * x + float(add) * target

    return step


def _log_ratio(interpolant: Interpolant, t: Tensor) -> Tensor:
    return torch.log(interpolant.alpha(t) / interpolant.sigma(t))


def _scalar(t: float) -> Tensor:
    """A time as a 0-dim CPU tensor, which mixes with tensors on any device without a copy."""
    return torch.tensor(t, dtype=torch.float64)


class _SiTVelocity:
    """The conditional and the null velocity of a SiT over float64 states.

    Conditions are embedded once a run. All samples share the time, which is embedded once for
    both branches, and the null branch's condition stays one row: its modulation is computed once
    a step and broadcast.
    """

    def __init__(
        self,
        sit: SiT,
        y: Tensor | None,
        network: Callable[[Tensor, Tensor], Tensor],
        dtype: torch.dtype | None,
        *,
        guided: bool,
    ) -> None:
        self.sit, self.network = sit, network
        self.device = sit.pos_embed.device
        self.autocast = dtype if dtype != sit.pos_embed.dtype else None
        with self._precision():
            self.embedded = sit.embed_condition(y)
            # A SiT without a null class draws where nothing is guided.
            self.embedded_null = sit.embed_condition(None) if guided else self.embedded
        self._time: tuple[float, Tensor] | None = None

    def conditional(self, x: Tensor, t: float) -> Tensor:
        return self._evaluate(x, t, self.embedded)

    def null(self, x: Tensor, t: float) -> Tensor:
        return self._evaluate(x, t, self.embedded_null)

    def _evaluate(self, x: Tensor, t: float, embedded: Tensor) -> Tensor:
        with self._precision():
            return self.network(x.float(), self._embed_time(t) + embedded).double()

    def _embed_time(self, t: float) -> Tensor:
        if self._time is None or self._time[0] != t:
            time = torch.full((1,), t, dtype=torch.float32, device=self.device)
            self._time = (t, self.sit.t_embedder(time))
        return self._time[1]

    def _precision(self) -> AbstractContextManager[object]:
        if self.autocast is None:
            return nullcontext()
        return torch.autocast(self.device.type, self.autocast)


@torch.no_grad()
def sample(
    sit: SiT,
    features: Tensor | None,
    *,
    seeds: Sequence[int] | Tensor,
    steps: int = 250,
    solver: Solver = "sde",
    guidance_scale: float = 1.0,
    guidance_low: float = 0.0,
    guidance_high: float = 1.0,
    interpolant: Interpolant | None = None,
    dtype: torch.dtype | None = None,
    network: Callable[[Tensor, Tensor], Tensor] | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """Draw normalised latents [n, C, H, W] (float32) from a SiT, one for each of n seeds.

    `features` [n, condition_dim] or labels [n] condition the images, on any device; None samples
    without condition, where guidance has nothing to do. `seeds` are n numbers in [0, 2^64): an
    image's start and step noise depend on its own alone. Guidance is active in steps that start
    at guidance_low <= t <= guidance_high, both ends included, if the scale is above 1. The state
    is float64. The network runs in its parameters' dtype, or under autocast to `dtype` where
    that differs; convert the network once where many images are drawn. `network` may be a
    compiled `sit.forward_from_condition`. `LatentNorm.denormalise` makes raw latents of the
    result. CytoSyn's setting (arXiv 2603.18089) is 250 SDE steps, scale 2.5, interval [0, 0.75].
    Raises UserError where the numbers of seeds and features differ or a setting is out of range.
    """
    guidance = Guidance(guidance_scale, guidance_low, guidance_high)
    device, config = sit.pos_embed.device, sit.config
    keys = seed_tensor(seeds, device)
    if features is not None and len(features) != len(keys):
        raise UserError(f"{len(features)} features for {len(keys)} seeds; pass one seed an image")
    shape = (config.latent_channels, config.latent_size, config.latent_size)

    def step_noise(index: int) -> Tensor:
        return normal(
            keys,
            shape,
            stream=RandomStream.SAMPLE_STEP,
            step=index,
            device=device,
            dtype=torch.float64,
        )

    start = normal(
        keys, shape, stream=RandomStream.SAMPLE_START, device=device, dtype=torch.float64
    )
    y = None if features is None else features.to(device)
    guided = y is not None and guidance.scale > 1
    branches = _SiTVelocity(sit, y, network or sit.forward_from_condition, dtype, guided=guided)
    return integrate(
        GuidedVelocity(branches.conditional, None if y is None else branches.null, guidance),
        start,
        steps=steps,
        solver=solver,
        interpolant=interpolant,
        noise=step_noise,
        progress=progress,
    ).float()
