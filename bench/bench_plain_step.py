"""A training step with the maths of ours, written plainly: what `training.py` compares with.

As public trainers of this kind are written: networks in their default memory layout, eager,
float16 autocast with one loss scaler on a GPU, `requires_grad` switched between passes, three
separate updates, averages parameter by parameter, and metrics read to the host in every step.
"""

from typing import Any

import torch
from torch import Tensor, nn

from model.images import from_uint8
from model.interpolant import Interpolant
from model.losses import (
    alignment_loss,
    denoising_loss,
    generator_loss,
    hinge_discriminator_loss,
    l1_reconstruction,
)
from train.config import Config
from train.losses import draw_randomness
from train.networks import Parts
from train.reader import Batch


class PlainStep:
    """Calls on a batch train the networks of `parts`; returns the metrics as numbers."""

    def __init__(self, config: Config, device: torch.device, parts: Parts) -> None:
        self.config, self.device, self.parts = config, device, parts
        networks = parts.networks
        networks.vae.to(memory_format=torch.contiguous_format)
        self.path = Interpolant(config.model.path)
        named = {"vae": networks.vae, "discriminator": networks.discriminator, "sit": networks.sit}
        self.networks: dict[str, nn.Module] = {k: v for k, v in named.items() if v is not None}
        self.optimizers = {
            name: torch.optim.AdamW(
                [p for p in network.parameters() if p.requires_grad],
                lr=1e-4, weight_decay=0.0, foreach=False, fused=False,
            )
            for name, network in self.networks.items()
        }  # fmt: skip
        self.on_gpu = device.type == "cuda"
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.on_gpu)

    def __call__(self, batch: Batch) -> dict[str, float]:
        """One step: VAE, discriminator, SiT, each with its own update."""
        networks, weights = self.parts.networks, self.config.loss
        images = from_uint8(batch.tiles.to(self.device))
        assert batch.cls is not None
        assert batch.tokens is not None
        condition, tokens = batch.cls.to(self.device), batch.tokens.to(self.device)
        draws = draw_randomness(self.config, batch.step, batch.slots, self.device)
        metrics: dict[str, Tensor] = {}

        with self._autocast():
            output = networks.vae(images, draws.posterior_noise)
        fake = output.reconstruction.float()
        metrics["l1"] = l1_reconstruction(fake, images)
        metrics["kl"] = output.posterior.kl().mean()
        total = weights.reconstruction * metrics["l1"] + weights.kl * metrics["kl"]
        if networks.perceptual is not None:
            metrics["lpips"] = networks.perceptual(fake, images).mean()
            total = total + weights.perceptual * metrics["lpips"]
        if networks.discriminator is not None:
            networks.discriminator.requires_grad_(False)
            metrics["generator"] = generator_loss(networks.discriminator(fake))
            networks.discriminator.requires_grad_(True)
            total = total + weights.generator * metrics["generator"]
        t, noise = draws.t, draws.noise
        trained = [p for p in networks.sit.parameters() if p.requires_grad]
        for parameter in trained:
            parameter.requires_grad_(False)
        with self._autocast():
            x0 = networks.sit.bn.normalise(output.latents, use_batch=False)
            _, found = networks.sit(self.path.x_t(x0, noise, t), t, condition, return_tokens=True)
            metrics["vae_align"] = alignment_loss(found, tokens)
        self._update("vae", total + weights.vae_align * metrics["vae_align"])
        for parameter in trained:
            parameter.requires_grad_(True)

        if networks.discriminator is not None:
            real, made = networks.discriminator(images), networks.discriminator(fake.detach())
            metrics["discriminator"] = hinge_discriminator_loss(real, made)
            self._update("discriminator", metrics["discriminator"])

        x0 = networks.sit.bn.normalise(output.latents.detach(), use_batch=True)
        with self._autocast():
            velocity, found = networks.sit(
                self.path.x_t(x0, noise, t), t, condition, drop=draws.drop, return_tokens=True
            )
            metrics["denoise"] = denoising_loss(velocity, self.path.velocity(x0, noise, t))
            metrics["sit_align"] = alignment_loss(found, tokens)
        self._update("sit", metrics["denoise"] + weights.sit_align * metrics["sit_align"])
        self.scaler.update()
        self._average(self.parts.sit_average.module, networks.sit)
        if self.parts.vae_average is not None:
            self._average(self.parts.vae_average.module, networks.vae)
        return {name: value.item() for name, value in metrics.items()}

    def _autocast(self) -> Any:
        return torch.autocast(self.device.type, torch.float16, enabled=self.on_gpu)

    def _update(self, name: str, loss: Tensor) -> None:
        optimizer, network = self.optimizers[name], self.networks[name]
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(network.parameters(), self.config.optim.clip)
        self.scaler.step(optimizer)
        optimizer.zero_grad(set_to_none=True)

    @torch.no_grad()
    def _average(self, average: nn.Module, network: nn.Module) -> None:
        sources = network.state_dict()
        for name, value in average.state_dict().items():
            if value.is_floating_point():
                value.mul_(0.9999).add_(sources[name], alpha=1 - 0.9999)
            else:
                value.copy_(sources[name])
