"""From which corner of a slide coordinates count, and whether what they describe fits the slide.

Some formats (SCN, MIRAX, Ventana) have a large canvas of which the scanner filled a part, the
bounds. OpenSlide and this project count from the canvas's corner, QuPath from that of the bounds.
Nothing in a file says which, so that both are tried on the slide's own tissue.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt

from common.errors import UserError
from pipeline.dataset import Slide
from pipeline.imports.config import Frame
from pipeline.imports.polygons import Affine
from pipeline.slides.identity import check_recorded
from pipeline.slides.openslide_reader import OpenSlideReader
from pipeline.slides.reader import SlideOpenError
from pipeline.tissue.classes import TissueClass
from pipeline.tissue.colour import NotHematoxylinEosinError
from pipeline.tissue.detector import ClassicalDetector

Bounds = tuple[int, int, int, int]
Bools = npt.NDArray[np.bool_]

_VENDORS_WITH_BOUNDS = frozenset({"leica", "mirax", "ventana", "zeiss"})
_CLEARLY = 0.1


def with_bounds(slide: Slide) -> Slide:
    """The slide with its `bounds`, read from its file where an older `scan` did not record them.

    Raises `UserError` where the file would have to be read and cannot be, and `OtherFileError`
    where it is another one than `scan` recorded.
    """
    if slide.bounds is not None or slide.vendor not in _VENDORS_WITH_BOUNDS:
        return slide
    check_recorded(slide, Path(slide.path))
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


def frame_shifts(slide: Slide, frame: Frame) -> Mapping[Frame, Affine]:
    """The placements to try: of the frame, or of each that the slide has."""
    bounds = inner_bounds(slide)
    shifts: dict[Frame, Affine] = {"canvas": Affine()}
    if bounds is not None:
        shifts["bounds"] = Affine(shift=(float(bounds[0]), float(bounds[1])))
    elif frame == "bounds":
        return {"bounds": Affine()}
    return shifts if frame == "auto" else {frame: shifts[frame]}


def is_clearly_more(share: float, other: float) -> bool:
    """Whether one share of 0 to 1 is so much larger than another that it decides between frames.

    >>> is_clearly_more(0.05, 0.0), is_clearly_more(0.97, 0.95)
    (True, False)
    """
    return share > 0 and share - other >= _CLEARLY * share


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
    if is_clearly_more(shares[chosen], shares[other]):
        return f"{text}, {shares[other]:.0%} from {names[other]}"
    return (
        f"{text}, and {shares[other]:.0%} from {names[other]}: both fit; "
        f"if that was meant, give --frame {other}"
    )
