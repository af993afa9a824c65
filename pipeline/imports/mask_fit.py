"""Whether an imported mask is of the slide: in the frame and at the scale in which it was read."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from common.errors import UserError
from pipeline.dataset import Slide
from pipeline.imports.config import Frame
from pipeline.imports.frames import (
    Bools,
    describe_choice,
    find_tissue,
    frame_shifts,
    inner_bounds,
    is_clearly_more,
)
from pipeline.imports.polygons import Affine, Painted
from pipeline.tissue.classes import TissueClass

_MIN_INSIDE = 0.01
_MOSTLY = 0.5
_MIN_OVERLAP = 0.01
_POOR_OVERLAP = 0.2
_GOOD_OVERLAP = 0.5
_GOOD_IOU = 0.5
_EXPECTED = "expected level-0 pixels of this slide. --frame canvas takes it as it is"


Paint = Callable[[Affine], Painted | None]
"""The imported mask under a placement; None where it cannot be placed so."""


@dataclass(frozen=True)
class Fit:
    """How a mask lies on the slide's tissue, shares of 0 to 1.

    `inside` is the share of it on the slide, `on_tissue` that on tissue; `overlap` is the common
    area over the smaller of the two, `iou` that over their union. `is_stray` says that it is not on
    this slide: as good as nothing is, or most is not and the rest begins as a slide does.
    """

    is_stray: bool
    inside: float
    on_tissue: float
    overlap: float
    iou: float

    @classmethod
    def of_mask(cls, painted: Painted, tissue: Bools) -> "Fit":
        """The fit of a mask to tissue bool [h, w]; `overlap` is 1 where there is no mask."""
        marked = painted.mask == TissueClass.TISSUE
        # Someone may have drawn artifacts only: they too are rarely on empty glass.
        if not marked.any():
            marked = painted.mask != TissueClass.BACKGROUND
        # A wrong scale leads beyond the right and lower edge alone; what was drawn over the left or
        # upper one was drawn there.
        least = _MIN_INSIDE if painted.is_negative else _MOSTLY
        is_stray, area = painted.inside < least, marked.sum() / max(painted.inside, 1e-9)
        if not area:
            return cls(is_stray, painted.inside, 0.0, 1.0, 0.0)
        common, total = float((marked & tissue).sum()), float(tissue.sum())
        smaller, union = max(min(area, total), 1.0), area + total - common
        return cls(is_stray, painted.inside, common / area, common / smaller, common / union)


@dataclass(frozen=True)
class Placement:
    """A mask as it was placed on the slide; `note` is what a person should know about it."""

    mask: npt.NDArray[np.uint8]
    note: str = ""


def place_mask(
    paint: Paint, slide: Slide, frame: Frame, rgb: npt.NDArray[np.uint8], um_per_px: float,
    *, usual: Frame, is_checked: bool = True,
) -> Placement:  # fmt: skip
    """The imported mask [h, w] in the frame that fits the slide; `usual` decides where both do.

    `rgb` uint8 [h, w, 3] is the slide's overview. Raises `UserError` where neither fits, and where
    another scale or a mirrored one plainly fits and this does not. With `is_checked` false the
    `frame` was requested, and is taken.
    """
    placed = {name: paint(affine) for name, affine in frame_shifts(slide, frame).items()}
    masks = {name: painted for name, painted in placed.items() if painted is not None}
    if not masks:
        raise UserError(f"--frame {frame}: the mask has another shape than that part of the slide")
    tissue, is_sure = find_tissue(rgb, um_per_px)
    fits = {name: Fit.of_mask(painted, tissue) for name, painted in masks.items()}
    best = _choose_frame(fits, usual)
    if not is_checked:
        return Placement(masks[best].mask, _forced_note(frame, fits[best]))
    is_known = is_sure and bool(tissue.any())
    _refuse_misfit(fits[best], tissue, is_known, paint, slide)
    note = describe_choice(best, {name: fit.on_tissue for name, fit in fits.items()}, slide)
    if not note and is_known and fits[best].overlap < _POOR_OVERLAP:
        note = f"{fits[best].on_tissue:.0%} of the mask is on tissue"
    return Placement(masks[best].mask, note)


def _choose_frame(fits: Mapping[Frame, Fit], usual: Frame) -> Frame:
    """The frame of the best fit; the usual one unless another is clearly better."""
    best = usual if usual in fits else next(iter(fits))
    for name, fit in fits.items():
        if fit.is_stray != fits[best].is_stray:
            best = best if fit.is_stray else name
        elif is_clearly_more(fit.on_tissue, fits[best].on_tissue):
            best = name
    return best


def _forced_note(frame: Frame, fit: Fit) -> str:
    if fit.overlap >= _MIN_OVERLAP:
        return ""
    return f"--frame {frame} as requested, but {fit.on_tissue:.0%} of the mask is on tissue"


def _refuse_misfit(fit: Fit, tissue: Bools, is_known: bool, paint: Paint, slide: Slide) -> None:
    """Raise `UserError` where the mask is not of this slide as it was read."""
    if fit.is_stray:
        other = _better_reading(fit, tissue, paint, slide)
        raise UserError(
            f"{fit.inside:.1%} of the annotated area is on the slide of {slide.width}x"
            f"{slide.height} px{_add_reading(other)}; {_EXPECTED}"
        )
    if not is_known or fit.overlap >= _GOOD_OVERLAP:
        return
    other = _better_reading(fit, tissue, paint, slide)
    if fit.overlap < _MIN_OVERLAP or other:
        raise UserError(
            f"{fit.on_tissue:.0%} of the mask is on this slide's tissue{_add_reading(other)}; "
            f"{_EXPECTED}"
        )


def _add_reading(reading: str) -> str:
    return f"; it fits if {reading}" if reading else ""


def _better_reading(fit: Fit, tissue: Bools, paint: Paint, slide: Slide) -> str:
    """Another reading of the coordinates that fits the tissue where this one does not, or ''."""
    best, found = max(_GOOD_IOU, 2 * fit.iou), ""
    for name, affine in _other_readings(slide).items():
        painted = paint(affine)
        if painted is None:
            continue
        iou = Fit.of_mask(painted, tissue).iou
        if iou > best:
            best, found = iou, name
    return found


def _other_readings(slide: Slide) -> dict[str, Affine]:
    """Mistakes that are made: another level's pixels, µm, a mirrored or turned slide."""
    width, height = float(slide.width), float(slide.height)
    readings = {
        "x is mirrored": Affine((-1.0, 1.0), (width, 0.0)),
        "y is mirrored": Affine((1.0, -1.0), (0.0, height)),
        "x and y are mirrored": Affine((-1.0, -1.0), (width, height)),
        "x and y are swapped": Affine(swap=True),
    }
    factors = {f"it is in pixels of level {i}": v[2] for i, v in enumerate(slide.levels) if i}
    if slide.mpp:
        factors["it is in micrometres"] = 1 / slide.mpp
    for factor in (2.0, 4.0, 8.0, 16.0, 32.0):
        factors[f"it is multiplied by {factor:g}"] = factor
        factors[f"it is divided by {factor:g}"] = 1 / factor
    bounds = inner_bounds(slide)
    corners = [(0.0, 0.0)] + ([(float(bounds[0]), float(bounds[1]))] if bounds else [])
    for name, factor in factors.items():
        for corner in corners:
            where = f" from ({corner[0]:g}, {corner[1]:g})" if any(corner) else ""
            readings[name + where] = Affine((factor, factor), corner)
    return readings
