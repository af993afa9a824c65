"""Tiles of a slide at given places, read as the pipeline reads them.

The pipeline's readers are imported where a slide is read: nothing else here needs them.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from common.errors import UserError

Place = tuple[float, float]
"""Upper left corner of a tile, in level-0 pixels."""
_TOLERANCE = 0.02


def parse_place(text: str) -> Place:
    """Read "x,y". Raises `UserError` with what was expected.

    >>> parse_place("1200,800")
    (1200.0, 800.0)
    """
    try:
        x, y = (float(part) for part in text.split(","))
    except ValueError:
        raise UserError(
            f"'{text}' is not a place on a slide; expected x,y, the tile's upper left corner in "
            "level-0 pixels, such as 1200,800"
        ) from None
    return x, y


def read_slide_tiles(
    path: Path, places: Sequence[Place], *, tile_px: int, mpp: float, slide_mpp: float | None
) -> list[npt.NDArray[np.uint8]]:
    """RGB tiles uint8 [tile_px, tile_px, 3] of a slide at `mpp`, at these places.

    `mpp` is in micrometres per pixel; `slide_mpp` is the slide's where its file records none.
    Raises `UserError`, naming the slide, where it cannot be read or a tile is not within it.
    """
    try:
        from pipeline.slides.levels import without_levels
        from pipeline.slides.open import best_reader
        from pipeline.slides.pyramid import find_false_levels
        from pipeline.slides.region import read_region
        from pipeline.slides.resolution import MppContradictionError, plan_read, resolve_mpp
    except ImportError as error:
        raise UserError(
            f"--slide needs the slide libraries, and {error.name} is not installed here; install "
            "this project whole, or give tiles as --images"
        ) from error
    if not path.exists():
        raise UserError(f"slide {path}: no such file")
    try:
        # As `scan` would read it: its tiles must be those that the model knows.
        opened, _ = best_reader(path)
        with opened:
            reader = without_levels(opened, find_false_levels(opened))
            try:
                native_mpp = resolve_mpp(reader.resolution, table=None, assumed=slide_mpp).value
            except MppContradictionError as error:
                if slide_mpp is None:
                    raise UserError(f"{error.facts}; give --slide-mpp") from error
                native_mpp = slide_mpp
            level = reader.levels[0]
            span = plan_read(reader.levels, native_mpp, mpp, _TOLERANCE, tile_px).stride_level0
            # All places are checked before any is read: reading takes seconds on some formats.
            for x, y in places:
                if not (0 <= x <= level.width - span and 0 <= y <= level.height - span):
                    raise UserError(
                        f"a tile of {span:g} level-0 pixels at {x:g},{y:g} is not within it; "
                        f"it is {level.width} x {level.height} pixels"
                    )
            return [
                read_region(reader, native_mpp, x, y, tile_px, mpp, tolerance=_TOLERANCE)
                for x, y in places
            ]
    except UserError as error:
        # The pipeline's own option has another name here.
        message = str(error).replace("--assume-mpp", "--slide-mpp")
        message = message.replace(", or --mpp-from objective", "")
        raise UserError(f"slide {path.name}: {message}") from error
