"""The configuration of `cache`."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from common.errors import UserError
from common.options import option_field
from pipeline.options import SELECTIONS

if TYPE_CHECKING:
    from pipeline.dataset import Dataset

STAGE, VERSION = "cache", 2
ALIGNED_ENCODER = "h0-mini"
"""The encoder whose patch tokens training aligns to."""


@dataclass(frozen=True)
class CacheConfig:
    """Which encoder, with which weights, for which selections (all, where none is named).

    `tokens` "auto": see `resolve_tokens`; `dtype` is that of the forward pass; `view` is what
    is done to a tile first (`pipeline.features.views`); `tile_px` is the size in pixels of the
    tiles that are read, by default the dataset's; `threads` are a worker's, by default all cores.
    """

    encoder: str = option_field(ALIGNED_ENCODER, "name in the table of encoders (`weights list`)")
    weights: str = option_field(
        "hub", "hub, hub:ID, a local .safetensors or .pt file, or explicitly random:SEED"
    )
    selections: tuple[str, ...] = option_field((), SELECTIONS)
    tokens: str = option_field(
        "auto",
        f"how patch tokens are stored; auto: float16 for {ALIGNED_ENCODER}, none for others",
        choices=("auto", "none", "float16", "int8"),
    )
    dtype: Literal["float32", "bfloat16"] = option_field(
        "float32", "number format of the forward pass"
    )
    batch: int = option_field(32, "tiles per forward pass")
    device: str = option_field(
        "auto",
        "where the encoder runs; auto: a GPU where there is one",
        choices=("auto", "cpu", "cuda"),
    )
    view: str = option_field(
        "",
        "applied to each tile first: crop224, resize224, jpeg70 or a chain (jpeg70+crop224)",
        metavar="VIEW",
    )
    tile_px: int | None = option_field(None, "tile side in pixels (default: the dataset's)")
    threads: int | None = None

    @property
    def stores_tokens(self) -> bool:
        """Whether patch tokens are stored."""
        return self.tokens != "none"

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of features to store.

        >>> CacheConfig(tokens="int8").kinds
        ('cls', 'tokens-int8')
        """
        return ("cls", f"tokens-{self.tokens}") if self.stores_tokens else ("cls",)

    def scope(self, tile_px: int, kind: str) -> str:
        """The journal's scope of a kind of these features, of tiles of `tile_px` px."""
        from pipeline.dataset.features.store import feature_scope

        return feature_scope(tile_px, self.encoder, self.view, kind)

    def file(self, dataset: "Dataset", tile_px: int, kind: str) -> Path:
        """The encoder.json of a kind of these features, of tiles of `tile_px` px."""
        from pipeline.dataset.features.store import encoder_file

        return encoder_file(dataset, tile_px, self.encoder, self.view, kind)

    def resolve_tokens(self) -> "CacheConfig":
        """The same with `auto` decided: float16 tokens for the encoder that training aligns to.

        All others are for conditioning and measuring, which want the CLS feature alone.
        """
        from model.encoders import encoder_spec

        spec = encoder_spec(self.encoder)
        if self.tokens == "auto":
            return replace(self, tokens="float16" if self.encoder == ALIGNED_ENCODER else "none")
        if self.tokens != "none" and spec.num_tokens == 0:
            raise UserError(
                f"--tokens {self.tokens}: encoder {self.encoder} has no patch tokens; use none"
            )
        return self
