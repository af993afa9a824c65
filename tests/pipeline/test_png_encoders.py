"""Both PNG encoders write standard PNGs that give the tile back."""

import io
import zlib

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from pipeline.dataset.tiles.png_tar import (
    PNG_EFFORTS,
    _average_filtered,
    decode_png,
    encode_png,
)
from pipeline.slides.open import open_slide


def slow_average_filter(tile: np.ndarray) -> bytes:
    """The definition, byte by byte."""
    height, width, channels = tile.shape
    out = bytearray()
    for y in range(height):
        out.append(3)
        for i in range(width * channels):
            row = tile[y].reshape(-1)
            left = int(row[i - channels]) if i >= channels else 0
            above = int(tile[y - 1].reshape(-1)[i]) if y else 0
            out.append((int(row[i]) - (left + above) // 2) % 256)
    return bytes(out)


tiles = hnp.arrays(np.uint8, st.tuples(st.integers(1, 6), st.integers(1, 7), st.just(3)))


@given(tiles)
@settings(max_examples=60, deadline=None)
def test_the_filter_is_the_one_of_the_specification(tile):
    assert _average_filtered(tile).tobytes() == slow_average_filter(tile)


@pytest.mark.parametrize("effort", PNG_EFFORTS)
@given(tile=tiles)
@settings(max_examples=40, deadline=None)
def test_pillow_and_opencv_read_the_tile_back(effort, tile):
    data = encode_png(tile, effort)
    image = Image.open(io.BytesIO(data))
    image.verify()
    image = Image.open(io.BytesIO(data))
    assert image.mode == "RGB"
    assert np.array_equal(np.asarray(image), tile)
    assert np.array_equal(decode_png(data), tile)
    assert np.array_equal(cv2.imdecode(np.frombuffer(data, np.uint8), 1)[..., ::-1], tile)


def chunks(data: bytes) -> list[tuple[bytes, bytes]]:
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    found, at = [], 8
    while at < len(data):
        size = int.from_bytes(data[at : at + 4], "big")
        kind, body = data[at + 4 : at + 8], data[at + 8 : at + 8 + size]
        assert int.from_bytes(data[at + 8 + size : at + 12 + size], "big") == zlib.crc32(
            kind + body
        )
        found.append((kind, body))
        at += 12 + size
    return found


def test_a_fast_png_holds_three_sound_chunks_and_a_zlib_stream(cmu_slide):
    with open_slide(cmu_slide) as slide:
        tile = slide.read(0, 896, 1344, 224, 224)
    kinds = chunks(encode_png(tile, "fast"))
    assert [kind for kind, _ in kinds] == [b"IHDR", b"IDAT", b"IEND"]
    assert zlib.decompress(kinds[1][1]) == _average_filtered(tile).tobytes()


def test_the_small_one_is_smaller_and_the_fast_one_close(cmu_slide):
    with open_slide(cmu_slide) as slide:
        tissue = [slide.read(0, x, y, 224, 224) for x, y in ((896, 1344), (448, 896), (1120, 1568))]
    sizes = {effort: sum(len(encode_png(t, effort)) for t in tissue) for effort in PNG_EFFORTS}
    assert sizes["small"] < sizes["fast"] < 1.12 * sizes["small"]
