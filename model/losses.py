"""The losses of REPA-E as pure functions: float32, one value a sample.

Sources: REPA-E (Leng et al., arXiv 2504.10483, section 3), Latent Diffusion (Rombach et al.,
arXiv 2112.10752, appendix G), VQGAN (Esser et al., arXiv 2012.09841) for the hinge losses,
REPA (Yu et al., arXiv 2410.06940, equation 6) for the alignment.

Every function returns a float32 tensor [B] whose mean is the loss of the batch, so that a trainer
can weight samples or ranks as it needs. Inputs may be of any floating dtype.
"""

import torch.nn.functional as F
from torch import Tensor


def _mean_a_sample(values: Tensor) -> Tensor:
    return values.flatten(1).mean(dim=1)


def l1_reconstruction(reconstruction: Tensor, images: Tensor) -> Tensor:
    """Mean absolute error of images [B, 3, H, W], both in [-1, 1]; returns [B] in [0, 2]."""
    return _mean_a_sample((reconstruction.float() - images.float()).abs())


def kl_loss(mean: Tensor, logvar: Tensor) -> Tensor:
    """Divergence of diagonal Gaussians [B, C, h, w] from the standard normal; returns [B], nats.

    `1/2 sum (mean² + exp(logvar) - 1 - logvar)`, a sum over C, h, w where the other losses
    are means: its weight (1e-6) is small for that reason.
    """
    mean, logvar = mean.float(), logvar.float()
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).flatten(1).sum(dim=1)


def hinge_discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Hinge loss of a discriminator on logits [B, 1, h, w] of real and generated images.

    `1/2 (mean relu(1 - real) + mean relu(1 + fake))`, the i-th real paired with the i-th fake;
    returns [B], from 0 up.
    """
    real = _mean_a_sample(F.relu(1 - real_logits.float()))
    fake = _mean_a_sample(F.relu(1 + fake_logits.float()))
    return 0.5 * (real + fake)


def generator_loss(fake_logits: Tensor) -> Tensor:
    """Adversarial loss of the generator, `-mean D(fake)`, on logits [B, 1, h, w]; returns [B]."""
    return -_mean_a_sample(fake_logits.float())


def alignment_loss(projected: Tensor, tokens: Tensor) -> Tensor:
    """Negative mean cosine similarity of tokens [B, T, D] with an encoder's.

    Returns [B] in [-1, 1]. Both sides are normalised here, in float32: in float16 the guard against a zero norm
    vanishes.
    """
    cosine = F.normalize(projected.float(), dim=-1) * F.normalize(tokens.float(), dim=-1)
    return -cosine.sum(dim=-1).mean(dim=1)


def denoising_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of velocities [B, C, h, w], not weighted in time; returns [B]."""
    return _mean_a_sample((prediction.float() - target.float()).square())
