"""Compares lossless PNG encoders on tissue tiles of the committed slide: time and bytes a tile.

    python bench/png_encoders.py [--rounds 5]

Encoders take turns on the same tiles, each is judged by its best round of CPU time, and stands as
a ratio to the one that `pipeline tile --png small` uses. fpng is compared where it is installed.
The table goes to the terminal and to bench/out/png_encoders.md, the numbers to
bench/out/png_encoders.json.
"""

import argparse
import importlib.util
import io
import struct
import sys
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path

import cv2
import imagecodecs
import numpy as np
import numpy.typing as npt
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # before bench/, with its model.py

from bench.common import SLIDE, best_seconds, markdown, write_result
from pipeline.dataset.tiles.png_tar import _average_filtered, decode_png, encode_png
from pipeline.slides.open import open_slide

TILES, TILE_PX = 32, 224
REFERENCE = "OpenCV level 1, RLE (--png small)"

Tile = npt.NDArray[np.uint8]
Encoder = Callable[[Tile], bytes]


def tissue_tiles() -> list[Tile]:
    """The tiles of a grid with the least glass."""
    with open_slide(SLIDE) as slide:
        level = slide.levels[0]
        tiles = [
            slide.read(0, x, y, TILE_PX, TILE_PX)
            for y in range(0, level.height - TILE_PX, TILE_PX)
            for x in range(0, level.width - TILE_PX, TILE_PX)
        ]
    return sorted(tiles, key=lambda tile: float(tile.mean()))[:TILES]


def _pillow(tile: Tile, level: int) -> bytes:
    png = io.BytesIO()
    Image.fromarray(tile).save(png, "PNG", compress_level=level)
    return png.getvalue()


def _opencv(tile: Tile, options: list[int]) -> bytes:
    return cv2.imencode(".png", cv2.cvtColor(tile, cv2.COLOR_RGB2BGR), options)[1].tobytes()


def _average(tile: Tile, deflate: Callable[[bytes], bytes]) -> bytes:
    """The filter Average with another deflate than ISA-L's."""
    size = struct.pack(">IIBBBBB", tile.shape[1], tile.shape[0], 8, 2, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n"
    data = deflate(_average_filtered(tile).tobytes())
    for name, body in ((b"IHDR", size), (b"IDAT", data), (b"IEND", b"")):
        png += struct.pack(">I", len(body)) + name + body
        png += struct.pack(">I", zlib.crc32(name + body))
    return png


def _fpng(tile: Tile) -> bytes:
    import fpng

    return bytes(fpng.fpng_encode_image_to_memory(tile.tobytes(), tile.shape[1], tile.shape[0], 3))


def encoders() -> dict[str, Encoder]:
    """All that are here."""
    rle = [cv2.IMWRITE_PNG_STRATEGY, cv2.IMWRITE_PNG_STRATEGY_RLE]
    found: dict[str, Encoder] = {
        REFERENCE: encode_png,
        "Average + ISA-L level 1 (--png fast)": partial(encode_png, effort="fast"),
        "Average + libdeflate level 1": partial(
            _average, deflate=partial(imagecodecs.deflate_encode, level=1)
        ),
        "Average + zlib-ng level 1": partial(
            _average, deflate=partial(imagecodecs.zlibng_encode, level=1)
        ),
        "OpenCV level 1": partial(_opencv, options=[cv2.IMWRITE_PNG_COMPRESSION, 1]),
        "OpenCV level 6, RLE": partial(_opencv, options=[cv2.IMWRITE_PNG_COMPRESSION, 6, *rle]),
        "libspng level 1": partial(imagecodecs.spng_encode, level=1),
        "Pillow level 1": partial(_pillow, level=1),
        "Pillow level 6": partial(_pillow, level=6),
    }
    if importlib.util.find_spec("fpng"):
        found["fpng"] = _fpng
    return found


def measure(rounds: int) -> dict[str, dict[str, float]]:
    """Milliseconds and KiB a tile by encoder."""
    tiles, contenders = tissue_tiles(), encoders()
    for name, encode in contenders.items():
        for tile in tiles:
            if not np.array_equal(decode_png(encode(tile)), tile):
                raise SystemExit(f"{name} does not give the tile back")
    runs = {name: partial(encode_all, encode, tiles) for name, encode in contenders.items()}
    best = best_seconds(runs, rounds)
    bytes_per_tile = {
        name: encode_all(encode, tiles) / TILES for name, encode in contenders.items()
    }
    return {
        name: {
            "ms": 1000 * best[name] / TILES,
            "kib": bytes_per_tile[name] / 1024,
            "speed": best[REFERENCE] / best[name],
            "bytes": bytes_per_tile[name] / bytes_per_tile[REFERENCE],
        }
        for name in contenders
    }


def encode_all(encode: Encoder, tiles: list[Tile]) -> int:
    """Encode every tile; bytes in all."""
    return sum(len(encode(tile)) for tile in tiles)


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    cv2.setNumThreads(1)
    result = measure(options.rounds)
    rows = [
        (
            name,
            f"{row['ms']:.2f}",
            f"{row['kib']:.1f}",
            f"{row['speed']:.2f}",
            f"{row['bytes']:.2f}",
        )
        for name, row in sorted(result.items(), key=lambda item: item[1]["ms"])
    ]
    text = markdown("encoder | ms a tile | KiB a tile | speed | bytes", rows)
    write_result("png_encoders", result, text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
