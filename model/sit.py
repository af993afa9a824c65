"""SiT, the diffusion transformer with adaptive layer norm, and its REPA projector.

Sources: SiT (Ma et al., arXiv 2401.08740), DiT's adaLN-Zero block (Peebles & Xie, arXiv
2212.09748, section 3.2), REPA (Yu et al., arXiv 2410.06940, section 3.2), REPA-E (Leng et al.,
arXiv 2504.10483). Names and shapes of the state are REPA-E's, so that its checkpoints load.
Time runs from 0 (data) to 1 (noise).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, Self, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from common.config import build_config, to_plain_values
from common.errors import UserError
from model.latent_norm import LatentNorm

Conditioning = Literal["feature", "label", "none", "label-only"]
"""What conditions a SiT. "label-only" is a table without the null class, of training without label
drop: such a model draws neither without a label nor with guidance."""

_SIZES: dict[str, dict[str, int]] = {
    # The alignment tap sits after about the first third of the blocks, REPA's 8 of 28.
    "S": {"hidden_size": 384, "depth": 12, "num_heads": 6, "encoder_depth": 4},
    "B": {"hidden_size": 768, "depth": 12, "num_heads": 12, "encoder_depth": 4},
    "L": {"hidden_size": 1024, "depth": 24, "num_heads": 16, "encoder_depth": 8},
    "XL": {"hidden_size": 1152, "depth": 28, "num_heads": 16, "encoder_depth": 8},
}

SIT_PRESETS: dict[str, dict[str, int]] = {
    f"{name}/{patch}": {**size, "patch_size": patch}
    for name, size in _SIZES.items()
    for patch in (1, 2, 4)
} | {
    "tiny": {
        "hidden_size": 128,
        "depth": 4,
        "num_heads": 4,
        "encoder_depth": 2,
        "projector_dim": 256,
        "patch_size": 2,
    }
}

_LARGEST = {"latent_size": 4096, "patch_size": 4096, "depth": 1024, "encoder_depth": 1024}
"""Far beyond any network, and not so far that a file of others could ask for endless work."""


@dataclass(frozen=True)
class SiTConfig:
    """The shape of a SiT; the defaults are XL/2 on the 28x28x4 latents of 224 px tiles.

    Raises UserError naming the field and its value where the fields do not fit together.
    """

    latent_size: int = 28  # side of the latent, in latent pixels
    patch_size: int = 2  # side of a token's patch, in latent pixels
    latent_channels: int = 4
    hidden_size: int = 1152
    depth: int = 28  # number of blocks
    num_heads: int = 16
    mlp_ratio: float = 4.0
    encoder_depth: int = 8  # blocks before the alignment tap
    projector_dim: int = 2048
    token_dim: int = 768  # width of the encoder's patch tokens that the projector aims at
    conditioning: Conditioning = "feature"
    condition_dim: int = 768  # width of the feature, for "feature"
    num_classes: int = (
        1000  # for "label", whose class num_classes is the null one, and "label-only"
    )
    qk_norm: bool = False
    train_pos_embed: bool = False  # the table of positions: REPA-E trains it, REPA and SiT do not

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            most = _LARGEST.get(field.name, 1 << 20)
            if field.type is int and not (type(value) is int and 1 <= value <= most):
                raise UserError(
                    f"SiT {field.name} is {value!r}; expected an integer from 1 to {most:,}"
                )
        if self.conditioning not in get_args(Conditioning):
            allowed = ", ".join(get_args(Conditioning))
            raise UserError(f"SiT conditioning is {self.conditioning!r}; expected one of {allowed}")
        if not 0 < self.mlp_ratio <= 1024:
            raise UserError(
                f"SiT mlp_ratio is {self.mlp_ratio}; expected a number above 0, at most 1,024"
            )
        self._require_multiple("latent_size", self.patch_size, "patch_size")
        self._require_multiple("hidden_size", self.num_heads, "num_heads")
        self._require_multiple("hidden_size", 4, "4, which the position embedding needs")
        if self.encoder_depth > self.depth:
            raise UserError(
                f"SiT encoder_depth is {self.encoder_depth}; expected at most depth {self.depth}"
            )

    def _require_multiple(self, name: str, divisor: int, of: str) -> None:
        value = getattr(self, name)
        if value % divisor:
            of = f"{of} {divisor}" if not of[0].isdigit() else of
            raise UserError(f"SiT {name} is {value}; expected a multiple of {of}")

    @property
    def grid_size(self) -> int:
        """Side of the token grid."""
        return self.latent_size // self.patch_size

    @property
    def num_tokens(self) -> int:
        """Number of tokens T, the grid's side squared."""
        return self.grid_size**2

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> Self:
        """A named size ("S/2", "B/4", "XL/2", "tiny", ...), with fields replaced by overrides."""
        if name not in SIT_PRESETS:
            raise UserError(f"SiT preset is {name!r}; expected one of {', '.join(SIT_PRESETS)}")
        return cls.from_dict({**SIT_PRESETS[name], **overrides})

    @classmethod
    def from_dict(cls, values: Mapping[str, object]) -> Self:
        """The inverse of `to_dict`; raises UserError for an unknown key or a wrong type."""
        return build_config(cls, values)

    def to_dict(self) -> dict[str, object]:
        """The fields as plain values, ready for JSON."""
        return to_plain_values(self)


def position_embedding(grid_size: int, width: int) -> Tensor:
    """Fixed 2-D sine-cosine positions [1, grid_size^2, width] in float32, tokens row by row.

    The first half of the width encodes the column, the second the row; each half is the sines
    and then the cosines of position / 10000^(k / (width/4)), k = 0..width/4-1 (MAE, He et al.,
    arXiv 2111.06377).
    """
    quarter = width // 4
    rates = 10000.0 ** -(torch.arange(quarter, dtype=torch.float64) / quarter)
    angles = torch.arange(grid_size, dtype=torch.float64)[:, None] * rates
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)
    columns = axis[None, :, :].expand(grid_size, grid_size, -1)
    rows = axis[:, None, :].expand(grid_size, grid_size, -1)
    return torch.cat([columns, rows], dim=2).reshape(1, grid_size**2, width).float()


def time_features(t: Tensor, width: int = 256) -> Tensor:
    """Fourier features [B, width] in float32 of times t [B] in [0, 1]: cosines, then sines.

    Frequencies exp(-ln(10000) k / (width/2)); t is not multiplied by 1000, as in SiT.
    """
    half = width // 2
    k = torch.arange(half, dtype=torch.float32, device=t.device)
    angles = t.float()[:, None] * torch.exp(-math.log(10000) / half * k)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (1 + scale) + shift for tokens x [B, T, D], shift and scale [B, D] or [1, D]."""
    return x * (1 + scale[:, None]) + shift[:, None]


def _frozen_call(module: nn.Module, *args: Any) -> Any:
    """Call a module with its parameters detached: gradients pass through it, none reach it."""
    detached = {name: parameter.detach() for name, parameter in module.named_parameters()}
    return functional_call(module, detached, args)


def _plain_call(module: nn.Module, *args: Any) -> Any:
    return module(*args)


class PatchEmbedder(nn.Module):
    """Cut latents [B, C, H, W] in patches and map each to a token: [B, T, D], row by row."""

    def __init__(self, channels: int, patch_size: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, width, patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens [B, T, D] of x [B, C, H, W]."""
        return self.proj(x.to(self.proj.weight.dtype)).flatten(2).transpose(1, 2)


class TimestepEmbedder(nn.Module):
    """Map times [B] in [0, 1] to vectors [B, D] by Fourier features and a two-layer MLP."""

    def __init__(self, width: int, num_features: int = 256) -> None:
        super().__init__()
        self.num_features = num_features
        first = nn.Linear(num_features, width)
        self.mlp = nn.Sequential(first, nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        """Vectors [B, D] of times t [B]."""
        dtype = next(self.mlp.parameters()).dtype
        return self.mlp(time_features(t, self.num_features).to(dtype))


class FeatureEmbedder(nn.Module):
    """Condition on a feature vector: a linear map to width D, and a learned null vector [D].

    The report (arXiv 2603.18089) does not state CytoSyn's module; a linear map and a null vector
    fit its parameter count.
    """

    def __init__(self, condition_dim: int, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(condition_dim, width)
        self.null = nn.Parameter(torch.empty(width))

    def forward(self, y: Tensor | None, drop: Tensor | None) -> Tensor:
        """Vectors [B, D] of features y [B, condition_dim], null where drop; [1, D] for None."""
        if y is None:
            return self.null[None]
        embedded = self.linear(y.to(self.linear.weight.dtype))
        if drop is None:
            return embedded
        return torch.where(drop[:, None], self.null.to(embedded.dtype), embedded)


class LabelEmbedder(nn.Module):
    """Condition on a class: a table of num_classes + 1 vectors, the last one for null.

    Without `has_null` there is no such row, and asking for it raises `UserError`.
    """

    def __init__(self, num_classes: int, width: int, *, has_null: bool = True) -> None:
        super().__init__()
        self.num_classes, self.has_null = num_classes, has_null
        self.embedding_table = nn.Embedding(num_classes + has_null, width)

    def forward(self, y: Tensor | None, drop: Tensor | None) -> Tensor:
        """Vectors [B, D] of labels y [B] in [0, num_classes], null where drop; [1, D] for None."""
        if not self.has_null and (y is None or drop is not None):
            raise UserError(
                "this SiT was trained without label drop and has no null class: give labels, "
                "and guidance_scale=1"
            )
        if y is None:
            return self.embedding_table.weight[self.num_classes :]
        return self.embedding_table(y if drop is None else y.masked_fill(drop, self.num_classes))


class Attention(nn.Module):
    """Multi-head self-attention over tokens [B, T, D] with one projection to (q, k, v)."""

    def __init__(self, width: int, num_heads: int, *, qk_norm: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        head_dim = width // num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm = nn.LayerNorm(head_dim) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(head_dim) if qk_norm else nn.Identity()
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Attended tokens [B, T, D] of x [B, T, D]."""
        B, T, D = x.shape
        qkv = self.qkv(x).reshape(B, T, 3, self.num_heads, D // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)
        attended = F.scaled_dot_product_attention(q, k, v)
        return self.proj(attended.transpose(1, 2).reshape(B, T, D))


class Mlp(nn.Module):
    """The block's two-layer MLP, with GELU in its tanh form."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens [..., D] of x [..., D]."""
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


def _layer_norm(width: int) -> nn.LayerNorm:
    return nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)


def _build_modulation(width: int, chunks: int) -> nn.Sequential:
    return nn.Sequential(nn.SiLU(), nn.Linear(width, chunks * width))


class SiTBlock(nn.Module):
    """A transformer block whose norms and residual gates are set by the condition (adaLN-Zero)."""

    def __init__(self, config: SiTConfig) -> None:
        super().__init__()
        D = config.hidden_size
        self.norm1 = _layer_norm(D)
        self.attn = Attention(D, config.num_heads, qk_norm=config.qk_norm)
        self.norm2 = _layer_norm(D)
        self.mlp = Mlp(D, int(D * config.mlp_ratio))
        self.adaLN_modulation = _build_modulation(D, 6)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """Tokens [B, T, D] of x [B, T, D] under condition c [B or 1, D]."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate1[:, None] * self.attn(modulate(self.norm1(x), shift1, scale1))
        return x + gate2[:, None] * self.mlp(modulate(self.norm2(x), shift2, scale2))


class FinalLayer(nn.Module):
    """Map tokens to patches of the output, after a norm set by the condition."""

    def __init__(self, width: int, patch_values: int) -> None:
        super().__init__()
        self.norm_final = _layer_norm(width)
        self.linear = nn.Linear(width, patch_values)
        self.adaLN_modulation = _build_modulation(width, 2)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """Patches [B, T, p*p*C] of x [B, T, D] under condition c [B or 1, D]."""
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


def _build_projector(config: SiTConfig) -> nn.Sequential:
    """REPA's tokenwise three-layer MLP from the residual stream to the encoder's tokens."""
    return nn.Sequential(
        nn.Linear(config.hidden_size, config.projector_dim),
        nn.SiLU(),
        nn.Linear(config.projector_dim, config.projector_dim),
        nn.SiLU(),
        nn.Linear(config.projector_dim, config.token_dim),
    )


def _build_conditioner(config: SiTConfig) -> nn.Module | None:
    if config.conditioning == "feature":
        return FeatureEmbedder(config.condition_dim, config.hidden_size)
    if config.conditioning in ("label", "label-only"):
        has_null = config.conditioning == "label"
        return LabelEmbedder(config.num_classes, config.hidden_size, has_null=has_null)
    return None


class SiT(nn.Module):
    """The velocity network v(x, t, y) over normalised latents, with the latent norm inside.

    Shapes: x [B, C, H, W] normalised latents at time t; t [B] in [0, 1]; y features
    [B, condition_dim], labels [B] (int64) or None, the null condition for the whole batch.
    Computes in the parameters' dtype or autocast's; float32 under autocast keeps the residual
    stream in float32. `recompute` trades memory for time: each block's activations are computed
    again in the backward pass. It is no part of the state or the configuration.

    Example:
        >>> sit = SiT(SiTConfig.preset("tiny", latent_size=4, condition_dim=3))
        >>> velocity = sit(torch.zeros(2, 4, 4, 4), torch.tensor([0.0, 1.0]), torch.zeros(2, 3))
        >>> list(velocity.shape)
        [2, 4, 4, 4]
    """

    def __init__(self, config: SiTConfig, *, recompute: bool = False) -> None:
        super().__init__()
        self.config = config
        self.recompute = recompute
        D, p, C = config.hidden_size, config.patch_size, config.latent_channels
        self.x_embedder = PatchEmbedder(C, p, D)
        self.t_embedder = TimestepEmbedder(D)
        self.y_embedder = _build_conditioner(config)
        self.pos_embed = nn.Parameter(
            position_embedding(config.grid_size, D), requires_grad=config.train_pos_embed
        )
        self.blocks = nn.ModuleList([SiTBlock(config) for _ in range(config.depth)])
        self.projectors = nn.ModuleList([_build_projector(config)])
        self.final_layer = FinalLayer(D, p * p * C)
        self.bn = LatentNorm(C)
        self._initialise_weights()

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        y: Tensor | None,
        *,
        drop: Tensor | None = None,
        return_tokens: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The velocity [B, C, H, W] in x's dtype, with return_tokens also tokens [B, T, token_dim].

        `drop` [B] (bool) marks the samples whose condition is replaced by the null one, for
        classifier-free guidance; drawing it is the caller's part. The tokens are the projected
        residual stream after `encoder_depth` blocks (REPA, equation 8).
        """
        velocity, tapped = self._run_network(x, self.condition(t, y, drop=drop))
        return (velocity, self.projectors[0](tapped)) if return_tokens else velocity

    def forward_from_condition(self, x: Tensor, c: Tensor) -> Tensor:
        """The velocity [B, C, H, W] under vectors c [B, D] of `condition`, or [1, D] for all.

        With one row the modulation of every block is computed once and broadcast: so the null
        branch of guided sampling costs no modulation a sample.
        """
        return self._run_network(x, c)[0]

    def align_tokens(self, x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        """Projected tokens [B, T, token_dim] for the VAE's alignment loss (REPA-E, equation 2).

        Equal to `forward`'s tokens, but runs the first `encoder_depth` blocks alone and with all
        parameters detached: gradients reach x, never the SiT. No condition is dropped.
        """
        c = self.condition(t, y, frozen=True)
        tokens = _frozen_call(self.x_embedder, x) + self.pos_embed.detach()
        tokens = self._run_blocks(self.blocks[: self.config.encoder_depth], tokens, c, frozen=True)
        return _frozen_call(self.projectors[0], tokens)

    def condition(
        self, t: Tensor, y: Tensor | None, *, drop: Tensor | None = None, frozen: bool = False
    ) -> Tensor:
        """The conditioning vectors c [B, D] = time + condition; one row of t or y serves all.

        `frozen` detaches the parameters.
        """
        call = _frozen_call if frozen else _plain_call
        return call(self.t_embedder, t) + self.embed_condition(y, drop=drop, frozen=frozen)

    def embed_condition(
        self, y: Tensor | None, *, drop: Tensor | None = None, frozen: bool = False
    ) -> Tensor:
        """The condition's share [B, D] of `condition`; [1, D], the null one, for y None.

        Raises UserError when y is given to a SiT without conditioning.
        """
        call = _frozen_call if frozen else _plain_call
        if self.y_embedder is not None:
            return call(self.y_embedder, y, drop)
        if y is not None:
            raise UserError("this SiT has conditioning 'none'; pass y=None instead of a condition")
        return self.pos_embed.new_zeros(1, self.config.hidden_size)

    def _run_network(self, x: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        """Velocity, and the residual stream at the alignment tap."""
        cut = self.config.encoder_depth
        tapped = self._run_blocks(self.blocks[:cut], self.x_embedder(x) + self.pos_embed, c)
        tokens = self._run_blocks(self.blocks[cut:], tapped, c)
        return self._unpatchify(self.final_layer(tokens, c)).to(x.dtype), tapped

    def _run_blocks(
        self, blocks: nn.ModuleList, x: Tensor, c: Tensor, *, frozen: bool = False
    ) -> Tensor:
        call = _frozen_call if frozen else _plain_call
        for block in blocks:
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(call, block, x, c, use_reentrant=False, preserve_rng_state=False)
            else:
                x = call(block, x, c)
        return x

    def _unpatchify(self, patches: Tensor) -> Tensor:
        """[B, T, p*p*C], values of a patch in (row, column, channel) order, to [B, C, H, W]."""
        g, p, C = self.config.grid_size, self.config.patch_size, self.config.latent_channels
        patches = patches.reshape(-1, g, g, p, p, C)
        return patches.permute(0, 5, 1, 3, 2, 4).reshape(-1, C, g * p, g * p)

    @torch.no_grad()
    def _initialise_weights(self) -> None:
        """adaLN-Zero: every block starts as the identity and the velocity as 0."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.xavier_uniform_(module.weight.flatten(1))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for module in self.t_embedder.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
        if isinstance(self.y_embedder, FeatureEmbedder):
            nn.init.normal_(self.y_embedder.null, std=0.02)
        elif isinstance(self.y_embedder, LabelEmbedder):
            nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        for block in (*self.blocks, self.final_layer):
            nn.init.zeros_(block.adaLN_modulation[1].weight)
        nn.init.zeros_(self.final_layer.linear.weight)
