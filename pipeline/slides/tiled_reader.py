"""Readers that decode native tiles themselves, each once: a cache of tiles by their last use."""

from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from pipeline.slides.reader import SlideReader

CACHE_BYTES = 192 << 20
"""Most memory for the decoded native tiles of one open slide."""


class NativeGrid(Protocol):
    """The native tiles of a level, row by row; `sizes` int64 [rows * columns] are their bytes."""

    @property
    def tile_width(self) -> int:
        """Pixels."""

    @property
    def tile_height(self) -> int:
        """Pixels."""

    @property
    def columns(self) -> int:
        """Native tiles in a row."""

    @property
    def rows(self) -> int:
        """Rows of native tiles."""

    @property
    def sizes(self) -> npt.NDArray[np.int64]:
        """Bytes in the file, 0 for a tile that it leaves out."""


class TiledReader(SlideReader):
    """A slide whose native tiles are decoded one by one, each kept while it is wanted."""

    cache_bytes = CACHE_BYTES
    native: Sequence[NativeGrid]
    """One per level."""
    unused_sizes: Sequence[tuple[int, int]] = ()
    """(width, height) of levels that the file has and this reader does not use."""
    is_ome = False
    """Whether the resolution is from OME-XML, which not every reader knows."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._cache: OrderedDict[tuple[int, int, int], npt.NDArray[np.uint8]] = OrderedDict()
        self._cached_bytes = 0
        self._uses: dict[int, npt.NDArray[np.int32]] = {}
        self.decoded = 0

    @abstractmethod
    def decode_native(self, level: int, row: int, column: int) -> npt.NDArray[np.uint8]:
        """Read and decode one native tile, uint8 [tile_height, tile_width, 3].

        Raises ValueError where its bytes are damaged.
        """

    def expect_windows(self, level: int, windows: npt.NDArray[np.int64]) -> None:
        """Keep each native tile of the level until the last of these windows has been read."""
        native = self.native[level]
        uses = np.zeros((native.rows, native.columns), np.int32)
        left, top, right, bottom = self._tile_spans(level, windows)
        for row, column, row_end, column_end in zip(top, left, bottom, right, strict=True):
            uses[row:row_end, column:column_end] += 1
        self._uses[level] = uses

    def _tile_spans(
        self, level: int, windows: npt.NDArray[np.int64]
    ) -> tuple[npt.NDArray[Any], ...]:
        """Half-open columns and rows of native tiles that windows [n, 4] (x, y, w, h) touch."""
        # Cut at the level's edge: windows may reach over it, native tiles there do not exist.
        native, size = self.native[level], self.levels[level]
        x, y, width, height = windows.T
        right, bottom = np.minimum(x + width, size.width), np.minimum(y + height, size.height)
        return (
            np.maximum(x, 0) // native.tile_width,
            np.maximum(y, 0) // native.tile_height,
            -(-right // native.tile_width),
            -(-bottom // native.tile_height),
        )

    def _read_window(
        self, level: int, x: int, y: int, width: int, height: int
    ) -> npt.NDArray[np.uint8]:
        native = self.native[level]
        # The window is inside the level, so that native tiles cover all of the canvas.
        canvas = np.empty((height, width, 3), np.uint8)
        for row in range(y // native.tile_height, -(-(y + height) // native.tile_height)):
            at_y = row * native.tile_height
            top, bottom = max(y, at_y), min(y + height, at_y + native.tile_height)
            for column in range(x // native.tile_width, -(-(x + width) // native.tile_width)):
                at_x = column * native.tile_width
                left, right = max(x, at_x), min(x + width, at_x + native.tile_width)
                tile = self._native_tile(level, row, column)
                part = tile[top - at_y : bottom - at_y, left - at_x : right - at_x]
                canvas[top - y : bottom - y, left - x : right - x] = part
        return canvas

    def _native_tile(self, level: int, row: int, column: int) -> npt.NDArray[np.uint8]:
        """A decoded native tile [tile_height, tile_width, 3], from the cache where it is there."""
        key = (level, row, column)
        tile = self._cache.pop(key, None)
        if tile is None:
            tile = self.decode_native(level, row, column)
            self._cached_bytes += tile.nbytes
        # A tile that no expected window needs again is not kept.
        uses = self._uses.get(level)
        if uses is not None:
            uses[row, column] -= 1
            if uses[row, column] == 0:
                self._cached_bytes -= tile.nbytes
                return tile
        self._cache[key] = tile
        # One strip may be larger than the cache: it is kept until the next comes.
        while self._cached_bytes > self.cache_bytes and len(self._cache) > 1:
            self._cached_bytes -= self._cache.popitem(last=False)[1].nbytes
        return tile

    def close(self) -> None:
        """Release the decoded tiles."""
        self._cache.clear()
        self._cached_bytes = 0
