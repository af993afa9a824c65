"""Opening a slide with the reader that fits."""

import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from common.files import open_regular, read_regular
from common.text import one_line
from pipeline.dataset import Slide
from pipeline.slides.dicom_series import DICOM_SUFFIX, read_head
from pipeline.slides.identity import OtherFileError
from pipeline.slides.levels import without_levels
from pipeline.slides.reader import SlideOpenError, SlideReader, SlideReadError, refuse_extent
from pipeline.slides.readers import AUTO, READERS, reader_entry, readers_for
from pipeline.slides.tiff_limits import refuse_unbounded

if TYPE_CHECKING:
    from pipeline.slides.native_reader import NativeReader
    from pipeline.slides.tiff_images import TiffChoice

_SHOW_WHAT_COMES_FIRST = ("openslide", "tiffslide")
"""Readers that show what a TIFF file begins with, whatever else it has."""
_MIRAX_INDEX, _MOST_INDEX_BYTES = "Slidedat.ini", 16 << 20
_FILE_NAME = re.compile(r"/|\.[A-Za-z]\w*$")
"""What a value of an index has in it that names a file."""
_READ_WHOLE_PX = 224
_A_TIFF = Path("any.tif")


def open_slide(path: Path, reader: str = AUTO, series: str = "") -> SlideReader:
    """Open a slide with the named reader; "auto" is the first for its suffix that opens it.

    `series` names the image of a file that has several; '' is the largest that may be the slide.
    Of the readers that are only used for slides whose pixels were compared, "auto" takes one
    where no other opens the image (see `best_reader`, which compares). Raises `SlideOpenError`
    with the reasons in one line.
    """
    _refuse_known_non_slides(path)
    _refuse_other_parts(path)
    choice = _choose_image(path, series)
    names = [reader] if reader != AUTO else _readers_to_try(path, choice)
    reasons = []
    for name in names:
        try:
            return _within_limits(_open_chosen(path, name, series, choice))
        except SlideOpenError as error:
            reasons.append(one_line(error, 120))
    if choice is not None and choice.image.unfit:
        reasons = [f"its pixels are {choice.image.unfit}, expected RGB of 8 or 16 bits per sample"]
    raise SlideOpenError(f"cannot be opened: {'; '.join(reasons)}")


def _readers_to_try(path: Path, choice: "TiffChoice | None") -> list[str]:
    """The names of the readers that may show the image, in the order to try them."""
    names = readers_for(_A_TIFF if choice else path)
    unchecked = [name for name in names if not READERS[name].is_checked]
    if choice is None:
        return unchecked
    checked = [name for name in names if name not in unchecked]
    # Those that need a comparison come last, for images that the others do not show.
    return checked if choice.only_native else unchecked + checked


def _open_chosen(path: Path, name: str, series: str, choice: "TiffChoice | None") -> SlideReader:
    """The file in this reader, which must show the image that was chosen."""
    entry = reader_entry(name)
    if name not in _SHOW_WHAT_COMES_FIRST:
        return entry.open(path, series) if series else entry.open(path)
    if choice is None:
        if series not in ("", "0") and path.suffix.lower() in entry.suffixes.split():
            raise SlideOpenError(f"no series '{series}': {name} shows one image of this format")
        return entry.open(path, series) if series else entry.open(path)
    if choice.only_native:
        raise SlideOpenError(f"not with {name}: {choice.only_native}; use reader native")
    if choice.is_misshown:
        raise SlideOpenError(f"{name} shows no {choice.image.unfit}")
    reader = entry.open(path)
    reader.notes = (*reader.notes, *choice.notes)
    return reader


def _choose_image(path: Path, series: str) -> "TiffChoice | None":
    """The image of a TIFF file that is the slide, None for other formats."""
    # Imported here, since training nodes often lack these libraries.
    from pipeline.slides.tiff_images import choose_in_file

    return choose_in_file(path, series)


def open_scanned(slide: Slide, path: Path) -> SlideReader:
    """Open a slide as `scan` recorded it: its reader, its series, and only the levels it took.

    `path` is where the file is now (see `local_slide`). Raises `SlideOpenError`, and
    `OtherFileError` where the file's levels are not those that `scan` recorded.
    """
    opened = open_slide(path, slide.reader, slide.series)
    reader = without_levels(opened, slide.levels_left_out)
    sizes = [(level.width, level.height) for level in reader.levels]
    if slide.levels and sizes != [(width, height) for width, height, _ in slide.levels]:
        opened.close()
        raise OtherFileError(slide.slide_id, f"{path} has other levels")
    return reader


def best_reader(path: Path, series: str = "") -> tuple[SlideReader, str]:
    """The native reader where it shows what OpenSlide shows; else OpenSlide or another.

    Returns the open slide and, where it is not the native reader, why. Raises `SlideOpenError`.
    """
    # Imported here: only `scan` and `doctor` compare readers.
    from pipeline.slides.compare import find_disagreement
    from pipeline.slides.native_reader import NativeReader

    reference = open_slide(path, series=series)
    if reference.name not in _SHOW_WHAT_COMES_FIRST:
        is_native = isinstance(reference, NativeReader)
        return reference, "" if is_native else "OpenSlide does not open it"
    is_openslide = reference.name == "openslide"
    if is_openslide and reference.vendor == "dicom":
        return _best_dicom(reference, series)
    try:
        native = NativeReader(path, series)
    except SlideOpenError as error:
        return reference, one_line(error, 160) if is_openslide else "OpenSlide does not open it"
    # The native reader counts the tiles that are not in the file; others show the same image.
    reference.notes = native.notes
    # What others read rightly stays with them: a slide's tiles are not made again for a new reader.
    if (native.unusual or not is_openslide) and not _is_misread(reference, native):
        native.close()
        reason = f"native: {native.unusual}" if is_openslide else "OpenSlide does not open it"
        return reference, reason
    # tiffslide may take a label for a level; it is no reference for that.
    reason = find_disagreement(native, reference) if is_openslide else ""
    chosen, other = (reference, native) if reason else (native, reference)
    other.close()
    return chosen, reason


def _best_dicom(reference: SlideReader, series: str) -> tuple[SlideReader, str]:
    """The DICOM reader for what OpenSlide interpolates or cannot read; else OpenSlide."""
    from pipeline.slides.compare import find_disagreement
    from pipeline.slides.dicom_reader import DicomReader

    problem = _read_problem(reference)
    fractional = [v.downsample for v in reference.levels if v.downsample != round(v.downsample)]
    if not problem and not fractional:
        return reference, "native: DICOM files are read by other readers"
    try:
        slide = DicomReader(reference.path, series)
    except SlideOpenError as error:
        return reference, one_line(error, 160)
    if problem:
        reference.close()
        return slide, f"OpenSlide cannot read it: {problem}"
    reason = find_disagreement(slide, reference)
    chosen, other = (reference, slide) if reason else (slide, reference)
    other.close()
    return chosen, reason or f"OpenSlide interpolates a level of downsample {fractional[0]:.6g}"


def _read_problem(reader: SlideReader) -> str:
    """Why the first pixel of a level cannot be read, '' where they all can."""
    try:
        for level in range(len(reader.levels)):
            reader.read(level, 0, 0, 1, 1)
    except SlideReadError as error:
        return one_line(error, 120)
    return ""


def _is_misread(reference: SlideReader, native: "NativeReader") -> bool:
    """Whether others interpolate a level's pixels, or show gaps as what they are not."""
    # OpenSlide shows tiles that level 0 leaves out as white, tiffslide as black; tiffslide also
    # takes any tiled page of an Aperio file for a level.
    if reference.name == "tiffslide":
        theirs, ours = ({(v.width, v.height) for v in r.levels} for r in (reference, native))
        if theirs - ours or any(level.missing.any() for level in native.native):
            return True
    # A level smaller than a tile is read whole, from its corner: nothing falls between its pixels.
    is_fractional = any(
        v.downsample != round(v.downsample) and max(v.width, v.height) > _READ_WHOLE_PX
        for v in reference.levels
    )
    return is_fractional or len(native.levels) < len(reference.levels)


def _within_limits(reader: SlideReader) -> SlideReader:
    """The reader, closed and refused where it shows more pixels than the slide's bytes can."""
    try:
        base = reader.levels[0]
        refuse_extent(base.width, base.height, sum(_size_of(file) for file in _parts(reader.path)))
    except SlideOpenError:
        reader.close()
        raise
    return reader


def _parts(path: Path) -> list[Path]:
    """The files that OpenSlide reads with a slide: named in it, or all in its folder."""
    suffix = path.suffix.lower()
    if path.is_dir() or (DICOM_SUFFIX.fullmatch(suffix) and read_head(path)):
        return [*(path if path.is_dir() else path.parent).iterdir()]
    if suffix == ".mrxs" and path.with_suffix("").is_dir():
        index = path.with_suffix("") / _MIRAX_INDEX
        return [path, *index.parent.iterdir(), *_named_parts(index)]
    return [path, *(_named_parts(path) if suffix in (".vms", ".vmu") else ())]


def _named_parts(index: Path) -> Iterator[Path]:
    """The files that an index of `key = value` lines names."""
    if not os.path.lexists(index):
        return
    for line in read_regular(index, _MOST_INDEX_BYTES).decode(errors="replace").splitlines():
        name = line.partition("=")[2].strip().lstrip("/")
        if _FILE_NAME.search(name):
            part = index.parent / name
            if part.exists():
                yield part


def _size_of(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _refuse_other_parts(path: Path) -> None:
    """Refuse a slide with a pipe or device among the files that are opened with it."""
    try:
        for part in _parts(path):
            mode = part.stat().st_mode if part.exists() else stat.S_IFREG
            if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                raise SlideOpenError(f"{part.name} next to it is no regular file")
    except OSError as error:
        raise SlideOpenError(f"cannot be read: {error.strerror}") from error


def _refuse_known_non_slides(path: Path) -> None:
    if path.is_dir():
        return
    try:
        with open_regular(path) as file:
            head = file.read(64)
        refuse_unbounded(path)
    except OSError as error:
        raise SlideOpenError(f"cannot be read: {error.strerror}") from error
    if not head:
        raise SlideOpenError("the file is empty (0 bytes); fetch it again")
    if head.startswith(b"version https://git-lfs"):
        raise SlideOpenError("a Git LFS pointer, not the slide itself; run `git lfs pull`")
