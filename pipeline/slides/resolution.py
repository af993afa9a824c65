"""From a target mpp to pixels: which mpp to believe, which level to read, which window.

Pure arithmetic, no slide in it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from common.errors import UserError
from pipeline.slides.reader import Level, ResolutionTags

TIFF_MPP_WINDOW = (0.1, 1.0)
MAX_ANISOTROPY = 0.02
_SAYS = {
    "vendor": "the vendor's metadata says",
    "tiff-tags": "the TIFF tags say",
    "ome-xml": "the OME-XML says",
}
_BY = _SAYS | {
    "table": "the table says",
    "assumed": "--assume-mpp says",
    "objective": "the objective says",
}
_VENDOR_WINDOW = (0.02, 50.0)
# Exactly 1 is what writers of OME-XML put where they do not know.
_OME_WINDOW = (0.1, 0.999)
_NOMINAL_UM = 10.0
_POWERS = (1.0, 150.0)
_SAID_FACTOR = 1.1
# Twice, but for the rounding that square pixels are allowed as well.
_REFUSED_FACTOR = 2 / (1 + MAX_ANISOTROPY)
# A magnification is a round number: 40x slides have 0.22 to 0.28 µm.
_NOMINAL_FACTOR, _MAGNIFICATION_LIMIT = 1.35, 1.8
# Scanners of 3DHISTECH and Zeiss have 0.17 to 0.24 µm behind a lens of 20x.
_LENS_LIMIT = 3.6
_CELLS_PER_BLOCK = 16
ROUNDED_PX = 1.5


class ResolutionError(UserError):
    """The slide's resolution is unknown, not to be trusted or too coarse: it is rejected."""


class MppContradictionError(ResolutionError):
    """A slide states resolutions that differ by two or more; `facts` says which, without advice."""

    def __init__(self, facts: str, sources: Sequence[str]) -> None:
        self.facts = facts
        choice = f"--mpp-from {' or '.join(sources)}, or " if sources else ""
        super().__init__(f"{facts}; give {choice}a CSV with an mpp column")


@dataclass(frozen=True)
class Mpp:
    """µm per pixel at level 0, where the number comes from, and what contradicts it."""

    value: float
    source: str
    notes: tuple[str, ...] = ()


def resolve_mpp(
    tags: ResolutionTags,
    *,
    table: float | None,
    assumed: float | None,
    believed: str = "auto",
) -> Mpp:
    """The first of: the CSV's column, the vendor's metadata, TIFF tags, OME-XML, `assumed`.

    All in µm per px. `believed` names the source that comes before the others of the file;
    "objective" is 10 µm by the magnification, for slides that state nothing else or contradict it.
    What contradicts the value by more than 10 % (a magnification by more than 35 %) is in `notes`.
    Raises `MppContradictionError` for a factor of two (of about four for a lens) where neither the
    table nor `believed` decides, and `ResolutionError` where there is no value.

    >>> resolve_mpp(ResolutionTags(vendor=(0.25, 0.25)), table=None, assumed=None)
    Mpp(value=0.25, source='vendor', notes=())
    """
    stated, doubts = _plausible_sources(tags)
    if believed in stated:
        stated = {believed: stated[believed]} | stated
    if believed == "objective":
        stated = _settle_by_objective(stated, tags)
    if table is not None:
        value, source = table, "table"
    elif stated:
        source, pair = next(iter(stated.items()))
        _require_square(pair)
        value = (pair[0] + pair[1]) / 2
    elif assumed is not None:
        value, source = assumed, "assumed"
    else:
        raise ResolutionError(_no_mpp(doubts, tags))
    is_decided = source in ("table", "assumed", believed) or (
        believed == "objective" and _nominal_mpp(tags) is not None
    )
    return Mpp(value, source, _find_contradictions(value, source, tags, is_decided))


def _plausible_sources(
    tags: ResolutionTags,
) -> tuple[dict[str, tuple[float, float]], list[str]]:
    """The values that may be believed, by source, and why the others may not."""
    stated, doubts = {}, []
    for name, pair, window in (
        ("vendor", tags.vendor, _VENDOR_WINDOW),
        # TIFF tags often state a printer's dpi: outside the window they are not believed.
        ("tiff-tags", tags.tiff, TIFF_MPP_WINDOW),
        ("ome-xml", tags.ome, _OME_WINDOW),
    ):
        if pair is None:
            continue
        value = (pair[0] + pair[1]) / 2
        if window[0] <= value <= window[1]:
            stated[name] = pair
        else:
            hint = "" if name == "tiff-tags" else _unit_hint(value)
            doubts.append(f"{_SAYS[name]} {value:.4g}, outside {window[0]} to {window[1]}{hint}")
    return stated, doubts


def _unit_hint(value: float) -> str:
    """For a value that is a thousand or a million times off: the unit that it may be in."""
    for factor, unit in ((1e3, "nm"), (1e-3, "mm"), (1e-6, "m"), (1e6, "pm")):
        if TIFF_MPP_WINDOW[0] <= value / factor <= TIFF_MPP_WINDOW[1]:
            return f"; {value:.4g} {unit} would be {value / factor:.4g} µm"
    return ""


def _settle_by_objective(
    stated: dict[str, tuple[float, float]], tags: ResolutionTags
) -> dict[str, tuple[float, float]]:
    """Values that the magnification does not contradict; what it says where there are none."""
    nominal = _nominal_mpp(tags)
    if nominal is None:
        return stated
    limit = _MAGNIFICATION_LIMIT if tags.magnification else _LENS_LIMIT
    agreeing = {n: pair for n, pair in stated.items() if _factor(sum(pair) / 2, nominal) < limit}
    return agreeing or {"objective": (nominal, nominal)}


def _require_square(pair: tuple[float, float]) -> None:
    if abs(pair[0] - pair[1]) > MAX_ANISOTROPY * min(pair):
        raise ResolutionError(
            f"pixels are not square: {pair[0]:.4f} x {pair[1]:.4f} mpp differ by more than "
            f"{MAX_ANISOTROPY:.0%}"
        )


def _no_mpp(doubts: Sequence[str], tags: ResolutionTags) -> str:
    nominal, more = _nominal_mpp(tags), ""
    if nominal is not None:
        doubts = [*doubts, f"{_NOMINAL_UM / nominal:.3g}x is about {nominal:.4g}"]
        more = ", or --mpp-from objective"
    why = f" ({'; '.join(doubts)})" if doubts else ""
    return f"no trustworthy mpp{why}; give a CSV with an mpp column, or --assume-mpp{more}"


def _find_contradictions(
    value: float, source: str, tags: ResolutionTags, is_decided: bool
) -> tuple[str, ...]:
    """What else the slide states that contradicts the value: as a note, or raised."""
    said, named, is_refused = [], [source], False
    others = [(name, sum(pair) / 2) for name, pair in _plausible_sources(tags)[0].items()]
    others += [("vendor", sum(pair) / 2) for pair in tags.others]
    for name, other in others:
        factor = _factor(value, other)
        if factor > _SAID_FACTOR:
            said.append(f"{_SAYS[name]} {other:.4g}")
            named.append(name)
            # What the vendor states twice is not settled by believing the vendor.
            is_open = not is_decided or (name == source == "vendor")
            is_refused |= factor >= _REFUSED_FACTOR and is_open
    nominal = _nominal_mpp(tags)
    if nominal is not None and source != "objective":
        factor = _factor(value, nominal)
        if factor > _NOMINAL_FACTOR:
            said.append(f"{_NOMINAL_UM / nominal:.3g}x is about {nominal:.4g}")
            named.append("objective")
            limit = _MAGNIFICATION_LIMIT if tags.magnification else _LENS_LIMIT
            is_refused |= factor >= limit and not is_decided
    if not said:
        return ()
    facts = f"{_BY[source]} {value:.4g} µm per pixel, but {' and '.join(said)}"
    if is_refused:
        raise MppContradictionError(facts, [n for n in dict.fromkeys(named) if named.count(n) == 1])
    return (facts,)


def _nominal_mpp(tags: ResolutionTags) -> float | None:
    """10 µm by the magnification: 0.25 for 40x; None where there is none that slides have."""
    power = tags.magnification or tags.lens or 0.0
    return _NOMINAL_UM / power if _POWERS[0] <= power <= _POWERS[1] else None


def _factor(one: float, other: float) -> float:
    return max(one, other) / min(one, other)


@dataclass(frozen=True)
class ReadPlan:
    """How tiles of a slide are read.

    Tiles are cut from `level`; a tile covers `window` x `window` of that level's pixels, which is
    `tile_px * factor`. With `factor` an integer and `aligned` true, tiles are pixel-aligned
    integer reductions; otherwise windows have sub-pixel exact edges. `mpp` is the tile's true
    resolution; `stride_level0` the distance between tiles in level-0 pixels.
    """

    level: int
    factor: float
    aligned: bool
    mpp: float
    window: float
    stride_level0: float
    downsample: float


def plan_read(
    levels: Sequence[Level], mpp_level0: float, target_mpp: float, tolerance: float, tile_px: int
) -> ReadPlan:
    """Choose the coarsest level that is not coarser than the target, and the reduction from it.

    If an integer multiple of that level's mpp is within `tolerance` (relative) of the target,
    tiles are integer reductions and their true mpp is recorded; else they are resampled to the
    target exactly. Raises `ResolutionError` when level 0 is coarser than the target: nothing is
    ever enlarged.

    >>> plan = plan_read([Level(8000, 6000, 1.0), Level(2000, 1500, 4.0)], 0.25, 0.5, 0.02, 224)
    >>> plan.level, plan.factor, plan.mpp, plan.stride_level0
    (0, 2.0, 0.5, 448.0)
    """
    if mpp_level0 > target_mpp * (1 + tolerance) + 1e-12:
        raise ResolutionError(
            f"{mpp_level0:.4g} mpp is coarser than the target {target_mpp:.4g}; "
            "slides are never enlarged"
        )
    limit = target_mpp * (1 + tolerance) + 1e-12
    downsamples = level_downsamples(levels)
    usable = [i for i, d in enumerate(downsamples) if mpp_level0 * d <= limit]
    level = max(usable, key=lambda i: downsamples[i])
    level_mpp = mpp_level0 * downsamples[level]
    # Whole multiples need no resampling: tiles are then means of whole pixels.
    multiple = max(1, round(target_mpp / level_mpp))
    aligned = abs(multiple * level_mpp - target_mpp) <= tolerance * target_mpp + 1e-12
    factor = float(multiple) if aligned else target_mpp / level_mpp
    return ReadPlan(
        level=level,
        factor=factor,
        aligned=aligned,
        mpp=level_mpp * factor,
        window=tile_px * factor,
        stride_level0=tile_px * factor * downsamples[level],
        downsample=downsamples[level],
    )


def level_downsamples(levels: Sequence[Level]) -> list[float]:
    """The downsamples that were meant: readers give 4.00012 for 4, from rounded level sizes.

    A whole number is meant where it explains the level's size to within 1.5 of its pixels, so
    that nothing at the far edge of the slide is misplaced by more.
    """
    base, downsamples = levels[0], []
    for level in levels:
        whole = max(1, round(level.downsample))
        off_x, off_y = base.width / whole - level.width, base.height / whole - level.height
        is_whole = max(abs(off_x), abs(off_y)) <= ROUNDED_PX
        downsamples.append(float(whole) if is_whole else level.downsample)
    return downsamples


def area_resample(
    image: npt.NDArray[np.uint8], x: float, y: float, window: float, out_px: int
) -> npt.NDArray[np.uint8]:
    """Mean over sub-pixel exact cells: [h, w, 3] uint8 to [out_px, out_px, 3] uint8, rounded.

    Output pixel (i, j) is the area-weighted mean of [y + i s, y + (i+1) s) x [x + j s, ...) with
    s = window / out_px >= 1, in pixels of `image`.
    """
    # Separable: first over rows, then, transposed, over columns.
    height, width = image.shape[:2]
    narrow = _cell_means(image.reshape(height, width * 3), y, window, out_px)
    turned = narrow.reshape(out_px, width, 3).transpose(1, 0, 2).reshape(width, out_px * 3)
    result = _cell_means(turned, x, window, out_px).reshape(out_px, out_px, 3)
    return np.rint(result).astype(np.uint8).transpose(1, 0, 2).copy()


def _cell_means(
    rows: npt.NDArray[Any], start: float, window: float, cells: int
) -> npt.NDArray[np.float32]:
    """Means of `rows` [n, w] over `cells` equal parts of [start, start + window): [cells, w].

    A cell touches few rows, so the matrix of shares is a band: it is applied in blocks.
    """
    step = window / cells
    blocks = -(-cells // _CELLS_PER_BLOCK)
    edges = start + np.arange(blocks * _CELLS_PER_BLOCK + 1) * step
    first = np.floor(edges[:-1:_CELLS_PER_BLOCK]).astype(np.int64)
    index = first[:, None] + np.arange(math.ceil(_CELLS_PER_BLOCK * step) + 1)
    upper = edges[:-1].reshape(blocks, _CELLS_PER_BLOCK, 1)
    lower = edges[1:].reshape(blocks, _CELLS_PER_BLOCK, 1)
    # How much of each row is in each cell; rows beyond the last have no share.
    inside = np.minimum(index + 1, len(rows))[:, None]
    share = np.clip(np.minimum(lower, inside) - np.maximum(upper, index[:, None]), 0, None)
    share /= np.maximum(share.sum(2, keepdims=True), np.finfo(np.float64).tiny)
    taken = rows[np.minimum(index, len(rows) - 1)].astype(np.float32, copy=False)
    means = share.astype(np.float32) @ taken
    return np.asarray(means.reshape(blocks * _CELLS_PER_BLOCK, -1)[:cells])
