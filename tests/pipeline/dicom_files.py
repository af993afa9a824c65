"""DICOM slides of a few tiles for the tests, in every way of storing frames that is read."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import tifffile
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate, encapsulate_extended
from pydicom.pixels import get_encoder
from pydicom.uid import RLELossless, generate_uid

from pipeline.slides.dicom_series import WSI_CLASS

VOLUME = ("ORIGINAL", "PRIMARY", "VOLUME", "NONE")
UID = "1.2.840.10008.1.2"


def jpeg(tile: np.ndarray) -> bytes:
    """YCbCr with half the chroma, as most scanners write."""
    return bytes(imagecodecs.jpeg8_encode(tile, level=90, subsampling="422"))


def jpeg_rgb(tile: np.ndarray) -> bytes:
    """Three colours as they are, without a marker that says so."""
    return bytes(imagecodecs.jpeg8_encode(tile, level=90, colorspace="RGB", outcolorspace="RGB"))


def rle(tile: np.ndarray) -> bytes:
    """Three planes of PackBits."""
    return bytes(
        get_encoder(RLELossless).encode(
            tile, rows=tile.shape[0], columns=tile.shape[1], samples_per_pixel=3,
            bits_allocated=8, bits_stored=8, pixel_representation=0, planar_configuration=0,
            photometric_interpretation="RGB", number_of_frames=1,
        )
    )  # fmt: skip


def jpeg2000(tile: np.ndarray, mct: bool = True) -> bytes:
    """A codestream without a file format around it, which DICOM wants."""
    return bytes(imagecodecs.jpeg2k_encode(tile, level=0, codecformat="j2k", mct=mct))


STORED: dict[str, tuple[str, str, Callable[[np.ndarray], bytes]]] = {
    "jpeg": (f"{UID}.4.50", "YBR_FULL_422", jpeg),
    "jpeg rgb": (f"{UID}.4.50", "RGB", jpeg_rgb),
    "jpeg2000": (f"{UID}.4.90", "YBR_RCT", jpeg2000),
    "jpeg2000 alone": (f"{UID}.4.90", "RGB", lambda t: jpeg2000(t, mct=False)),
    "jpeg lossless": (
        f"{UID}.4.70",
        "RGB",
        lambda t: bytes(imagecodecs.jpeg8_encode(t, lossless=True)),
    ),
    "jpegls": (f"{UID}.4.80", "RGB", lambda t: bytes(imagecodecs.jpegls_encode(t))),
    "htj2k": (f"{UID}.4.201", "YBR_RCT", lambda t: bytes(imagecodecs.htj2k_encode(t))),
    "rle": (RLELossless, "RGB", rle),
    "raw": (f"{UID}.1", "RGB", lambda t: t.tobytes()),
    "raw implicit": (UID, "RGB", lambda t: t.tobytes()),
}
"""Transfer syntax, photometric interpretation and encoder by a short name."""


def tissue(cmu: Path, height: int = 700, width: int = 900) -> np.ndarray:
    """H&E at 0.499 mpp out of the committed slide: uint8 [height, width, 3]."""
    with tifffile.TiffFile(cmu) as tiff:
        return np.ascontiguousarray(tiff.pages[0].asarray()[600 : 600 + height, 300 : 300 + width])


def shrink(image: np.ndarray, factor: int) -> np.ndarray:
    """Means of factor x factor px; rows and columns left over are dropped, as scanners do."""
    height, width = (side // factor * factor for side in image.shape[:2])
    parts = image[:height, :width].reshape(height // factor, factor, width // factor, factor, 3)
    return np.rint(parts.mean((1, 3))).astype(np.uint8)


def cut_frames(image: np.ndarray, tile: int) -> list[np.ndarray]:
    """The frames of an image, row by row, padded with white."""
    rows, columns = (-(-side // tile) for side in image.shape[:2])
    padded = np.full((rows * tile, columns * tile, 3), 255, np.uint8)
    padded[: image.shape[0], : image.shape[1]] = image
    return [
        np.ascontiguousarray(padded[y : y + tile, x : x + tile])
        for y in range(0, rows * tile, tile)
        for x in range(0, columns * tile, tile)
    ]


def write_dicom(
    path: Path, image: np.ndarray, series: str, *, mpp: float = 0.5, tile: int = 128,
    stored: str = "jpeg", kind: Sequence[str] = VOLUME, keep: Sequence[int] | None = None,
    sparse: bool = False, table: str = "basic", frames: Sequence[np.ndarray] | None = None,
    fragments: int = 1, **more: Any,
) -> None:  # fmt: skip
    """One file of a slide. `keep` are the frames it has; `sparse` gives each its place.

    `table` is "basic", "extended" or "none"; `more` are attributes of the data set.
    """
    syntax, photometric, encode = STORED[stored]
    every = list(frames) if frames is not None else cut_frames(image, tile)
    kept = list(range(len(every))) if keep is None else list(keep)
    data = [encode(every[i]) for i in kept]
    d = Dataset()
    d.file_meta = FileMetaDataset()
    d.file_meta.TransferSyntaxUID = syntax
    d.SOPClassUID = d.file_meta.MediaStorageSOPClassUID = WSI_CLASS
    d.SOPInstanceUID = d.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    d.StudyInstanceUID, d.SeriesInstanceUID = f"{series}.1", series
    d.FrameOfReferenceUID, d.Modality, d.ImageType = f"{series}.2", "SM", list(kind)
    d.TotalPixelMatrixRows, d.TotalPixelMatrixColumns = image.shape[:2]
    d.Rows = d.Columns = tile
    d.NumberOfFrames, d.SamplesPerPixel, d.PlanarConfiguration = len(data), 3, 0
    d.PhotometricInterpretation = photometric
    d.BitsAllocated = d.BitsStored = 8
    d.HighBit, d.PixelRepresentation, d.InstanceNumber = 7, 0, 1
    d.ImagedVolumeWidth = image.shape[1] * mpp / 1000
    d.ImagedVolumeHeight = image.shape[0] * mpp / 1000
    d.TotalPixelMatrixFocalPlanes = d.NumberOfOpticalPaths = 1
    d.DimensionOrganizationType = "TILED_SPARSE" if sparse else "TILED_FULL"
    measures, shared, optical = Dataset(), Dataset(), Dataset()
    measures.PixelSpacing = [mpp / 1000, mpp / 1000]
    shared.PixelMeasuresSequence = [measures]
    d.SharedFunctionalGroupsSequence = [shared]
    optical.OpticalPathIdentifier = "1"
    d.OpticalPathSequence = [optical]
    if sparse:
        columns = -(-image.shape[1] // tile)
        d.PerFrameFunctionalGroupsSequence = [_place(*divmod(i, columns), tile) for i in kept]
    for name, value in more.items():
        setattr(d, name, value)
    _put_pixels(d, data, table, fragments)
    d.save_as(path, enforce_file_format=True)


def _place(row: int, column: int, tile: int) -> Dataset:
    position, group = Dataset(), Dataset()
    position.ColumnPositionInTotalImagePixelMatrix = column * tile + 1
    position.RowPositionInTotalImagePixelMatrix = row * tile + 1
    group.PlanePositionSlideSequence = [position]
    return group


def _put_pixels(d: Dataset, data: list[bytes], table: str, fragments: int) -> None:
    is_raw = str(d.file_meta.TransferSyntaxUID) in (UID, f"{UID}.1")
    if is_raw:
        d.PixelData = b"".join(data)
    elif table == "extended":
        d.PixelData, d.ExtendedOffsetTable, d.ExtendedOffsetTableLengths = encapsulate_extended(
            data
        )
    else:
        d.PixelData = encapsulate(data, fragments_per_frame=fragments, has_bot=table == "basic")
    d["PixelData"].VR = "OB"
    d["PixelData"].is_undefined_length = not is_raw
