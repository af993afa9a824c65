"""A large slide for measuring: real tissue, mirrored and recoloured, as a pyramidal Aperio TIFF."""

from pathlib import Path

import cv2
import imagecodecs
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
    description = _description(side_px, side_px)
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


def make_wide_slide(path: Path, source: Path, width_px: int, height_px: int) -> Path:
    """Write a JPEG Aperio-like TIFF of one level at 0.25 mpp, as wide as the widest scanners'.

    A few encoded native tiles of tissue stand again and again: what it takes in memory to read a
    slide depends on how many there are, not on what they show. A slide that stands is kept.
    """
    if path.exists():
        return path
    columns, rows = -(-width_px // TILE_PX), -(-height_px // TILE_PX)
    tissue = _mosaic(_tissue(source), 8 * TILE_PX)
    encoded = [
        imagecodecs.jpeg8_encode(
            tissue[y : y + TILE_PX, x : x + TILE_PX], level=_JPEG_QUALITY, outcolorspace="RGB"
        )
        for y in range(0, 8 * TILE_PX, TILE_PX)
        for x in range(0, 8 * TILE_PX, TILE_PX)
    ]
    staged = path.with_suffix(".part")
    with tifffile.TiffWriter(staged, bigtiff=True) as tiff:
        tiff.write(
            (encoded[(row * 13 + column) % len(encoded)] for row in range(rows)
             for column in range(columns)),
            shape=(height_px, width_px, 3), dtype=np.uint8, tile=(TILE_PX, TILE_PX),
            photometric="rgb", compression="jpeg", metadata=None,
            description=_description(width_px, height_px),
        )  # fmt: skip
    staged.rename(path)
    return path


def _description(width_px: int, height_px: int) -> str:
    return (
        f"Aperio Image Library v1.0\r\n{width_px}x{height_px} ({TILE_PX}x{TILE_PX}) JPEG/RGB "
        f"Q={_JPEG_QUALITY}|AppMag = 40|MPP = {MPP}"
    )


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
