"""What `measure` compares, and how: its fields are the command's options."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from common.options import option_metadata


@dataclass(frozen=True)
class MeasureConfig:
    """Two selections, the features that they are compared by, and the results file."""

    real: Path = field(metadata=option_metadata("real dataset", metavar="DATASET"))
    real_selection: str = field(
        metadata=option_metadata("selection of the real dataset", metavar="NAME")
    )
    generated: Path = field(metadata=option_metadata("synthetic dataset", metavar="SYN"))
    generated_selection: str = field(
        default="generated",
        metadata=option_metadata("selection of the synthetic dataset", metavar="NAME"),
    )
    guidance: Path | None = field(
        default=None,
        metadata=option_metadata(
            "dataset of the tiles that guided, if not --real", metavar="DATASET"
        ),
    )
    encoder: str = field(
        default="h0-mini", metadata=option_metadata("encoder whose features are compared")
    )
    view: str = field(
        default="", metadata=option_metadata("view of the features that are compared")
    )
    tile_px: int | None = field(
        default=None,
        metadata=option_metadata(
            "side of the tiles in pixels; by default that of the dataset's tiles", metavar="PX"
        ),
    )
    train_selection: str | None = field(
        default=None,
        metadata=option_metadata(
            "training tiles, a selection of the guidance's dataset: also measures FLD",
            metavar="NAME",
        ),
    )
    draws: int = field(
        default=50, metadata=option_metadata("resamples for the intervals; 0 leaves them out")
    )
    seed: int = field(default=0, metadata=option_metadata("seed of all random draws"))
    device: Literal["auto", "cpu", "cuda"] = field(
        default="auto", metadata=option_metadata("where distances are computed")
    )
    out: Path = field(
        default=Path("results.json"), metadata=option_metadata("results file to write")
    )
