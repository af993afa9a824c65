"""Tissue on a brightfield H&E overview, by optical density and colour.

No weights, no tuning per cohort: the glass level is estimated on each slide (it is 241 to 246
on real scanners, while padding is exactly 255), and colours are judged relative to it.
"""

from dataclasses import asdict, dataclass
from enum import IntEnum

import cv2
import numpy as np
import numpy.typing as npt

from model.errors import UserError


class TissueClass(IntEnum):
    """Pixel values of a tissue mask."""

    BACKGROUND = 0
    TISSUE = 1
    PEN = 2


class NotHematoxylinEosinError(UserError):
    """The slide is not a brightfield H&E slide: it is rejected, with the reason."""


@dataclass(frozen=True)
class DetectorConfig:
    """Thresholds of the classical detector. Optical densities are base 10, relative to glass."""

    um_per_px: float = 8.0
    min_density: float = 0.06
    min_object_um2: float = 10_000.0
    max_hole_um2: float = 4_000.0
    max_dark_fraction: float = 0.5
    min_stained_as_tissue: float = 0.2

    def as_dict(self) -> dict[str, float | str]:
        """For the dataset's identity: another detector is another dataset."""
        return {"name": "classical-1", **asdict(self)}


@dataclass(frozen=True)
class Detection:
    """A mask uint8 [h, w] of `TissueClass` values, and the glass level (R, G, B) it was cut at."""

    mask: npt.NDArray[np.uint8]
    glass: tuple[float, float, float]


def detect_tissue(
    rgb: npt.NDArray[np.uint8], um_per_px: float, config: DetectorConfig
) -> Detection:
    """Classify an overview uint8 [h, w, 3]; raises `NotHematoxylinEosinError` with the reason."""
    _refuse_dark(rgb, config)
    glass = glass_level(rgb)
    smooth = np.asarray(cv2.GaussianBlur(rgb, (3, 3), 0), np.uint8)
    density = optical_density(smooth, glass)
    stained = density.mean(-1) >= config.min_density
    pen = stained & _is_pen(density)
    tissue = stained & ~pen
    _refuse_wrong_colour(stained, tissue, config)
    tissue = _clean(tissue, um_per_px, config)
    mask = np.zeros(rgb.shape[:2], np.uint8)
    mask[tissue] = TissueClass.TISSUE
    mask[pen] = TissueClass.PEN
    return Detection(mask, glass)


def glass_level(rgb: npt.NDArray[np.uint8]) -> tuple[float, float, float]:
    """Empty glass (R, G, B): the mode of bright, colourless pixels, padding (255) left out.

    A field without glass (a crop of solid tissue) is given 245 in each channel.
    """
    brightness, spread = rgb.min(-1), np.ptp(rgb, axis=-1)
    empty = (brightness > 200) & (brightness < 255) & (spread < 16)
    if empty.sum() < 0.005 * empty.size:
        return (245.0, 245.0, 245.0)
    modes = [float(np.bincount(rgb[..., c][empty], minlength=256).argmax()) for c in range(3)]
    return (modes[0], modes[1], modes[2])


def optical_density(
    rgb: npt.NDArray[np.uint8], glass: tuple[float, float, float]
) -> npt.NDArray[np.float32]:
    """log10((glass + 1) / (I + 1)) a channel, not below 0 (Beer and Lambert)."""
    levels = np.arange(256, dtype=np.float64) + 1
    tables = [np.log10((value + 1) / levels).clip(0) for value in glass]
    channels = [tables[c].astype(np.float32)[rgb[..., c]] for c in range(3)]
    return np.stack(channels, -1)


def _is_pen(density: npt.NDArray[np.float32]) -> npt.NDArray[np.bool_]:
    """Inks absorb where haematoxylin and eosin do not: both stains absorb green most."""
    red, green, blue = density[..., 0], density[..., 1], density[..., 2]
    strong = density.max(-1) > 0.2
    green_ink = (green < 0.8 * red) & (green < 1.1 * blue)
    blue_ink = (red > 1.3 * green) & (blue < 0.6 * red)
    red_ink = (red < 0.25 * green) & (blue > 0.8 * green)
    black_ink = (density.min(-1) > 0.8 * density.max(-1)) & (density.mean(-1) > 0.7)
    return np.asarray(strong & (green_ink | blue_ink | red_ink | black_ink))


def _refuse_dark(rgb: npt.NDArray[np.uint8], config: DetectorConfig) -> None:
    dark = float((rgb.max(-1) < 40).mean()) if rgb.size else 1.0
    if dark > config.max_dark_fraction:
        raise NotHematoxylinEosinError(
            f"{dark:.0%} of the slide is black: fluorescence or an empty scan, not brightfield H&E"
        )


def _refuse_wrong_colour(
    stained: npt.NDArray[np.bool_], tissue: npt.NDArray[np.bool_], config: DetectorConfig
) -> None:
    if not stained.any():
        return
    share = float(tissue.sum() / stained.sum())
    if share < config.min_stained_as_tissue:
        raise NotHematoxylinEosinError(
            f"only {share:.0%} of what is stained has the colours of H&E; "
            "another stain, or ink over the whole slide"
        )


def _clean(
    tissue: npt.NDArray[np.bool_], um_per_px: float, config: DetectorConfig
) -> npt.NDArray[np.bool_]:
    """Close gaps of a pixel, drop small objects, fill small holes."""
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (3, 3))
    closed = cv2.morphologyEx(tissue.astype(np.uint8), cv2.MORPH_CLOSE, kernel)
    kept = _drop_small(closed.astype(bool), config.min_object_um2 / um_per_px**2)
    return ~_drop_small(~kept, config.max_hole_um2 / um_per_px**2)


def _drop_small(mask: npt.NDArray[np.bool_], min_pixels: float) -> npt.NDArray[np.bool_]:
    _, labels, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=8)
    keep = stats[:, cv2.CC_STAT_AREA] >= min_pixels
    keep[0] = False
    return np.asarray(keep[labels])
