"""From which corner of a slide coordinates count, and whether what they describe fits the slide.

Some formats (SCN, MIRAX, Ventana) have a large canvas of which the scanner filled a part, the
bounds. OpenSlide and this project count from the canvas's corner, QuPath from that of the bounds.
Nothing in a file says which, so that both are tried on the slide's own tissue.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt

from common.errors import UserError
from pipeline.dataset import Slide
from pipeline.imports.config import Frame
from pipeline.imports.polygons import Affine, Painted
from pipeline.slides.openslide_reader import OpenSlideReader
from pipeline.slides.reader import SlideOpenError
from pipeline.tissue.classes import TissueClass
from pipeline.tissue.colour import NotHematoxylinEosinError
from pipeline.tissue.detector import ClassicalDetector

Bounds = tuple[int, int, int, int]
Bools = npt.NDArray[np.bool_]

_VENDORS_WITH_BOUNDS = frozenset({"leica", "mirax", "ventana", "zeiss"})
_MIN_INSIDE = 0.01
_MOSTLY = 0.5
_MIN_OVERLAP = 0.01
_POOR_OVERLAP = 0.2
_GOOD_OVERLAP = 0.5
_GOOD_IOU = 0.5
_EXPECTED = "expected level-0 pixels of this slide. --frame canvas takes it as it is"
_CLEARLY = 0.1
"""Of the imported area: how much more of it is on tissue in one frame than in the other."""


def with_bounds(slide: Slide) -> Slide:
    """The slide with its `bounds`, read from its file where an older `scan` did not record them.

    Raises `UserError` where the file would have to be read and cannot be.
    """
    if slide.bounds is not None or slide.vendor not in _VENDORS_WITH_BOUNDS:
        return slide
    try:
        with OpenSlideReader(Path(slide.path)) as reader:
            base, bounds = reader.levels[0], reader.bounds
    except SlideOpenError as error:
        raise UserError(
            f"slide {slide.slide_id}: which part of it was scanned is not recorded, and "
            f"{slide.path} cannot be opened ({error}); run `scan` again, or give --frame canvas"
        ) from error
    # Of another image of the file the bounds would mean nothing.
    is_same = (base.width, base.height) == (slide.width, slide.height)
    return replace(slide, bounds=bounds) if is_same else slide


def inner_bounds(slide: Slide) -> Bounds | None:
    """The slide's bounds (x, y, width, height) in level-0 px where they are not the whole slide."""
    return None if slide.bounds == (0, 0, slide.width, slide.height) else slide.bounds


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


def find_tissue(rgb: npt.NDArray[np.uint8], um_per_px: float) -> tuple[Bools, bool]:
    """Where an overview uint8 [h, w, 3] shows anything, bool [h, w], and whether that is sure.

    On a slide that is no H&E it is what is not of the most frequent brightness: good enough to
    choose between two frames, and not to refuse anything.
    """
    try:
        mask = ClassicalDetector().detect(rgb, um_per_px).mask
        return (mask != TissueClass.BACKGROUND) & (mask != TissueClass.OTHER), True
    except NotHematoxylinEosinError:
        grey = cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY)
        threshold, _ = cv2.threshold(grey, 0, 255, cv2.THRESH_BINARY | cv2.THRESH_OTSU)
        mode = int(np.bincount(grey.ravel(), minlength=256).argmax())
        return (grey <= threshold) != (mode <= threshold), False


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
    # Where both are alike, the usual one.
    best = max(
        fits,
        key=lambda n: (not fits[n].is_stray, round(fits[n].on_tissue, 2), n == usual),
    )
    if not is_checked:
        return Placement(masks[best].mask, _forced_note(frame, fits[best]))
    is_known = is_sure and bool(tissue.any())
    _refuse_misfit(fits[best], tissue, is_known, paint, slide)
    note = describe_choice(best, {name: fit.on_tissue for name, fit in fits.items()}, slide)
    if not note and is_known and fits[best].overlap < _POOR_OVERLAP:
        note = f"{fits[best].on_tissue:.0%} of the mask is on tissue"
    return Placement(masks[best].mask, note)


def frame_shifts(slide: Slide, frame: Frame) -> Mapping[Frame, Affine]:
    """The placements to try: of the frame, or of each that the slide has."""
    bounds = inner_bounds(slide)
    shifts: dict[Frame, Affine] = {"canvas": Affine()}
    if bounds is not None:
        shifts["bounds"] = Affine(shift=(float(bounds[0]), float(bounds[1])))
    elif frame == "bounds":
        return {"bounds": Affine()}
    return shifts if frame == "auto" else {frame: shifts[frame]}


def describe_choice(
    chosen: Frame, shares: Mapping[Frame, float], slide: Slide, what: str = "the mask"
) -> str:
    """Which of two frames was taken, and why; '' where the slide has one only."""
    bounds = inner_bounds(slide)
    if bounds is None or bounds[:2] == (0, 0):
        return ""
    corner = f"the corner of the scanned area ({bounds[0]}, {bounds[1]})"
    names: dict[Frame, str] = {"bounds": corner, "canvas": "the corner of the whole slide"}
    other: Frame = "canvas" if chosen == "bounds" else "bounds"
    text = f"counted from {names[chosen]}: {shares[chosen]:.0%} of {what} is on tissue"
    if other not in shares:
        return text
    if shares[chosen] - shares[other] >= _CLEARLY:
        return f"{text}, {shares[other]:.0%} from {names[other]}"
    return (
        f"{text}, and {shares[other]:.0%} from {names[other]}: both fit; "
        f"if that was meant, give --frame {other}"
    )


def _forced_note(frame: Frame, fit: Fit) -> str:
    if fit.overlap >= _MIN_OVERLAP:
        return ""
    return f"--frame {frame} as requested, but {fit.on_tissue:.0%} of the mask is on tissue"


def _refuse_misfit(fit: Fit, tissue: Bools, is_known: bool, paint: Paint, slide: Slide) -> None:
    """Raise `UserError` where the mask is not of this slide as it was read."""
    if fit.is_stray:
        other = _better_reading(fit, tissue, paint, slide)
        raise UserError(
            f"{fit.inside:.1%} of the annotated area is on the slide of {slide.width}x{slide.height} "
            f"px{_add_reading(other)}; {_EXPECTED}"
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
