"""Tissue, ink and artifacts on a brightfield H&E overview, by optical density and colour.

No weights, no tuning per cohort: the colour of the glass is estimated on each slide, from place to
place where the light varies (see `pipeline.tissue.glass`), the density required follows the
strength of the stain, and sizes are in micrometres.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass

import cv2
import numpy as np
import numpy.typing as npt

from pipeline.tissue.classes import TissueClass
from pipeline.tissue.colour import (
    density_over_glass,
    ink_colour,
    is_coloured,
    mean_density,
    refuse_dark,
    refuse_wrong_colour,
    smooth_density,
)
from pipeline.tissue.glass import Bools, Floats, estimate_glass, find_black


@dataclass(frozen=True)
class DetectorConfig:
    """Thresholds of the classical detector. Optical densities are base 10, relative to glass.

    The tissue threshold is `relative_density` of the stain's typical one, kept within
    [`min_density`, `max_density`]; a piece of tissue is what has `min_piece_density`. Lengths are
    in µm, areas in µm².
    """

    um_per_px: float = 8.0
    sigma_um: float = 8.0
    min_density: float = 0.006
    max_density: float = 0.06
    relative_density: float = 0.2
    min_piece_density: float = 0.012
    min_piece_um2: float = 250_000.0
    piece_margin_um: float = 64.0
    min_object_um2: float = 20_000.0
    max_hole_um2: float = 8_000.0
    close_um: float = 40.0
    min_ink_core_um2: float = 2_500.0
    min_ink_um2: float = 10_000.0
    min_ink_width_um: float = 40.0
    ink_margin_um: float = 40.0
    max_ink_gap_um2: float = 40_000.0
    black_margin_um: float = 600.0
    min_fold_density: float = 0.35
    relative_fold_density: float = 2.1
    min_fold_um2: float = 5_000.0

    def as_dict(self) -> dict[str, float | str]:
        """For the dataset's identity (lengths in µm): another detector is another dataset."""
        return {"name": "classical-3", **asdict(self)}


@dataclass(frozen=True)
class Detection:
    """A mask uint8 [h, w] of `TissueClass` values, and the glass (R, G, B) it was cut at.

    `glass_variation` is the share by which the darkest glass is darker than the brightest;
    `notes` are what a person should know of the slide.
    """

    mask: npt.NDArray[np.uint8]
    glass: tuple[float, float, float]
    glass_variation: float = 0.0
    notes: tuple[str, ...] = ()


def detect_tissue(
    rgb: npt.NDArray[np.uint8], um_per_px: float, config: DetectorConfig
) -> Detection:
    """Classify a slide's overview uint8 [h, w, 3].

    Raises `NotHematoxylinEosinError` with the reason where the slide is no brightfield H&E.
    Focus is not judged here: what a microscope loses out of focus is far finer than the pixels
    of an overview (see `pipeline.tissue.focus`).
    """
    black = find_black(rgb, um_per_px)
    glass = estimate_glass(rgb)
    refuse_dark(rgb, glass, black)
    density = density_over_glass(rgb, glass)
    if black is not None:
        # What was not scanned has no colour: it counts nowhere, and nothing grows from it.
        density[:, black] = 0
    density = smooth_density(density, config.sigma_um / um_per_px)
    refuse_wrong_colour(density, config.max_density)
    mask = classify_density(density, um_per_px, config)
    unlit = glass.too_dark((rgb.shape[0], rgb.shape[1]))
    if unlit is not None:
        mask[unlit] = TissueClass.OTHER
    if black is not None:
        # It spoils a tile that reaches into it; far from what was scanned it is only empty.
        depth = cv2.distanceTransform(black.astype(np.uint8), cv2.DIST_L2, 3)
        mask[black] = TissueClass.OTHER
        mask[depth * um_per_px > config.black_margin_um] = TissueClass.BACKGROUND
    notes = (glass.note,) if glass.note else ()
    return Detection(mask, glass.level, glass.variation, notes)


def classify_density(
    density: Floats, um_per_px: float, config: DetectorConfig
) -> npt.NDArray[np.uint8]:
    """Mask uint8 [h, w] of a smoothed optical density [3, h, w]; also of a part of a slide."""
    # Ink first: its density must not count in the slide's threshold.
    mean = mean_density(density)
    ink, specks = find_ink(density, um_per_px, config)
    coloured = is_coloured(density)
    stained = find_stained(mean, coloured & ~ink, ink, um_per_px, config)
    # Close narrow gaps, drop small objects, fill small holes.
    tissue = _morph_mask(stained & coloured & ~ink, cv2.MORPH_CLOSE, config.close_um / um_per_px)
    tissue = _drop_small(tissue, config.min_object_um2 / um_per_px**2)
    tissue = ~_drop_small(~tissue, config.max_hole_um2 / um_per_px**2)
    mask = np.zeros(mean.shape, np.uint8)
    # Faint grey is dirty glass or a shadow: only what is as dense as any stain is an artifact.
    mask[(specks | ~coloured) & (mean >= config.max_density) & ~tissue] = TissueClass.OTHER
    mask[tissue] = TissueClass.TISSUE
    mask[find_folds(mean, tissue & stained, um_per_px, config)] = TissueClass.FOLD
    mask[ink] = TissueClass.PEN
    return mask


def density_threshold(density: Floats, config: DetectorConfig) -> float:
    """From which optical density (mean of the channels) a pixel of this slide is stained.

    The stain's typical strength is the mean of the densities weighted by themselves, so that
    neither the amount of glass nor faint dirt on it moves it.
    """
    total = float(density.sum(dtype=np.float64))
    squares = float(np.square(density).sum(dtype=np.float64))
    typical = squares / total if total > 0 else 0.0
    return float(np.clip(config.relative_density * typical, config.min_density, config.max_density))


def find_stained(
    density: Floats, possible: Bools, ink: Bools, um_per_px: float, config: DetectorConfig
) -> Bools:
    """Pixels as dense as the tissue around them is stained, bool [h, w].

    `density` is the mean of the channels; only `possible` pixels can be tissue. Each large piece
    of tissue has the threshold of its own stain where that differs from the slide's, so that a
    pale piece is not lost next to a strong one; small pieces may be debris and have the slide's.
    """
    threshold = density_threshold(density[~ink], config)
    stained = density >= threshold
    for window, part, near in _large_pieces(
        possible & (density >= config.min_piece_density), um_per_px, config
    ):
        values = density[window]
        own = density_threshold(values[part & possible[window]], config)
        # What is far paler than the rest and touches ink is ink, smeared.
        smeared = own < 0.5 * threshold and bool((near & ink[window]).any())
        if not smeared and not 0.8 <= own / threshold <= 1.1:
            stained[window][near] = values[near] >= own
    return stained


def _large_pieces(
    faint: Bools, um_per_px: float, config: DetectorConfig
) -> Iterator[tuple[tuple[slice, slice], Bools, Bools]]:
    """Window, piece, and piece with what lies close around it, both bool [h, w] of the window."""
    # A piece is large: it is found on a million pixels of a picture of any size.
    step = max(1, int((faint.size / 1_000_000) ** 0.5))
    coarse, side_um = faint[::step, ::step], um_per_px * step
    closed = _morph_mask(coarse, cv2.MORPH_CLOSE, config.close_um / side_um)
    _, labels, stats, _ = cv2.connectedComponentsWithStats(closed.astype(np.uint8), connectivity=8)
    margin = round(config.piece_margin_um / side_um)
    large = stats[:, cv2.CC_STAT_AREA] >= config.min_piece_um2 / side_um**2
    for piece in np.flatnonzero(large[1:]) + 1:
        left, top, width, height = (int(value) for value in stats[piece, :4])
        rows = slice(max(0, top - margin), min(coarse.shape[0], top + height + margin))
        columns = slice(max(0, left - margin), min(coarse.shape[1], left + width + margin))
        part, free = labels[rows, columns] == piece, labels[rows, columns] == 0
        near = _morph_mask(part, cv2.MORPH_DILATE, 2 * margin) & (part | free)
        window = (
            slice(rows.start * step, min(faint.shape[0], rows.stop * step)),
            slice(columns.start * step, min(faint.shape[1], columns.stop * step)),
        )
        shape = faint[window].shape
        yield window, _repeat_pixels(part, step, shape), _repeat_pixels(near, step, shape)


def _repeat_pixels(mask: Bools, times: int, shape: tuple[int, ...]) -> Bools:
    return mask.repeat(times, 0).repeat(times, 1)[: shape[0], : shape[1]]


def find_ink(density: Floats, um_per_px: float, config: DetectorConfig) -> tuple[Bools, Bools]:
    """Pen strokes, and specks of ink-like colour too small or thin for a stroke; bool [h, w].

    A stroke is a connected region of ink-like colour with a core that is surely ink and wide
    enough; gaps within it are filled and its faded margin is taken with it.
    """
    sure, margin = ink_colour(density)
    px2, wide_px = um_per_px**2, config.ink_margin_um / um_per_px
    wide_enough = _morph_mask(sure, cv2.MORPH_OPEN, config.min_ink_width_um / um_per_px)
    # Stain may have the hue of ink in thin or small spots: a pen leaves broad strokes.
    core = _drop_small(wide_enough, config.min_ink_core_um2 / px2)
    strokes = _drop_small(_keep_touching(margin | sure, core), config.min_ink_um2 / px2)
    if strokes.any():
        closed = _morph_mask(strokes, cv2.MORPH_CLOSE, wide_px)
        strokes = _morph_mask(closed, cv2.MORPH_DILATE, wide_px)
        strokes = ~_drop_small(~strokes, config.max_ink_gap_um2 / px2)
    return strokes, sure & ~strokes


def find_folds(density: Floats, tissue: Bools, um_per_px: float, config: DetectorConfig) -> Bools:
    """Experimental: tissue that absorbs as much as several layers would, bool [h, w]."""
    if not tissue.any():
        return np.zeros_like(tissue)
    # Relative to this slide's tissue, since stains differ in strength.
    typical = float(np.median(density[tissue]))
    least = max(config.min_fold_density, config.relative_fold_density * typical)
    dark = tissue & (density > least)
    return _drop_small(dark, config.min_fold_um2 / um_per_px**2)


def _morph_mask(mask: Bools, operation: int, width_px: float) -> Bools:
    """The morphological operation with a disk of that width; below three pixels there is none."""
    side = 2 * round(width_px / 2) + 1
    if side < 3:
        return mask
    disk = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (side, side))
    result = np.asarray(cv2.morphologyEx(mask.astype(np.uint8), operation, disk)).astype(bool)
    # Closing only ever adds pixels, also at the picture's edge.
    return result | mask if operation == cv2.MORPH_CLOSE else result


def _keep_touching(mask: Bools, seeds: Bools) -> Bools:
    """The connected regions of `mask` that have a seed in them."""
    if not seeds.any():
        return np.zeros_like(mask)
    count, labels = cv2.connectedComponents(mask.astype(np.uint8), connectivity=8)
    keep = np.zeros(count, bool)
    keep[np.unique(labels[seeds])] = True
    keep[0] = False
    return np.asarray(keep[labels])


def _drop_small(mask: Bools, min_pixels: float) -> Bools:
    if not mask.any():
        return mask
    _, labels, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=8)
    keep = stats[:, cv2.CC_STAT_AREA] >= min_pixels
    keep[0] = False
    return np.asarray(keep[labels])
