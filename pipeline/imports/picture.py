"""Reading one picture of a tile: RGB pixels of just the right size, or one line why not."""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt

from common.errors import UserError
from common.pictures import open_picture
from common.text import one_line
from pipeline.slides.colour import to_srgb
from pipeline.slides.reader import over_white

_cached_recolour = lru_cache(maxsize=8)(to_srgb)
"""A folder's pictures mostly have one profile between them."""
_MOST_CROPPED_PX = 1 << 26
_OPAQUE, _CLEAR = ("RGB", "L"), ("RGBA", "LA", "P", "PA")


@dataclass(frozen=True)
class Picture:
    """RGB uint8 [px, px, 3], and the format it was stored in (`png`, `jpeg`)."""

    rgb: npt.NDArray[np.uint8]
    codec: str


def read_picture(path: Path, tile_px: int, *, crop: bool = False, icc: str = "ignore") -> Picture:
    """The picture at `path`, its size checked; `crop` takes the centre of a larger one.

    Transparent parts become white; `icc` "srgb" applies an embedded colour profile, "ignore"
    drops it; an EXIF rotation is not applied. Raises `UserError` with the path.
    """
    try:
        with open_picture(path, ("PNG", "JPEG"), _MOST_CROPPED_PX) as image:
            _check_size(path, image.size, tile_px, crop)
            codec = str(image.format).lower()
            profile = image.info.get("icc_profile")
            if image.mode not in _OPAQUE + _CLEAR:
                raise UserError(f"{path}: its pixels are {image.mode}, expected 8-bit RGB or grey")
            is_clear = image.mode in _CLEAR
            rgb = np.asarray(image.convert("RGBA" if is_clear else "RGB"))
    except UserError:
        raise
    except Exception as error:  # decoders raise many kinds for damaged bytes
        reason = one_line(error, 120) or type(error).__name__
        raise UserError(f"{path} cannot be read as PNG or JPEG ({reason})") from error
    rgb = _crop_to_size(over_white(rgb) if is_clear else rgb, tile_px)
    if icc == "srgb":
        rgb = _cached_recolour(profile)(rgb)
    return Picture(np.ascontiguousarray(rgb), codec)


def _check_size(path: Path, size: tuple[int, int], tile_px: int, crop: bool) -> None:
    """Refuse a picture of another size than a tile, before it is decoded."""
    width, height = size
    is_larger = min(size) >= tile_px
    if size != (tile_px, tile_px) and not (crop and is_larger):
        hint = ", or --crop to take the centre" if is_larger else ""
        raise UserError(
            f"{path} is {width}x{height} px, expected {tile_px}x{tile_px}: give --tile-px{hint}"
        )


def _crop_to_size(rgb: npt.NDArray[np.uint8], tile_px: int) -> npt.NDArray[np.uint8]:
    """The middle [tile_px, tile_px, 3] of pixels [h, w, 3]."""
    height, width = rgb.shape[:2]
    top, left = (height - tile_px) // 2, (width - tile_px) // 2
    return rgb[top : top + tile_px, left : left + tile_px]
