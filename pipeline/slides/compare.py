"""Whether a reader of native tiles shows a slide as OpenSlide does, by 16 of them."""

import numpy as np

from pipeline.slides.reader import SlideReader, SlideReadError
from pipeline.slides.tiled_reader import TiledReader

TILES_COMPARED = 16
_NO_MPP = (float("nan"), float("nan"))


def find_disagreement(native: TiledReader, reference: SlideReader) -> str:
    """Why the native reader is not to be used for this slide; '' where all is equal.

    Vendor, levels and resolution must be OpenSlide's, and the pixels of 16 native tiles: half
    of them spread evenly over the slide, half those with the most bytes.
    """
    if native.vendor != reference.vendor:
        return f"vendor is {reference.vendor}"
    numbers = _level_numbers(native, reference)
    if numbers is None:
        sizes = [[(v.width, v.height) for v in reader.levels] for reader in (native, reference)]
        return f"levels are {sizes[1]}, native {sizes[0]}"
    ours, theirs = (
        np.array([reader.resolution.vendor or _NO_MPP, reader.resolution.tiff or _NO_MPP])
        for reader in (native, reference)
    )
    # Not every reader knows OME-XML.
    if not native.is_ome and not np.allclose(ours, theirs, rtol=1e-6, equal_nan=True):
        return f"resolution is {reference.resolution}, native {native.resolution}"
    # Last, since pixels cost most.
    try:
        for level, row, column in sampled_tiles(native):
            width, height = native.native_tiles[level]
            window = (column * width, row * height, width, height)
            tiles = [
                reader.read(number, *window).astype(np.int16)
                for reader, number in ((native, level), (reference, numbers[level]))
            ]
            difference = int(np.abs(tiles[0] - tiles[1]).max())
            if difference:
                return f"native tile {column}, {row} of level {level} differs by {difference}"
    except SlideReadError as error:
        return str(error)
    return ""


def _level_numbers(native: TiledReader, reference: SlideReader) -> list[int] | None:
    """The reference's numbers of the native levels; None where it has others.

    Levels that the native reader knows and does not use (of another plane, with gaps) may be in
    the reference.
    """
    theirs = [(v.width, v.height) for v in reference.levels]
    ours = [(v.width, v.height) for v in native.levels]
    unused = [size for size in theirs if size not in ours]
    if not set(ours) <= set(theirs) or not set(unused) <= set(native.unused_sizes):
        return None
    repeated = len(theirs) - len(unused) - len(ours)
    if repeated and not set(theirs) & set(native.unused_sizes):
        return None
    return [theirs.index(size) for size in ours]


def sampled_tiles(native: TiledReader) -> list[tuple[int, int, int]]:
    """(level, row, column) of the native tiles to compare.

    OpenSlide is asked for level-0 positions. Where a level's downsample is not whole (2.0004),
    those fall between its pixels and OpenSlide interpolates (by up to 52 grey levels on a real
    slide): of such a level only the first tile can be compared.
    """
    chosen = [(level, 0, 0) for level in range(len(native.levels))][:TILES_COMPARED]
    whole = [i for i, v in enumerate(native.levels) if v.downsample == round(v.downsample)]
    sizes = np.concatenate([native.native[level].sizes for level in whole])
    ends = np.cumsum([len(native.native[level].sizes) for level in whole])
    # Heavy tiles have the most detail; those spread evenly also reach empty parts and edges.
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
