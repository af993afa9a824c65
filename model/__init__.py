"""Encoders, SD-VAE, SiT, interpolants, losses and samplers in pure PyTorch.

Public names are imported on first use: `import model` alone imports no torch.
"""

from importlib import import_module
from typing import Any

_PUBLIC: dict[str, str] = {
    "alignment_loss": "model.losses",
    "CytoSyn": "model.cytosyn",
    "denoising_loss": "model.losses",
    "Discriminator": "model.discriminator",
    "DiscriminatorConfig": "model.discriminator",
    "Encoder": "model.encoders",
    "encoder_spec": "model.encoders",
    "EncoderOutput": "model.encoders",
    "ENCODERS": "model.encoders",
    "EncoderSpec": "model.encoders",
    "generator_loss": "model.losses",
    "hinge_discriminator_loss": "model.losses",
    "Interpolant": "model.interpolant",
    "kl_loss": "model.losses",
    "l1_reconstruction": "model.losses",
    "LatentNorm": "model.latent_norm",
    "load_encoder": "model.encoders",
    "PerceptualLoss": "model.perceptual",
    "Posterior": "model.vae",
    "Records": "model.cytosyn",
    "sample": "model.sampler",
    "SiT": "model.sit",
    "SIT_PRESETS": "model.sit",
    "SiTConfig": "model.sit",
    "UserError": "common.errors",
    "VAE": "model.vae",
    "VAE_PRESETS": "model.vae",
    "VAEConfig": "model.vae",
    "VAEOutput": "model.vae",
}

__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    """Import the module that defines the public name, once."""
    if name not in _PUBLIC:
        raise AttributeError(f"module 'model' has no attribute {name!r}")
    value = getattr(import_module(_PUBLIC[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
