"""What the `cache` stage is asked for."""

from dataclasses import dataclass, replace
from pathlib import Path

from common.errors import UserError
from pipeline.dataset import Dataset
from pipeline.dataset.features.store import encoder_file, feature_scope

STAGE, VERSION = "cache", 2
TOKENS = ("auto", "none", "float16", "int8")
DTYPES = ("float32", "bfloat16")
ALIGNED_ENCODER = "h0-mini"


@dataclass(frozen=True)
class CacheConfig:
    """Which encoder, with which weights, for which selections (all, where none is named).

    `weights` is "hub", "hub:ID", a local file, or explicitly "random:SEED"; `tokens` is how
    patch tokens are stored (see `resolved`); `dtype` is that of the forward pass; `view` is what
    is done to a tile first (`pipeline.features.views`); `tile_px` is the size of the tiles that
    are read, by default the dataset's; `threads` are a worker's, by default all cores.
    """

    encoder: str
    weights: str = "hub"
    selections: tuple[str, ...] = ()
    tokens: str = "auto"
    dtype: str = "float32"
    batch: int = 32
    device: str = "auto"
    view: str = ""
    tile_px: int | None = None
    threads: int | None = None

    @property
    def stores_tokens(self) -> bool:
        """Whether patch tokens are stored."""
        return self.tokens != "none"

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of features to store."""
        return ("cls",) if self.tokens == "none" else ("cls", f"tokens-{self.tokens}")

    def scope(self, tile_px: int, kind: str) -> str:
        """The journal's scope of a kind of these features."""
        return feature_scope(tile_px, self.encoder, self.view, kind)

    def file(self, dataset: Dataset, tile_px: int, kind: str) -> Path:
        """The encoder.json of a kind of these features."""
        return encoder_file(dataset, tile_px, self.encoder, self.view, kind)

    def resolved(self) -> "CacheConfig":
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
