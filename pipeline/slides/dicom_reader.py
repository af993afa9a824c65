"""DICOM whole-slide images, decoded frame by frame: every level's own pixels.

OpenSlide interpolates levels whose downsample is not whole; `scan` chooses this reader for slides
that have one, and for those that OpenSlide does not open.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from common.files import open_descriptor, open_regular
from common.text import list_some
from pipeline.slides.dicom_frames import FrameCoding, decode_frame, find_frames, unwrap_items
from pipeline.slides.dicom_series import read_head, read_header, series_files
from pipeline.slides.reader import Level, ResolutionTags, SlideOpenError
from pipeline.slides.tiled_reader import TiledReader

_LAST_TAG = 0x7FE00007
"""Of the group of the pixels all but the pixels: tables of offsets, and lengths."""
_MOST_FRAME_PX, _MOST_FRAMES = 1 << 27, 1 << 23
_GREY = 128
_MCU = 8


@dataclass(frozen=True)
class _Instance:
    """A file with a level, or with a part of one; offsets and sizes int64 [frames] in bytes."""

    path: Path
    header: Any
    coding: FrameCoding
    offsets: npt.NDArray[np.int64]
    sizes: npt.NDArray[np.int64]

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the level in px."""
        return int(self.header.TotalPixelMatrixColumns), int(self.header.TotalPixelMatrixRows)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of frames that cover the level."""
        width, height = self.size
        return -(-height // self.coding.height), -(-width // self.coding.width)

    @property
    def image(self) -> str:
        """What the parts of one image have in common."""
        return str(self.header.get("ConcatenationUID") or self.header.SOPInstanceUID)

    @cached_property
    def is_full(self) -> bool:
        """Whether frames follow each other without gaps, so that none says where it is."""
        kind = self.header.get("DimensionOrganizationType")
        groups = self.header.get("PerFrameFunctionalGroupsSequence")
        return kind == "TILED_FULL" or not (kind or groups)

    @cached_property
    def places(self) -> list[tuple[int, int, str, float]]:
        """(row, column, optical path, focal plane) of every frame."""
        return self._full_places() if self.is_full else self._sparse_places()

    def _full_places(self) -> list[tuple[int, int, str, float]]:
        rows, columns = self.grid
        planes = int(self.header.get("TotalPixelMatrixFocalPlanes") or 1)
        first = int(self.header.get("ConcatenationFrameOffsetNumber") or 0)
        # Columns fastest, then rows, focal planes, optical paths (PS3.3 C.7.6.17.3).
        numbers = np.arange(first, first + len(self.offsets))
        shape = (1 + int(numbers[-1]) // (planes * rows * columns), planes, rows, columns)
        path, plane, row, column = (part.tolist() for part in np.unravel_index(numbers, shape))
        return [
            (r, c, f"{p:06d}", float(z))
            for r, c, p, z in zip(row, column, path, plane, strict=True)
        ]

    def _sparse_places(self) -> list[tuple[int, int, str, float]]:
        shared = (self.header.get("SharedFunctionalGroupsSequence") or [{}])[0]
        groups = self.header.get("PerFrameFunctionalGroupsSequence") or []
        if len(groups) != len(self.offsets):
            raise SlideOpenError(
                f"dicom: {len(self.offsets)} frames, but places of {len(groups)} (TILED_SPARSE)"
            )
        places = []
        for group in groups:
            position = _item(group, shared, "PlanePositionSlideSequence")
            optical = _item(group, shared, "OpticalPathIdentificationSequence")
            x = int(position["ColumnPositionInTotalImagePixelMatrix"].value) - 1
            y = int(position["RowPositionInTotalImagePixelMatrix"].value) - 1
            if x % self.coding.width or y % self.coding.height:
                raise SlideOpenError(
                    f"dicom: a frame is at {x}, {y} px, not on the grid of "
                    f"{self.coding.width}x{self.coding.height} px frames"
                )
            places.append(
                (
                    y // self.coding.height,
                    x // self.coding.width,
                    str(optical.get("OpticalPathIdentifier", "")),
                    float(position.get("ZOffsetInSlideCoordinateSystem") or 0.0),
                )
            )
        return places


@dataclass(frozen=True)
class DicomLevel:
    """A level's frames, row by row: file number, offset and bytes of each, [rows * columns].

    A frame that the level leaves out has 0 bytes.
    """

    tile_width: int
    tile_height: int
    columns: int
    rows: int
    files: npt.NDArray[np.int64]
    offsets: npt.NDArray[np.int64]
    sizes: npt.NDArray[np.int64]


class DicomReader(TiledReader):
    """A series of DICOM files, one slide; `series` is its SeriesInstanceUID.

    Levels are the images of type VOLUME: labels, overviews and thumbnails never are. Tiled in full
    or sparsely, in one file or in several. Of several focal planes the middle one is shown, of
    several optical paths the first; `notes` say so. Frames that a sparse level leaves out are
    white. Raises `SlideOpenError` for anything but 8-bit colour, and where parts are missing.
    """

    name = "dicom"
    native: tuple[DicomLevel, ...]

    def __init__(self, path: Path, series: str = "") -> None:
        super().__init__(path)
        self.series = series
        self._descriptors: dict[int, int] = {}
        try:
            self._describe_series(_volume_instances(series_files(path, series)))
        except SlideOpenError:
            raise
        except Exception as error:
            # pydicom raises many kinds for damaged headers; all mean the same to the user.
            raise SlideOpenError(f"dicom: {error}") from error

    def _describe_series(self, instances: Sequence[_Instance]) -> None:
        images, notes = _choose_images(instances)
        self._parts = [part for image in images for part in image]
        levels: list[DicomLevel] = []
        for image in images:
            level, said = _frame_level(image, sum(len(i) for i in images[: len(levels)]))
            levels.append(level)
            notes.extend(note for note in said if note not in notes)
        self.native, self.notes = tuple(levels), tuple(notes)
        base = images[0][0]
        width, height = base.size
        self.levels = tuple(
            Level(w, h, (width / w + height / h) / 2) for w, h in (i[0].size for i in images)
        )
        self.native_tiles = tuple((n.tile_width, n.tile_height) for n in self.native)
        self.vendor, self.codec = "dicom", base.coding.codec
        self.resolution = ResolutionTags(vendor=_pixel_um(base))
        optical = base.header.get("OpticalPathSequence") or [{}]
        profile = optical[0].get("ICCProfile")
        self.icc_profile = None if profile is None else bytes(profile)

    def decode_native(self, level: int, row: int, column: int) -> npt.NDArray[np.uint8]:
        """Read and decode one frame, uint8 [tile_height, tile_width, 3].

        Raises ValueError where its bytes are damaged.
        """
        native = self.native[level]
        index = row * native.columns + column
        offset, size = int(native.offsets[index]), int(native.sizes[index])
        if size == 0:
            return np.full((native.tile_height, native.tile_width, 3), 255, np.uint8)
        number = int(native.files[index])
        part = self._parts[number]
        if number not in self._descriptors:
            self._descriptors[number] = open_descriptor(part.path)
        data = os.pread(self._descriptors[number], size, offset)
        if len(data) != size:
            raise ValueError("the file ends inside a frame")
        self.decoded += 1
        frame = unwrap_items(data) if part.coding.is_encapsulated else data
        tile = decode_frame(frame, part.coding)
        if part.coding.codec == "jpeg" and (tile[-_MCU:, -_MCU:] == _GREY).all():
            self._confirm_frame(level, column * native.tile_width, row * native.tile_height)
        return tile

    def _confirm_frame(self, level: int, x: int, y: int) -> None:
        """Ask OpenSlide about a frame that ends in the grey which libjpeg leaves where data ended.

        imagecodecs passes over libjpeg's warnings; OpenSlide raises. A slide that OpenSlide does
        not open is believed.
        """
        from pipeline.slides.openslide_reader import OpenSlideReader

        try:
            other = OpenSlideReader(self.path, self.series)
        except SlideOpenError:
            return
        with other:
            other.read_interpolated(level, x, y, 1, 1)

    def close(self) -> None:
        """Release the files and the decoded frames."""
        super().close()
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])


def _item(group: Any, shared: Any, name: str) -> Any:
    """The first item of a sequence of the frame's own or of all frames' attributes."""
    items = group.get(name) or shared.get(name) or [{}]
    return items[0]


def _volume_instances(files: Sequence[Path]) -> list[_Instance]:
    """The files that levels are in, each once."""
    instances: dict[str, _Instance] = {}
    for file in files:
        head = read_head(file)
        if head is None or "VOLUME" not in head.image_type[2:3]:
            continue
        # A copy under another name is the same part of the slide.
        if head.instance_uid not in instances:
            instances[head.instance_uid] = _open_instance(file)
    if not instances:
        raise SlideOpenError("dicom: no image of type VOLUME in the series")
    return list(instances.values())


def _open_instance(path: Path) -> _Instance:
    with open_regular(path) as file:
        header = read_header(file, _LAST_TAG)
        _require_colour(header)
        coding = FrameCoding(
            str(header.file_meta.TransferSyntaxUID),
            str(header.PhotometricInterpretation),
            header.get("PlanarConfiguration") == 1,
            int(header.Columns),
            int(header.Rows),
        )
        coding.require_known()
        count = int(header.get("NumberOfFrames") or 1)
        return _Instance(path, header, coding, *find_frames(file, header, coding, count))


def _require_colour(header: Any) -> None:
    """Refuse what is not 8-bit colour, and sizes that no frame or level can have."""
    samples, bits = header.SamplesPerPixel, header.BitsAllocated
    if (samples, bits) != (3, 8) or header.get("PixelRepresentation", 0) != 0:
        raise SlideOpenError(
            f"dicom: {samples} x {bits}-bit {header.PhotometricInterpretation} pixels, expected "
            "3 x 8-bit colour (fluorescence and 16 bit are not read)"
        )
    size = header.Rows, header.Columns, header.TotalPixelMatrixRows, header.TotalPixelMatrixColumns
    if min(size) < 1 or size[0] * size[1] > _MOST_FRAME_PX:
        raise SlideOpenError(f"dicom: rows and columns of frame and level are {size}")
    frames = -(-size[2] // size[0]) * -(-size[3] // size[1])
    if frames > _MOST_FRAMES:
        raise SlideOpenError(f"dicom: {frames:,} frames in a level, at most {_MOST_FRAMES:,}")


def _choose_images(
    instances: Sequence[_Instance],
) -> tuple[list[list[_Instance]], list[str]]:
    """The levels, finest first, each with its parts in order; and what to know about the choice."""
    images: dict[str, list[_Instance]] = {}
    for instance in instances:
        images.setdefault(instance.image, []).append(instance)
    for parts in images.values():
        parts.sort(key=lambda part: int(part.header.get("InConcatenationNumber") or 1))
        _require_all_parts(parts)
    # Focal planes or optical paths may be images of their own: the first by path, then the middle.
    by_size: dict[tuple[int, int], list[list[_Instance]]] = {}
    for parts in images.values():
        by_size.setdefault(parts[0].size, []).append(parts)
    notes, levels = [], []
    for size in sorted(by_size, reverse=True):
        same = sorted(by_size[size], key=_image_order)
        first_path = [i for i in same if _image_order(i)[:2] == _image_order(same[0])[:2]]
        levels.append(first_path[len(first_path) // 2])
        if len(same) > 1:
            notes.append(
                f"{len(same)} images of {size[0]}x{size[1]} px in the series, "
                f"{levels[-1][0].path.name} is read"
            )
    return levels, notes


def _require_all_parts(parts: Sequence[_Instance]) -> None:
    total = int(parts[0].header.get("InConcatenationTotalNumber") or len(parts))
    if len(parts) < total:
        raise SlideOpenError(
            f"dicom: {total - len(parts)} of {total} files of a level are missing; there: "
            f"{list_some([part.path.name for part in parts], 3)}"
        )


def _image_order(parts: Sequence[_Instance]) -> tuple[bool, str, float]:
    """Originals before what was derived from them, then by optical path and focal plane."""
    is_derived = parts[0].header.ImageType[0] != "ORIGINAL"
    optical = parts[0].header.get("OpticalPathSequence") or [{}]
    origin = (parts[0].header.get("TotalPixelMatrixOriginSequence") or [{}])[0]
    z = origin.get("ZOffsetInSlideCoordinateSystem") or 0.0
    z = z or min(place[3] for place in parts[0].places)
    return is_derived, str(optical[0].get("OpticalPathIdentifier", "")), float(z)


def _frame_level(parts: Sequence[_Instance], first_file: int) -> tuple[DicomLevel, list[str]]:
    """The frames of one focal plane and optical path of a level, and which of how many it is."""
    coding, (rows, columns) = parts[0].coding, parts[0].grid
    if any((p.coding.width, p.coding.height) != (coding.width, coding.height) for p in parts):
        raise SlideOpenError("dicom: the files of a level have frames of different sizes")
    frames: dict[tuple[int, int], list[tuple[float, int, int, int]]] = {}
    paths = sorted({place[2] for part in parts for place in part.places})
    for number, part in enumerate(parts, first_file):
        for place, offset, size in zip(part.places, part.offsets, part.sizes, strict=True):
            row, column, path, z = place
            if path == paths[0] and 0 <= row < rows and 0 <= column < columns:
                frames.setdefault((row, column), []).append((z, number, int(offset), int(size)))
    if not frames or (parts[0].is_full and len(frames) < rows * columns):
        raise SlideOpenError(
            f"dicom: {len(frames):,} of {rows * columns:,} frames of a level are there"
        )
    table = np.zeros((3, rows * columns), np.int64)
    for (row, column), stack in frames.items():
        # By place: a scanner may write another focus at each.
        table[:, row * columns + column] = sorted(stack)[len(stack) // 2][1:]
    planes = max(map(len, frames.values()))
    notes = [
        f"{what} {number} of {count} is read"
        for what, number, count in (
            ("optical path", 1, len(paths)),
            ("focal plane", planes // 2 + 1, planes),
        )
        if count > 1
    ]
    return DicomLevel(coding.width, coding.height, columns, rows, *table), notes


def _pixel_um(instance: _Instance) -> tuple[float, float] | None:
    """µm per px as (x, y): from the spacing of pixels, else from the size of what was imaged."""
    header = instance.header
    groups = [
        *(header.get("SharedFunctionalGroupsSequence") or []),
        *(header.get("PerFrameFunctionalGroupsSequence") or [])[:1],
    ]
    for group in groups:
        measures = (group.get("PixelMeasuresSequence") or [{}])[0]
        spacing = measures.get("PixelSpacing")
        if spacing and min(map(float, spacing)) > 0:
            return float(spacing[1]) * 1000, float(spacing[0]) * 1000
    across, down = header.get("ImagedVolumeWidth"), header.get("ImagedVolumeHeight")
    if not across or not down:
        return None
    width, height = instance.size
    return float(across) * 1000 / width, float(down) * 1000 / height
