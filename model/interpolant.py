"""The path between data and noise: x_t = alpha(t) x0 + sigma(t) eps, t=0 data, t=1 noise.

Source: stochastic interpolants as used by SiT (Ma et al., arXiv 2401.08740, sections 2.1 to 2.3)
with REPA's direction of time. Everything here is a pure function of tensors.
"""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from common.errors import UserError

PathName = Literal["linear", "cosine"]

_HALF_PI = math.pi / 2


def _broadcast_time(t: Tensor, x: Tensor) -> Tensor:
    """Give times [B] trailing axes so that they broadcast over x [B, ...]; leave a scalar alone."""
    return t if t.ndim == 0 else t.reshape(-1, *([1] * (x.ndim - 1)))


@dataclass(frozen=True)
class Interpolant:
    """A path, "linear" (alpha = 1-t, sigma = t) or "cosine" (alpha = cos, sigma = sin of pi t / 2).

    Times are tensors of shape [] or [B] in [0, 1]; x0, eps, x and v are [B, ...] of one shape.
    With a scalar (0-dim) time the results keep the dtype of the other operand.
    Raises UserError for an unknown path.

    Example:
        >>> path, x0, eps = Interpolant("linear"), torch.zeros(1, 2), torch.ones(1, 2)
        >>> path.x_t(x0, eps, torch.tensor([0.25]))
        tensor([[0.2500, 0.2500]])
        >>> path.velocity(x0, eps, torch.tensor([0.25]))
        tensor([[1., 1.]])
    """

    path: PathName = "linear"

    def __post_init__(self) -> None:
        if self.path not in get_args(PathName):
            raise UserError(
                f"path is {self.path!r}; expected one of {', '.join(get_args(PathName))}"
            )

    def alpha(self, t: Tensor) -> Tensor:
        """Weight of the data at times t ([] or [B]), 1 at t=0 and 0 at t=1."""
        return 1 - t if self.path == "linear" else torch.cos(_HALF_PI * t)

    def sigma(self, t: Tensor) -> Tensor:
        """Weight of the noise at times t ([] or [B]), 0 at t=0 and 1 at t=1."""
        return t if self.path == "linear" else torch.sin(_HALF_PI * t)

    def d_alpha(self, t: Tensor) -> Tensor:
        """Time derivative of alpha at times t ([] or [B])."""
        return -torch.ones_like(t) if self.path == "linear" else -_HALF_PI * torch.sin(_HALF_PI * t)

    def d_sigma(self, t: Tensor) -> Tensor:
        """Time derivative of sigma at times t ([] or [B])."""
        return torch.ones_like(t) if self.path == "linear" else _HALF_PI * torch.cos(_HALF_PI * t)

    def x_t(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """The point alpha(t) x0 + sigma(t) eps of the path (SiT, equation 1)."""
        t = _broadcast_time(t, x0)
        return self.alpha(t) * x0 + self.sigma(t) * eps

    def velocity(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """The regression target alpha'(t) x0 + sigma'(t) eps; eps - x0 on the linear path."""
        t = _broadcast_time(t, x0)
        return self.d_alpha(t) * x0 + self.d_sigma(t) * eps

    def data(self, v: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """The data prediction E[x0 | x_t = x] that velocity v implies; linear: x - t v."""
        t = _broadcast_time(t, x)
        return (self.d_sigma(t) * x - self.sigma(t) * v) / self._determinant(t)

    def noise(self, v: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """The noise prediction E[eps | x_t = x] that velocity v implies."""
        t = _broadcast_time(t, x)
        return (self.alpha(t) * v - self.d_alpha(t) * x) / self._determinant(t)

    def score(self, v: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """The score grad log p_t(x) = -E[eps | x] / sigma(t) (SiT, equation 9), for t > 0."""
        return -self.noise(v, x, t) / self.sigma(_broadcast_time(t, x))

    def diffusion(self, t: Tensor) -> Tensor:
        """g(t)^2 = 2 t of the reverse SDE, on either path as in REPA."""
        return 2 * t

    def drift(self, v: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """Drift v - g(t)^2/2 * score of the reverse SDE, for t > 0; (2-t) v + x on the linear path.

        The drift is affine in v with weights summing over v and x alone, so guidance may be
        applied to v or to the drift with the same outcome.
        """
        return v - 0.5 * self.diffusion(_broadcast_time(t, x)) * self.score(v, x, t)

    def time_from_normal(self, n: Tensor) -> Tensor:
        """The time at which sigma/alpha = exp(n): "lognormal" times for standard normal n."""
        ratio = torch.exp(n)
        return ratio / (1 + ratio) if self.path == "linear" else torch.atan(ratio) / _HALF_PI

    def _determinant(self, t: Tensor) -> Tensor:
        """alpha sigma' - sigma alpha': 1 on the linear path, pi/2 on the cosine path."""
        return self.alpha(t) * self.d_sigma(t) - self.sigma(t) * self.d_alpha(t)
