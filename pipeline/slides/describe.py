"""What `scan` records of an open slide: reader, levels, resolution, and what to know about it."""

from dataclasses import replace
from pathlib import Path

from pipeline.dataset import Slide
from pipeline.slides.config import ScanConfig
from pipeline.slides.entries import SlideEntry
from pipeline.slides.levels import without_levels
from pipeline.slides.open import best_reader, open_slide
from pipeline.slides.pyramid import find_false_levels
from pipeline.slides.reader import SlideReader
from pipeline.slides.resolution import ResolutionError, plan_read, resolve_mpp

_PROBE_PX = 64
_MOST_MM2 = 20_000
"""Twice the largest glass (100 x 100 mm): masks are as large as a slide claims to be."""


def describe_slide(
    slide: Slide, path: Path, source: SlideEntry, config: ScanConfig
) -> tuple[Slide, str]:
    """The slide with all that its file says of it, and why the native reader does not read it.

    Raises `SlideOpenError` and `SlideReadError`; a slide whose resolution does not do is returned
    as rejected.
    """
    reader, why = _open_with_reader(path, config.reader, source.series or config.series)
    with reader:
        _probe_levels(reader)
        false_levels = find_false_levels(reader)
        left_out = tuple(sorted(false_levels))
        notes = [f"level {index} left out: {false_levels[index]}" for index in left_out]
        slide = replace(slide, levels_left_out=left_out, notes=(*slide.notes, *notes))
        kept = without_levels(reader, left_out)
        return _describe(slide, kept, source, config), why


def _open_with_reader(path: Path, name: str, series: str) -> tuple[SlideReader, str]:
    """The slide with the requested reader, and why it is not the native one."""
    if name != "auto":
        return open_slide(path, name, series), ""
    reader, why = best_reader(path, series)
    return reader, f"read by {reader.name}: {why}" if why else ""


def _describe(slide: Slide, reader: SlideReader, source: SlideEntry, config: ScanConfig) -> Slide:
    base = reader.levels[0]
    slide = replace(
        slide,
        reader=reader.name,
        vendor=reader.vendor,
        codec=reader.codec,
        width=base.width,
        height=base.height,
        levels=tuple((v.width, v.height, v.downsample) for v in reader.levels),
        series=reader.series,
        bounds=reader.bounds,
        notes=(*slide.notes, *reader.notes),
    )
    try:
        mpp = resolve_mpp(
            reader.resolution,
            table=source.mpp,
            assumed=config.assume_mpp,
            believed=config.mpp_from,
        )
        notes = (*slide.notes, *mpp.notes)
        slide = replace(slide, mpp=mpp.value, mpp_source=mpp.source, notes=notes)
        plan = plan_read(reader.levels, mpp.value, config.mpp, config.mpp_tolerance, config.tile_px)
    except ResolutionError as error:
        return replace(slide, status="rejected", reason=str(error))
    slide = replace(slide, tile_mpp=plan.mpp)
    area = base.width * base.height * mpp.value**2 / 1e6
    if area > _MOST_MM2:
        reason = f"it would be {area:,.0f} mm² at {mpp.value:g} µm per px, larger than any glass"
        return replace(slide, status="rejected", reason=reason)
    # Half a pixel of slack, as the grid has: sizes at level 0 are rounded.
    needed = plan.window * plan.downsample
    if min(base.width, base.height) < needed - 0.5:
        reason = (
            f"{base.width}x{base.height} px is smaller than one tile ({needed:.0f} px at level 0)"
        )
        return replace(slide, status="rejected", reason=reason)
    return slide


def _probe_levels(reader: SlideReader) -> None:
    """Read the middle and the corners of every level: some files open and then cannot be read."""
    for index, level in enumerate(reader.levels):
        width, height = min(_PROBE_PX, level.width), min(_PROBE_PX, level.height)
        right, bottom = level.width - width, level.height - height
        corners = {(0, 0), (right, 0), (0, bottom), (right, bottom), (right // 2, bottom // 2)}
        for x, y in sorted(corners):
            reader.read(index, x, y, width, height)
