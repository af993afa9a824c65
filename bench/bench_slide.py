"""A large slide for measuring: real tissue, mirrored and recoloured, as a pyramidal Aperio TIFF."""

from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
import openslide
import tifffile

SIDE_PX = 16_000
TILE_PX = 240
MPP = 0.25
_JPEG_QUALITY = 80
_SEED = 7
_PATCH_PX = 1000


def make_slide(path: Path, source: Path, side_px: int = SIDE_PX) -> Path:
    """Write a JPEG Aperio-like TIFF of side_px x side_px at 0.25 mpp, levels 1, 4 and 16.

    The tissue of `source` (0.499 mpp) is enlarged two-fold, cut into patches, each of which is
    drawn with a fixed seed, turned, brightened a little and given sensor noise, so that no two
    are alike. Same arguments, same pixels. A slide that stands is kept.
    """
    if path.exists():
        return path
    image = _mosaic(_tissue(source), side_px)
    description = (
        f"Aperio Image Library v1.0\r\n{side_px}x{side_px} ({TILE_PX}x{TILE_PX}) JPEG/RGB "
        f"Q={_JPEG_QUALITY}|AppMag = 40|MPP = {MPP}"
    )
    staged = path.with_suffix(".part")
    with tifffile.TiffWriter(staged, bigtiff=True) as tiff:
        for level, factor in enumerate((1, 4, 16)):
            size = side_px // factor
            shrunk = cv2.resize(image, (size, size), interpolation=cv2.INTER_AREA)
            tiff.write(
                shrunk,
                tile=(TILE_PX, TILE_PX),
                photometric="rgb",
                compression="jpeg",
                compressionargs={"level": _JPEG_QUALITY, "outcolorspace": "rgb"},
                description=description if level == 0 else description.replace("|", f"|L{level} "),
                metadata=None,
                subfiletype=1 if level else 0,
            )
    staged.rename(path)
    return path


def _tissue(source: Path) -> npt.NDArray[np.uint8]:
    """The densest part of the committed slide, two-fold enlarged: [2 _PATCH_PX + ..., 3]."""
    with openslide.OpenSlide(source) as slide:
        region = np.asarray(slide.read_region((200, 700), 0, (1100, 1100)).convert("RGB"))
    return cv2.resize(region, None, fx=2, fy=2, interpolation=cv2.INTER_CUBIC).astype(np.uint8)


def _mosaic(tissue: npt.NDArray[np.uint8], side_px: int) -> npt.NDArray[np.uint8]:
    rng = np.random.default_rng(_SEED)
    image = np.empty((side_px, side_px, 3), np.uint8)
    for top in range(0, side_px, _PATCH_PX):
        for left in range(0, side_px, _PATCH_PX):
            y, x = rng.integers(0, tissue.shape[0] - _PATCH_PX, 2)
            patch = tissue[y : y + _PATCH_PX, x : x + _PATCH_PX]
            patch = np.rot90(patch, int(rng.integers(4))).astype(np.int16)
            noise = rng.normal(0, 3, patch.shape).astype(np.int16) + rng.integers(-8, 9)
            height, width = min(_PATCH_PX, side_px - top), min(_PATCH_PX, side_px - left)
            done = np.clip(patch + noise, 0, 255).astype(np.uint8)
            image[top : top + height, left : left + width] = done[:height, :width]
    return image
