"""Slides through tiffslide: OME-TIFF and tiled TIFF that OpenSlide refuses."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tiffslide

from pipeline.slides.metadata import read_description
from pipeline.slides.reader import Level, ResolutionTags, SlideOpenError, SlideReader
from pipeline.slides.tiff_images import describe_layout
from pipeline.slides.tiff_limits import MOST_SEGMENT_BYTES

_ICC_TAG = 34675
_UNIT_IN_UM = {"CENTIMETER": 10_000.0, "INCH": 25_400.0}


class _LevelSlide(tiffslide.TiffSlide):
    """A slide whose regions are placed in pixels of their level.

    tiffslide places them in pixels of level 0, as OpenSlide does: where a downsample is not whole
    (2.0004), regions come out shifted by a pixel.
    """

    def _read_region_loc_transform(self, location: tuple[int, int], level: int) -> tuple[int, int]:
        return location


class TiffSlideReader(SlideReader):
    """A slide opened by tiffslide (tifffile underneath): 8-bit RGB, with or without alpha."""

    name = "tiffslide"

    def __init__(self, path: Path, series: str = "") -> None:
        self.path = path
        try:
            self._slide = _LevelSlide(path)
            self.levels = tuple(
                Level(width, height, float(downsample))
                for (width, height), downsample in zip(
                    self._slide.level_dimensions, self._slide.level_downsamples, strict=True
                )
            )
            properties = dict(self._slide.properties)
            first: Any = self._slide.ts_tifffile.pages.first
            profile, description = first.tags.get(_ICC_TAG), str(first.description)
            unfit = describe_layout((first,)) or ("" if first.dtype == np.uint8 else "16 bits")
            _require_small_tiles(self._slide.ts_tifffile)
        except Exception as error:
            # tifffile raises many kinds for damaged headers; all mean the same to the user.
            raise SlideOpenError(f"tiffslide: {error}") from error
        # It hands out samples as they are, whatever they mean.
        if unfit:
            self._slide.close()
            raise SlideOpenError(f"tiffslide: pixels are not 8-bit RGB: {unfit}")
        self.vendor = str(properties.get("tiffslide.vendor") or "generic-tiff")
        self.resolution = read_description(
            _resolution_tags(properties), description, self.vendor, *self._slide.dimensions
        )
        self.icc_profile = None if profile is None else bytes(profile.value)

    def _read_window(
        self, level: int, x: int, y: int, width: int, height: int
    ) -> npt.NDArray[np.uint8]:
        region = self._slide.read_region((x, y), level, (width, height), as_array=True)
        if region.dtype != np.uint8 or region.shape[-1] not in (3, 4):
            raise ValueError(f"pixels are {region.dtype} {region.shape}, expected 8-bit RGB")
        return np.ascontiguousarray(region[..., :3])

    def close(self) -> None:
        """Release the file."""
        self._slide.close()


def _require_small_tiles(tiff: Any) -> None:
    """Raise ValueError for tiles or strips that take more memory than a machine may have."""
    for page in tiff.pages:
        page = page.keyframe
        if int(np.prod([int(side) for side in page.chunks])) > MOST_SEGMENT_BYTES:
            raise ValueError(f"its tiles of {page.chunks} are too large")


def _resolution_tags(properties: dict[str, object]) -> ResolutionTags:
    x, y = properties.get("tiffslide.mpp-x"), properties.get("tiffslide.mpp-y")
    if not isinstance(x, float) or not isinstance(y, float) or x <= 0 or y <= 0:
        return ResolutionTags()
    # tiffslide does not say where its mpp is from: equal to the TIFF tags, it is theirs.
    unit = _UNIT_IN_UM.get(str(properties.get("tiff.ResolutionUnit", "")).upper())
    per_unit = properties.get("tiff.XResolution")
    if unit is None or not isinstance(per_unit, float | int) or per_unit <= 0:
        return ResolutionTags(vendor=(x, y))
    is_tiff = abs(unit / float(per_unit) - x) < 1e-6 * x
    return ResolutionTags(tiff=(x, y)) if is_tiff else ResolutionTags(vendor=(x, y))
