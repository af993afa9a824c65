"""Whether each level of a pyramid is a reduction of level 0: by its size, and by its pixels."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from pipeline.slides.reader import Level, SlideReader, SlideReadError
from pipeline.slides.resolution import ROUNDED_PX, area_resample, level_downsamples

Place = tuple[float, float]
"""Centre of what is compared, in level-0 pixels."""
Bands = npt.NDArray[np.float32]

_TEMPLATE_PX, _TEMPLATE_PX_STEEP = 64, 32
_STEEP = 8.0
_SEARCH_PX = 5
_SMALLEST_PX = 24
_GRID, _DENSE_GRID = 5, 8
_WINDOWS, _FEWEST_WINDOWS, _TRIES = 8, 4, 3
_BUDGET_PX = 5_000_000
_NATIVE_TILE_PX = 256

# Details of one pixel depend on the kernel of a reduction and on JPEG, wide shades on nothing:
# what lies between decides. Of nearest, box, Lanczos and sharpened reductions by 2 to 32, in JPEG
# of quality 30, the least correlation was 0.72; of windows of other places 99 % were under 0.28.
_FINE_SIGMA, _WIDE_PX = 1.5, 25
_LEAST_CONTRAST = 4.0
_LEAST_CORRELATION = 0.5
_LEAST_GAIN = 0.3
# A kernel may shift by half a pixel, and rounded sizes by one at the far edge.
_MOST_SHIFT_PX = 2.0
_MOST_COLOUR = 16.0


def find_false_levels(reader: SlideReader) -> dict[int, str]:
    """The levels (by number) that are not reductions of level 0, and why, as a clause.

    A level's size must be level 0's by one downsample in x and y, and its pixels those of level 0
    (by way of the next finer level that is proved) at up to eight places with contrast, as far
    apart as the slide has them. A level that shows no contrast where finer ones show none is taken
    by its size. Reads a few million pixels; a place that cannot be read proves nothing.
    """
    if len(reader.levels) < 2:
        return {}
    proof = _Proof(reader)
    false: dict[int, str] = {}
    proved = [0]
    for index in sorted(range(1, len(reader.levels)), key=lambda i: proof.downsamples[i]):
        problem = _size_problem(reader.levels, index, proof.downsamples[index])
        problem = problem or proof.find_difference(index, proved[-1])
        if problem:
            false[index] = problem
        else:
            proved.append(index)
    return false


def _size_problem(levels: Sequence[Level], index: int, downsample: float) -> str:
    """How the level's size contradicts the downsample that it is read with."""
    base, level = levels[0], levels[index]
    off = max(
        abs(base.width / downsample - level.width), abs(base.height / downsample - level.height)
    )
    if off <= ROUNDED_PX:
        return ""
    across, down = base.width / level.width, base.height / level.height
    digits = 4 if f"{across:.4g}" != f"{down:.4g}" else 7
    return (
        f"{level.width}x{level.height} px is {across:.{digits}g} of level 0 across and "
        f"{down:.{digits}g} down"
    )


class _Proof:
    """Comparisons of an open slide's levels with each other."""

    def __init__(self, reader: SlideReader) -> None:
        self.reader = reader
        self.downsamples = level_downsamples(reader.levels)

    def find_difference(self, index: int, finer: int) -> str:
        """Where the level differs from a finer one that is proved; '' where nothing differs."""
        ratio = max(1.0, self.downsamples[index] / self.downsamples[finer])
        comparison = _Comparison(self.reader, index, finer, self.downsamples, ratio)
        if comparison.extent < _SMALLEST_PX:
            return ""
        proved = 0
        # Few places may be left where a label or a blank level said where to look.
        for dense in (False, True):
            places = self._dense_places if dense else self._sparse_places
            for x, y in places[: _TRIES * comparison.wanted]:
                try:
                    problem = comparison.compare_at(x, y)
                except SlideReadError:
                    continue
                if problem:
                    return f"{problem} at x={x:.0f}, y={y:.0f}"
                proved += problem is not None
                if proved == comparison.wanted:
                    return ""
            if proved >= _FEWEST_WINDOWS:
                break
        return ""

    @cached_property
    def _sparse_places(self) -> list[Place]:
        """Places with contrast, in level 0 or in the coarsest level, which shows more at once."""
        # Both, since a level that is blank or another picture does not say where to look.
        wide = [
            i
            for i, level in enumerate(self.reader.levels)
            if min(level.width, level.height) >= 2 * _TEMPLATE_PX
        ]
        coarsest = max(wide, key=lambda i: self.downsamples[i], default=0)
        found = self._find_contrast(0, _GRID)
        if coarsest:
            found += self._find_contrast(coarsest, _GRID)
        return _order_apart(found, self.reader.levels[0])

    @cached_property
    def _dense_places(self) -> list[Place]:
        return _order_apart(self._find_contrast(0, _DENSE_GRID), self.reader.levels[0])

    def _find_contrast(self, index: int, grid: int) -> list[Place]:
        """Places of contrast, one for each of grid x grid windows over the level that has some."""
        level, downsample = self.reader.levels[index], self.downsamples[index]
        side = min(_TEMPLATE_PX, level.width, level.height)
        found = []
        for y in _starts(level.height, side, grid):
            for x in _starts(level.width, side, grid):
                try:
                    bands = _band_pass(self.reader.read(index, x, y, side, side))
                except SlideReadError:
                    continue
                if bands.std() >= _LEAST_CONTRAST:
                    energy = cv2.blur((bands**2).sum(2), (side // 4, side // 4))
                    row, column = divmod(int(energy.argmax()), side)
                    found.append(((x + column) * downsample, (y + row) * downsample))
        return found


def _starts(size: int, side: int, grid: int) -> list[int]:
    count = max(1, min(grid, size // side))
    return sorted({round(v) for v in np.linspace(0, size - side, count)})


def _order_apart(places: Sequence[Place], size: Level) -> list[Place]:
    """The places nearest to the corners first, far ones before, then each the farthest from all.

    A wrong downsample shows as a shift that grows with the distance from the upper left corner.

    >>> _order_apart([(0, 0), (50, 50), (90, 90), (0, 90), (90, 0)], Level(99, 99, 1.0))
    [(90, 90), (90, 0), (0, 90), (0, 0), (50, 50)]
    """
    if not places:
        return []
    points = np.array(places, np.float64)
    corners = np.array([(1, 1), (1, 0), (0, 1), (0, 0)]) * (size.width, size.height)
    order = list(dict.fromkeys(int(np.hypot(*(points - corner).T).argmin()) for corner in corners))
    distance = np.min([np.hypot(*(points - points[i]).T) for i in order], 0)
    while len(order) < len(points):
        distance[order] = -1
        order.append(int(distance.argmax()))
        distance = np.minimum(distance, np.hypot(*(points - points[order[-1]]).T))
    return [places[i] for i in order]


@dataclass(frozen=True)
class _Comparison:
    """Level `index` against the finer level `finer`, reduced by `ratio`."""

    reader: SlideReader
    index: int
    finer: int
    downsamples: Sequence[float]
    ratio: float

    @cached_property
    def size(self) -> tuple[int, int]:
        """Width and height of what both levels show, in pixels of the coarser."""
        level, finer = self.reader.levels[self.index], self.reader.levels[self.finer]
        return (
            min(level.width, int(finer.width / self.ratio)),
            min(level.height, int(finer.height / self.ratio)),
        )

    @cached_property
    def extent(self) -> int:
        """Side of a window, in pixels of the level: smaller where the ratio is large."""
        template = _TEMPLATE_PX if self.ratio <= _STEEP else _TEMPLATE_PX_STEEP
        return min(template + 2 * _SEARCH_PX, *self.size)

    @property
    def wanted(self) -> int:
        """How many places are enough: fewer where each costs many pixels."""
        each = (self.extent * self.ratio + _NATIVE_TILE_PX) ** 2
        return int(np.clip(_BUDGET_PX / each, _FEWEST_WINDOWS, _WINDOWS))

    def compare_at(self, x_level0: float, y_level0: float) -> str | None:
        """What differs around a place, '' for nothing, None where neither level has contrast."""
        downsample = self.downsamples[self.index]
        x, y = (
            int(np.clip(round(at / downsample - self.extent / 2), 0, size - self.extent))
            for at, size in zip((x_level0, y_level0), self.size, strict=True)
        )
        shown = self.reader.read(self.index, x, y, self.extent, self.extent)
        return find_difference(self._reduce_finer(x, y), shown)

    def _reduce_finer(self, x: int, y: int) -> npt.NDArray[np.uint8]:
        """The finer level's pixels as the level should show them: [extent, extent, 3] uint8."""
        left, top = int(x * self.ratio), int(y * self.ratio)
        side = int(np.ceil(self.extent * self.ratio)) + 1
        finer = self.reader.levels[self.finer]
        width, height = min(side, finer.width - left), min(side, finer.height - top)
        image = self.reader.read(self.finer, left, top, width, height)
        window = self.extent * self.ratio
        return area_resample(
            image, x * self.ratio - left, y * self.ratio - top, window, self.extent
        )


def find_difference(expected: npt.NDArray[np.uint8], shown: npt.NDArray[np.uint8]) -> str | None:
    """How two windows [n, n, 3] differ that should show the same; None where neither has contrast.

    '' where they are the same, but for the kernel of a reduction, JPEG, and 2 px of shift.
    """
    ours, theirs = _band_pass(expected), _band_pass(shown)
    contrasts = float(ours.std()), float(theirs.std())
    if max(contrasts) < _LEAST_CONTRAST:
        return None
    if contrasts[1] < _LEAST_GAIN * contrasts[0]:
        return "it is blank where level 0 is not,"
    margin = _SEARCH_PX
    inner = theirs[margin:-margin, margin:-margin]
    # Of a blank patch no correlation is defined, and none is found.
    scores = np.nan_to_num(np.asarray(cv2.matchTemplate(ours, inner, cv2.TM_CCOEFF_NORMED)))
    row, column = divmod(int(scores.argmax()), scores.shape[1])
    best = float(scores[row, column])
    near = float(scores[margin - 1 : margin + 2, margin - 1 : margin + 2].max())
    shift = float(np.hypot(_peak_offset(scores[:, column], row), _peak_offset(scores[row], column)))
    # Along a straight edge all places are alike: only one that fits better is a shift.
    is_shifted = shift > _MOST_SHIFT_PX and 1 - near > 1.5 * (1 - best) + 0.02
    if max(best if shift <= _MOST_SHIFT_PX else near, is_shifted * best) < _LEAST_CORRELATION:
        return "it does not show what level 0 shows"
    if is_shifted:
        return f"it is shifted by {shift:.1f} px"
    colours = np.abs(expected.mean((0, 1)) - shown.mean((0, 1)))
    return "its colours are not those of level 0" if colours.max() > _MOST_COLOUR else ""


def _peak_offset(scores: npt.NDArray[Any], at: int) -> float:
    """Distance from the middle to the peak at `at`, refined by a parabola through three scores."""
    offset = float(at - len(scores) // 2)
    if 0 < at < len(scores) - 1:
        before, peak, after = (float(v) for v in scores[at - 1 : at + 2])
        bend = before - 2 * peak + after
        offset += 0.5 * (before - after) / bend if bend < 0 else 0.0
    return offset


def _band_pass(image: npt.NDArray[np.uint8]) -> Bands:
    """What of an image [n, n, 3] is between one pixel's detail and wide shades: float32."""
    pixels = image.astype(np.float32)
    fine = cv2.GaussianBlur(pixels, (0, 0), _FINE_SIGMA)
    return np.asarray(fine - cv2.blur(pixels, (_WIDE_PX, _WIDE_PX)), np.float32)
