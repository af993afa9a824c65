"""From positions as others state them to tiles of this dataset: pure functions of arrays."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

import numpy as np
import numpy.typing as npt

from pipeline.dataset import Slide, safe_slide_id
from pipeline.dataset.grid import COORDINATE_UNITS, rank_order
from pipeline.slides.reader import Level
from pipeline.slides.readers import SLIDE_SUFFIXES
from pipeline.slides.resolution import level_downsamples, plan_read

_SLACK = 0.5 / COORDINATE_UNITS

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int32]


@dataclass(frozen=True)
class SlideFrames:
    """What positions on n slides are measured by, each float64 [n]; all in level-0 pixels.

    `size` is the side of one of the dataset's tiles; `step` that of a pixel of the level it is
    cut from where tiles begin on whole pixels, 0 where they are resampled; `downsamples` [n, k]
    is NaN where a slide has no such level.
    """

    width: Floats
    height: Floats
    mpp: Floats
    size: Floats
    step: Floats
    downsamples: Floats


def slide_frames(
    slides: Sequence[Slide], mpp: float, tolerance: float, tile_px: int
) -> SlideFrames:
    """The frames of usable slides for tiles of `tile_px` at `mpp`."""
    # Slides have different numbers of levels: short ones are filled up with NaN.
    depth = max((len(slide.levels) for slide in slides), default=0)
    downsamples = np.full((len(slides), depth), np.nan)
    rows = []
    for index, slide in enumerate(slides):
        levels = [Level(*level) for level in slide.levels]
        downsamples[index, : len(levels)] = level_downsamples(levels)
        plan = plan_read(levels, float(slide.mpp or 0), mpp, tolerance, tile_px)
        tile_step = plan.downsample if plan.aligned else 0.0
        tile_size = plan.window * plan.downsample
        rows.append((slide.width, slide.height, float(slide.mpp or 0), tile_size, tile_step))
    width, height, level0_mpp, size, step = np.array(rows, np.float64).reshape(len(rows), 5).T
    return SlideFrames(width, height, level0_mpp, size, step, downsamples)


def match_slides(names: Iterable[str], slides: Sequence[Slide], known: Iterable[str]) -> Ints:
    """Index of the slide that each name means, -1 where none or several do; int32 [n].

    A name is a slide id, a file name or a path of any system; last, where it has no dot itself,
    what is before the first dot of the id (a TCGA barcode without its UUID). `known` are the
    ids of all slides of the dataset, also of those not in `slides`: a short form that one of them
    shares means several.
    """
    # A short form that several slides share, refused ones too, means none of them.
    by_id = {slide.slide_id: index for index, slide in enumerate(slides)}
    count = Counter(slide_id.partition(".")[0] for slide_id in known)
    heads = {slide.slide_id.partition(".")[0]: index for index, slide in enumerate(slides)}
    by_head = {head: index for head, index in heads.items() if count[head] == 1}
    matches = []
    for name in names:
        path = PurePosixPath(name.strip().replace("\\", "/"))
        is_file = path.suffix.lower() in SLIDE_SUFFIXES
        stem = safe_slide_id((path.stem if is_file else path.name).removesuffix(".ome"))
        # A stem without a dot is a short form: `case.B` never means the slide `case.A`.
        matches.append(by_id.get(name, by_id.get(stem, by_head.get(stem, -1))))
    return np.array(matches, np.int32)


def level_factors(frames: SlideFrames, codes: Ints, levels: Floats) -> Floats:
    """Level-0 pixels per pixel of each row's level; NaN where its slide has no such level."""
    depth = frames.downsamples.shape[1]
    whole = np.where((levels >= 0) & (levels < depth) & (levels == np.floor(levels)), levels, -1)
    factors = frames.downsamples[codes, whole.astype(np.int64)] if depth else np.full(len(codes), 0)
    return np.where(whole >= 0, factors, np.nan)


def place_tiles(
    frames: SlideFrames, codes: Ints, x: Floats, y: Floats
) -> tuple[Floats, Floats, npt.NDArray[np.bool_]]:
    """Where tiles with corners (x, y) begin in level-0 px, and whether they are on their slides."""
    x, y = (snap_position(position, frames.step[codes]) for position in (x, y))
    size = frames.size[codes] - _SLACK
    fits_x = (x >= -_SLACK) & (x + size <= frames.width[codes])
    fits_y = (y >= -_SLACK) & (y + size <= frames.height[codes])
    return x, y, fits_x & fits_y


def snap_position(position: Floats, step: Floats) -> Floats:
    """Where tiles requested at `position` (level-0 px) begin: a multiple of 1/256 pixel.

    Tiles that are cut without resampling begin on whole pixels of their level, `step` level-0
    pixels apart, and so do their recorded positions; `step` 0 leaves the fraction.

    >>> snap_position(np.array([9.0, 9.001]), np.array([4.0, 0.0])).tolist()
    [8.0, 9.0]
    """
    whole = np.where(step > 0, step, 1.0 / COORDINATE_UNITS)
    return np.rint(np.rint(position / whole) * whole * COORDINATE_UNITS) / COORDINATE_UNITS


@dataclass(frozen=True)
class RankedUnion:
    """A slide's distinct positions in rank order, and the ranks of each part that names them.

    `x`, `y` float64 [n]; `ranks[k]` int32 ascending, distinct; `duplicates[k]` counts the rows of
    part k that repeat another of that part.
    """

    x: Floats
    y: Floats
    ranks: list[Ints]
    duplicates: list[int]


def ranked_union(
    seed: int, slide_id: str, x: Floats, y: Floats, part: npt.NDArray[np.integer], parts: int
) -> RankedUnion:
    """Union of the parts' positions, x and y float64 [n] in level-0 px; equal ones are one."""
    # In rank order equal positions are neighbours, since their keys are equal.
    order = rank_order(seed, slide_id, x, y)
    x, y, part = x[order], y[order], part[order]
    new = np.ones(len(x), bool)
    new[1:] = (x[1:] != x[:-1]) | (y[1:] != y[:-1])
    rank = (np.cumsum(new) - 1).astype(np.int32)
    rows = [rank[part == k] for k in range(parts)]
    ranks = [np.unique(part_rank) for part_rank in rows]
    duplicates = [len(a) - len(b) for a, b in zip(rows, ranks, strict=True)]
    return RankedUnion(x[new], y[new], ranks, duplicates)
