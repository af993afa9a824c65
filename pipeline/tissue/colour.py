"""Colour on a brightfield slide as light absorbed: the glass, the stains, the inks.

Haematoxylin and eosin both absorb green most and blue clearly less: on the slides measured,
blue over green stays below 0.70 and red over green below 1. Inks break one of the two, also
where they are over tissue, so ratios of optical density tell them apart without a colour table.
"""

from collections.abc import Sequence
from typing import TypeVar

import cv2
import numpy as np
import numpy.typing as npt

from common.errors import UserError
from pipeline.tissue.glass import Bools, Floats, Glass, Rgb

Number = TypeVar("Number", bound=np.generic)
_SAMPLE_PIXELS = 1_000_000
_DARK = 40
_MAX_DARK_SHARE = 0.5
_MAX_UNSCANNED = 0.995
_MIN_STAIN_SHARE = 0.2
_MAX_BROWN_SHARE = 0.3
_MIN_COLOURED_SHARE = 0.1


class NotHematoxylinEosinError(UserError):
    """The slide is not a brightfield H&E slide: it is rejected, with the reason."""


def optical_density(rgb: Rgb, glass: tuple[float, float, float]) -> Floats:
    """log10((glass + 1) / (I + 1)) per channel, not below 0 (Beer-Lambert).

    `rgb` is uint8 [h, w, 3]; the result is float32 [3, h, w], planes one after another, because
    what follows compares channels pixel by pixel.

    >>> white = np.full((1, 1, 3), 245, np.uint8)
    >>> optical_density(white, (245.0, 245.0, 245.0)).max()
    np.float32(0.0)
    """
    levels = np.arange(256, dtype=np.float64) + 1
    density = np.zeros((3, *rgb.shape[:2]), np.float32)
    # By table: there are 256 levels and up to a hundred million pixels.
    if rgb.size:
        for plane, value, out in zip(cv2.split(rgb), glass, density, strict=True):
            table = np.log10((value + 1) / levels).clip(0).astype(np.float32)
            cv2.LUT(plane, table, out)
    return density


def density_over_glass(rgb: Rgb, glass: Glass) -> Floats:
    """Optical density [3, h, w] of a picture, as `optical_density`, over glass that may vary."""
    if glass.field is None:
        return optical_density(rgb, glass.level)
    density = np.empty((3, *rgb.shape[:2]), np.float32)
    table = np.log10(np.arange(256, dtype=np.float64) + 1).astype(np.float32)
    field = glass.log_planes((rgb.shape[0], rgb.shape[1]))
    for plane, empty, out in zip(cv2.split(rgb), field, density, strict=True):
        cv2.LUT(plane, table, out)
        cv2.subtract(empty, out, out)
        np.maximum(out, 0, out=out)
    return density


def smooth_density(density: Floats, sigma_px: float) -> Floats:
    """Gaussian mean of a density float32 [3, h, w]; below a third of a pixel nothing is done."""
    if sigma_px < 1 / 3:
        return density
    smoothed = np.empty_like(density)
    for plane, out in zip(density, smoothed, strict=True):
        cv2.GaussianBlur(plane, (0, 0), sigma_px, dst=out)
    return smoothed


def mean_density(density: Floats) -> Floats:
    """Mean over the channels of a density [3, ...], float32 [...]."""
    return np.asarray((density[0] + density[1] + density[2]) / np.float32(3))


def is_coloured(density: Floats) -> Bools:
    """Stain, not grey: dirty glass, dust and shading absorb all three channels alike.

    For a density [3, ...]; bool [...].
    """
    low, high = _least_and_greatest(density)
    return np.asarray(low < 0.8 * high)


def ink_colour(density: Floats) -> tuple[Bools, Bools]:
    """Pixels that are surely ink, and pixels that may be its margin; bool [h, w].

    `density` [3, h, w] should be smoothed over a few pixels: ratios of single pixels are noise.
    """
    red, green, blue = density
    sure = (blue > 0.75 * green) & _any_above(density, 0.30) | (red > 1.25 * green) & (red > 0.10)
    sure |= (blue > 0.70 * green) & (red < 0.4 * green) & (green > 0.6)
    margin = (blue > 0.71 * green) & _any_above(density, 0.12) | (red > 1.10 * green) & (red > 0.04)
    # Thin red ink has nearly the hue of eosin, but absorbs more than eosin does.
    margin |= (blue > 0.62 * green) & (red < 0.25 * green) & (green > 0.42)
    return np.asarray(sure), np.asarray(margin)


def _any_above(density: Floats, least: float) -> Bools:
    return (density[0] > least) | (density[1] > least) | (density[2] > least)


def _sample_step(shape: tuple[int, ...]) -> int:
    """Stride at which about a million pixels of a picture are sampled."""
    return max(1, int((shape[0] * shape[1] / _SAMPLE_PIXELS) ** 0.5))


def _least_and_greatest(
    planes: Sequence[npt.NDArray[Number]] | npt.NDArray[Number],
) -> tuple[npt.NDArray[Number], npt.NDArray[Number]]:
    """Least and greatest of three planes."""
    red, green, blue = planes
    return (
        np.minimum(np.minimum(red, green), blue),
        np.maximum(np.maximum(red, green), blue),
    )


def refuse_dark(rgb: Rgb, glass: Glass, black: Bools | None) -> None:
    """Raise `NotHematoxylinEosinError` for fluorescence and other pictures on black.

    `rgb` is uint8 [h, w, 3]; `black` [h, w] is what was never scanned, and is not judged. Refused
    is a picture of which more than half of the rest is dark (below 40 of 255, less with a dim
    lamp), or whose rest is not bright in all three channels, as brightfield is.
    """
    step = _sample_step(rgb.shape[:2])
    sample = rgb[::step, ::step].reshape(-1, 3)
    unscanned = np.zeros(len(sample), bool) if black is None else black[::step, ::step].ravel()
    rest = sample[~unscanned]
    share = float(unscanned.mean()) if len(sample) else 1.0
    limit = min(_DARK, 0.17 * max(glass.level))
    dark = float((rest.max(-1) < limit).mean()) if len(rest) else 1.0
    lit = share <= _MAX_DARK_SHARE or glass.found or _is_brightfield(rest)
    if dark > _MAX_DARK_SHARE or share > _MAX_UNSCANNED or not lit:
        black_share = float((sample.max(-1) < limit).mean()) if len(sample) else 1.0
        raise NotHematoxylinEosinError(
            f"{black_share:.0%} of the slide is black: fluorescence or an empty scan, "
            "not brightfield H&E"
        )


def _is_brightfield(rest: Rgb) -> bool:
    """Whether pixels [n, 3] were lit from below: most of them are bright in all channels."""
    if not len(rest):
        return False
    least, most = np.median(rest.min(-1)), np.median(rest.max(-1))
    return bool(least >= 90 and least >= 0.6 * most)


def refuse_wrong_colour(density: Floats, min_density: float) -> None:
    """Raise `NotHematoxylinEosinError` where what is stained has not the colours of H&E.

    `density` is float32 [3, h, w]; stained is what has at least `min_density`.

    Recognised are pictures without colour, brown chromogens (DAB) and slides whose stain is
    mostly that of no H&E (blue, green or red as ink is).
    """
    # Only what is stained is judged, so that the amount of glass does not matter.
    step = _sample_step(density.shape[1:])
    values = density[:, ::step, ::step].reshape(3, -1)
    values = values[:, mean_density(values) >= min_density]
    if values.shape[1] == 0:
        return
    red, green, blue = values
    coloured = float(is_coloured(values).mean())
    if coloured < _MIN_COLOURED_SHARE:
        raise NotHematoxylinEosinError("the picture has no colour: greyscale, not brightfield H&E")
    brown = float(((blue > 1.1 * green) & (red > 0.3 * green) & (red < 0.9 * green)).mean())
    if brown > _MAX_BROWN_SHARE:
        raise NotHematoxylinEosinError(
            f"{brown:.0%} of what is stained is brown: immunohistochemistry (DAB), not H&E"
        )
    share = float(((blue < 0.76 * green) & (red < 1.25 * green)).mean())
    if share < _MIN_STAIN_SHARE:
        raise NotHematoxylinEosinError(
            f"only {share:.0%} of what is stained has the colours of H&E; "
            "another stain, or ink over the whole slide"
        )
