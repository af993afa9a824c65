"""Out of focus: a blurred microscope loses detail of a few µm, far finer than an overview's pixels.

So focus is judged on patches at about 1 µm per pixel, on a lattice over the tissue, and written
into the mask around each. Sharpness is the root mean square of the detail of 1 µm over that of
4 µm in the optical density (two bands of a difference-of-Gaussians pyramid, Burt and Adelson,
1983): the strength of the stain cancels out, and blur takes from the first band only.
"""

from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt

from pipeline.slides.reader import SlideReader
from pipeline.slides.resolution import level_downsamples
from pipeline.tissue.classes import TissueClass
from pipeline.tissue.colour import Floats

_MAX_UM_PER_PX = 1.4
_FINE_UM, _COARSE_UM = (0.7, 1.4), (2.8, 5.6)


@dataclass(frozen=True)
class FocusConfig:
    """Where patches are and how sharp is sharp; lengths in µm.

    `min_sharpness` was set on H&E tiles at 1 µm per pixel (see docs/tissue.md); a patch with
    less contrast than `min_contrast` (optical density) is not judged.
    """

    um_per_px: float = 1.0
    patch_um: float = 112.0
    pitch_um: float = 256.0
    max_probes: int = 400
    min_patch_tissue: float = 0.7
    min_sharpness: float = 0.48
    min_contrast: float = 0.004


def measure_sharpness(rgb: npt.NDArray[np.uint8], um_per_px: float, min_contrast: float) -> float:
    """Detail of 1 µm over detail of 4 µm of a patch uint8 [h, w, 3]; NaN without contrast.

    About 1 on sharp H&E at 0.8 to 1.2 µm per pixel, 0.3 where points spread over 4 µm around.
    """
    # Green alone: both stains absorb it most, and one channel is three times as quick.
    density = -np.log10((rgb[..., 1].astype(np.float32) + 1) / 256)
    fine, coarse = (_band_detail(density, band, um_per_px) for band in (_FINE_UM, _COARSE_UM))
    return fine / coarse if coarse >= min_contrast else float("nan")


def _band_detail(density: Floats, band_um: tuple[float, float], um_per_px: float) -> float:
    inner, outer = (cv2.GaussianBlur(density, (0, 0), sigma / um_per_px) for sigma in band_um)
    return float(np.sqrt(np.square(inner - outer).mean(dtype=np.float64)))


@dataclass(frozen=True)
class PatchSource:
    """Patches of a slide: `read(x_um, y_um)` is uint8 [h, w, 3] from that corner on."""

    read: Callable[[float, float], npt.NDArray[np.uint8]]
    um_per_px: float


def slide_patches(
    reader: SlideReader, mpp_level0: float, config: FocusConfig
) -> PatchSource | None:
    """Patches of an open slide at about `config.um_per_px`; None where it is > 1.4 µm per px."""
    # The coarsest level that is fine enough, reduced by a whole factor: no resampling blur.
    levels = [mpp_level0 * downsample for downsample in level_downsamples(reader.levels)]
    fine = [i for i, mpp in enumerate(levels) if mpp <= 1.05 * config.um_per_px]
    level = max(fine, key=lambda i: levels[i]) if fine else 0
    factor = max(1, round(config.um_per_px / levels[level]))
    um_per_px = levels[level] * factor
    if um_per_px > _MAX_UM_PER_PX:
        return None
    side = round(config.patch_um / um_per_px)

    def read(x_um: float, y_um: float) -> npt.NDArray[np.uint8]:
        x, y = round(x_um / levels[level]), round(y_um / levels[level])
        patch = reader.read(level, x, y, side * factor, side * factor)
        small = cv2.resize(patch, (side, side), interpolation=cv2.INTER_AREA)
        return np.asarray(small, np.uint8)

    return PatchSource(read, um_per_px)


def mark_out_of_focus(
    mask: npt.NDArray[np.uint8], um_per_px: float, patches: PatchSource, config: FocusConfig
) -> npt.NDArray[np.uint8]:
    """The mask uint8 [h, w] with blurred tissue as `OUT_OF_FOCUS`.

    A cell of the lattice is blurred if the median sharpness of it and its eight neighbours is too
    low: one smooth spot is not yet blur.
    """
    tissue = mask == TissueClass.TISSUE
    # The lattice is wider where the tissue would need too many patches.
    spread = (int(tissue.sum()) / config.max_probes) ** 0.5
    pitch_px = float(max(spread, config.pitch_um / um_per_px, 1.0))
    values = _probe_sharpness(tissue, pitch_px, um_per_px, patches, config)
    blurred = _neighbourhood_median(values) < config.min_sharpness
    rows = np.minimum(np.arange(mask.shape[0]) // pitch_px, blurred.shape[0] - 1).astype(np.int64)
    columns = np.minimum(np.arange(mask.shape[1]) // pitch_px, blurred.shape[1] - 1).astype(
        np.int64
    )
    marked = mask.copy()
    marked[tissue & blurred[np.ix_(rows, columns)]] = TissueClass.OUT_OF_FOCUS
    return marked


def _probe_sharpness(
    tissue: npt.NDArray[np.bool_],
    pitch_px: float,
    um_per_px: float,
    patches: PatchSource,
    config: FocusConfig,
) -> npt.NDArray[np.float64]:
    """Sharpness per cell of the lattice [rows, columns]; NaN where its middle is not tissue."""
    side = config.patch_um / um_per_px
    rows, columns = (max(1, int(length // pitch_px)) for length in tissue.shape)
    # In the middle of each cell, and only where that is tissue: a patch costs a read of the slide.
    values = np.full((rows, columns), np.nan)
    for row in range(rows):
        for column in range(columns):
            top, left = ((i + 0.5) * pitch_px - side / 2 for i in (row, column))
            first_row, end_row, first, end = (
                max(0, round(edge)) for edge in (top, top + side, left, left + side)
            )
            # At least one pixel: on a coarse mask a patch is less than that.
            window = tissue[first_row : max(end_row, first_row + 1), first : max(end, first + 1)]
            if window.size and window.mean() >= config.min_patch_tissue:
                patch = patches.read(left * um_per_px, top * um_per_px)
                values[row, column] = measure_sharpness(
                    patch, patches.um_per_px, config.min_contrast
                )
    return values


def _neighbourhood_median(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Median of each cell and its neighbours, over those that were judged; NaN if none was."""
    padded = np.pad(values, 1, constant_values=np.nan)
    around = np.lib.stride_tricks.sliding_window_view(padded, (3, 3)).reshape(*values.shape, 9)
    result = np.full(values.shape, np.nan)
    known = ~np.isnan(around).all(-1)
    result[known] = np.nanmedian(around[known], axis=-1)
    return result
