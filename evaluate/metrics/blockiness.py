"""The trace that saving a tile as JPEG leaves: steps between its blocks of 8 x 8 pixels."""

import numpy as np
from numpy.typing import NDArray

_BLOCK = 8
_MARGIN = 2  # columns on either side of a block's edge that it is compared with
_FLOOR = 0.5  # grey levels; smaller steps are rounding, not structure


def measure_blockiness(tile: NDArray[np.uint8]) -> float:
    """How much larger the steps across block edges are than those next to them; 1 is no grid.

    The mean absolute step of the luma across each eighth column edge (and row edge), counted
    from the tile's corner as JPEG counts, is divided by that of the four edges around it, so
    that a trend of the content cancels; the median over the edges, so that a single edge of the
    content counts for little, averaged over the two directions. A slide's JPEG grid is
    anywhere in its tiles and cancels over many; a grid that was scaled is not seen.

    Args:
        tile: uint8 ``[H, W, 3]``, at least 32 pixels per side.

    >>> measure_blockiness(np.full((64, 64, 3), 200, np.uint8))
    1.0

    Raises:
        ValueError: another shape or a smaller tile.
    """
    if tile.ndim != 3 or tile.shape[2] != 3 or min(tile.shape[:2]) < 4 * _BLOCK:
        raise ValueError(f"expected a tile [H, W, 3] of 32 px or more, got shape {tile.shape}")
    # JPEG has luma at full resolution; the grid of the colours is often coarser.
    luma = tile.astype(np.float64) @ np.array([0.299, 0.587, 0.114])
    return float(np.mean([_edge_ratio(luma), _edge_ratio(luma.T)]))


def _edge_ratio(luma: NDArray[np.float64]) -> float:
    """The median over block edges of the step across the edge, over those of its neighbours."""
    steps = np.abs(np.diff(luma, axis=1)).mean(axis=0)
    edges = np.arange(_BLOCK - 1, len(steps) - _MARGIN, _BLOCK)
    around = [steps[edges + offset] for offset in range(-_MARGIN, _MARGIN + 1) if offset]
    return float(np.median((steps[edges] + _FLOOR) / (np.mean(around, axis=0) + _FLOOR)))
