"""Real tiles named by the user, as pixels and features: image files and cached tiles."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from common.errors import UserError
from common.pictures import PictureSizeError, open_picture
from common.terms import plain_terms
from common.text import is_whole_number
from evaluate.generate.condition_source import check_resolution
from evaluate.generate.conditions import Reference
from evaluate.generators import EncoderRecord
from model.encoders import Encoder
from pipeline.dataset import Dataset, TileStore, identity_value
from pipeline.dataset.features import FeatureStore

Tile = npt.NDArray[np.uint8]


_FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "WEBP", "GIF", "PPM")


@dataclass(frozen=True)
class Wanted:
    """What the model requires of a tile: its side in pixels, and its resolution where known."""

    tile_px: int
    mpp: float | None


def read_image(path: Path, wanted: Wanted) -> Tile:
    """An image file as RGB uint8 [px, px, 3]; refused where it is not the model's tile size."""
    try:
        # Formats that Pillow decodes itself: for PostScript it runs a program.
        with open_picture(path, _FORMATS) as image:
            if image.size != (wanted.tile_px, wanted.tile_px):  # before a slide is decoded
                raise UserError(
                    f"image {path} is {image.width} x {image.height} px, the model's tiles are "
                    f"{wanted.tile_px} x {wanted.tile_px}; cut it at that size, at the model's "
                    "resolution, without resizing"
                )
            return np.array(image.convert("RGB"))
    except FileNotFoundError as error:
        raise UserError(f"image {path}: no such file") from error
    except PictureSizeError as error:
        raise UserError(
            f"image {path} is far larger than a tile of {wanted.tile_px} px ({error}); give tiles "
            "of a slide by --slide FILE --at x,y"
        ) from error
    except (OSError, ValueError) as error:
        raise UserError(f"image {path}: not a readable image ({error})") from error


def check_image_mpp(given: float | None, wanted: Wanted, *, force: bool) -> str:
    """Compare the stated mpp of image files with the model's; files do not record it.

    Returns a warning as `check_resolution` does. Raises `UserError` where none was stated.
    """
    if given is None and wanted.mpp is not None:
        raise UserError(
            "an image file does not record its resolution: give --images-mpp, in µm per pixel; the "
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
    # One at a time: in a batch, kernels may round a tile's feature by its neighbours' number.
    for tile in tiles:
        side = encoder.spec.input_px
        if resize and tile.shape[:2] != (side, side):
            bilinear = Image.Resampling.BILINEAR
            tile = np.array(Image.fromarray(tile).resize((side, side), bilinear))
        cls = encoder.encode(torch.from_numpy(tile.copy())[None], tokens=False).cls
        features.append(cls[0].cpu().numpy().astype(np.float32))
    return features


def describe_encoder(encoder: Encoder, tile_px: int) -> EncoderRecord:
    """What encoder.json would record of features computed on the fly; `tile_px` in pixels."""
    record: EncoderRecord = {
        "encoder": encoder.spec.name,
        "weights": encoder.weights,
        "weights_sha256": encoder.weights_sha256,
        "random_weights": encoder.is_random,
        "dim": encoder.spec.dim,
        "view": "",
        "compute_dtype": str(encoder.dtype).removeprefix("torch."),
        "tile_px": tile_px,
    }
    if encoder.terms:
        record["terms"] = [dict(one) for one in plain_terms(encoder.terms)]
    return record


def parse_tile_name(text: str) -> tuple[str, int]:
    """Read "slide_id:rank", a tile of a dataset.

    >>> parse_tile_name("TCGA-01:17")
    ('TCGA-01', 17)
    """
    slide_id, _, rank = text.rpartition(":")
    if not slide_id or not is_whole_number(rank, 10):
        raise UserError(f"'{text}' is no tile of a dataset; expected SLIDE_ID:RANK")
    return slide_id, int(rank)


def cached_references(
    dataset: Dataset, names: Sequence[str], store: FeatureStore
) -> list[Reference]:
    """References of a dataset's tiles: cached features [d]; pixels [px, px, 3] where tiled."""
    tiles = TileStore(dataset, int(identity_value(dataset, "tile_px")))
    references = []
    for name in names:
        slide_id, rank = parse_tile_name(name)
        feature = np.asarray(store.read(slide_id, [rank])[0], np.float32)
        try:
            tile = tiles.read(slide_id, [rank])[0]
        except UserError:
            tile = None  # a dataset may have features of tiles that were removed
        references.append(Reference(name, tile, feature, (slide_id, rank)))
    return references
