"""The losses of REPA-E as pure functions, computed in float32.

Sources: REPA-E (Leng et al., arXiv 2504.10483, section 3), Latent Diffusion (Rombach et al.,
arXiv 2112.10752, appendix G), VQGAN (Esser et al., arXiv 2012.09841) for the hinge losses,
REPA (Yu et al., arXiv 2410.06940, equation 6) for the alignment.

Every function takes tensors of any floating dtype and returns the batch's mean, a float32 scalar;
with `reduction="none"` the values of the samples, float32 [B], whose mean it is.
"""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

Reduction = Literal["mean", "none"]


def l1_reconstruction(
    reconstruction: Tensor, images: Tensor, *, reduction: Reduction = "mean"
) -> Tensor:
    """Mean absolute error of images [B, 3, H, W], both in [-1, 1]; in [0, 2]."""
    error = (reconstruction.float() - images.float()).abs()
    return _reduce(_sample_means(error), reduction)


def kl_loss(mean: Tensor, logvar: Tensor, *, reduction: Reduction = "mean") -> Tensor:
    """Divergence of diagonal Gaussians [B, C, h, w] from the standard normal, in nats.

    `1/2 sum (mean² + exp(logvar) - 1 - logvar)`: within a sample a sum over C, h, w, where the
    other losses are means; its weight (1e-6) is small for that reason.
    """
    mean, logvar = mean.float(), logvar.float()
    terms = mean.square() + logvar.exp() - 1 - logvar
    return _reduce(0.5 * terms.flatten(1).sum(dim=1), reduction)


def hinge_discriminator_loss(
    real_logits: Tensor, fake_logits: Tensor, *, reduction: Reduction = "mean"
) -> Tensor:
    """Hinge loss of a discriminator, `1/2 (mean relu(1 - real) + mean relu(1 + fake))`.

    Logits [B, 1, h, w] of real and of generated images, the i-th real paired with the i-th
    generated.
    """
    real = _sample_means(F.relu(1 - real_logits.float()))
    fake = _sample_means(F.relu(1 + fake_logits.float()))
    return _reduce(0.5 * (real + fake), reduction)


def generator_loss(fake_logits: Tensor, *, reduction: Reduction = "mean") -> Tensor:
    """Adversarial loss of the generator, `-mean D(fake)`, on logits [B, 1, h, w]."""
    return _reduce(-_sample_means(fake_logits.float()), reduction)


def alignment_loss(projected: Tensor, tokens: Tensor, *, reduction: Reduction = "mean") -> Tensor:
    """Negative mean cosine similarity of tokens [B, T, D] with an encoder's; in [-1, 1].

    Both sides are normalised here and in float32: float16 would round the guard against a zero
    norm to 0.
    """
    cosine = F.normalize(projected.float(), dim=-1) * F.normalize(tokens.float(), dim=-1)
    return _reduce(-cosine.sum(dim=-1).mean(dim=1), reduction)


def denoising_loss(prediction: Tensor, target: Tensor, *, reduction: Reduction = "mean") -> Tensor:
    """Mean squared error of velocities [B, C, h, w], not weighted in time."""
    error = (prediction.float() - target.float()).square()
    return _reduce(_sample_means(error), reduction)


def _sample_means(values: Tensor) -> Tensor:
    return values.flatten(1).mean(dim=1)


def _reduce(per_sample: Tensor, reduction: Reduction) -> Tensor:
    if reduction not in ("mean", "none"):
        raise ValueError(f"reduction is {reduction!r}; expected mean or none")
    return per_sample.mean() if reduction == "mean" else per_sample
