"""`import coordinates`: tables of positions become candidates and selections."""

from collections import Counter
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from common.console import print_line
from common.errors import UserError
from common.files import hash_file
from common.text import list_some
from pipeline.dataset import Dataset, Slide, identity_value, read_slides
from pipeline.imports.candidates import ImportedTiles, record_candidates
from pipeline.imports.config import CoordinatesConfig
from pipeline.imports.positions import (
    Ints,
    SlideFrames,
    level_factors,
    match_slides,
    place_tiles,
    slide_frames,
)
from pipeline.imports.table import PositionTable, read_positions
from pipeline.imports.tile_fit import TileFit, moved_origin, moved_parameters
from pipeline.tissue.stage import usable_slides


def import_coordinates(dataset: Dataset, config: CoordinatesConfig) -> int:
    """Candidates and selections from tables of positions; returns the exit status."""
    names = Counter(name for name, _ in config.files)
    if repeated := [name for name, count in names.items() if count > 1]:
        raise UserError(
            f"selection '{repeated[0]}' is given twice; each NAME=FILE needs another name"
        )
    slides = usable_slides(dataset)
    frames = dataset_frames(dataset, slides)
    known = [slide.slide_id for slide in read_slides(dataset)]
    imported = []
    for name, path in config.files:
        table = read_positions(path, config.columns, config.units)
        slide_index = match_slides(table.slides, slides, known)
        imported.append(_place_table(name, table, slide_index, slides, frames, config))
    if not any(len(tiles.x) for tiles in imported):
        raise UserError(
            f"no row of {', '.join(str(path) for _, path in config.files)} names a usable slide of "
            f"{dataset.root}, such as {slides[0].slide_id}; is --slide-column right?"
        )
    try:
        sums = {name: hash_file(path) for name, path in config.files}
    except OSError as error:
        raise UserError(f"{error.filename} cannot be read: {error.strerror}") from error
    parameters = {
        "name": "imported coordinates",
        "files": sums,
        "columns": config.columns.as_dict(),
        "units": config.units,
        "anchor": config.anchor,
        "drop_outside": config.drop_outside,
    }
    return record_candidates(dataset, slides, imported, parameters | moved_parameters(imported))


def dataset_frames(dataset: Dataset, slides: Sequence[Slide]) -> SlideFrames:
    """The frames of the slides for this dataset's tiles, in level-0 px."""
    mpp, tolerance = identity_value(dataset, "mpp"), identity_value(dataset, "mpp_tolerance")
    return slide_frames(slides, mpp, tolerance, int(identity_value(dataset, "tile_px")))


def _place_table(
    name: str,
    table: PositionTable,
    slide_index: Ints,
    slides: Sequence[Slide],
    frames: SlideFrames,
    config: CoordinatesConfig,
) -> ImportedTiles:
    """The table's tiles; `slide_index` is the slide of each of its names, -1 where none."""
    # The table's names as slides of the dataset; rows of other slides are reported and left out.
    codes = slide_index[table.codes] if len(slide_index) else table.codes
    _report_unknown(table, slide_index)
    what = "centre" if config.anchor == "center" else "upper left corner"
    print_line(f"import: {table.path}: read {table.describe_units()} of each tile's {what}")
    rows = np.flatnonzero(codes >= 0)
    codes = codes[rows]
    factors = _level0_factors(table, rows, codes, slides, frames)
    # Centres become corners in level-0 pixels, where a tile's size is known.
    half = frames.size[codes] / 2 if config.anchor == "center" else 0.0
    fit = TileFit(table.path.name, slides, frames, config.frame)
    x, y, moved = fit.shift_tiles(
        codes, table.x[rows] * factors - half, table.y[rows] * factors - half
    )
    x, y, is_inside = place_tiles(frames, codes, x, y)
    if not is_inside.all():
        row, slide = rows[~is_inside][0], slides[codes[~is_inside][0]]
        what = (
            f"{table.path}: {np.sum(~is_inside):,} rows are outside their slides, "
            f"{table.lines(rows[~is_inside])} (x {table.x[row]:g}, y {table.y[row]:g} in "
            f"{table.units} pixels; {slide.slide_id} is {slide.width}x{slide.height})"
        )
        if not config.drop_outside:
            raise UserError(
                f"{what}; are --units and --anchor right? --drop-outside leaves them out"
            )
        print_line(f"import: {what}; left out")
    codes, x, y = codes[is_inside], x[is_inside], y[is_inside]
    fit.check_tissue(codes, x, y)
    origin: dict[str, object] = {
        "file": table.path.name, "units": table.units, "anchor": config.anchor
    }  # fmt: skip
    return ImportedTiles(name, codes, x, y, origin | moved_origin(moved))


def _report_unknown(table: PositionTable, slide_index: Ints) -> None:
    """Report which slides of the table are not in the dataset: a part of a cohort is no mistake."""
    counts = np.bincount(table.codes, minlength=len(table.slides))
    unknown = [table.slides[i] for i in np.flatnonzero((slide_index < 0) & (counts > 0))]
    if unknown:
        print_line(
            f"import: {table.path}: {counts[slide_index < 0].sum():,} rows are of "
            f"{len(unknown):,} slides that are not among the usable ones of this dataset: "
            f"{list_some(unknown)}"
        )


def _level0_factors(
    table: PositionTable,
    rows: npt.NDArray[np.int64],
    codes: Ints,
    slides: Sequence[Slide],
    frames: SlideFrames,
) -> npt.NDArray[np.float64] | float:
    """Level-0 pixels per pixel of the table's coordinates, float64 [rows]."""
    if table.scale is None:
        return 1.0
    scale = table.scale[rows]
    if table.units == "level":
        factors, what = level_factors(frames, codes, scale), "a level that the slide has not"
    else:
        is_good = (scale > 0.01) & (scale < 100)
        factors = np.where(is_good, scale, np.nan) / frames.mpp[codes]
        what = "an mpp that is not between 0.01 and 100"
    bad = np.flatnonzero(np.isnan(factors))
    if len(bad):
        raise UserError(
            f"{table.path}: {len(bad):,} rows have {what}: {table.lines(rows[bad])} "
            f"({table.units} {scale[bad[0]]:g}, slide {slides[codes[bad[0]]].slide_id})"
        )
    return factors
