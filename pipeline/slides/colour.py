"""A slide's ICC profile applied to its tiles, where that was requested."""

import io
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageCms

from common.errors import UserError

Recolour = Callable[[npt.NDArray[np.uint8]], npt.NDArray[np.uint8]]


def to_srgb(profile: bytes | None) -> Recolour:
    """A function that takes RGB uint8 [h, w, 3] from the profile's colours to sRGB.

    The rendering intent is the profile's. A slide without a profile is taken to be sRGB. Raises
    `UserError` for a profile that LittleCMS does not accept.

    >>> to_srgb(None)(np.full((1, 1, 3), 200, np.uint8)).ravel().tolist()
    [200, 200, 200]
    """
    if profile is None:
        return lambda tile: tile
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        intent = ImageCms.Intent(ImageCms.getDefaultIntent(source))
        target = ImageCms.createProfile("sRGB")
        transform = ImageCms.buildTransform(source, target, "RGB", "RGB", intent)
    except (ImageCms.PyCMSError, OSError) as error:
        raise UserError(
            f"the slide's ICC profile is not usable ({error}); tile with --icc ignore"
        ) from error

    def recolour(tile: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        return np.array(transform.apply(Image.fromarray(tile)))

    return recolour
