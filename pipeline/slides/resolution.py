"""From a target mpp to pixels: which mpp to believe, which level to read, which window.

Pure arithmetic, no slide in it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from common.errors import UserError
from pipeline.slides.reader import Level, ResolutionTags

TIFF_MPP_WINDOW = (0.1, 1.0)
MAX_ANISOTROPY = 0.02
_VENDOR_WINDOW = (0.02, 50.0)
_CELLS_PER_BLOCK = 16
_ROUNDED_PX = 1.5


class ResolutionError(UserError):
    """The slide's resolution is unknown, not to be trusted or too coarse: it is rejected."""


@dataclass(frozen=True)
class Mpp:
    """µm per pixel at level 0, and where the number comes from."""

    value: float
    source: str


def resolve_mpp(tags: ResolutionTags, *, table: float | None, assumed: float | None) -> Mpp:
    """The first of: the CSV's column, the vendor's metadata, TIFF tags in [0.1, 1], `assumed`.

    >>> resolve_mpp(ResolutionTags(vendor=(0.25, 0.25)), table=None, assumed=None)
    Mpp(value=0.25, source='vendor')
    """
    if table is not None:
        return Mpp(table, "table")
    notes = []
    for name, pair, window in (
        ("vendor", tags.vendor, _VENDOR_WINDOW),
        ("tiff-tags", tags.tiff, TIFF_MPP_WINDOW),
    ):
        if pair is None:
            continue
        # TIFF tags often state a printer's dpi: outside the window they are not believed.
        value = (pair[0] + pair[1]) / 2
        if window[0] <= value <= window[1]:
            if abs(pair[0] - pair[1]) > MAX_ANISOTROPY * min(pair):
                raise ResolutionError(
                    f"pixels are not square: {pair[0]:.4f} x {pair[1]:.4f} mpp differ by more than "
                    f"{MAX_ANISOTROPY:.0%}"
                )
            return Mpp(value, name)
        notes.append(f"{name} say {value:.4g}, outside {window[0]} to {window[1]}")
    if assumed is not None:
        return Mpp(assumed, "assumed")
    why = f" ({'; '.join(notes)})" if notes else ""
    raise ResolutionError(
        f"no trustworthy mpp{why}; give a CSV with an mpp column, or --assume-mpp"
    )


@dataclass(frozen=True)
class ReadPlan:
    """How tiles of a slide are read.

    Tiles are cut from `level`; a tile covers `window` x `window` of that level's pixels, which is
    `tile_px * factor`. With `factor` an integer and `aligned` true, tiles are pixel-aligned
    integer reductions; otherwise windows have sub-pixel exact edges. `mpp` is the tile's true
    resolution; `stride_level0` the distance between tiles in level-0 pixels.
    """

    level: int
    factor: float
    aligned: bool
    mpp: float
    window: float
    stride_level0: float
    downsample: float


def plan_read(
    levels: Sequence[Level], mpp_level0: float, target_mpp: float, tolerance: float, tile_px: int
) -> ReadPlan:
    """Choose the coarsest level that is not coarser than the target, and the reduction from it.

    If an integer multiple of that level's mpp is within `tolerance` (relative) of the target,
    tiles are integer reductions and their true mpp is recorded; else they are resampled to the
    target exactly. Raises `ResolutionError` when level 0 is coarser than the target: nothing is
    ever enlarged.

    >>> plan = plan_read([Level(8000, 6000, 1.0), Level(2000, 1500, 4.0)], 0.25, 0.5, 0.02, 224)
    >>> plan.level, plan.factor, plan.mpp, plan.stride_level0
    (0, 2.0, 0.5, 448.0)
    """
    if mpp_level0 > target_mpp * (1 + tolerance) + 1e-12:
        raise ResolutionError(
            f"{mpp_level0:.4g} mpp is coarser than the target {target_mpp:.4g}; "
            "slides are never enlarged"
        )
    limit = target_mpp * (1 + tolerance) + 1e-12
    downsamples = level_downsamples(levels)
    usable = [i for i, d in enumerate(downsamples) if mpp_level0 * d <= limit]
    level = max(usable, key=lambda i: downsamples[i])
    level_mpp = mpp_level0 * downsamples[level]
    # Whole multiples need no resampling: tiles are then means of whole pixels.
    multiple = max(1, round(target_mpp / level_mpp))
    aligned = abs(multiple * level_mpp - target_mpp) <= tolerance * target_mpp + 1e-12
    factor = float(multiple) if aligned else target_mpp / level_mpp
    return ReadPlan(
        level=level,
        factor=factor,
        aligned=aligned,
        mpp=level_mpp * factor,
        window=tile_px * factor,
        stride_level0=tile_px * factor * downsamples[level],
        downsample=downsamples[level],
    )


def level_downsamples(levels: Sequence[Level]) -> list[float]:
    """The downsamples that were meant: readers give 4.00012 for 4, from rounded level sizes.

    A whole number is meant where it explains the level's size to within 1.5 of its pixels, so
    that nothing at the far edge of the slide is misplaced by more.
    """
    base, downsamples = levels[0], []
    for level in levels:
        whole = max(1, round(level.downsample))
        off_x, off_y = base.width / whole - level.width, base.height / whole - level.height
        is_whole = max(abs(off_x), abs(off_y)) <= _ROUNDED_PX
        downsamples.append(float(whole) if is_whole else level.downsample)
    return downsamples


def area_resample(
    image: npt.NDArray[np.uint8], x: float, y: float, window: float, out_px: int
) -> npt.NDArray[np.uint8]:
    """Mean over sub-pixel exact cells: [h, w, 3] uint8 to [out_px, out_px, 3] uint8, rounded.

    Output pixel (i, j) is the area-weighted mean of [y + i s, y + (i+1) s) x [x + j s, ...) with
    s = window / out_px >= 1, in pixels of `image`.
    """
    # Separable: first over rows, then, transposed, over columns.
    height, width = image.shape[:2]
    narrow = _cell_means(image.reshape(height, width * 3), y, window, out_px)
    turned = narrow.reshape(out_px, width, 3).transpose(1, 0, 2).reshape(width, out_px * 3)
    result = _cell_means(turned, x, window, out_px).reshape(out_px, out_px, 3)
    return np.rint(result).astype(np.uint8).transpose(1, 0, 2).copy()


def _cell_means(
    rows: npt.NDArray[Any], start: float, window: float, cells: int
) -> npt.NDArray[np.float32]:
    """Means of `rows` [n, w] over `cells` equal parts of [start, start + window): [cells, w].

    A cell touches few rows, so the matrix of shares is a band: it is applied in blocks.
    """
    step = window / cells
    blocks = -(-cells // _CELLS_PER_BLOCK)
    edges = start + np.arange(blocks * _CELLS_PER_BLOCK + 1) * step
    first = np.floor(edges[:-1:_CELLS_PER_BLOCK]).astype(np.int64)
    index = first[:, None] + np.arange(math.ceil(_CELLS_PER_BLOCK * step) + 1)
    upper = edges[:-1].reshape(blocks, _CELLS_PER_BLOCK, 1)
    lower = edges[1:].reshape(blocks, _CELLS_PER_BLOCK, 1)
    # How much of each row is in each cell; rows beyond the last have no share.
    inside = np.minimum(index + 1, len(rows))[:, None]
    share = np.clip(np.minimum(lower, inside) - np.maximum(upper, index[:, None]), 0, None)
    share /= np.maximum(share.sum(2, keepdims=True), np.finfo(np.float64).tiny)
    taken = rows[np.minimum(index, len(rows) - 1)].astype(np.float32, copy=False)
    means = share.astype(np.float32) @ taken
    return np.asarray(means.reshape(blocks * _CELLS_PER_BLOCK, -1)[:cells])
