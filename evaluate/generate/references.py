"""Real tiles that a person names, as pixels and features: image files and cached tiles."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from common.errors import UserError
from evaluate.generate.conditions import Reference
from evaluate.generate.guidance import check_resolution
from model.encoders import Encoder
from pipeline.dataset import Dataset, TileStore, identity_value
from pipeline.dataset.features import FeatureStore

Tile = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Wanted:
    """What the model asks of a tile: its side in pixels, and its resolution where it is known."""

    tile_px: int
    mpp: float | None


def read_image(path: Path, wanted: Wanted) -> Tile:
    """An image file as RGB uint8 [px, px, 3]; refused where it is not the model's tile size."""
    try:
        with Image.open(path) as image:
            _check_size(path, image.size, wanted)  # before a slide-sized one is decoded
            return np.array(image.convert("RGB"))
    except FileNotFoundError as error:
        raise UserError(f"image {path}: no such file") from error
    except Image.DecompressionBombError as error:
        raise UserError(
            f"image {path} is far larger than a tile of {wanted.tile_px} px ({error}); give tiles "
            "of a slide by --slide FILE --at x,y"
        ) from error
    except (OSError, ValueError) as error:
        raise UserError(f"image {path}: not a readable image ({error})") from error


def _check_size(path: Path, size: tuple[int, int], wanted: Wanted) -> None:
    width, height = size
    if (width, height) != (wanted.tile_px, wanted.tile_px):
        raise UserError(
            f"image {path} is {width} x {height} px, the model's tiles are {wanted.tile_px} x "
            f"{wanted.tile_px}; cut it at that size, at the model's resolution, without resizing"
        )


def check_image_mpp(given: float | None, wanted: Wanted, *, force: bool) -> str:
    """Compare the stated resolution of image files with the model's; a file does not say it.

    Returns a warning as `check_resolution` does. Raises `UserError` where none was stated.
    """
    if given is None and wanted.mpp is not None:
        raise UserError(
            "an image file does not say its resolution: give --images-mpp, in µm per pixel; the "
            f"model was trained at {wanted.mpp:g}"
        )
    return check_resolution(given, wanted.mpp, force=force)


def encode_tiles(
    encoder: Encoder, tiles: Sequence[Tile], *, resize: bool = False
) -> list[npt.NDArray[np.float32]]:
    """Features float32 [d] of tiles, one forward pass each: none depends on the others.

    With `resize`, tiles of another size than the encoder's are resized (Pillow, bilinear), as
    PixCell's published recipe does with its 256 px tiles.
    """
    features = []
    for tile in tiles:
        side = encoder.spec.input_px
        if resize and tile.shape[:2] != (side, side):
            bilinear = Image.Resampling.BILINEAR
            tile = np.array(Image.fromarray(tile).resize((side, side), bilinear))
        cls = encoder.encode(torch.from_numpy(tile.copy())[None], tokens=False).cls
        features.append(cls[0].cpu().numpy().astype(np.float32))
    return features


def encoder_record(encoder: Encoder, tile_px: int) -> dict[str, Any]:
    """What encoder.json would say of features that were computed on the way."""
    return {
        "encoder": encoder.spec.name,
        "weights": encoder.weights,
        "weights_sha256": encoder.weights_sha256,
        "random_weights": encoder.is_random,
        "dim": encoder.spec.dim,
        "view": "",
        "compute_dtype": str(encoder.dtype).removeprefix("torch."),
        "tile_px": tile_px,
    }


def tile_references(
    names: Sequence[str],
    tiles: Sequence[Tile],
    encode: Callable[[Sequence[Tile]], list[npt.NDArray[np.float32]]],
) -> list[Reference]:
    """References of tiles that are encoded on the way."""
    features = encode(tiles)
    return [Reference(*each) for each in zip(names, tiles, features, strict=True)]


def parse_tile_name(text: str) -> tuple[str, int]:
    """Read "slide_id:rank", a tile of a dataset."""
    slide_id, _, rank = text.rpartition(":")
    if not slide_id or not rank.isdigit():
        raise UserError(f"'{text}' is no tile of a dataset; expected SLIDE_ID:RANK")
    return slide_id, int(rank)


def cached_references(
    dataset: Dataset, names: Sequence[str], store: FeatureStore
) -> list[Reference]:
    """References of a dataset's tiles with their cached features; pixels where they are tiled."""
    tiles = TileStore(dataset, int(identity_value(dataset, "tile_px")))
    found = []
    for name in names:
        slide_id, rank = parse_tile_name(name)
        feature = np.asarray(store.read(slide_id, [rank])[0], np.float32)
        try:
            tile = tiles.read(slide_id, [rank])[0]
        except UserError:
            tile = None  # a dataset may hold features of tiles that were removed
        found.append(Reference(name, tile, feature, (slide_id, rank)))
    return found
