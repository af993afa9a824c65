"""Losses on tiles that are not trained on: the same tiles, times and noise every time.

Next to each loss is what a predictor reaches that never looks at the tile, since a loss may fall
without any learning: the closed-form velocity of a Gaussian with the latents' mean and variance
per channel, and the one constant token nearest to all tokens.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from model.images import from_uint8
from model.interpolant import Interpolant
from model.losses import alignment_loss, denoising_loss
from model.noise import RandomStream, normal, uniform
from model.sit import SiT
from model.vae import VAE
from train.config import Config
from train.preview import FixedTiles, evaluation_mode, measure_reconstruction

VALIDATION_SEED = 0
"""The same for every `run.seed`: the losses of all runs are measured on the same noise."""

VALIDATION_STEP = 2**32 - 1
"""The step of the noise's address; `run.steps` ends before it."""

_AT_ONCE = 8  # tiles of a forward pass: validation must fit into memory next to a training step


@dataclass(frozen=True)
class FixedNoise:
    """`t` [n] in (0, 1) and standard normal `noise`, `posterior_noise` [n, C, h, w]."""

    t: Tensor
    noise: Tensor
    posterior_noise: Tensor


def fixed_noise(config: Config, count: int, draws: int, index: int) -> FixedNoise:
    """Times and noise of draw `index` of `draws` for `count` tiles.

    A tile's times are spread, one in each of `draws` equal parts of (0, 1): with independent
    times the loss's spread over few tiles would be that of the times.
    """
    sit = config.model.sit
    shape = (sit.latent_channels, sit.latent_size, sit.latent_size)
    # Each draw has other slots, so that no two share their noise.
    slots = list(range(index * count, (index + 1) * count))
    seed, step = VALIDATION_SEED, VALIDATION_STEP
    part = uniform(seed, (), stream=RandomStream.TIME, step=step, slot=slots)
    return FixedNoise(
        (index + part) / draws,
        normal(seed, shape, stream=RandomStream.NOISE, step=step, slot=slots),
        normal(seed, shape, stream=RandomStream.POSTERIOR, step=step, slot=slots),
    )


def gaussian_velocity(
    path: Interpolant, x_t: Tensor, t: Tensor, mean: Tensor, variance: Tensor
) -> Tensor:
    """The expected velocity [B, C, h, w] given x_t, for Gaussian data of mean and variance [C].

    With x_t = alpha x0 + sigma eps, the residual r = (x_t - alpha mean) / (alpha² variance +
    sigma²) gives E[x0] = mean + alpha variance r and E[eps] = sigma r.
    """
    mean, variance, t = mean[:, None, None], variance[:, None, None], t[:, None, None, None]
    alpha, sigma = path.alpha(t), path.sigma(t)
    residual = (x_t - alpha * mean) / (alpha.square() * variance + sigma.square())
    x0 = mean + alpha * variance * residual
    return path.d_alpha(t) * x0 + path.d_sigma(t) * sigma * residual


def mean_token_cosine(tokens: Tensor) -> float:
    """Mean cosine of tokens [n, t, d] with the constant that makes it largest.

    The mean of the unit tokens points there, and its length is that cosine.
    """
    return float(F.normalize(tokens.float(), dim=-1).mean(dim=(0, 1)).norm())


@torch.no_grad()
def measure_validation(
    config: Config, sit: SiT, vae: VAE, fixed: FixedTiles, *, align: bool
) -> dict[str, float]:
    """Losses of the networks on the tiles, with those of the blind predictors.

    `denoise` and `denoise_gaussian` are mean squared errors of velocities, `align` and
    `align_mean_token` (with `align`) mean cosines in [-1, 1], `psnr` in dB. Latents are normalised
    by the SiT's running statistics and no condition is dropped. All in float32.
    """
    path, device = Interpolant(config.model.path), sit.pos_embed.device
    num_draws, sums = config.log.validation_draws, dict.fromkeys(_TERMS, 0.0)
    with evaluation_mode(sit), evaluation_mode(vae):
        # Tiles are encoded once; each draw samples the posteriors again.
        posteriors = [
            vae.encode(from_uint8(part.to(device))) for part in fixed.tiles.split(_AT_ONCE)
        ]
        for index in range(num_draws):
            draw = fixed_noise(config, len(fixed.tiles), num_draws, index)
            parts = zip(posteriors, draw.posterior_noise.split(_AT_ONCE), strict=True)
            latents = torch.cat([posterior.sample(noise.to(device)) for posterior, noise in parts])
            x0 = sit.bn.normalise(latents, use_batch=False)
            for name, value in _mean_losses(sit, path, x0, draw, fixed, align=align).items():
                sums[name] += value / num_draws
    if not align:
        del sums["align"]
    elif fixed.tokens is not None:
        sums["align_mean_token"] = mean_token_cosine(fixed.tokens)
    return sums | {"psnr": measure_reconstruction(vae, fixed.tiles).psnr}


_TERMS = ("denoise", "denoise_gaussian", "align")


def _mean_losses(
    sit: SiT, path: Interpolant, x0: Tensor, draw: FixedNoise, fixed: FixedTiles, *, align: bool
) -> dict[str, float]:
    """Means over tiles of one draw; x0 [n, C, h, w] normalised latents."""
    # The blind predictor knows no more than these moments of the same latents.
    variance, mean = torch.var_mean(x0, dim=(0, 2, 3), correction=0)
    sums = torch.zeros(3, device=x0.device)
    for start in range(0, len(x0), _AT_ONCE):
        part = slice(start, start + _AT_ONCE)
        t, noise = draw.t[part].to(x0.device), draw.noise[part].to(x0.device)
        x_t, target = path.x_t(x0[part], noise, t), path.velocity(x0[part], noise, t)
        condition = None if fixed.cls is None else fixed.cls[part].to(x0.device)
        velocity, tokens = sit.forward(x_t, t, condition, return_tokens=True)
        blind = gaussian_velocity(path, x_t, t, mean, variance)
        values = [
            denoising_loss(velocity, target, reduction="none"),
            denoising_loss(blind, target, reduction="none"),
        ]
        if align and fixed.tokens is not None:
            encoded = fixed.tokens[part].to(x0.device)
            values.append(-alignment_loss(tokens, encoded, reduction="none"))
        sums[: len(values)] += torch.stack([value.sum() for value in values])
    return dict(zip(_TERMS, (sums / len(x0)).tolist(), strict=True))
