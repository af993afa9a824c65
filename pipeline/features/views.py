"""Preprocessing views: what is done to a tile before the encoder sees it.

A view is a short string, steps chained by `+`, applied from left to right:

- `crop224`: the centre 224 x 224 pixels (the same resolution, a smaller field)
- `resize224`: resized to 224 x 224 by Pillow's bilinear filter, which averages when it reduces:
  torchvision's `Resize(224)` on a Pillow image, as PixCell uses it (another mpp, the same field)
- `resize224bicubic`: the same with the bicubic filter
- `jpeg70`: written and read back as JPEG of quality 70, RGB, chroma 4:2:0 (Pillow on
  libjpeg-turbo), as the tiles were that PixCell was trained on

The features of a view are next to the plain ones: a view is no copy of the tiles.
"""

import io
import re
from collections.abc import Callable
from functools import partial

import numpy as np
import numpy.typing as npt

from common.errors import UserError

Tile = npt.NDArray[np.uint8]

_STEP = re.compile(r"^(?P<name>crop|resize|jpeg)(?P<number>[1-9]\d{0,3})(?P<filter>bicubic)?$")
_CHROMA_420 = 2
_KNOWN = "crop224, resize224, resize224bicubic, jpeg70 and chains such as jpeg70+crop224"


def view_function(view: str) -> Callable[[Tile], Tile]:
    """From a tile uint8 [H, W, 3] to what the encoder sees; '' changes nothing.

    Raises `UserError` for a view that is not known. The function raises it for a tile smaller
    than a crop.

    >>> view_function("crop2")(np.zeros((5, 4, 3), np.uint8)).shape
    (2, 2, 3)
    """
    steps = [_parse_step(text) for text in view.split("+")] if view else []

    def apply_steps(tile: Tile) -> Tile:
        for step in steps:
            tile = step(tile)
        return tile

    return apply_steps


def check_view(view: str) -> str:
    """The view itself, refused where it is not known."""
    view_function(view)
    return view


def view_software(view: str) -> dict[str, str]:
    """The versions that a view's pixels depend on."""
    from PIL import Image, features

    if not view:
        return {}
    versions = {"pillow": Image.__version__}
    if "jpeg" in view:
        turbo = features.version_feature("libjpeg_turbo")
        versions["libjpeg"] = f"turbo {turbo}" if turbo else str(features.version("jpg"))
    return versions


def _parse_step(text: str) -> Callable[[Tile], Tile]:
    match = _STEP.match(text)
    if match is None or (match["filter"] and match["name"] != "resize"):
        raise UserError(f"view step '{text}' is not known; expected {_KNOWN}")
    number = int(match["number"])
    if match["name"] == "crop":
        return partial(centre_crop, size=number)
    if match["name"] == "resize":
        return partial(resize_tile, size=number, bicubic=bool(match["filter"]))
    if number > 95:
        raise UserError(f"view step '{text}': JPEG quality is 1 to 95")
    return partial(through_jpeg, quality=number)


def centre_crop(tile: Tile, size: int) -> Tile:
    """The centre of a tile, uint8 [size, size, 3]; an odd remainder leaves 1 px more at the end."""
    height, width = tile.shape[:2]
    if min(height, width) < size:
        raise UserError(
            f"view crop{size}: the tile is {width}x{height} px; cache larger tiles with --tile-px"
        )
    top, left = (height - size) // 2, (width - size) // 2
    return np.ascontiguousarray(tile[top : top + size, left : left + size])


def through_jpeg(tile: Tile, quality: int) -> Tile:
    """A tile uint8 [h, w, 3] as it comes back from JPEG of that quality (1 to 95), chroma 4:2:0."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(tile).save(buffer, "JPEG", quality=quality, subsampling=_CHROMA_420)
    return np.array(Image.open(buffer), np.uint8)


def resize_tile(tile: Tile, size: int, *, bicubic: bool = False) -> Tile:
    """The whole tile, uint8 [size, size, 3], by Pillow's bilinear or bicubic filter."""
    from PIL import Image

    kernel = Image.Resampling.BICUBIC if bicubic else Image.Resampling.BILINEAR
    return np.array(Image.fromarray(tile).resize((size, size), kernel), np.uint8)
