"""Where OpenSlide can be asked for a level without interpolating it.

OpenSlide takes whole positions of level 0. On a level whose downsample is not whole, few of them
fall on a pixel: reading begins there, in blocks, and tiles are cut from the blocks.
"""

from itertools import pairwise

import numpy as np
import numpy.typing as npt

_BLOCK_PX = 2048
_REACH_PX = 4096
"""OpenSlide reads squares of this side; at each it begins anew, at a rounded position."""
_EXACT = 1 / 512
"""Part of a pixel that cairo, with 8 bits for it, takes for none."""


def block_edges(size: int, downsample: float) -> npt.NDArray[np.int64] | None:
    """Where to begin and end reading along a level's side of `size` px: int64, from 0 to `size`.

    Each beginning is a pixel that a whole position of level 0 falls on, so that OpenSlide
    interpolates nothing up to 4096 px from there. None where some pixels are farther than that.

    >>> block_edges(5000, 2.0004).tolist()
    [0, 9, 2491, 2509, 4991, 5000]
    >>> block_edges(50_000, 2.00002) is None
    True
    """
    pixels = np.arange(size)
    exact = pixels[np.abs(np.rint(pixels * downsample) / downsample - pixels) < _EXACT]
    edges = [0]
    while edges[-1] + _BLOCK_PX < size:
        nearest = int(np.searchsorted(exact, edges[-1] + _BLOCK_PX, side="right")) - 1
        if exact[nearest] == edges[-1]:
            nearest += 1
        if nearest == len(exact) or exact[nearest] > edges[-1] + _REACH_PX:
            break
        edges.append(int(exact[nearest]))
    return None if edges[-1] + _REACH_PX < size else np.array([*edges, size])


def blocks_between(edges: npt.NDArray[np.int64], start: int, stop: int) -> list[tuple[int, int]]:
    """The blocks (begin, end) that pixels from start to stop are in."""
    first, last = np.searchsorted(edges, (start, stop - 1), side="right")
    ends = edges[first - 1 : last + 1].tolist()
    return list(pairwise(ends))
