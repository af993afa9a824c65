"""Opening a slide with the reader that fits."""

from pathlib import Path
from typing import TYPE_CHECKING, cast

from common.text import one_line
from pipeline.dataset import Slide
from pipeline.slides.levels import without_levels
from pipeline.slides.reader import SlideOpenError, SlideReader, SlideReadError
from pipeline.slides.readers import AUTO, READERS, reader_entry, readers_for

if TYPE_CHECKING:
    from pipeline.slides.tiled_reader import TiledReader


def open_slide(path: Path, reader: str = AUTO, series: str = "") -> SlideReader:
    """Open a slide with the named reader; "auto" is the first for its suffix that opens it.

    `series` names the image of a file that has several; '' leaves the choice to the reader.
    Whether the native reader may be used is for `scan` to find out (see `best_reader`). Raises
    `SlideOpenError` with the reasons in one line.
    """
    _refuse_known_non_slides(path)
    reasons = []
    unchecked = [name for name in readers_for(path) if not READERS[name].is_checked]
    for name in unchecked if reader == AUTO else [reader]:
        try:
            return reader_entry(name).open(path, series)
        except SlideOpenError as error:
            reasons.append(one_line(error, 120))
    raise SlideOpenError(f"cannot be opened: {'; '.join(reasons)}")


def open_scanned(slide: Slide, path: Path) -> SlideReader:
    """Open a slide as `scan` recorded it: its reader, its series, and only the levels it took.

    `path` is where the file is now (see `local_slide`). Raises `SlideOpenError`.
    """
    reader = open_slide(path, slide.reader, slide.series)
    return without_levels(reader, slide.levels_left_out)


def best_reader(path: Path, series: str = "") -> tuple[SlideReader, str]:
    """The native reader where it shows what OpenSlide shows; else OpenSlide or another.

    DICOM that OpenSlide interpolates or cannot read is for the DICOM reader. Returns the open
    slide and, where it is not the native reader, why. Raises `SlideOpenError`.
    """
    reference = open_slide(path, series=series)
    if reference.name != "openslide":
        return reference, "OpenSlide does not open it"
    name = why = ""
    if reference.vendor == "dicom":
        if problem := _read_problem(reference):
            reference.close()
            return open_slide(path, "dicom", series), f"OpenSlide cannot read it: {problem}"
        if fractional := [v.downsample for v in reference.levels if v.downsample % 1]:
            name, why = "dicom", f"OpenSlide interpolates a level of downsample {fractional[0]:.6g}"
    try:
        own = READERS[name or "native"].open(path, series)
    except SlideOpenError as error:
        return reference, one_line(error, 160)
    # Imported here: only `scan` and `doctor` compare readers.
    from pipeline.slides.compare import find_disagreement

    reason = find_disagreement(cast("TiledReader", own), reference)
    chosen, other = (reference, own) if reason else (own, reference)
    other.close()
    return chosen, reason or why


def _read_problem(reader: SlideReader) -> str:
    """Why the first pixel of a level cannot be read, '' where they all can."""
    try:
        for level in range(len(reader.levels)):
            reader.read(level, 0, 0, 1, 1)
    except SlideReadError as error:
        return one_line(error, 120)
    return ""


def _refuse_known_non_slides(path: Path) -> None:
    if path.is_dir():
        return
    try:
        with path.open("rb") as file:
            head = file.read(64)
    except OSError as error:
        raise SlideOpenError(f"cannot be read: {error.strerror}") from error
    if not head:
        raise SlideOpenError("the file is empty (0 bytes); fetch it again")
    if head.startswith(b"version https://git-lfs"):
        raise SlideOpenError("a Git LFS pointer, not the slide itself; run `git lfs pull`")
