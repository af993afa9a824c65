"""Cutting tiles and overviews from an open slide at a resolution in mpp."""

import math
from collections.abc import Iterator

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image

from pipeline.slides.reader import Level, SlideReader, SlideReadError
from pipeline.slides.resolution import ReadPlan, area_resample, level_downsamples, plan_read

_KERNELS = {
    "lanczos": (Image.Resampling.LANCZOS, 3.0),
    "bicubic": (Image.Resampling.BICUBIC, 2.0),
}
"""Pillow's filter, and its reach in output pixels."""

_STRIP_PIXELS = 16_000_000
MOST_OVERVIEW_PX = 400_000_000
"""Of the largest glass at 5 µm per px."""
_UNKNOWN_NATIVE_TILE = (256, 256)


def read_region(
    reader: SlideReader,
    mpp_level0: float,
    x_level0: float,
    y_level0: float,
    tile_px: int,
    mpp: float,
    *,
    tolerance: float = 0.02,
    resampler: str = "area",
) -> npt.NDArray[np.uint8]:
    """RGB uint8 [tile_px, tile_px, 3] at `mpp` whose upper left corner is at (x, y) of level 0.

    `mpp_level0` is the slide's resolution (in `slides.parquet`). Where an integer
    multiple of a level's is within `tolerance` (relative) of `mpp`, the region is an integer
    reduction of whole pixels at that multiple; otherwise it is resampled from the coarsest level
    that is not coarser than `mpp`, sub-pixel exact. Raises `ResolutionError` where the slide is
    coarser than requested, and `SlideReadError` with the coordinates where it cannot be read.
    """
    plan = plan_read(reader.levels, mpp_level0, mpp, tolerance, tile_px)
    return read_tile(reader, plan, x_level0, y_level0, tile_px, resampler)


def read_tile(
    reader: SlideReader,
    plan: ReadPlan,
    x_level0: float,
    y_level0: float,
    tile_px: int,
    resampler: str = "area",
) -> npt.NDArray[np.uint8]:
    """RGB uint8 [tile_px, tile_px, 3] whose upper left corner is at (x, y) in level-0 pixels.

    Resampler "area" is the mean over each output pixel's exact footprint; "lanczos" and "bicubic"
    are Pillow's, and see the slide beyond the tile's edge. Outside the slide is white.
    """
    x, y = np.array([x_level0]), np.array([y_level0])
    windows = tile_windows(reader.levels[plan.level], plan, x, y, resampler)
    return _cut_tile(reader, plan, windows[0], x_level0, y_level0, tile_px, resampler)


def cut_tiles(
    reader: SlideReader,
    plan: ReadPlan,
    x_level0: npt.NDArray[np.float64],
    y_level0: npt.NDArray[np.float64],
    tile_px: int,
    resampler: str = "area",
) -> Iterator[tuple[int, npt.NDArray[np.uint8]]]:
    """(index, tile) of every position, as `read_tile` gives it, in the order of native tiles.

    The native reader decodes each native tile once (but for the seams of bands, on slides too
    wide for its cache).
    """
    windows = tile_windows(reader.levels[plan.level], plan, x_level0, y_level0, resampler)
    reader.expect_windows(plan.level, windows)
    native = reader.native_tiles[plan.level] if reader.native_tiles else _UNKNOWN_NATIVE_TILE
    for index in reading_order(windows, native, reader.cache_bytes):
        x, y = float(x_level0[index]), float(y_level0[index])
        yield int(index), _cut_tile(reader, plan, windows[index], x, y, tile_px, resampler)


def tile_windows(
    level: Level,
    plan: ReadPlan,
    x_level0: npt.NDArray[np.float64],
    y_level0: npt.NDArray[np.float64],
    resampler: str = "area",
) -> npt.NDArray[np.int64]:
    """What must be read for tiles at these positions: int64 [n, 4] (x, y, w, h), level pixels."""
    spans = []
    for start, pixels in (
        (x_level0 / plan.downsample, level.width),
        (y_level0 / plan.downsample, level.height),
    ):
        if plan.aligned:
            first = np.rint(start).astype(np.int64)
            last = first + round(plan.window)
        else:
            first = np.floor(start).astype(np.int64)
            last = np.ceil(start + plan.window).astype(np.int64)
        # Kernels reach beyond the tile; what they need is read as far as the slide goes.
        if resampler != "area" and plan.factor != 1:
            reach = math.ceil(_KERNELS[resampler][1] * plan.factor)
            first = np.minimum(first, np.maximum(first - reach, 0))
            last = np.maximum(last, np.minimum(last + reach, pixels))
        spans.append((first, last - first))
    return np.stack([spans[0][0], spans[1][0], spans[0][1], spans[1][1]], 1)


def reading_order(
    windows: npt.NDArray[np.int64], native_tile: tuple[int, int], cache_bytes: int
) -> npt.NDArray[np.int64]:
    """Order in which to read windows [n, 4] so that decoded native tiles fit the cache.

    Row by row; a slide so wide that its rows overflow the cache is read in vertical bands.

    >>> windows = np.array([[300, 0, 9, 9], [0, 0, 9, 9], [0, 300, 9, 9]])
    >>> reading_order(windows, (256, 256), 64 << 20).tolist()
    [1, 0, 2]
    """
    if len(windows) == 0:
        return np.zeros(0, np.int64)
    # As many columns of native tiles as fit the cache over the rows that one window touches.
    width, height = native_tile
    rows = -(-int(windows[:, 3].max()) // height) + 1
    columns = cache_bytes // (rows * width * height * 3)
    spare = -(-int(windows[:, 2].max()) // width) + 1
    band_px = max(1, columns - spare) * width
    x, y = windows[:, 0], windows[:, 1]
    return np.lexsort((x, y, x // band_px))


def _cut_tile(
    reader: SlideReader,
    plan: ReadPlan,
    window: npt.NDArray[np.int64],
    x_level0: float,
    y_level0: float,
    tile_px: int,
    resampler: str,
) -> npt.NDArray[np.uint8]:
    left, top, width, height = (int(value) for value in window)
    image = reader.read(plan.level, left, top, width, height)
    if plan.factor == 1:
        return image
    # Where the tile begins in the pixels that were read.
    x, y = x_level0 / plan.downsample, y_level0 / plan.downsample
    if plan.aligned:
        x, y = round(x), round(y)
    if resampler != "area":
        box = (x - left, y - top, x - left + plan.window, y - top + plan.window)
        kernel = _KERNELS[resampler][0]
        return np.array(Image.fromarray(image).resize((tile_px, tile_px), kernel, box))
    if plan.aligned:
        shrunk = cv2.resize(image, (tile_px, tile_px), interpolation=cv2.INTER_AREA)
        return np.asarray(shrunk, np.uint8)
    return area_resample(image, x - left, y - top, plan.window, tile_px)


def read_overview(
    reader: SlideReader, mpp_level0: float, target_um_per_px: float
) -> tuple[npt.NDArray[np.uint8], float]:
    """The whole slide at about the target resolution: RGB [h, w, 3] and its true µm per pixel.

    Read from the coarsest level that is not coarser than the target, in strips of at most 16
    million pixels, each reduced by an integer factor: memory does not grow with the slide.
    """
    downsamples = level_downsamples(reader.levels)
    fine = [i for i, d in enumerate(downsamples) if mpp_level0 * d <= target_um_per_px]
    level = max(fine, key=lambda i: downsamples[i]) if fine else 0
    # A whole factor keeps the overview's resolution exact, and its strips independent.
    level_mpp = mpp_level0 * downsamples[level]
    factor = max(1, round(target_um_per_px / level_mpp))
    size = reader.levels[level]
    width, height = size.width // factor, size.height // factor
    if width * height > MOST_OVERVIEW_PX:
        raise SlideReadError(
            f"slide {reader.path.name}: an overview of {width}x{height} px is larger than any "
            "glass; is its resolution right?"
        )
    rows = max(1, _STRIP_PIXELS // max(1, size.width * factor))
    strips = []
    for top in range(0, height, rows):
        count = min(rows, height - top)
        strip = reader.read(level, 0, top * factor, width * factor, count * factor)
        strips.append(cv2.resize(strip, (width, count), interpolation=cv2.INTER_AREA))
    if not strips or width == 0:
        return np.zeros((0, 0, 3), np.uint8), level_mpp * factor
    return np.concatenate(strips).astype(np.uint8, copy=False), level_mpp * factor
