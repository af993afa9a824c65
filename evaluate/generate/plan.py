"""Which images a synthetic dataset has, in which units they are made, and with which seeds.

Pure: no files, no model. An image is known by its index, from 0; 1,024 consecutive indices form
a pseudo-slide, and an image's rank is its place therein.
"""

import hashlib
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from common.errors import UserError
from pipeline.dataset import BLOCK_ROWS

IMAGES_PER_SLIDE = 1024
_UNIT_IMAGES = 128
"""The work that a kill may cost; a shard of 128 tiles of 224 px is some 10 MB."""

Span = tuple[int, int]
"""Half-open range of ranks [start, stop)."""


def pseudo_slide_id(number: int) -> str:
    """`gen-00000`, `gen-00001`, ..."""
    return f"gen-{number:05d}"


def slide_spans(images: int) -> list[Span]:
    """Image indices [start, stop) of each pseudo-slide, for this many images in all.

    >>> slide_spans(2100)
    [(0, 1024), (1024, 2048), (2048, 2100)]
    """
    starts = range(0, images, IMAGES_PER_SLIDE)
    return [(start, min(start + IMAGES_PER_SLIDE, images)) for start in starts]


def whole_blocks(images: int, end: int | None) -> int:
    """This many images rounded up to whole blocks, at most the `end` of the guidance.

    Readers assume that a block on disk is whole, so only the end that can never move may cut a
    block short.
    """
    rounded = -(-images // BLOCK_ROWS) * BLOCK_ROWS
    return rounded if end is None else min(rounded, end)


@dataclass(frozen=True, order=True)
class Unit:
    """Ranks [start, stop) of one pseudo-slide: made, committed and resumed as a whole."""

    slide: int
    start: int
    stop: int

    @property
    def slide_id(self) -> str:
        """The pseudo-slide's id."""
        return pseudo_slide_id(self.slide)

    @property
    def image_count(self) -> int:
        """Number of images."""
        return self.stop - self.start

    def image_index(self, rank: int) -> int:
        """The image index, from 0 up, of a rank."""
        return self.slide * IMAGES_PER_SLIDE + rank


def units_of_rows(rows: object) -> list[Unit]:
    """The units of rows (slide, start, stop), as another process sent them; checked.

    >>> units_of_rows([[0, 0, 128]])
    [Unit(slide=0, start=0, stop=128)]
    """
    units = []
    for row in rows if isinstance(rows, list | tuple) else [rows]:
        values = list(row) if isinstance(row, list | tuple) else []
        if not (
            [type(value) for value in values] == [int] * 3
            and values[0] >= 0
            and 0 <= values[1] < values[2] <= IMAGES_PER_SLIDE
        ):
            raise UserError(f"{str(row)[:80]!r} is no unit of images (pseudo-slide, start, stop)")
        units.append(Unit(*values))
    return units


def unit_images(micro_batch: int) -> int:
    """Images per unit: whole blocks and whole micro-batches, about 128.

    It depends on the micro-batch alone, never on the number of processes, so that the files are
    the same for any of them.
    """
    step = math.lcm(BLOCK_ROWS, micro_batch)
    return min(max(_UNIT_IMAGES // step, 1) * step, IMAGES_PER_SLIDE)


def plan_units(images: int, micro_batch: int) -> list[Unit]:
    """Cut this many images in units, in order of their indices.

    >>> plan_units(1025, 16)[-1]
    Unit(slide=1, start=0, stop=1)
    """
    size = unit_images(micro_batch)
    return [
        Unit(number, start, min(start + size, stop - first))
        for number, (first, stop) in enumerate(slide_spans(images))
        for start in range(0, stop - first, size)
    ]


def missing_units(units: Iterable[Unit], done: dict[str, list[Span]]) -> list[Unit]:
    """The parts of the units that no span of ranks in `done` contains, in whole blocks."""
    missing: list[Unit] = []
    for unit in units:
        spans = done.get(unit.slide_id, [])
        for start in range(unit.start, unit.stop, BLOCK_ROWS):
            stop = min(start + BLOCK_ROWS, unit.stop)
            if any(first <= start and stop <= last for first, last in spans):
                continue
            last = missing[-1] if missing else None
            # Neighbouring blocks of one unit are one part; units are never joined.
            if last and last.slide == unit.slide and last.stop == start > unit.start:
                missing[-1] = Unit(unit.slide, last.start, stop)
            else:
                missing.append(Unit(unit.slide, start, stop))
    return missing


def end_of_spans(done: dict[str, list[Span]], slides: int) -> int:
    """The image index after the last one of all spans of ranks in the first pseudo-slides.

    `done` is by pseudo-slide; 0 for none. Others, which a journal may name as well, do not count.

    >>> end_of_spans({"gen-00000": [(0, 1024)], "gen-00001": [(16, 32)], "x": [(0, 9)]}, slides=2)
    1056
    """
    ends = (
        number * IMAGES_PER_SLIDE + min(stop, IMAGES_PER_SLIDE)
        for number in range(slides)
        for _, stop in done.get(pseudo_slide_id(number), [])
    )
    return max(ends, default=0)


@dataclass(frozen=True)
class MicroBatch:
    """Image indices int64 [micro_batch] of one call of the generator; rows [begin, end) are kept.

    The rows around them are padding.
    """

    images: npt.NDArray[np.int64]
    begin: int
    end: int


def micro_batches(unit: Unit, micro_batch: int) -> Iterator[MicroBatch]:
    """The calls that make a unit, all of one shape.

    Rank r is always in row r mod micro_batch: kernels may round the rows of a batch differently,
    so an image keeps its row in every unit or resumed part. Padding repeats the nearest image
    of the unit.
    """
    first = unit.start // micro_batch * micro_batch
    for base in range(first, unit.stop, micro_batch):
        ranks = np.clip(np.arange(base, base + micro_batch), unit.start, unit.stop - 1)
        begin, end = max(unit.start - base, 0), min(unit.stop - base, micro_batch)
        images = (unit.slide * IMAGES_PER_SLIDE + ranks).astype(np.int64)
        yield MicroBatch(images, begin, end)


def source_order(rows: int, key: str) -> npt.NDArray[np.int64]:
    """A fixed permutation, int64 ``[n]``, of a selection's rows: the order in which they guide.

    A selection is sorted by slide; in the permuted order any prefix (`--limit`) is a fair sample
    of it, and a larger limit extends a smaller one. Raw Philox bits are sorted instead of
    numpy's own `permutation`, whose algorithm may change between its versions.
    """
    digest = hashlib.blake2b(key.encode(), digest_size=16).digest()
    bits = np.random.Philox(key=int.from_bytes(digest, "little")).random_raw(rows)
    return np.argsort(np.atleast_1d(bits), kind="stable").astype(np.int64)
