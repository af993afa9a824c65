"""Whether the native reader shows a slide as OpenSlide does, by 16 native tiles."""

import numpy as np
import numpy.typing as npt

from pipeline.slides.native_reader import NativeReader
from pipeline.slides.reader import SlideReader, SlideReadError

TILES_COMPARED = 16


def disagreement(native: NativeReader, reference: SlideReader) -> str:
    """Why the native reader is not to be used for this slide; '' where all is equal.

    Vendor, levels and resolution must be OpenSlide's, and the pixels of 16 native tiles: half
    of them spread evenly over the slide, half those with the most bytes.
    """
    if native.vendor != reference.vendor:
        return f"vendor is {reference.vendor}"
    sizes = [[(v.width, v.height) for v in reader.levels] for reader in (native, reference)]
    if sizes[0] != sizes[1]:
        return f"levels are {sizes[1]}, native {sizes[0]}"
    if not _same_resolution(native, reference):
        return f"resolution is {reference.resolution}, native {native.resolution}"
    try:
        for level, row, column in sampled_tiles(native):
            difference = _largest_difference(native, reference, level, row, column)
            if difference:
                return f"native tile {column}, {row} of level {level} differs by {difference}"
    except SlideReadError as error:
        return str(error)
    return ""


def _same_resolution(native: NativeReader, reference: SlideReader) -> bool:
    for ours, theirs in (
        (native.resolution.vendor, reference.resolution.vendor),
        (native.resolution.tiff, reference.resolution.tiff),
    ):
        if (ours is None) != (theirs is None):
            return False
        if ours is not None and theirs is not None and not np.allclose(ours, theirs, rtol=1e-6):
            return False
    return True


def sampled_tiles(native: NativeReader) -> list[tuple[int, int, int]]:
    """(level, row, column) of the native tiles to compare.

    OpenSlide is asked for level-0 positions. Where a level's downsample is not whole (2.0004),
    those fall between its pixels and OpenSlide interpolates (by up to 52 grey levels on a real
    slide): of such a level only the first tile can be compared.
    """
    chosen = [(level, 0, 0) for level in range(len(native.levels))][:TILES_COMPARED]
    whole = [i for i, v in enumerate(native.levels) if v.downsample == round(v.downsample)]
    sizes = np.concatenate([native.native[level].sizes for level in whole])
    ends = np.cumsum([len(native.native[level].sizes) for level in whole])
    even = np.linspace(0, len(sizes) - 1, TILES_COMPARED).astype(int)
    heavy = np.argsort(-sizes, kind="stable")[:TILES_COMPARED]
    for index in [*even[::2], *heavy, *even]:
        at = int(np.searchsorted(ends, index, side="right"))
        level = whole[at]
        place = int(index - (ends[at] - len(native.native[level].sizes)))
        tile = (level, *divmod(place, native.native[level].columns))
        if tile not in chosen and len(chosen) < TILES_COMPARED:
            chosen.append(tile)
    return chosen


def _largest_difference(
    native: NativeReader, reference: SlideReader, level: int, row: int, column: int
) -> int:
    """Largest difference in grey levels over one native tile."""
    width, height = native.native_tiles[level]
    window = (level, column * width, row * height, width, height)
    ours, theirs = _read_pixels(native, window), _read_pixels(reference, window)
    return int(np.abs(ours - theirs).max())


def _read_pixels(
    reader: SlideReader, window: tuple[int, int, int, int, int]
) -> npt.NDArray[np.int16]:
    return reader.read(*window).astype(np.int16)
