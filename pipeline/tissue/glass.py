"""Empty glass on a brightfield slide: its colour, where it varies, and what was never scanned.

Glass is what is bright and smooth. On the slides measured, the roughness of glass (what a plane
through 5 x 5 pixels of about 8 µm leaves over, in log10 of the intensity) is below 0.003 for 95 %
of its pixels; that of tissue is above 0.006 for 99 %. Tint, a dim lamp and uneven light do not
change that: they multiply the intensity, and the logarithm turns factors into sums.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

Rgb = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]
Bools = npt.NDArray[np.bool_]

GLASS_WITHOUT_GLASS = (245.0, 245.0, 245.0)
_MAX_PIXELS = 1_000_000
_MAX_CELLS = 128
_LEAST_SIDE = 32
_BLACK, _DARK = 16, 40
_MIN_BLACK_UM2 = 20_000.0
# Logarithms (base 10) of intensity from here on, unless they are shares.
_OFFSET = 2.3
_MAX_ROUGHNESS = 0.004
_MAX_TINT = 0.16
_MIN_LEVEL = 50.0
_SATURATED = 253
_MAX_STEP, _MAX_HUE_STEP = 0.08, 0.003
_MAX_SHADE, _MAX_ISLAND_SHADE, _MAX_HUE, _MAX_PINK = 1.0, 0.25, 0.1, 0.03
_UNIFORM = 0.016
_TOO_DARK = -0.7
_PROFILE_ROUNDS = 5


@dataclass(frozen=True)
class Glass:
    """The glass of a slide: `level` (R, G, B) from 0 to 255, and how it varies.

    `field` is log10(level + 1) of the glass, float32 [3, rows, columns] on a coarse grid that is
    stretched over the picture; None where the glass is even. `variation` is the share by which
    the darkest glass is darker than the brightest; `found` is false where there is none to see
    and the level is assumed.
    """

    level: tuple[float, float, float]
    field: Floats | None = None
    variation: float = 0.0
    found: bool = True

    @property
    def note(self) -> str:
        """What a person should know of it: '' where glass was found."""
        if self.found:
            return ""
        level = "/".join(f"{value:.0f}" for value in self.level)
        return f"no empty glass was found; colours were judged against an assumed glass of {level}"

    def log_planes(self, shape: tuple[int, int]) -> Iterator[Floats]:
        """log10(level + 1) of an uneven glass in R, G and B, each float32 `shape`."""
        assert self.field is not None
        for plane in self.field:
            stretched = cv2.resize(plane, (shape[1], shape[0]), interpolation=cv2.INTER_LINEAR)
            yield np.asarray(stretched, np.float32)

    def too_dark(self, shape: tuple[int, int]) -> Bools | None:
        """Where less than a fifth of the light comes through, bool `shape`; None if nowhere."""
        if self.field is None:
            return None
        light = self.field.mean(0)
        dark = light < light.max() + _TOO_DARK
        return _stretch_mask(dark, shape) if dark.any() else None


def glass_level(rgb: Rgb) -> tuple[float, float, float]:
    """Empty glass (R, G, B) of a picture uint8 [h, w, 3]; 245 in each channel if it has none."""
    return estimate_glass(rgb).level


def estimate_glass(rgb: Rgb) -> Glass:
    """The glass of a slide's overview uint8 [h, w, 3].

    Pure white is padding, and black was never scanned: neither is glass. Where the light falls
    off, glass is followed from place to place, and interpolated where tissue covers it.
    """
    if not rgb.size:
        return Glass(GLASS_WITHOUT_GLASS, found=False)
    small = _reduce_picture(rgb)
    glass = _see_glass(small)
    if glass is None and min(small.shape[:2]) >= 3 * _LEAST_SIDE:
        # Noise may hide it: it goes when pixels are taken together, tissue's structure does not.
        size = (small.shape[1] // 3, small.shape[0] // 3)
        coarse = cv2.resize(small, size, interpolation=cv2.INTER_AREA)
        glass = _see_glass(np.asarray(coarse, np.uint8))
    return glass or _assume_glass(small)


def _see_glass(small: Rgb) -> Glass | None:
    """The glass of a picture uint8 [h, w, 3] of at most a million pixels; None if there is none."""
    log = np.stack([_log_plane(plane) for plane in cv2.split(small)])
    rough = _roughness(log)
    darkest, brightest = _darkest(small), _brightest(small)
    valid = (darkest < 255) & (brightest >= _BLACK)
    smooth = valid & (rough < _MAX_ROUGHNESS + 0.1 / (brightest + np.float32(1)))
    seed = _find_seed(log, smooth, valid, rough)
    if seed is None:
        return None
    cells, share = _cell_means(log, smooth)
    surface, accepted = _follow_glass(cells, share >= 0.3, seed)
    if surface is None:
        return None
    spread = _percentile_range(surface)
    if spread.max() <= _UNIFORM:
        chosen = smooth & _stretch_mask(accepted, smooth.shape)
        modes = [float(np.bincount(p[chosen], minlength=256).argmax()) for p in cv2.split(small)]
        return Glass((modes[0], modes[1], modes[2]))
    middle = 10 ** (np.median(surface.reshape(3, -1), axis=1).astype(np.float64) + _OFFSET) - 1
    red, green, blue = (round(float(value), 1) for value in middle)
    field = (surface + np.float32(_OFFSET)).astype(np.float32)
    return Glass((red, green, blue), field, float(1 - 10 ** -spread.mean()))


def _reduce_picture(rgb: Rgb) -> Rgb:
    """At most about a million pixels, by a whole factor."""
    factor = int(np.ceil((rgb.shape[0] * rgb.shape[1] / _MAX_PIXELS) ** 0.5))
    if factor <= 1:
        return rgb
    size = (max(1, rgb.shape[1] // factor), max(1, rgb.shape[0] // factor))
    return np.asarray(cv2.resize(rgb, size, interpolation=cv2.INTER_AREA), np.uint8)


def _darkest(rgb: Rgb) -> Rgb:
    red, green, blue = cv2.split(rgb)
    return np.minimum(np.minimum(red, green), blue)


def _brightest(rgb: Rgb) -> Rgb:
    red, green, blue = cv2.split(rgb)
    return np.maximum(np.maximum(red, green), blue)


def _log_plane(plane: npt.NDArray[Any]) -> Floats:
    # Less an offset: variances of numbers near 2 lose digits in float32.
    table = (np.log10(np.arange(256, dtype=np.float64) + 1) - _OFFSET).astype(np.float32)
    return np.asarray(cv2.LUT(plane, table), np.float32)


def _roughness(log: Floats) -> Floats:
    """What the plane that fits 5 x 5 pixels best leaves over: standard deviation, [h, w].

    Of the channel that has most. A slope, as of light that falls off, is not roughness.
    """
    mean, slope = np.full(5, 0.2), (np.arange(5) - 2) / 10
    result = np.zeros(log.shape[1:], np.float32)
    for plane in log:
        centre, across, down, square = (
            cv2.sepFilter2D(values, cv2.CV_32F, kx, ky)
            for values, kx, ky in (
                (plane, mean, mean), (plane, slope, mean), (plane, mean, slope),
                (plane * plane, mean, mean),
            )
        )  # fmt: skip
        # `slope` weighs by a tenth of the distance: its own variance over 5 x 5 pixels is 2.
        left = square - centre * centre - (across * across + down * down) * np.float32(2)
        result = np.maximum(result, left)
    return np.sqrt(result)


def _assume_glass(small: Rgb) -> Glass:
    """Where no glass is seen: the mode of bright, colourless pixels, or else 245."""
    darkest, brightest = small.min(-1), small.max(-1)
    empty = (darkest > 200) & (darkest < 255) & (brightest - darkest < 16)
    if empty.sum() < 0.005 * empty.size:
        return Glass(GLASS_WITHOUT_GLASS, found=False)
    modes = [float(np.bincount(plane[empty], minlength=256).argmax()) for plane in cv2.split(small)]
    # Glass so bright that it is pure white, as padding is, shows at its edges.
    return Glass((modes[0], modes[1], modes[2]), found=min(modes) >= _SATURATED)


@dataclass(frozen=True)
class _Regions:
    """Smooth regions, n large ones: their `numbers` in `labels` [h, w], colours [n, 3] (log R, G,
    B), shares of the picture [n], and which are of one `exact` colour, as what is drawn is [n].
    """

    labels: npt.NDArray[np.int32]
    numbers: npt.NDArray[np.int64]
    colours: npt.NDArray[np.float64]
    shares: npt.NDArray[np.float64]
    exact: Bools


def _list_regions(log: Floats, smooth: Bools, rough: Floats, pixels: int) -> _Regions:
    count, labels, stats, _ = cv2.connectedComponentsWithStats(
        smooth.astype(np.uint8), connectivity=4
    )
    areas = stats[:, cv2.CC_STAT_AREA].astype(np.float64)
    areas[0] = 0
    numbers = np.flatnonzero(areas >= max(16.0, 0.02 * areas.max(initial=0)))
    flat, area = labels.ravel(), areas[numbers]
    sums = [np.bincount(flat, plane.ravel(), count)[numbers] for plane in log]
    exact = np.bincount(flat, (rough < 1e-4).ravel(), count)[numbers]
    colours = np.stack(sums, 1) / area[:, None]
    return _Regions(
        np.asarray(labels, np.int32), numbers, colours, area / max(1, pixels), exact >= 0.98 * area
    )


def _can_be_glass(regions: _Regions) -> Bools:
    """Which regions are neither padding nor too dark or too coloured for glass, bool [n]."""
    hue = np.ptp(regions.colours, axis=1)
    level = 10 ** (regions.colours.mean(1) + _OFFSET) - 1
    red, green, blue = regions.colours.T
    # Pale pink is the colour of eosin too: as glass it must be much of the slide.
    pink = (green < blue - 0.01) & (green < red - 0.01)
    possible = (hue <= _MAX_TINT) & (level >= _MIN_LEVEL) & (~pink | (regions.shares >= 0.03))
    grey = regions.exact & (hue <= 0.004)
    # A region of one exact grey may be padding: it is where other glass is seen.
    real = regions.shares[possible & ~regions.exact].sum()
    drawn = regions.shares[possible & ~grey & ~pink].sum()
    padding = grey & (real >= np.maximum(0.25 * regions.shares, 0.02))
    padding |= (
        grey & (level >= 249.5) & (max(real, drawn) >= np.maximum(0.05 * regions.shares, 0.02))
    )
    glass = possible & ~padding
    # Where light falls off, tissue may be brighter than glass elsewhere, but it is pinker.
    tint, light = green - np.maximum(red, blue), regions.colours.mean(1)
    greener = tint[None] > tint[:, None] + 0.015
    greener &= (regions.shares[None] >= 0.2 * regions.shares[:, None]) & glass[None]
    greener &= light[None] >= light[:, None] - 0.2
    return np.asarray(glass & ~greener.any(1))


def _find_seed(log: Floats, smooth: Bools, valid: Bools, rough: Floats) -> Floats | None:
    """Colour (log R, G, B) of the brightest large smooth region that can be glass; else None."""
    regions = _list_regions(log, smooth, rough, int(valid.sum()))
    glass = _can_be_glass(regions)
    if regions.shares[glass].sum() < 0.005:
        return None
    chosen = int(np.flatnonzero(glass)[regions.colours[glass].mean(1).argmax()])
    # The median of the region: light that falls off has one too, near its middle.
    inside = regions.labels == regions.numbers[chosen]
    colour = np.array([np.median(plane[inside]) for plane in log], np.float32)
    # Little is brighter than glass. Padding may be.
    padding = regions.numbers[~glass & regions.exact]
    rest = valid & ~inside & ~np.isin(regions.labels, padding)
    brighter = rest & (log.mean(0) > colour.mean() + 0.03)
    return None if brighter.sum() > 0.1 * valid.sum() else colour


def _cell_means(log: Floats, smooth: Bools) -> tuple[Floats, Floats]:
    """Mean colour [3, r, c] of the smooth pixels of each cell, and their share of it [r, c]."""
    height, width = smooth.shape
    side = max(3, -(-max(height, width) // _MAX_CELLS))
    size = (max(1, round(width / side)), max(1, round(height / side)))
    weight = smooth.astype(np.float32)
    share = np.asarray(cv2.resize(weight, size, interpolation=cv2.INTER_AREA), np.float32)
    sums = [cv2.resize(plane * weight, size, interpolation=cv2.INTER_AREA) for plane in log]
    return np.asarray(np.stack(sums) / np.maximum(share, 1e-6), np.float32), share


def _follow_glass(cells: Floats, known: Bools, seed: Floats) -> tuple[Floats | None, Bools]:
    """The glass on every cell [3, r, c], and the cells in which it is seen.

    From the cells of the seed's colour it goes on to neighbours: brightness may change from one
    to the next, hue hardly. Then to regions apart that are only darker or brighter than glass
    would be there.
    """
    difference = cells - seed[:, None, None]
    accepted = known & (_hue(difference) <= 0.01) & (np.abs(difference.mean(0)) <= 0.02)
    if not accepted.any():
        return None, accepted
    accepted = _grow_accepted(cells, known, accepted, seed)
    for _ in range(2):
        surface = _fit_surface(cells, accepted)
        islands = _find_islands(cells - surface, known & ~accepted)
        if not islands.any():
            break
        accepted = _grow_accepted(cells, known, accepted | islands, seed)
    # Smooth pale tissue may have been followed: next to the glass of its rows and columns it is
    # pink.
    profiles = np.stack([_fit_profiles(plane, accepted) for plane in cells])
    glass = accepted & (_pinkness(profiles - cells) <= 0.012)
    if glass.any():
        accepted = glass
    return _fit_surface(cells, accepted), accepted


def _hue(difference: npt.NDArray[Any]) -> Floats:
    """How far a difference [3, ...] is from grey: the largest less the least channel."""
    return np.asarray(difference.max(0) - difference.min(0))


def _pinkness(shade: Floats) -> Floats:
    """How much more green is missing than red and blue: above 0 for every H&E stain."""
    return np.asarray(shade[1] - np.maximum(shade[0], shade[2]))


def _grow_accepted(cells: Floats, known: Bools, accepted: Bools, seed: Floats) -> Bools:
    shade = seed[:, None, None] - cells
    possible = known & (_hue(shade) <= _MAX_HUE)
    possible &= (shade.mean(0) <= _MAX_SHADE) & (shade.mean(0) >= -0.15)
    possible &= _pinkness(shade) <= _MAX_PINK
    # Where it is dark, whole grey levels are wide steps.
    hue_step = _MAX_HUE_STEP + 0.05 * 10 ** -(cells.mean(0) + _OFFSET)
    while True:
        weight = accepted.astype(np.float32)
        around = np.maximum(cv2.boxFilter(weight, -1, (3, 3), normalize=False), 1e-6)
        means = [cv2.boxFilter(plane * weight, -1, (3, 3), normalize=False) for plane in cells]
        step = cells - np.stack(means) / around
        new = possible & ~accepted & (around >= 1)
        new &= (_hue(step) <= hue_step) & (np.abs(step.mean(0)) <= _MAX_STEP)
        if not new.any():
            return accepted
        accepted = accepted | new


def _find_islands(difference: Floats, left: Bools) -> Bools:
    """Cells apart from the glass that are glass in other light; `difference` is to the surface."""
    shade = -difference.mean(0)
    same = _hue(difference) <= np.maximum(0.008, 0.08 * np.abs(shade))
    grey = left & same & (shade >= -0.15) & (shade <= _MAX_ISLAND_SHADE)
    _, labels, stats, _ = cv2.connectedComponentsWithStats(grey.astype(np.uint8), connectivity=8)
    keep = stats[:, cv2.CC_STAT_AREA] >= 12
    keep[0] = False
    return np.asarray(keep[labels] | (grey & (np.abs(shade) < 0.01)))


def _fit_surface(cells: Floats, accepted: Bools) -> Floats:
    """Glass on every cell [3, r, c]: its profiles, and what they leave over near by."""
    result = np.empty_like(cells)
    for plane, out in zip(cells, result, strict=True):
        profiles = _fit_profiles(plane, accepted)
        out[:] = profiles + _spread_residual(np.where(accepted, plane - profiles, 0), accepted)
    return result


def _fit_profiles(plane: Floats, accepted: Bools) -> Floats:
    """A profile by row and one by column, added: float32 [r, c].

    They carry stripes and shaded edges on under tissue, where no glass is seen.
    """
    values = np.where(accepted, plane, np.nan).astype(np.float64)
    rows, columns = np.zeros((len(plane), 1)), np.zeros((1, plane.shape[1]))
    for _ in range(_PROFILE_ROUNDS):
        rows = _fill_profile(_row_medians(values - columns))[:, None]
        columns = _fill_profile(_row_medians((values - rows).T))[None]
    return (rows + columns).astype(np.float32)


def _row_medians(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Median of each row, NaN left out; NaN where a row has fewer than two."""
    ordered = np.sort(values, axis=1)
    counts = (~np.isnan(values)).sum(1)
    index = np.arange(len(values))
    low, high = np.maximum(counts - 1, 0) // 2, np.minimum(counts // 2, values.shape[1] - 1)
    medians = (ordered[index, low] + ordered[index, high]) / 2
    return np.where(counts >= 2, medians, np.nan)


def _fill_profile(profile: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    known = np.flatnonzero(~np.isnan(profile))
    if not len(known):
        return np.zeros_like(profile)
    return np.interp(np.arange(len(profile)), known, profile[known])


def _spread_residual(values: Floats, known: Bools) -> Floats:
    """Values [r, c] carried on from known cells: from near where there are any, else from afar."""
    weight = known.astype(np.float32)
    result = np.zeros_like(values)
    for sigma in (32.0, 16.0, 8.0, 4.0, 2.0, 1.0):
        total = cv2.GaussianBlur(values * weight, (0, 0), sigma)
        near = cv2.GaussianBlur(weight, (0, 0), sigma)
        trust = np.minimum(near * 4, 1)
        result += trust * (total / np.maximum(near, 1e-6) - result)
    return result


def _percentile_range(surface: Floats) -> npt.NDArray[np.float64]:
    low, high = np.percentile(surface.reshape(3, -1), (2, 98), axis=1)
    return np.asarray(high - low)


def _stretch_mask(mask: Bools, shape: tuple[int, ...]) -> Bools:
    size = (shape[1], shape[0])
    return np.asarray(cv2.resize(mask.astype(np.uint8), size, interpolation=cv2.INTER_NEAREST)) > 0


def find_black(rgb: Rgb, um_per_px: float) -> Bools | None:
    """Where nothing was scanned: black with straight edges, or around the picture; bool [h, w].

    None where there is no such area. Ink is as dark, but its strokes are not cut straight.
    """
    if not rgb.size:
        return None
    small = _reduce_picture(rgb)
    core = _brightest(small) < _BLACK
    if not core.any():
        return None
    factor = rgb.shape[0] / max(1, small.shape[0])
    least = _MIN_BLACK_UM2 / (um_per_px * factor) ** 2
    _, labels, stats, _ = cv2.connectedComponentsWithStats(core.astype(np.uint8), connectivity=8)
    black = np.zeros_like(core)
    for label in range(1, len(stats)):
        left, top, width, height, area = (int(value) for value in stats[label])
        if area < least:
            continue
        window = np.s_[top : top + height, left : left + width]
        part = labels[window] == label
        if _is_unscanned(part, (top, left), core.shape):
            black[window] |= part
    if not black.any():
        return None
    # The pixels along its edge are mixed with what lies next to it.
    wide = cv2.dilate(black.astype(np.uint8), np.ones((3, 3), np.uint8)) > 0
    exact = _brightest(rgb) < _DARK
    near = _stretch_mask(wide, exact.shape) & exact
    return np.asarray(cv2.dilate(near.astype(np.uint8), np.ones((5, 5), np.uint8)) > 0)


def _is_unscanned(part: Bools, corner: tuple[int, int], shape: tuple[int, ...]) -> bool:
    """Whether a black region [h, w] at (top, left) of a picture has straight edges or frames it."""
    # Beyond the picture it goes on: the picture's own border is no edge.
    (height, width), (top, left) = part.shape, corner
    touches = (top == 0, top + height == shape[0], left == 0, left + width == shape[1])
    sides = (part[0], part[-1], part[:, 0], part[:, -1])
    border = sum(int(side.sum()) for side, touching in zip(sides, touches, strict=True) if touching)
    whole = np.pad(part, 1)
    for rows, source, touching in (
        (np.s_[0], np.s_[1], touches[0]), (np.s_[-1], np.s_[-2], touches[1]),
        (np.s_[:, 0], np.s_[:, 1], touches[2]), (np.s_[:, -1], np.s_[:, -2], touches[3]),
    ):  # fmt: skip
        if touching:
            whole[rows] = whole[source]
    across, down = whole[:, 1:] != whole[:, :-1], whole[1:] != whole[:-1]
    edges = int(across.sum()) + int(down.sum())
    straight = int((across[1:] & across[:-1]).sum()) + int((down[:, 1:] & down[:, :-1]).sum())
    return straight >= 0.8 * edges or border >= 0.35 * (border + edges)
