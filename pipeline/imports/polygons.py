"""Polygons of a mask and masks of polygons: pure functions, exact to the pixel both ways.

A traced polygon runs along pixel edges, a filled one has the pixels whose centres are in it,
so that filling what was traced gives the same mask.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Polygon:
    """A ring and the holes in it, each float64 [n, 2] (x, y), not closed."""

    shell: Floats
    holes: tuple[Floats, ...] = ()

    @property
    def rings(self) -> tuple[Floats, ...]:
        """Shell, then holes, each float64 [n, 2] of (x, y)."""
        return (self.shell, *self.holes)

    def scale_by(self, factor: float) -> "Polygon":
        """The polygon in px `factor` times as small."""
        return Polygon(self.shell * factor, tuple(hole * factor for hole in self.holes))

    def move_by(self, affine: "Affine") -> "Polygon":
        """The polygon with its points as the map has them."""
        return Polygon(
            affine.move_points(self.shell), tuple(affine.move_points(hole) for hole in self.holes)
        )


@dataclass(frozen=True)
class Affine:
    """Where points (x, y) go: `scale` * (x, y) + `shift`; `swap` exchanges x and y before."""

    scale: tuple[float, float] = (1.0, 1.0)
    shift: tuple[float, float] = (0.0, 0.0)
    swap: bool = False

    def move_points(self, points: Floats) -> Floats:
        """Points float64 [n, 2] of (x, y) as the map has them."""
        return (points[:, ::-1] if self.swap else points) * self.scale + self.shift


@dataclass(frozen=True)
class Painted:
    """A mask uint8 [h, w] of classes, and what of its areas is not in it.

    `inside` is the share (0 to 1) of them that is; `is_negative` says that some reach over the
    mask's left or upper edge.
    """

    mask: npt.NDArray[np.uint8]
    inside: float = 1.0
    is_negative: bool = False


def fill_polygon(polygon: Polygon, shape: tuple[int, int]) -> tuple[Bools, int, int]:
    """The pixels of a mask of `shape` (h, w) whose centres are in the polygon (even-odd rule).

    Returns the pixels of the polygon's bounding box and the box's top and left in the mask.
    """
    points = np.concatenate(polygon.rings)
    left, top = (np.clip(np.floor(points.min(0)), 0, shape[::-1])).astype(int)
    right, bottom = (np.clip(np.ceil(points.max(0)), 0, shape[::-1])).astype(int)
    width, height = right - left, bottom - top
    if width <= 0 or height <= 0:
        return np.zeros((0, 0), bool), int(top), int(left)
    cells = [_find_crossings(ring - (left, top), height, width) for ring in polygon.rings]
    size = height * (width + 1)
    flips = np.bincount(np.concatenate(cells), minlength=size).reshape(height, width + 1)
    return np.cumsum(flips, 1)[:, :width] % 2 == 1, int(top), int(left)


def _find_crossings(ring: Floats, height: int, width: int) -> Ints:
    """Flat cells [height, width + 1] from which on a row is on the other side of an edge."""
    x0, y0 = ring.T
    x1, y1 = np.roll(ring, -1, 0).T
    # Each edge crosses the rows whose centres, at y + 0.5, are between its ends.
    first = np.clip(np.ceil(np.minimum(y0, y1) - 0.5), 0, height).astype(np.int64)
    last = np.clip(np.ceil(np.maximum(y0, y1) - 0.5), 0, height).astype(np.int64)
    count = last - first
    # One entry per pair of edge and row, without a loop over either.
    edge = np.repeat(np.arange(len(ring)), count)
    row = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count) + first[edge]
    share = (row + 0.5 - y0[edge]) / (y1[edge] - y0[edge])
    x = x0[edge] + share * (x1[edge] - x0[edge])
    column = np.clip(np.ceil(x - 0.5), 0, width).astype(np.int64)
    return row * (width + 1) + column


def trace_polygons(mask: Bools) -> list[Polygon]:
    """The regions of a mask [h, w] as polygons along pixel edges, in pixels of the mask.

    Pixels that touch only at a corner are two regions. No ring touches itself; a hole may touch
    its shell or another hole in a point, as the OGC's simple features allow.
    """
    if not mask.any():
        return []
    # Regions by label, so that a hole finds its shell.
    labels = np.asarray(cv2.connectedComponents(mask.astype(np.uint8), connectivity=4)[1], np.int32)
    shells: dict[int, Floats] = {}
    holes: dict[int, list[Floats]] = {}
    for ring in _trace_rings(mask):
        region, is_shell = _bounded_region(ring, labels)
        if is_shell:
            shells[region] = ring.astype(np.float64)
        else:
            holes.setdefault(region, []).append(ring.astype(np.float64))
    return [Polygon(shells[key], tuple(holes.get(key, ()))) for key in sorted(shells)]


def _trace_rings(mask: Bools) -> Iterator[Ints]:
    """Boundary rings int64 [n, 2] (x, y) of corners, none of which passes a point twice."""
    points, across, down = _find_corners(mask)
    links = (_edge_partners(points, across, (1, 0)), _edge_partners(points, down, (0, 1)))
    seen = np.zeros(len(points), bool)
    for start in range(len(points)):
        if seen[start]:
            continue
        # Horizontal and vertical edges by turns, until the ring closes.
        ring, at = [], start
        while not seen[at]:
            seen[at] = True
            ring.append(at)
            at = int(links[0][at])
            seen[at] = True
            ring.append(at)
            at = int(links[1][at])
        yield from _split_ring(points[ring])


def _find_corners(mask: Bools) -> tuple[Ints, Ints, Ints]:
    """Corners of the boundary [n, 2] (x, y), and which way their edges go.

    `across` is 0 where a corner's horizontal edge is to its left, 1 to its right; `down` is 0
    where the vertical edge is above, 1 below. Where two pixels touch at a corner there are
    two corners, one round each pixel.
    """
    padded = np.pad(mask, 1).astype(np.int8)
    # The four pixels round each point; a corner is where one differs from its neighbours.
    quarters = [padded[:-1, :-1], padded[:-1, 1:], padded[1:, :-1], padded[1:, 1:]]
    count = sum(quarters)
    corners_by_quarter = []
    for index, quarter in enumerate(quarters):
        opposite = quarters[3 - index]
        alone = (quarter == 1) & ((count == 1) | ((count == 2) & (opposite == 1)))
        missing = (quarter == 0) & (count == 3)
        y, x = np.nonzero(alone | missing)
        across, down = np.full(len(x), index % 2), np.full(len(x), index // 2)
        corners_by_quarter.append(np.stack([x, y, across, down], 1))
    corners = np.concatenate(corners_by_quarter).astype(np.int64)
    return corners[:, :2], corners[:, 2], corners[:, 3]


def _edge_partners(points: Ints, side: Ints, axis: tuple[int, int]) -> Ints:
    """The corner at the other end of each corner's edge along an axis."""
    along, other = (points[:, 0], points[:, 1]) if axis[0] else (points[:, 1], points[:, 0])
    # Along a line corners come in pairs: an edge begins at one and ends at the next.
    order = np.lexsort((side, along, other))
    partner = np.empty(len(order), np.int64)
    partner[order[0::2]], partner[order[1::2]] = order[1::2], order[0::2]
    return partner


def _split_ring(ring: Ints) -> Iterator[Ints]:
    """The ring cut where it passes a point twice."""
    place: dict[tuple[int, int], int] = {}
    kept: list[tuple[int, int]] = []
    for x, y in ring.tolist():
        point = (x, y)
        if point in place:
            begin = place[point]
            yield np.array(kept[begin:], np.int64)
            for gone in kept[begin + 1 :]:
                del place[gone]
            del kept[begin + 1 :]
        else:
            place[point] = len(kept)
            kept.append(point)
    yield np.array(kept, np.int64)


def _bounded_region(ring: Ints, labels: npt.NDArray[np.int32]) -> tuple[int, bool]:
    """The region that a ring bounds, and whether from outside: a shell and no hole."""
    following = np.roll(ring, -1, 0)
    level = np.flatnonzero(ring[:, 1] == following[:, 1])
    top = level[ring[level, 1].argmin()]
    x, y = int(min(ring[top, 0], following[top, 0])), int(ring[top, 1])
    below = int(labels[y, x]) if y < labels.shape[0] else 0
    above = int(labels[y - 1, x]) if y > 0 else 0
    # Below the topmost edge of a ring is its inside; one of the edge's sides is in the mask.
    return (below, True) if below else (above, False)


def polygon_area(polygon: Polygon) -> float:
    """Area within the shell and outside the holes, in square pixels (shoelace formula).

    >>> polygon_area(Polygon(np.array([[0.0, 0.0], [2.0, 0.0], [2.0, 3.0], [0.0, 3.0]])))
    6.0
    """
    areas = [
        float(abs(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))) / 2)
        for x, y in (ring.T for ring in polygon.rings)
    ]
    return areas[0] - sum(areas[1:])


def is_within(polygon: Polygon, shape: tuple[int, int]) -> bool:
    """Whether all of a polygon is in a mask of `shape` (h, w)."""
    shell = polygon.shell
    return bool((shell.min(0) >= 0).all() and (shell.max(0) <= shape[::-1]).all())


def paint_polygon(mask: npt.NDArray[np.uint8], polygon: Polygon, value: int) -> int:
    """Set the pixels of the polygon in a mask [h, w], in place; returns how many they are."""
    inside, top, left = fill_polygon(polygon, (mask.shape[0], mask.shape[1]))
    mask[top : top + inside.shape[0], left : left + inside.shape[1]][inside] = value
    return int(inside.sum())
