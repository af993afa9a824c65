"""PNG, JPEG and BMP pictures of a region as slides with one level (BACH and the like)."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from common.files import open_regular
from common.pictures import MOST_PICTURE_PX, PictureSizeError, open_picture
from pipeline.slides.reader import Level, ResolutionTags, SlideOpenError, SlideReader, over_white

MOST_PIXELS = MOST_PICTURE_PX
"""Decoded at once and kept, 3 bytes each: larger pictures are refused before they are decoded."""

_FORMATS = ("PNG", "JPEG", "BMP")
_OPAQUE, _CLEAR = ("RGB", "L"), ("RGBA", "LA", "P", "PA")
_PNG_DEPTH_AT = 24
_STRIP_PIXELS = 4_000_000


class PictureReader(SlideReader):
    """A picture as a slide; it says nothing of its µm per pixel.

    Density in PNG and JPEG is a printer's, so `resolution` is empty. Grey becomes RGB, transparent
    parts white; an EXIF rotation is not applied. Raises `SlideOpenError` for more than 8 bits,
    CMYK, one bit per pixel, and more than 150 million pixels.
    """

    name = "picture"

    def __init__(self, path: Path, series: str = "") -> None:
        self.path, self.series = path, series
        self._pixels: npt.NDArray[np.uint8] | None = None
        with _open_picture(path) as image:
            _require_tissue_kind(path, image)
            self.vendor, self.codec = "picture", str(image.format).lower()
            self.levels = (Level(image.width, image.height, 1.0),)
            self.icc_profile = image.info.get("icc_profile")
        self.resolution = ResolutionTags()

    def _read_window(
        self, level: int, x: int, y: int, width: int, height: int
    ) -> npt.NDArray[np.uint8]:
        if self._pixels is None:
            self._pixels = _decode_picture(self.path)
        return self._pixels[y : y + height, x : x + width].copy()

    def close(self) -> None:
        """Release the decoded picture."""
        self._pixels = None


def _open_picture(path: Path) -> Image.Image:
    """The picture's head; its pixels are not decoded."""
    try:
        return open_picture(path, _FORMATS, MOST_PIXELS)
    except PictureSizeError as error:
        raise SlideOpenError(_too_large(str(error).removeprefix("it has "))) from error
    except Exception as error:
        raise SlideOpenError(
            "not a PNG, JPEG or BMP picture; a file of another kind must not have such a name"
        ) from error


def _too_large(what: str) -> str:
    return (
        f"the picture is too large ({what}), expected at most {MOST_PIXELS:,} pixels: convert it "
        "to a tiled TIFF"
    )


def _require_tissue_kind(path: Path, image: Image.Image) -> None:
    """Refuse what is no picture of tissue in 8-bit colour or grey, in words."""
    if image.mode not in _OPAQUE + _CLEAR:
        raise SlideOpenError(f"its pixels are {image.mode}, expected 8-bit RGB or grey")
    with open_regular(path) as file:
        head = file.read(_PNG_DEPTH_AT + 1)
    # Pillow reduces 16-bit RGB to 8 bits without a word.
    if image.format == "PNG" and head[-1] == 16:
        raise SlideOpenError("its pixels have 16 bits, expected 8-bit RGB or grey")


def _decode_picture(path: Path) -> npt.NDArray[np.uint8]:
    """RGB uint8 [h, w, 3]; raises where the file is cut off or damaged."""
    with _open_picture(path) as image:
        image.load()
        pixels = np.empty((image.height, image.width, 3), np.uint8)
        is_clear = image.mode in _CLEAR
        rows = max(1, _STRIP_PIXELS // image.width)
        # In strips: blending needs several times the memory of what it makes.
        for top in range(0, image.height, rows):
            strip = image.crop((0, top, image.width, min(top + rows, image.height)))
            part = np.asarray(strip.convert("RGBA" if is_clear else "RGB"))
            pixels[top : top + rows] = over_white(part) if is_clear else part
    return pixels
