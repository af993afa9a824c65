"""A slide without the levels that are not to be used."""

from collections.abc import Collection

import numpy as np
import numpy.typing as npt

from pipeline.slides.reader import SlideReader


class _FewerLevels(SlideReader):
    """A reader's other levels, under new numbers; all else is the reader's."""

    def __init__(self, reader: SlideReader, kept: list[int]) -> None:
        self._reader, self._kept = reader, kept
        self.name, self.path, self.vendor = reader.name, reader.path, reader.vendor
        self.levels = tuple(reader.levels[index] for index in kept)
        self.resolution, self.codec = reader.resolution, reader.codec
        self.series, self.notes = reader.series, reader.notes
        self.icc_profile, self.bounds = reader.icc_profile, reader.bounds
        if reader.native_tiles:
            self.native_tiles = tuple(reader.native_tiles[index] for index in kept)
        self.cache_bytes = reader.cache_bytes

    def _read_window(
        self, level: int, x: int, y: int, width: int, height: int
    ) -> npt.NDArray[np.uint8]:
        return self._reader._read_window(self._kept[level], x, y, width, height)

    def expect_windows(self, level: int, windows: npt.NDArray[np.int64]) -> None:
        """See `SlideReader.expect_windows`: windows int64 [n, 4]."""
        self._reader.expect_windows(self._kept[level], windows)

    def close(self) -> None:
        """Release the file."""
        self._reader.close()


def without_levels(reader: SlideReader, left_out: Collection[int]) -> SlideReader:
    """The open slide without these of its levels (by number); level 0 always stays."""
    if not left_out:
        return reader
    return _FewerLevels(
        reader, [i for i in range(len(reader.levels)) if i == 0 or i not in left_out]
    )
