"""Pictures of others: refused by what their heads claim, before any memory is taken."""

import struct
import warnings
from io import BufferedReader, BytesIO
from pathlib import Path

from PIL import Image

from common.files import open_regular

MOST_PICTURE_PX = 150_000_000
"""Decoded at once, 3 or 4 bytes each."""
_SWELLS_FROM_PX, _MOST_PX_PER_BYTE = 16_000_000, 150
"""White paper takes a byte for 60 to 100 px in JPEG; PNG packs a thousand bytes into one."""
_MOST_CHUNKS, _MOST_CHUNK_BYTES = 10_000, 64 << 20
_SIGNATURE = b"\x89PNG\r\n\x1a\n"


class PictureSizeError(ValueError):
    """A picture has, or claims, more than is decoded; the message says what."""


def open_picture(
    path: Path, formats: tuple[str, ...], most_px: int = MOST_PICTURE_PX, *, is_mask: bool = False
) -> Image.Image:
    """The picture's head, of one of Pillow's formats; its pixels are not decoded.

    A mask may be of one value in large parts, so that few bytes are many pixels.

    Raises `PictureSizeError`, `OSError` for what is no regular file, and Pillow's many kinds.
    """
    with open_regular(path) as file:
        size = file.seek(0, 2)
        file.seek(0)
        _check_chunks(file)
    with warnings.catch_warnings():
        # Pillow has a limit of its own, for which it warns and which is an error at twice that.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        try:
            image = Image.open(path, formats=formats)
        except Image.DecompressionBombError as error:
            most = 2 * (Image.MAX_IMAGE_PIXELS or 0)
            raise PictureSizeError(f"it has over {most:,} pixels") from error
    try:
        check_size(image.size, most_px if is_mask else size, most_px)
    except PictureSizeError:
        image.close()
        raise
    return image


def check_size(px: tuple[int, int], size: int, most_px: int = MOST_PICTURE_PX) -> None:
    """Raise `PictureSizeError` where width and height are too much for a file of `size` bytes."""
    area = px[0] * px[1]
    if area > most_px:
        raise PictureSizeError(f"it has {px[0]}x{px[1]} px")
    if area > max(_SWELLS_FROM_PX, _MOST_PX_PER_BYTE * size):
        raise PictureSizeError(
            f"it claims {px[0]}x{px[1]} px, more than {_MOST_PX_PER_BYTE} for each of its "
            f"{size:,} bytes"
        )


def check_data(data: bytes, formats: tuple[str, ...], *, is_mask: bool = False) -> None:
    """The same for a picture's bytes, before another library decodes them."""
    try:
        with Image.open(BytesIO(data), formats=formats) as image:
            check_size(image.size, MOST_PICTURE_PX if is_mask else len(data))
    except PictureSizeError:
        raise
    except Exception as error:  # Pillow raises many kinds for damaged heads
        raise PictureSizeError("it is not a readable picture") from error


def _check_chunks(file: BufferedReader) -> None:
    """Refuse a PNG with more before its pixels than any program writes there."""
    if file.read(8) != _SIGNATURE:
        return
    total = 0
    for _ in range(_MOST_CHUNKS):
        head = file.read(8)
        if len(head) < 8 or head[4:] in (b"IDAT", b"IEND"):
            return
        length = struct.unpack(">I", head[:4])[0]
        total += length
        if total > _MOST_CHUNK_BYTES:
            raise PictureSizeError(f"it has over {_MOST_CHUNK_BYTES:,} bytes before its pixels")
        file.seek(length + 4, 1)
    raise PictureSizeError(f"it has over {_MOST_CHUNKS:,} chunks before its pixels")
