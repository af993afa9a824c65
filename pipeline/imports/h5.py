"""`import h5`: coordinate files of CLAM and TRIDENT, one per slide.

Both keep `coords` [n, 2], upper left corners in level-0 pixels, and state in its attributes how
large a patch is: TRIDENT as `patch_size_level0`, CLAM as `patch_size` at `patch_level`.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from common.console import print_line
from common.errors import UserError
from common.files import hash_file, require_regular
from common.text import list_some, one_line
from pipeline.dataset import Dataset, Slide, fingerprint_of, read_slides
from pipeline.imports.candidates import ImportedTiles, record_candidates
from pipeline.imports.config import Frame, H5Config
from pipeline.imports.coordinates import dataset_frames
from pipeline.imports.frames import inner_bounds, with_bounds
from pipeline.imports.positions import Floats, SlideFrames, match_slides, place_tiles
from pipeline.imports.tile_fit import TileFit, moved_origin, moved_parameters
from pipeline.tissue.stage import usable_slides

_SUFFIXES = (".h5", ".hdf5")
_TRIDENT_SUFFIX = "_patches"
_SIZE_SLACK = 0.001
_MOST_PATCHES = 50_000_000
"""Of one slide: ten times what fits on the largest, edge to edge at 0.25 µm per px."""


@dataclass(frozen=True)
class Patches:
    """A slide's patches: upper left corners float64 [n, 2] and side, in level-0 pixels.

    `frame` is where they count from, "auto" where the file does not say.
    """

    path: Path
    tool: str
    corners: Floats
    size: float
    frame: Frame = "auto"


def import_h5(dataset: Dataset, config: H5Config) -> int:
    """Candidates and one selection from a folder of h5 files; returns the exit status."""
    try:
        import h5py  # noqa: F401
    except ImportError as error:
        raise UserError(
            "import h5 needs the package h5py, which is not installed: pip install '.[h5]'"
        ) from error
    slides = usable_slides(dataset)
    frames = dataset_frames(dataset, slides)
    files = find_files(config.folder, slides, [slide.slide_id for slide in read_slides(dataset)])
    patches = {index: read_patches(path, slides[index]) for index, path in sorted(files.items())}
    tiles = _place_patches(config, slides, frames, patches)
    _report_sizes(slides, frames, patches)
    sums = {path.name: hash_file(path) for path in files.values()}
    parameters = {
        "name": "imported h5",
        "selection": config.name,
        "files": fingerprint_of(files=sums),
        "anchor": config.anchor,
        "drop_outside": config.drop_outside,
    }
    return record_candidates(dataset, slides, [tiles], parameters | moved_parameters([tiles]))


def find_files(folder: Path, slides: Sequence[Slide], known: Sequence[str]) -> dict[int, Path]:
    """The h5 file of each slide that has one, by the slide's index; files of no slide are listed.

    `known` are the ids of all slides of the dataset, as in `match_slides`.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; expected one of h5 files, as CLAM's `patches`")
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in _SUFFIXES)
    names = [path.stem.removesuffix(_TRIDENT_SUFFIX) for path in paths]
    files: dict[int, Path] = {}
    unknown = []
    for path, index in zip(paths, match_slides(names, slides, known).tolist(), strict=True):
        if index < 0:
            unknown.append(path.name)
        elif index in files:
            raise UserError(f"{path} and {files[index].name} are of one slide; leave one of them")
        else:
            files[index] = path
    if not files:
        raise UserError(
            f"{folder} has no h5 file of a usable slide; expected names such as "
            f"{slides[0].slide_id}.h5, there: {', '.join(unknown[:3]) or 'none'}"
        )
    if unknown:
        print_line(
            f"import: {len(unknown):,} h5 files are of no usable slide of this dataset: "
            f"{list_some(unknown)}"
        )
    return files


def read_patches(path: Path, slide: Slide) -> Patches:
    """Corners [n, 2] and size of a slide's patches in level-0 px; a `UserError` names the file."""
    import h5py

    try:
        require_regular(path)
        with h5py.File(path, "r") as file:
            coords = _own_array(path, file)
            # An array that was never written is as large as it claims, in a few bytes.
            if (count := math.prod(coords.shape)) > 2 * _MOST_PATCHES:
                most = f"{2 * _MOST_PATCHES:,}"
                raise UserError(f"{path}: coords has {count:,} numbers, expected at most {most}")
            corners = np.asarray(coords, np.float64)
            attributes = {key: np.asarray(value) for key, value in coords.attrs.items()}
    except (OSError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"{path} cannot be read as HDF5: {one_line(error, 120)}") from error
    if corners.size == 0:
        corners = corners.reshape(0, 2)
    if corners.ndim != 2 or corners.shape[1] != 2:
        raise UserError(f"{path}: coords is {list(corners.shape)}, expected [n, 2]")
    if not np.isfinite(corners).all():
        raise UserError(f"{path}: coords has NaN or infinity, expected level-0 pixels")
    tool, size = patch_size(path, attributes, slide)
    return Patches(path, tool, corners, size, _stated_frame(path, attributes, slide))


def _own_array(path: Path, file: Any) -> Any:
    """The array `coords` of an open h5 file, which is in no other file.

    HDF5 has links, storage and virtual arrays in files of any name, which opening would follow.
    """
    import h5py

    if (link := file.get("coords", getlink=True)) is None:
        raise UserError(f"{path}: no dataset 'coords'; there: {', '.join(file) or 'none'}")
    coords = file["coords"] if isinstance(link, h5py.HardLink) else None
    if coords is None or getattr(coords, "external", None) or getattr(coords, "is_virtual", False):
        raise UserError(f"{path}: coords is in another file or a link; copy the values into it")
    if not isinstance(coords, h5py.Dataset) or coords.dtype.kind not in "iuf" or not coords.shape:
        raise UserError(f"{path}: coords is no array of numbers, expected [n, 2]")
    return coords


def _stated_frame(path: Path, attributes: Mapping[str, npt.NDArray[Any]], slide: Slide) -> Frame:
    """The frame by the slide's size in TRIDENT's attributes, "auto" where they do not say.

    Raises `UserError` where it is that of another slide.
    """
    try:
        size = tuple(float(attributes[f"level0_{side}"]) for side in ("width", "height"))
    except (KeyError, TypeError, ValueError):
        return "auto"
    sizes: dict[Frame, tuple[int, int]] = {"canvas": (slide.width, slide.height)}
    if bounds := inner_bounds(with_bounds(slide)):
        sizes["bounds"] = bounds[2:]
    for frame, known in sizes.items():
        if all(abs(a - b) <= 1 + _SIZE_SLACK * b for a, b in zip(size, known, strict=True)):
            return frame
    raise UserError(
        f"{path} was made from a slide of {size[0]:.0f}x{size[1]:.0f} px, but {slide.slide_id} is "
        f"{slide.width}x{slide.height}; is it of another scan or level?"
    )


def patch_size(
    path: Path, attributes: Mapping[str, npt.NDArray[Any]], slide: Slide
) -> tuple[str, float]:
    """The tool that wrote the attributes, and a patch's side in level-0 pixels."""
    if "patch_size_level0" in attributes:
        return "TRIDENT", _number(path, attributes, "patch_size_level0")
    if "patch_size" not in attributes or "patch_level" not in attributes:
        raise UserError(
            f"{path}: coords has neither patch_size_level0 (TRIDENT) nor patch_size and "
            f"patch_level (CLAM); there: {', '.join(sorted(attributes)) or 'no attribute'}"
        )
    level = int(_number(path, attributes, "patch_level", least=0))
    if "downsample" in attributes:
        downsample = _number(path, attributes, "downsample", most_values=2)
    elif 0 <= level < len(slide.levels):
        downsample = slide.levels[level][2]
    else:
        raise UserError(f"{path}: patch_level {level}, but {slide.slide_id} has no such level")
    return "CLAM", _number(path, attributes, "patch_size") * downsample


def _number(
    path: Path,
    attributes: Mapping[str, npt.NDArray[Any]],
    key: str,
    *,
    least: float = 1e-3,
    most_values: int = 1,
) -> float:
    """The first of an attribute's numbers; a `UserError` names one that is none or out of range."""
    values = np.ravel(attributes[key])
    try:
        number = float(values[0])
    except (TypeError, ValueError, IndexError):
        number = math.nan
    if not (least <= number < 1e9 and len(values) <= most_values):
        what = one_line(values.tolist(), 60)
        raise UserError(f"{path}: {key} of coords is {what}, expected a number from {least:g} up")
    return number


def _place_patches(
    config: H5Config, slides: Sequence[Slide], frames: SlideFrames, patches: Mapping[int, Patches]
) -> ImportedTiles:
    counts = [len(slide_patches.corners) for slide_patches in patches.values()]
    codes = np.repeat(np.fromiter(patches, np.int32, len(patches)), counts)
    corners = np.concatenate([slide_patches.corners for slide_patches in patches.values()])
    if config.anchor == "center":
        sides = np.repeat([slide_patches.size for slide_patches in patches.values()], counts)
        corners = corners + ((sides - frames.size[codes]) / 2)[:, None]
    stated = {i: found.frame for i, found in patches.items() if found.frame != "auto"}
    fit = TileFit(str(config.folder), slides, frames, config.frame, stated)
    x, y, moved = fit.shift_tiles(codes, corners[:, 0], corners[:, 1])
    x, y, is_inside = place_tiles(frames, codes, x, y)
    if not is_inside.all():
        # Patches at a border are padded by both tools; our tiles must be on the slide.
        outside = Counter(codes[~is_inside].tolist())
        worst, count = outside.most_common(1)[0]
        what = (
            f"{config.folder}: {outside.total():,} tiles would reach over the edge of "
            f"{len(outside):,} slides, most ({count:,}) in {patches[worst].path.name} "
            f"(slide {slides[worst].width}x{slides[worst].height})"
        )
        if not config.drop_outside:
            raise UserError(f"{what}; --drop-outside leaves them out")
        print_line(f"import: {what}; left out")
    if not is_inside.any():
        raise UserError(f"{config.folder}: no tile is on its slide; nothing was written")
    codes, x, y = codes[is_inside], x[is_inside], y[is_inside]
    fit.check_tissue(codes, x, y)
    origin: dict[str, object] = {
        "folder": config.folder.name, "anchor": config.anchor, "files": len(patches)
    }  # fmt: skip
    return ImportedTiles(config.name, codes, x, y, origin | moved_origin(moved))


def _report_sizes(
    slides: Sequence[Slide], frames: SlideFrames, patches: Mapping[int, Patches]
) -> None:
    """Report how many slides have patches of another size than our tiles."""
    tools = " and ".join(sorted({slide_patches.tool for slide_patches in patches.values()}))
    total = sum(len(slide_patches.corners) for slide_patches in patches.values())
    print_line(
        f"import: {total:,} patches of {len(patches):,} slides, written by {tools}: read coords as "
        "level-0 pixels of each patch's upper left corner"
    )
    different = [i for i, found in patches.items() if abs(found.size - frames.size[i]) > 1]
    if different:
        index = different[0]
        print_line(
            f"import: on {len(different):,} of {len(patches):,} slides a patch is not as large as "
            f"a tile of this dataset: {slides[index].slide_id} {patches[index].size:g} against "
            f"{frames.size[index]:g} level-0 px; see --anchor"
        )
