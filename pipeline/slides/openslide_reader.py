"""Slides through OpenSlide: Aperio, Hamamatsu, MIRAX, DICOM, Leica, generic tiled TIFF."""

import re
from pathlib import Path

import numpy as np
import numpy.typing as npt
import openslide

from pipeline.slides.metadata import read_description
from pipeline.slides.reader import (
    Level,
    ResolutionTags,
    SlideOpenError,
    SlideReader,
    over_white,
)

_GENERIC_VENDORS = {"generic-tiff"}
_UNIT_IN_UM = {"inch": 25_400.0, "centimeter": 10_000.0}


class OpenSlideReader(SlideReader):
    """A slide opened by OpenSlide, with a small tile cache."""

    name = "openslide"

    def __init__(self, path: Path, series: str = "") -> None:
        self.path = path
        try:
            self._slide = openslide.OpenSlide(_entry_file(path))
        except openslide.OpenSlideUnsupportedFormatError as error:
            raise SlideOpenError("not a format that OpenSlide knows") from error
        except (openslide.OpenSlideError, OSError) as error:
            raise SlideOpenError(f"OpenSlide: {error}") from error
        # One cache per handle: a shared one would let slides push out each other's tiles.
        self._slide.set_cache(openslide.OpenSlideCache(self.cache_bytes))
        properties = dict(self._slide.properties)
        self.vendor = properties.get(openslide.PROPERTY_NAME_VENDOR, "")
        self.levels = tuple(
            Level(width, height, float(downsample))
            for (width, height), downsample in zip(
                self._slide.level_dimensions, self._slide.level_downsamples, strict=True
            )
        )
        self.resolution = read_description(
            _resolution_tags(properties, self.vendor),
            properties.get("tiff.ImageDescription", ""),
            self.vendor,
            *self._slide.dimensions,
        )
        self.native_tiles = _native_tile_sizes(properties, len(self.levels))
        profile = self._slide.color_profile
        self.icc_profile = None if profile is None else profile.tobytes()

    def _read_window(
        self, level: int, x: int, y: int, width: int, height: int
    ) -> npt.NDArray[np.uint8]:
        # OpenSlide wants level-0 positions, at every level.
        scale = self.levels[level].downsample
        corner = (round(x * scale), round(y * scale))
        region = self._slide.read_region(corner, level, (width, height))
        return over_white(np.asarray(region))

    def close(self) -> None:
        """Release the file."""
        self._slide.close()


def _entry_file(path: Path) -> Path:
    """A DICOM slide is a folder; OpenSlide takes any of its files and finds the others."""
    if path.is_dir():
        files = sorted(path.glob("*.dcm"))
        if not files:
            raise SlideOpenError("a folder without .dcm files")
        return files[0]
    return path


def _resolution_tags(properties: dict[str, str], vendor: str) -> ResolutionTags:
    x = _parse_number(properties.get(openslide.PROPERTY_NAME_MPP_X))
    y = _parse_number(properties.get(openslide.PROPERTY_NAME_MPP_Y))
    mpp = (x, y) if x and y else None
    if vendor in _GENERIC_VENDORS:
        # OpenSlide derives this one from the TIFF resolution tags: less to be trusted.
        return ResolutionTags(tiff=mpp)
    lens = _parse_number(properties.get(openslide.PROPERTY_NAME_OBJECTIVE_POWER))
    return ResolutionTags(vendor=mpp, tiff=_tiff_mpp(properties), lens=lens)


def _tiff_mpp(properties: dict[str, str]) -> tuple[float, float] | None:
    unit = _UNIT_IN_UM.get(properties.get("tiff.ResolutionUnit", ""))
    x, y = (_parse_number(properties.get(f"tiff.{axis}Resolution")) for axis in "XY")
    return (unit / x, unit / y) if unit and x and y else None


def _native_tile_sizes(properties: dict[str, str], levels: int) -> tuple[tuple[int, int], ...]:
    sizes = []
    for level in range(levels):
        width = _parse_number(properties.get(f"openslide.level[{level}].tile-width"))
        height = _parse_number(properties.get(f"openslide.level[{level}].tile-height"))
        if not width or not height:
            return ()
        sizes.append((int(width), int(height)))
    return tuple(sizes)


def _parse_number(text: str | None) -> float | None:
    if text is None or not re.fullmatch(r"\s*[0-9.]+(e[+-]?\d+)?\s*", text, re.IGNORECASE):
        return None
    value = float(text)
    return value if value > 0 else None
