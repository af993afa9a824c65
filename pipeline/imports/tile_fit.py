"""Whether imported tile positions are of their slides, and from which corner they count."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt

from common.console import print_line
from common.errors import UserError
from common.text import list_some
from pipeline.dataset import Slide, fingerprint_of
from pipeline.imports.candidates import ImportedTiles
from pipeline.imports.config import Frame
from pipeline.imports.frames import Bools, find_tissue, inner_bounds, is_clearly_more, with_bounds
from pipeline.imports.positions import Floats, Ints, SlideFrames
from pipeline.slides.identity import OtherFileError, check_recorded
from pipeline.slides.open import open_scanned
from pipeline.slides.region import read_overview
from pipeline.tissue.detect import DetectorConfig

_CHECKED_SLIDES = 4
_MIN_ON_TISSUE, _MIN_TILES = 0.01, 20
_TISSUE_PIXELS = 0.05
"""Of a tile's pixels, from which on it is on tissue."""


@dataclass(frozen=True)
class SlideTissue:
    """Where a slide shows anything, bool [h, w]; `scale` is level-0 px per pixel of it."""

    mask: Bools
    scale: float
    is_sure: bool

    def share_on_tissue(self, x: Floats, y: Floats, size: float) -> float:
        """The share (0 to 1) of tiles with corners x, y [n] and side `size`, level-0 px."""
        sums = np.pad(np.cumsum(np.cumsum(self.mask, 0), 1), ((1, 0), (1, 0)))

        def to_pixels(position: Floats, end: int) -> npt.NDArray[np.int64]:
            return np.clip(np.rint(position / self.scale), 0, end).astype(np.int64)

        left, right = (to_pixels(v, self.mask.shape[1]) for v in (x, x + size))
        top, bottom = (to_pixels(v, self.mask.shape[0]) for v in (y, y + size))
        covered = sums[bottom, right] - sums[top, right] - sums[bottom, left] + sums[top, left]
        return float((covered > _TISSUE_PIXELS * (size / self.scale) ** 2).mean())


@lru_cache(maxsize=8)
def read_tissue(slide: Slide) -> SlideTissue | None:
    """The tissue of a slide, None where its file cannot be read here.

    Raises `OtherFileError` where it is another file than `scan` recorded.
    """
    try:
        path = Path(slide.path)
        check_recorded(slide, path)
        with open_scanned(slide, path) as reader:
            mpp = float(slide.mpp or 1)
            rgb, um_per_px = read_overview(reader, mpp, DetectorConfig().um_per_px)
    except OtherFileError:
        raise
    except (UserError, OSError):
        return None
    if not rgb.size:
        return None
    mask, is_sure = find_tissue(rgb, um_per_px)
    return SlideTissue(mask, um_per_px / mpp, is_sure) if mask.any() else None


@dataclass(frozen=True)
class TileFit:
    """Tile positions of a table or folder `what`, to be placed on `slides`.

    `stated` are the frames of slides (by index) whose file says where it counts from.
    """

    what: str
    slides: Sequence[Slide]
    frames: SlideFrames
    frame: Frame
    stated: Mapping[int, Frame] = field(default_factory=dict)

    def shift_tiles(self, codes: Ints, x: Floats, y: Floats) -> tuple[Floats, Floats, list[str]]:
        """Corners x, y [n] in level-0 px of the whole slide, and the slides that were moved.

        `codes` int32 [n] are the tiles' slides. Prints one line where a slide has two frames.
        """
        if self.frame == "canvas":
            return x, y, []
        shift = np.zeros((len(self.slides), 2))
        moved: list[str] = []
        notes: list[str] = []
        for index in np.unique(codes).tolist():
            slide = with_bounds(self.slides[index])
            bounds = inner_bounds(slide)
            if bounds is None or bounds[:2] == (0, 0):
                continue
            rows = codes == index
            chosen, why = self._choose_frame(index, slide, x[rows], y[rows])
            notes.append(f"{slide.slide_id}: {_NAMES[chosen]} ({why})")
            if chosen == "bounds":
                shift[index] = bounds[:2]
                moved.append(slide.slide_id)
        if notes:
            print_line(
                f"import: {self.what}: positions on {len(notes):,} slides whose scanned area is a "
                f"part of the whole count from: {list_some(notes)}; --frame bounds or canvas "
                "decides otherwise"
            )
        return x + shift[codes, 0], y + shift[codes, 1], moved

    def _choose_frame(self, index: int, slide: Slide, x: Floats, y: Floats) -> tuple[Frame, str]:
        """The frame of one slide's corners x, y, and why."""
        if self.frame != "auto":
            return self.frame, "as requested"
        if index in self.stated:
            return self.stated[index], "as its file states"
        bounds, size = slide.bounds or (0, 0, 0, 0), float(self.frames.size[index])
        shifts: dict[Frame, tuple[int, int]] = {"canvas": (0, 0), "bounds": bounds[:2]}

        def share_scanned(left: Floats, top: Floats) -> float:
            middle = np.stack([left, top]) + size / 2 - np.array(bounds[:2])[:, None]
            return float(((middle >= 0) & (middle < np.array(bounds[2:])[:, None])).all(0).mean())

        def shares(measure: Callable[[Floats, Floats], float]) -> dict[Frame, float]:
            return {name: measure(x + dx, y + dy) for name, (dx, dy) in shifts.items()}

        # The scanner saw nothing outside of the area: cheap, and mostly enough.
        if choice := _clear_choice(shares(share_scanned), "in the scanned area"):
            return choice
        if len(x) < _MIN_TILES:
            return "canvas", "both fit so few tiles"
        tissue = read_tissue(slide)
        if tissue is None:
            return "canvas", "both fit, and its pixels cannot be read here"
        on_tissue = shares(lambda left, top: tissue.share_on_tissue(left, top, size))
        choice = _clear_choice(on_tissue, "on tissue")
        return choice or ("canvas", "both fit")

    def check_tissue(self, codes: Ints, x: Floats, y: Floats) -> None:
        """Refuse tiles with corners x, y [n] in level-0 px that are as good as never on tissue.

        A few slides are looked at; a frame that was requested is taken without. Few tiles prove
        nothing, and are only reported.
        """
        if self.frame != "auto" or not len(codes):
            return
        present = np.unique(codes)
        checked = np.unique(present[np.linspace(0, len(present) - 1, _CHECKED_SLIDES).astype(int)])
        seen, on_tissue, names = 0, 0.0, []
        for index in checked.tolist():
            tissue = read_tissue(self.slides[index])
            if tissue is not None and tissue.is_sure:
                rows, size = codes == index, float(self.frames.size[index])
                seen += int(rows.sum())
                on_tissue += rows.sum() * tissue.share_on_tissue(x[rows], y[rows], size)
                names.append(self.slides[index].slide_id)
        if not seen or on_tissue >= _MIN_ON_TISSUE * seen:
            return
        what = f"{self.what}: {on_tissue:.0f} of {seen:,} tiles are on tissue ({list_some(names)})"
        if seen < _MIN_TILES:
            print_line(f"import: {what}; are units, anchor and columns right?")
            return
        raise UserError(
            f"{what}; are units, anchor and columns right? --frame canvas takes them as they are"
        )


_NAMES: dict[Frame, str] = {
    "bounds": "the corner of the scanned area",
    "canvas": "the corner of the whole slide",
}


def _clear_choice(shares: Mapping[Frame, float], where: str) -> tuple[Frame, str] | None:
    """The frame in which clearly more tiles are somewhere, and why; None where none is."""
    best, other = sorted(shares, key=lambda name: -shares[name])
    if not is_clearly_more(shares[best], shares[other]):
        return None
    return best, f"{shares[best]:.0%} of its tiles {where} against {shares[other]:.0%}"


def moved_origin(moved: Sequence[str]) -> dict[str, object]:
    """What a selection's plan says of slides whose positions counted from their scanned area."""
    return {"from_bounds": sorted(moved)} if moved else {}


def moved_parameters(imported: Sequence[ImportedTiles]) -> dict[str, object]:
    """The same for the dataset's identity; {} where no tile was moved, as by earlier releases."""
    moved = [(tiles.name, tiles.origin.get("from_bounds")) for tiles in imported]
    return {"from_bounds": fingerprint_of(moved=moved)} if any(ids for _, ids in moved) else {}
