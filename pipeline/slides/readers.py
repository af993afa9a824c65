"""The registry of slide readers: `open_slide`, `scan --reader`, `doctor` and suffixes read it.

A new reader is a module with a subclass of `SlideReader` and one line in `READERS`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from common.errors import UserError

if TYPE_CHECKING:
    from pipeline.slides.reader import SlideReader

AUTO = "auto"
_PICTURES = ".png .jpg .jpeg .bmp"
_TIFF = ".svs .tif .tiff .ndpi .scn .bif .svslide"


@dataclass(frozen=True)
class ReaderEntry:
    """Where a reader's class is, and the suffixes (space-separated) of the files that it opens.

    An `is_checked` reader is only used for slides whose pixels `scan` found to be OpenSlide's.
    Files of a reader that is not `is_searched` are slides only where they are named one by one: in
    a folder of slides they are thumbnails, masks and plots.
    """

    location: str
    suffixes: str
    is_checked: bool = False
    is_searched: bool = True

    def open(self, path: Path, series: str = "") -> "SlideReader":
        """Open a slide, or one image of a file that has several; raises `SlideOpenError`."""
        # Imported here, since training nodes often lack these libraries and `--help` is quick.
        module, _, name = self.location.partition(":")
        slide: SlideReader = getattr(import_module(module), name)(path, series)
        return slide


READERS: Mapping[str, ReaderEntry] = {
    # `auto` tries them in this order. The native one comes first: it is several times as fast, and
    # compared with OpenSlide slide by slide. OpenSlide knows most formats and is the reference.
    # tiffslide is for OME-TIFF and tiled TIFF that OpenSlide refuses, the DICOM reader for what
    # OpenSlide refuses or would interpolate. A further reader goes to the end, so that slides which
    # are read today keep their reader and their pixels.
    "native": ReaderEntry("pipeline.slides.native_reader:NativeReader", _TIFF, is_checked=True),
    "openslide": ReaderEntry(
        "pipeline.slides.openslide_reader:OpenSlideReader", f"{_TIFF} .mrxs .vms .vmu .dcm .czi"
    ),
    "tiffslide": ReaderEntry("pipeline.slides.tiffslide_reader:TiffSlideReader", _TIFF),
    "dicom": ReaderEntry("pipeline.slides.dicom_reader:DicomReader", ".dcm"),
    "picture": ReaderEntry(
        "pipeline.slides.picture_reader:PictureReader", _PICTURES, is_searched=False
    ),
}

SLIDE_SUFFIXES = frozenset(
    suffix for entry in READERS.values() if entry.is_searched for suffix in entry.suffixes.split()
)
"""Suffixes, in lower case, of the files that a folder of slides is searched for."""

PICTURE_SUFFIXES = frozenset(_PICTURES.split())
"""Suffixes, in lower case, of pictures: slides where they are named by a glob, path or table."""


def reader_choices() -> list[str]:
    """`auto` and the readers' names.

    >>> reader_choices()
    ['auto', 'native', 'openslide', 'tiffslide', 'dicom', 'picture']
    """
    return [AUTO, *READERS]


def reader_entry(name: str) -> ReaderEntry:
    """The entry of that name; raises `UserError` for any other."""
    if name not in READERS:
        raise UserError(f"no reader '{name}': expected one of {', '.join(reader_choices())}")
    return READERS[name]


def readers_for(path: Path) -> list[str]:
    """The readers that know the file's suffix; all of them for an unknown suffix.

    >>> readers_for(Path("a.mrxs")), readers_for(Path("a.PNG"))
    (['openslide'], ['picture'])
    """
    suffix = ".dcm" if path.is_dir() else path.suffix.lower()
    return [n for n, entry in READERS.items() if suffix in entry.suffixes.split()] or [*READERS]
