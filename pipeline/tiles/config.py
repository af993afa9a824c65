"""The configuration of `tile`."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal

from common.options import option_field, parse_count
from pipeline.options import PNG, SELECTIONS, Icc, PngEffort
from pipeline.slides.config import IN_PLACE, Resampler, StageIn

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

PNG_CODECS = {"small": "png", "fast": "png-fast"}
"""The codec in a dataset's identity, by the effort of `--png`."""


@dataclass(frozen=True)
class TileConfig:
    """Which selections to write tiles for (all, where none is named), and how.

    `tile_px` requests larger tiles around the same ranks: the centre of each is the tile of the
    dataset's size, what is beyond the slide is white. `spool` is a folder for tiles that wait, by
    default inside the dataset.
    """

    selections: tuple[str, ...] = option_field((), SELECTIONS)
    resampler: Resampler = option_field(
        "area", "how pixels are resampled; area is the mean over each pixel's footprint"
    )
    icc: Icc = option_field("ignore", "srgb: apply the slide's colour profile to its tiles")
    format: Literal["png", "zarr"] = option_field(
        "png", "shards as tar files of PNG, or as Zarr arrays"
    )
    png: PngEffort = option_field("small", PNG)
    tile_px: int | None = option_field(
        None,
        "side in pixels of larger tiles around the same ranks (default: the dataset's)",
        parse=parse_count,
    )
    spool: str = option_field(
        "", "folder where tiles wait (default: in the dataset)", metavar="DIR"
    )
    stage_in: StageIn = IN_PLACE

    @property
    def codec(self) -> str:
        """The name under which the identity knows the tiles' encoding."""
        from pipeline.dataset.tiles.zarr_shard import CODEC

        return CODEC if self.format == "zarr" else PNG_CODECS[self.png]

    def identity(self) -> dict[str, object]:
        """The values that every run of the stage on a dataset must share."""
        return {"resampler": self.resampler, "icc": self.icc, "codec": self.codec}

    def make_encoder(self) -> Callable[["npt.NDArray[np.uint8]"], bytes]:
        """From an RGB tile uint8 [h, w, 3] to its lossless bytes."""
        from pipeline.dataset import encode_png
        from pipeline.dataset.tiles.zarr_shard import encode_chunk

        return encode_chunk if self.format == "zarr" else partial(encode_png, effort=self.png)
