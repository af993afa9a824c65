"""About what a slide costs, so that the longest are begun first: by codec and area.

For ordering only; the rates are milliseconds of one core, measured (docs/performance/tiling.md).
"""

from pipeline.dataset import Slide
from pipeline.slides.reader import Level
from pipeline.slides.resolution import level_downsamples

_DECODE_MS_PER_MPX = {"jpeg": 6.0, "jpeg2000": 45.0}
_DECODE_MS_PER_MPX_UNKNOWN = 30.0
_MS_PER_TILE = 3.0
_MS_PER_OVERVIEW_MPX = 240.0


def tile_cost(slide: Slide, target_mpp: float, tile_px: int) -> float:
    """Milliseconds per tile: decoding, and resizing, encoding and writing."""
    side = tile_px * max(1.0, target_mpp / slide.mpp) if slide.mpp else tile_px
    return side * side / 1e6 * _decode_rate(slide) + _MS_PER_TILE


def overview_cost(slide: Slide, um_per_px: float) -> float:
    """Milliseconds to decode and segment the whole slide at that resolution."""
    if not slide.mpp or not slide.levels:
        return float(slide.bytes)
    levels = [Level(*level) for level in slide.levels]
    mpp = [slide.mpp * downsample for downsample in level_downsamples(levels)]
    fine = [i for i in range(len(levels)) if mpp[i] <= um_per_px]
    read = max(fine, key=lambda i: mpp[i]) if fine else 0
    decoded = levels[read].width * levels[read].height / 1e6
    shown = decoded * (mpp[read] / max(um_per_px, mpp[read])) ** 2
    return decoded * _decode_rate(slide) + shown * _MS_PER_OVERVIEW_MPX


def _decode_rate(slide: Slide) -> float:
    return _DECODE_MS_PER_MPX.get(slide.codec, _DECODE_MS_PER_MPX_UNKNOWN)
