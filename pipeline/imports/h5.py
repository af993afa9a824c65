"""`import h5`: coordinate files of CLAM and TRIDENT, one a slide.

Both keep `coords` [n, 2], upper left corners in level-0 pixels, and say in its attributes how
large a patch is: TRIDENT as `patch_size_level0`, CLAM as `patch_size` at `patch_level`.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from common.console import say
from common.errors import UserError
from pipeline.dataset import Dataset, Slide, fingerprint_of, read_slides
from pipeline.imports.candidates import Part, record_candidates
from pipeline.imports.coordinates import dataset_frames, file_sha256
from pipeline.imports.positions import Floats, SlideFrames, inside, match_slides, place
from pipeline.tissue.stage import usable_slides

SUFFIXES = (".h5", ".hdf5")
_TRIDENT_SUFFIX = "_patches"
_SHOWN = 20


@dataclass(frozen=True)
class H5Config:
    """The folder, the selection's name, and how tiles lie in the patches.

    `anchor` "corner" puts a tile's upper left corner on the patch's, "center" their centres on
    each other.
    """

    folder: Path
    name: str
    anchor: str = "corner"
    drop_outside: bool = False


@dataclass(frozen=True)
class Patches:
    """A slide's patches: upper left corners float64 [n, 2] and side, in level-0 pixels."""

    path: Path
    tool: str
    corners: Floats
    size: float


def import_h5(dataset: Dataset, config: H5Config) -> int:
    """Candidates and one selection from a folder of h5 files; returns the exit status."""
    _require_h5py()
    slides = usable_slides(dataset)
    frames = dataset_frames(dataset, slides)
    files = find_files(config.folder, slides, [one.slide_id for one in read_slides(dataset)])
    patches = {index: read_patches(path, slides[index]) for index, path in sorted(files.items())}
    part = _part(config, slides, frames, patches)
    _say_sizes(slides, frames, patches)
    listed = {path.name: file_sha256(path) for path in files.values()}
    parameters: dict[str, Any] = {
        "name": "imported h5",
        "selection": config.name,
        "files": fingerprint_of(files=listed),
        "anchor": config.anchor,
        "drop_outside": config.drop_outside,
    }
    return record_candidates(dataset, slides, [part], parameters)


def _require_h5py() -> None:
    try:
        import h5py  # noqa: F401
    except ImportError as error:
        raise UserError(
            "import h5 needs the package h5py, which is not installed: pip install '.[h5]'"
        ) from error


def find_files(folder: Path, slides: Sequence[Slide], known: Sequence[str]) -> dict[int, Path]:
    """The h5 file of each slide that has one, by the slide's index; strangers are listed.

    `known` are the ids of all slides of the dataset, as in `match_slides`.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; expected one of h5 files, as CLAM's `patches`")
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    names = [path.stem.removesuffix(_TRIDENT_SUFFIX) for path in paths]
    found: dict[int, Path] = {}
    unknown = []
    for path, index in zip(paths, match_slides(names, slides, known).tolist(), strict=True):
        if index < 0:
            unknown.append(path.name)
        elif index in found:
            raise UserError(f"{path} and {found[index].name} are of one slide; leave one of them")
        else:
            found[index] = path
    if not found:
        raise UserError(
            f"{folder} holds no h5 file of a usable slide; expected names such as "
            f"{slides[0].slide_id}.h5, there: {', '.join(unknown[:3]) or 'none'}"
        )
    if unknown:
        more = f" and {len(unknown) - _SHOWN:,} more" if len(unknown) > _SHOWN else ""
        say(
            f"import: {len(unknown):,} h5 files are of no usable slide of this dataset: "
            f"{', '.join(unknown[:_SHOWN])}{more}"
        )
    return found


def read_patches(path: Path, slide: Slide) -> Patches:
    """Corners and size of a slide's patches; raises `UserError` naming the file."""
    import h5py

    try:
        with h5py.File(path, "r") as file:
            if "coords" not in file:
                raise UserError(f"{path}: no dataset 'coords'; there: {', '.join(file) or 'none'}")
            corners = np.asarray(file["coords"], np.float64)
            attributes = {key: np.asarray(value) for key, value in file["coords"].attrs.items()}
    except OSError as error:
        reason = " ".join(str(error).split())[:120]
        raise UserError(f"{path} cannot be read as HDF5: {reason}") from error
    if corners.size == 0:
        corners = corners.reshape(0, 2)
    if corners.ndim != 2 or corners.shape[1] != 2:
        raise UserError(f"{path}: coords is {list(corners.shape)}, expected [n, 2]")
    tool, size = patch_size(path, attributes, slide)
    return Patches(path, tool, corners, size)


def patch_size(
    path: Path, attributes: dict[str, npt.NDArray[Any]], slide: Slide
) -> tuple[str, float]:
    """The tool that wrote the attributes, and a patch's side in level-0 pixels."""
    if "patch_size_level0" in attributes:
        return "TRIDENT", float(attributes["patch_size_level0"])
    if "patch_size" not in attributes or "patch_level" not in attributes:
        raise UserError(
            f"{path}: coords has neither patch_size_level0 (TRIDENT) nor patch_size and "
            f"patch_level (CLAM); there: {', '.join(sorted(attributes)) or 'no attribute'}"
        )
    level = int(attributes["patch_level"])
    if "downsample" in attributes:
        downsample = float(np.ravel(attributes["downsample"])[0])
    elif 0 <= level < len(slide.levels):
        downsample = slide.levels[level][2]
    else:
        raise UserError(f"{path}: patch_level {level}, but {slide.slide_id} has no such level")
    return "CLAM", float(attributes["patch_size"]) * downsample


def _part(
    config: H5Config, slides: Sequence[Slide], frames: SlideFrames, patches: dict[int, Patches]
) -> Part:
    counts = [len(one.corners) for one in patches.values()]
    codes = np.repeat(np.fromiter(patches, np.int32, len(patches)), counts)
    corners = np.concatenate([one.corners for one in patches.values()])
    sides = np.repeat([one.size for one in patches.values()], counts)
    if config.anchor == "center":
        corners = corners + ((sides - frames.size[codes]) / 2)[:, None]
    step = frames.step[codes]
    x, y = place(corners[:, 0], step), place(corners[:, 1], step)
    kept = inside(frames, codes, x, y)
    if not kept.all():
        _refuse_outside(config, slides, patches, codes[~kept])
    if not kept.any():
        raise UserError(f"{config.folder}: no tile lies on its slide; nothing was written")
    origin = {"folder": config.folder.name, "anchor": config.anchor, "files": len(patches)}
    return Part(config.name, codes[kept], x[kept], y[kept], origin)


def _refuse_outside(
    config: H5Config,
    slides: Sequence[Slide],
    patches: dict[int, Patches],
    codes: npt.NDArray[np.int32],
) -> None:
    """Patches at a border are padded by both tools; our tiles must lie on the slide."""
    worst, count = Counter(codes.tolist()).most_common(1)[0]
    slide = slides[worst]
    what = (
        f"{config.folder}: {len(codes):,} tiles would reach over the edge of "
        f"{len(np.unique(codes)):,} slides, most ({count:,}) in {patches[worst].path.name} "
        f"(slide {slide.width}x{slide.height})"
    )
    if not config.drop_outside:
        raise UserError(f"{what}; --drop-outside leaves them out")
    say(f"import: {what}; left out")


def _say_sizes(slides: Sequence[Slide], frames: SlideFrames, patches: dict[int, Patches]) -> None:
    """State how many slides have patches of another size than our tiles."""
    differ = {i: one for i, one in patches.items() if abs(one.size - frames.size[i]) > 1}
    tools = " and ".join(sorted({one.tool for one in patches.values()}))
    total = sum(len(one.corners) for one in patches.values())
    say(f"import: {total:,} patches of {len(patches):,} slides, written by {tools}")
    if differ:
        index, one = next(iter(differ.items()))
        side = frames.size[index]
        say(
            f"import: on {len(differ):,} of {len(patches):,} slides a patch is not as large as a "
            f"tile of this dataset: {slides[index].slide_id} {one.size:g} against {side:g} level-0 "
            "px; see --anchor"
        )
