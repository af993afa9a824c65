"""Cutting tiles and overviews from an open slide at a resolution in mpp."""

import math

import cv2
import numpy as np
import numpy.typing as npt

from pipeline.slides.reader import SlideReader
from pipeline.slides.resolution import ReadPlan, area_resample, snap_downsample

_STRIP_PIXELS = 16_000_000


def read_tile(
    reader: SlideReader, plan: ReadPlan, x_level0: float, y_level0: float, tile_px: int
) -> npt.NDArray[np.uint8]:
    """RGB uint8 [tile_px, tile_px, 3] whose upper left corner is at (x, y) in level-0 pixels.

    Resampler "area": the mean over each output pixel's exact footprint.
    """
    x, y = x_level0 / plan.downsample, y_level0 / plan.downsample
    if plan.aligned:
        size = round(plan.window)
        image = reader.read(plan.level, round(x), round(y), size, size)
        if plan.factor == 1:
            return image
        shrunk = cv2.resize(image, (tile_px, tile_px), interpolation=cv2.INTER_AREA)
        return np.asarray(shrunk, np.uint8)
    left, top = math.floor(x), math.floor(y)
    size = math.ceil(max(x - left, y - top) + plan.window)
    image = reader.read(plan.level, left, top, size, size)
    return area_resample(image, x - left, y - top, plan.window, tile_px)


def read_overview(
    reader: SlideReader, mpp_level0: float, target_um_per_px: float
) -> tuple[npt.NDArray[np.uint8], float]:
    """The whole slide at about the target resolution: RGB [h, w, 3] and its true µm per pixel.

    Read from the coarsest level that is not coarser than the target, in strips of at most 16
    million pixels, each reduced by an integer factor: memory does not grow with the slide.
    """
    downsamples = [snap_downsample(level.downsample) for level in reader.levels]
    fine = [i for i, d in enumerate(downsamples) if mpp_level0 * d <= target_um_per_px]
    level = max(fine, key=lambda i: downsamples[i]) if fine else 0
    level_mpp = mpp_level0 * downsamples[level]
    factor = max(1, round(target_um_per_px / level_mpp))
    size = reader.levels[level]
    width, height = size.width // factor, size.height // factor
    rows = max(1, _STRIP_PIXELS // max(1, size.width * factor))
    strips = []
    for top in range(0, height, rows):
        count = min(rows, height - top)
        strip = reader.read(level, 0, top * factor, width * factor, count * factor)
        strips.append(cv2.resize(strip, (width, count), interpolation=cv2.INTER_AREA))
    if not strips or width == 0:
        return np.zeros((0, 0, 3), np.uint8), level_mpp * factor
    return np.concatenate(strips).astype(np.uint8, copy=False), level_mpp * factor
