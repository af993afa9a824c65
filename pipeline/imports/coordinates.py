"""`import coordinates`: tables of positions become candidates and selections."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from common.console import say
from common.errors import UserError
from pipeline.dataset import Dataset, Slide, identity_value, read_slides
from pipeline.imports.candidates import Part, record_candidates
from pipeline.imports.config import CoordinatesConfig
from pipeline.imports.positions import (
    Ints,
    SlideFrames,
    inside,
    level_factors,
    match_slides,
    place,
    slide_frames,
)
from pipeline.imports.table import PositionTable, read_positions
from pipeline.tissue.stage import usable_slides

_SLIDES_SHOWN = 20
_HASH_CHUNK = 1 << 22


def import_coordinates(dataset: Dataset, config: CoordinatesConfig) -> int:
    """Candidates and selections from tables of positions; returns the exit status."""
    names = Counter(name for name, _ in config.files)
    if twice := [name for name, count in names.items() if count > 1]:
        raise UserError(f"selection '{twice[0]}' is given twice; each NAME=FILE needs its own name")
    slides = usable_slides(dataset)
    frames = dataset_frames(dataset, slides)
    known = [slide.slide_id for slide in read_slides(dataset)]
    parts = []
    for name, path in config.files:
        table = read_positions(path, config.columns, config.units)
        parts.append(_part(name, table, match_slides(table.slides, slides, known), slides, frames,
                           config))  # fmt: skip
    if not any(len(part.x) for part in parts):
        raise UserError(
            f"no row of {', '.join(str(path) for _, path in config.files)} names a usable slide of "
            f"{dataset.root}, such as {slides[0].slide_id}; is --slide-column right?"
        )
    parameters = {
        "name": "imported coordinates",
        "files": {name: file_sha256(path) for name, path in config.files},
        "columns": config.columns.as_dict(),
        "units": config.units,
        "anchor": config.anchor,
        "drop_outside": config.drop_outside,
    }
    return record_candidates(dataset, slides, parts, parameters)


def dataset_frames(dataset: Dataset, slides: Sequence[Slide]) -> SlideFrames:
    """The frames of the slides for this dataset's tiles."""
    mpp, tolerance = identity_value(dataset, "mpp"), identity_value(dataset, "mpp_tolerance")
    return slide_frames(slides, mpp, tolerance, int(identity_value(dataset, "tile_px")))


def file_sha256(path: Path) -> str:
    """sha256 of a file's bytes."""
    sha = hashlib.sha256()
    try:
        with path.open("rb") as data:
            while chunk := data.read(_HASH_CHUNK):
                sha.update(chunk)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    return sha.hexdigest()


def _part(
    name: str,
    table: PositionTable,
    index: Ints,
    slides: Sequence[Slide],
    frames: SlideFrames,
    config: CoordinatesConfig,
) -> Part:
    """The table's tiles; `index` is the slide of each of its names, -1 where none."""
    codes = index[table.codes] if len(index) else table.codes
    _list_unknown(table, index)
    rows = np.flatnonzero(codes >= 0)
    codes = codes[rows]
    factors = _factors(table, rows, codes, slides, frames)
    half = frames.size[codes] / 2 if config.anchor == "center" else 0.0
    step = frames.step[codes]
    x = place(table.x[rows] * factors - half, step)
    y = place(table.y[rows] * factors - half, step)
    kept = inside(frames, codes, x, y)
    if not kept.all():
        _refuse_outside(table, rows[~kept], codes[~kept], slides, config.drop_outside)
        codes, x, y = codes[kept], x[kept], y[kept]
    origin = {"file": table.path.name, "units": table.units, "anchor": config.anchor}
    return Part(name, codes, x, y, origin)


def _list_unknown(table: PositionTable, index: Ints) -> None:
    """Say which slides of the table are not in the dataset: a part of a cohort is no mistake."""
    counts = np.bincount(table.codes, minlength=len(table.slides))
    unknown = [name for name, code, n in zip(table.slides, index, counts, strict=True)
               if code < 0 and n]  # fmt: skip
    if not unknown:
        return
    rows = int(counts[index < 0].sum())
    shown = ", ".join(unknown[:_SLIDES_SHOWN])
    more = f" and {len(unknown) - _SLIDES_SHOWN:,} more" if len(unknown) > _SLIDES_SHOWN else ""
    say(
        f"import: {table.path}: {rows:,} rows are of {len(unknown):,} slides that are not among "
        f"the usable ones of this dataset: {shown}{more}"
    )


def _factors(
    table: PositionTable,
    rows: npt.NDArray[np.int64],
    codes: Ints,
    slides: Sequence[Slide],
    frames: SlideFrames,
) -> npt.NDArray[np.float64] | float:
    """Level-0 pixels a pixel of the table's coordinates, a row."""
    if table.scale is None:
        return 1.0
    scale = table.scale[rows]
    if table.units == "level":
        factors, what = level_factors(frames, codes, scale), "a level that the slide has not"
    else:
        good = (scale > 0.01) & (scale < 100)
        factors = np.where(good, scale, np.nan) / frames.mpp[codes]
        what = "an mpp that is not between 0.01 and 100"
    bad = np.flatnonzero(np.isnan(factors))
    if len(bad):
        raise UserError(
            f"{table.path}: {len(bad):,} rows have {what}: {table.lines(rows[bad])} "
            f"({table.units} {scale[bad[0]]:g}, slide {slides[codes[bad[0]]].slide_id})"
        )
    return factors


def _refuse_outside(
    table: PositionTable,
    rows: npt.NDArray[np.int64],
    codes: Ints,
    slides: Sequence[Slide],
    drop: bool,
) -> None:
    row, slide = rows[0], slides[codes[0]]
    what = (
        f"{table.path}: {len(rows):,} rows lie outside their slides, {table.lines(rows)} "
        f"(x {table.x[row]:g}, y {table.y[row]:g} in {table.units} pixels; {slide.slide_id} is "
        f"{slide.width}x{slide.height})"
    )
    if not drop:
        raise UserError(f"{what}; are --units and --anchor right? --drop-outside leaves them out")
    say(f"import: {what}; left out")
