"""Slides of 512 px in a second: parts of the committed slide, all of one size in bytes."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import tifffile

SLIDE = Path(__file__).resolve().parents[1] / "data" / "slides" / "CMU-1-Small-Region.svs"
PX = 512


def tissue_pixels() -> npt.NDArray[np.uint8]:
    """uint8 [1024, 1024, 3] of the committed slide's tissue, 0.499 µm per px."""
    with tifffile.TiffFile(SLIDE) as slide:
        return slide.pages[0].asarray()[1000:2024, 600:1624]


def write_part(path: Path, pixels: npt.NDArray[np.uint8], shift: int = 0, side: int = PX) -> Path:
    """Write a slide of `side` px at 0.5 µm per px; another `shift` is another part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tifffile.imwrite(
        path, pixels[shift : shift + side, :side], photometric="rgb", compression=None,
        tile=(256, 256), metadata=None, resolution=(20000, 20000), resolutionunit="CENTIMETER",
    )  # fmt: skip
    return path
