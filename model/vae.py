"""The SD-VAE: a convolutional autoencoder with a diagonal Gaussian posterior.

Sources: Latent Diffusion (Rombach et al., arXiv 2112.10752, section 3.1 and appendix G) for the
architecture, REPA-E (Leng et al., arXiv 2504.10483) for its use. Names and shapes of the state
are the CompVis ones; `model.vae_keys` translates to and from diffusers. There is no latent
scale factor: the latent norm inside the SiT takes its place.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from common.config import build_config, to_plain_values
from common.errors import UserError
from model.losses import kl_loss
from model.vae_keys import VAELayout, from_native, to_native
from model.weights import build_from_tensors, read_tensors, write_tensors

LOGVAR_RANGE = (-30.0, 20.0)

VAE_PRESETS: dict[str, dict[str, Any]] = {
    "f8d4": {},
    "f16d32": {
        "channel_multipliers": (1, 1, 2, 2, 4),
        "latent_channels": 32,
        "attention_levels": (4,),
    },
    # For a demonstration on two CPU cores, where full-resolution maps are what costs: the
    # architecture of f8d4 at 1/16 of its width. It is faster in channels_last.
    "tiny": {
        "base_channels": 8,
        "channel_multipliers": (1, 1, 2, 4),
        "num_res_blocks": 1,
        "norm_groups": 4,
    },
}

_MOST_LEVELS = 8
"""Each but the last halves the image, so that a tile has 128 times the side of a latent."""


@dataclass(frozen=True)
class VAEConfig:
    """The shape of a VAE; the defaults are SD-VAE f8d4.

    Raises UserError naming the field and its value where the fields do not fit together.
    """

    base_channels: int = 128
    channel_multipliers: tuple[int, ...] = (1, 2, 4, 4)  # one per level; each but the last halves
    num_res_blocks: int = 2  # per level of the encoder; the decoder has one more
    latent_channels: int = 4
    attention_levels: tuple[int, ...] = ()  # levels (0 is the image's) with attention
    norm_groups: int = 32
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        for name in ("base_channels", "num_res_blocks", "latent_channels", "norm_groups"):
            value = getattr(self, name)
            most = 64 if name == "num_res_blocks" else 65_536
            if not (type(value) is int and 1 <= value <= most):
                raise UserError(f"VAE {name} is {value!r}; expected an integer from 1 to {most:,}")
        multipliers = self.channel_multipliers
        if not (1 <= len(multipliers) <= _MOST_LEVELS and all(1 <= m <= 1024 for m in multipliers)):
            raise UserError(
                f"VAE channel_multipliers is {multipliers}; expected an integer of 1 or more for "
                f"each of up to {_MOST_LEVELS} levels"
            )
        levels = range(len(self.channel_multipliers))
        if not set(self.attention_levels) <= set(levels):
            raise UserError(
                f"VAE attention_levels is {self.attention_levels}; expected levels from 0 to "
                f"{levels[-1]}"
            )
        for channels in self.level_channels:
            if channels % self.norm_groups:
                raise UserError(
                    f"VAE norm_groups is {self.norm_groups}; expected a divisor of every "
                    f"level's channels {self.level_channels}"
                )

    @property
    def level_channels(self) -> tuple[int, ...]:
        """Channels of each level, from the image's inwards."""
        return tuple(self.base_channels * m for m in self.channel_multipliers)

    @property
    def downsampling(self) -> int:
        """Image pixels per latent pixel, along one side."""
        return 2 ** (len(self.channel_multipliers) - 1)

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> Self:
        """A named shape ("f8d4", "f16d32", "tiny"), with fields replaced by overrides."""
        if name not in VAE_PRESETS:
            raise UserError(f"VAE preset is {name!r}; expected one of {', '.join(VAE_PRESETS)}")
        return cls(**{**VAE_PRESETS[name], **overrides})

    def to_dict(self) -> dict[str, object]:
        """Plain values for JSON; `from_dict` reads them back."""
        return to_plain_values(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, object]) -> Self:
        """The inverse of `to_dict`; raises UserError for an unknown key or a wrong type."""
        return build_config(cls, values)


class Posterior(NamedTuple):
    """A diagonal Gaussian over latents: mean and log-variance, both [B, C, h, w]."""

    mean: Tensor
    logvar: Tensor

    def sample(self, noise: Tensor) -> Tensor:
        """Sample `mean + exp(logvar / 2) * noise` for standard normal noise [B, C, h, w]."""
        return self.mean + torch.exp(0.5 * self.logvar) * noise

    def mode(self) -> Tensor:
        """The most likely latent, the mean."""
        return self.mean

    def kl(self) -> Tensor:
        """Divergence from the standard normal of each sample [B], float32, in nats."""
        return kl_loss(self.mean, self.logvar, reduction="none")


class VAEOutput(NamedTuple):
    """One pass: reconstruction [B, 3, H, W], sampled latents [B, C, h, w] and the posterior."""

    reconstruction: Tensor
    latents: Tensor
    posterior: Posterior


def group_norm_silu(x: Tensor, norm: nn.GroupNorm) -> Tensor:
    """`SiLU(GroupNorm(x))` of x [B, C, H, W]: one function, which torch.compile fuses.

    PyTorch's CUDA GroupNorm copies channels_last input to a contiguous one and back; the
    fused kernel keeps the layout, and reads and writes the map once.
    """
    return F.silu(F.group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps))


class ResBlock(nn.Module):
    """Two convolutions, each after GroupNorm and SiLU, around a shortcut."""

    recompute: bool  # set by VAE; not part of the state

    def __init__(self, channels_in: int, channels_out: int, config: VAEConfig) -> None:
        super().__init__()
        self.norm1 = _group_norm(channels_in, config)
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, padding=1)
        self.norm2 = _group_norm(channels_out, config)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1)
        if channels_in != channels_out:
            self.nin_shortcut = nn.Conv2d(channels_in, channels_out, 1)
        self.has_shortcut = channels_in != channels_out
        self.recompute = False

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, channels_in, H, W] to [B, channels_out, H, W]."""
        shortcut = self.nin_shortcut(x) if self.has_shortcut else x
        hidden = self._convolve(x, self.norm1, self.conv1)
        return self._convolve(hidden, self.norm2, self.conv2) + shortcut

    def _convolve(self, x: Tensor, norm: nn.GroupNorm, conv: nn.Conv2d) -> Tensor:
        """`conv(SiLU(norm(x)))`; with `recompute` x alone is kept for the backward pass.

        The norm and the SiLU are then computed again, which costs bandwidth only, the convolution
        is not. Eager autograd would keep the convolution's input, so the convolution belongs to
        the part computed again; it comes last there, and recomputing stops before it. A compiler
        keeps what it needs, but would compute all of that part again.
        """
        if not (self.recompute and torch.is_grad_enabled()):
            return conv(group_norm_silu(x, norm))
        if torch.compiler.is_compiling():
            return conv(_call_checkpointed(partial(group_norm_silu, norm=norm), x))
        return _call_checkpointed(lambda x: conv(group_norm_silu(x, norm)), x)


def _call_checkpointed(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Compute `function(x)`, and again in the backward pass instead of keeping its insides."""
    output: Tensor = checkpoint(function, x, use_reentrant=False, preserve_rng_state=False)
    return output


class SpatialAttention(nn.Module):
    """Single-head self-attention over the positions of a feature map, with a shortcut."""

    def __init__(self, channels: int, config: VAEConfig) -> None:
        super().__init__()
        self.norm = _group_norm(channels, config)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Attend within [B, C, H, W]; the softmax is scaled by C^(-1/2)."""
        normed = F.group_norm(
            x, self.norm.num_groups, self.norm.weight, self.norm.bias, self.norm.eps
        )
        q, k, v = (
            project(normed).flatten(2).transpose(1, 2).unsqueeze(1)
            for project in (self.q, self.k, self.v)
        )
        attended = F.scaled_dot_product_attention(q, k, v).squeeze(1)
        return x + self.proj_out(attended.transpose(1, 2).unflatten(2, x.shape[2:]))


class Downsample(nn.Module):
    """Halve height and width by a strided convolution, padded at the right and bottom only."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, C, H, W] to [B, C, H/2, W/2]."""
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Double height and width by nearest neighbours and a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, C, H, W] to [B, C, 2H, 2W]."""
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


def _group_norm(channels: int, config: VAEConfig) -> nn.GroupNorm:
    return nn.GroupNorm(config.norm_groups, channels, eps=config.norm_eps)


class VAELevel(nn.Module):
    """The blocks of one resolution, each with attention where the level has it, then a resampling.

    `resample` leads to the next level: "down" in the encoder, "up" in the decoder, or None.
    """

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        num_blocks: int,
        config: VAEConfig,
        *,
        attend: bool,
        resample: Literal["down", "up"] | None,
    ) -> None:
        super().__init__()
        widths = [channels_in] + [channels_out] * num_blocks
        self.block = nn.ModuleList(
            ResBlock(before, after, config) for before, after in pairwise(widths)
        )
        self.attn = nn.ModuleList(
            SpatialAttention(channels_out, config) for _ in range(num_blocks if attend else 0)
        )
        self.resample = resample
        if resample == "down":
            self.downsample = Downsample(channels_out)
        elif resample == "up":
            self.upsample = Upsample(channels_out)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, channels_in, H, W] to channels_out at the next level's height and width."""
        for index, block in enumerate(self.block):
            x = block(x)
            if len(self.attn):
                x = self.attn[index](x)
        if self.resample == "down":
            return self.downsample(x)
        return self.upsample(x) if self.resample == "up" else x


class Middle(nn.Module):
    """Block, attention, block at the coarsest resolution."""

    def __init__(self, channels: int, config: VAEConfig) -> None:
        super().__init__()
        self.block_1 = ResBlock(channels, channels, config)
        self.attn_1 = SpatialAttention(channels, config)
        self.block_2 = ResBlock(channels, channels, config)

    def forward(self, x: Tensor) -> Tensor:
        """Keep the shape [B, C, h, w]."""
        return self.block_2(self.attn_1(self.block_1(x)))


class VAEEncoder(nn.Module):
    """Images to the 2 C channels of a posterior, before the 1x1 `quant_conv`."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        channels = config.level_channels
        before = (config.base_channels, *channels[:-1])
        self.conv_in = nn.Conv2d(3, config.base_channels, 3, padding=1)
        self.down = nn.ModuleList(
            VAELevel(
                channels_before,
                channels_here,
                config.num_res_blocks,
                config,
                attend=index in config.attention_levels,
                resample="down" if index + 1 < len(channels) else None,
            )
            for index, (channels_before, channels_here) in enumerate(
                zip(before, channels, strict=True)
            )
        )
        self.mid = Middle(channels[-1], config)
        self.norm_out = _group_norm(channels[-1], config)
        self.conv_out = nn.Conv2d(channels[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Map images [B, 3, H, W] to [B, 2 C, h, w]."""
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        return self.conv_out(group_norm_silu(self.mid(x), self.norm_out))


class VAEDecoder(nn.Module):
    """Latents, after the 1x1 `post_quant_conv`, to images."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        channels = config.level_channels
        before = (*channels[1:], channels[-1])  # level i takes what level i + 1 gave
        self.conv_in = nn.Conv2d(config.latent_channels, channels[-1], 3, padding=1)
        self.mid = Middle(channels[-1], config)
        self.up = nn.ModuleList(
            VAELevel(
                channels_before,
                channels_here,
                config.num_res_blocks + 1,
                config,
                attend=index in config.attention_levels,
                resample="up" if index else None,
            )
            for index, (channels_before, channels_here) in enumerate(
                zip(before, channels, strict=True)
            )
        )
        self.norm_out = _group_norm(channels[0], config)
        self.conv_out = nn.Conv2d(channels[0], 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        """Map latents [B, C, h, w] to images [B, 3, H, W]."""
        x = self.mid(self.conv_in(z))
        for index in reversed(range(len(self.up))):
            x = self.up[index](x)
        return self.conv_out(group_norm_silu(x, self.norm_out))


class VAE(nn.Module):
    """SD-VAE: f8d4 has 83,653,863 parameters in 248 tensors.

    Sides of images are multiples of `config.downsampling`; 224 px gives 28 x 28 latents at f8.
    `recompute` trades time for memory in training: GroupNorm and SiLU are computed again in the
    backward pass instead of kept. Weights start at PyTorch's initialisation.

    Example:
        >>> vae = VAE(VAEConfig.preset("tiny"))
        >>> output = vae(torch.zeros(1, 3, 32, 32), noise=torch.zeros(1, 4, 4, 4))
        >>> list(output.latents.shape), list(output.reconstruction.shape)
        ([1, 4, 4, 4], [1, 3, 32, 32])
    """

    def __init__(self, config: VAEConfig | None = None) -> None:
        super().__init__()
        self.config = config or VAEConfig()
        channels = self.config.latent_channels
        self.encoder = VAEEncoder(self.config)
        self.decoder = VAEDecoder(self.config)
        self.quant_conv = nn.Conv2d(2 * channels, 2 * channels, 1)
        self.post_quant_conv = nn.Conv2d(channels, channels, 1)

    @property
    def recompute(self) -> bool:
        """Whether norms and activations are recomputed in the backward pass."""
        return any(m.recompute for m in self.modules() if isinstance(m, ResBlock))

    @recompute.setter
    def recompute(self, on: bool) -> None:
        for module in self.modules():
            if isinstance(module, ResBlock):
                module.recompute = on

    def encode(self, images: Tensor) -> Posterior:
        """Posterior of images [B, 3, H, W] in [-1, 1]; its log-variance is clamped to [-30, 20]."""
        multiple = self.config.downsampling
        if images.shape[2] % multiple or images.shape[3] % multiple:
            raise ValueError(
                f"expected image sides in multiples of {multiple}, got {list(images.shape[2:])}"
            )
        mean, logvar = self.quant_conv(self.encoder(images)).chunk(2, dim=1)
        return Posterior(mean, logvar.clamp(*LOGVAR_RANGE))

    def decode(self, latents: Tensor) -> Tensor:
        """Images [B, 3, H, W], about [-1, 1] and not clamped, from latents [B, C, h, w]."""
        return self.decoder(self.post_quant_conv(latents))

    def forward(self, images: Tensor, noise: Tensor) -> VAEOutput:
        """Encode, sample the posterior with `noise` [B, C, h, w], and decode the sample."""
        posterior = self.encode(images)
        latents = posterior.sample(noise)
        return VAEOutput(self.decode(latents), latents, posterior)

    def save(self, path: str | Path, *, layout: VAELayout = "compvis") -> None:
        """Write the weights as safetensors in the CompVis or the diffusers key layout."""
        write_tensors(path, from_native(self.state_dict(), layout))

    @classmethod
    def load(cls, path: str | Path, config: VAEConfig | None = None) -> Self:
        """Read weights (safetensors or PyTorch file) in either layout, recognised by its keys.

        A CompVis training file's `first_stage_model.` prefix is taken off and its `loss.`
        tensors are left out. Raises UserError for a missing or damaged file and for weights
        that do not fit `config`.
        """
        tensors = to_native(read_tensors(path))
        return build_from_tensors(lambda: cls(config), tensors, source=str(path))
