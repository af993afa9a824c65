"""Which DICOM files of a folder are one slide: those of one series (SeriesInstanceUID).

Exports of archives (IDC, GDC, PACS) put many slides into one folder, each of several files: one
per pyramid level, label and overview. Only the beginning of a file is read, and once.
"""

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO

from common.files import open_regular
from common.text import list_some
from pipeline.slides.reader import SlideOpenError

WSI_CLASS = "1.2.840.10008.5.1.4.1.1.77.1.6"
"""SOP class of whole-slide images; annotations, segmentations and reports have others."""

_MAGIC, _MAGIC_AT = b"DICM", 128
_LAST_TAG = 0x00400512
"""ContainerIdentifier, which names the glass slide; the tables of frames come after it."""
DICOM_SUFFIX = re.compile(r"|\.dcm|\.dicom|\.dic|\.[0-9]+", re.IGNORECASE)
"""Archives name files by their UIDs, with or without a suffix: what follows the last dot is '', a
suffix of DICOM or a number."""
_SETTLED_NS = 2_000_000_000
_MOST_VALUE_BYTES, _UNDEFINED = 1 << 29, 0xFFFFFFFF


@dataclass(frozen=True)
class DicomHead:
    """The beginning of a DICOM file; `image_type` is such as ("ORIGINAL", "PRIMARY", "VOLUME").

    `container` (ContainerIdentifier) is the glass slide's, '' where the file does not say.
    """

    series_uid: str
    instance_uid: str
    sop_class: str
    image_type: tuple[str, ...]
    container: str = ""
    series_number: str = ""


def read_head(path: Path) -> DicomHead | None:
    """What the file says it is; None for a file that is not DICOM or cannot be read."""
    try:
        state = path.stat()
        return _read_head(path, state.st_size, state.st_mtime_ns)
    except OSError:
        return None


@lru_cache(maxsize=65_536)
def _read_head(path: Path, _size: int, _mtime_ns: int) -> DicomHead | None:
    with open_regular(path) as file:
        if file.read(_MAGIC_AT + len(_MAGIC))[_MAGIC_AT:] != _MAGIC:
            return None
        file.seek(0)
        try:
            # Not to the pixels: the table of a sparse slide's frames may be 100 MB before them.
            data = read_header(file, _LAST_TAG)
            kinds = data.get("ImageType") or ()
            return DicomHead(
                str(data.get("SeriesInstanceUID", "")),
                str(data.get("SOPInstanceUID", "")),
                str(data.get("SOPClassUID", "")),
                (kinds,) if isinstance(kinds, str) else tuple(map(str, kinds)),
                str(data.get("ContainerIdentifier") or ""),
                str(data.get("SeriesNumber") or ""),
            )
        except Exception:
            # pydicom raises many kinds for damaged headers; all mean the same.
            return None


def read_header(file: BinaryIO, last_tag: int) -> Any:
    """The attributes of an open DICOM file up to a tag; the file is left where the next begins."""
    # Imported here: `--help` is quick, and most cohorts have no DICOM file.
    from pydicom import config
    from pydicom.filereader import read_partial

    # Files that break a rule of the standard are common: pydicom would warn of each value.
    config.settings.reading_validation_mode = config.IGNORE

    def stop(tag: int, _kind: str | None, length: int) -> bool:
        if tag <= last_tag and _MOST_VALUE_BYTES < length != _UNDEFINED:
            raise ValueError(f"the value of an attribute has {length:,} bytes")
        return tag > last_tag

    return read_partial(file, stop_when=stop)


def group_series(folder: Path) -> Mapping[str, Sequence[Path]]:
    """The whole-slide DICOM files in a folder by SeriesInstanceUID; files sorted by name.

    Series are in the order of their first files. Files of other kinds, hidden files and folders
    below are passed over.
    """
    changed_ns = folder.stat().st_mtime_ns
    # While files are still being written, two changes may have one time.
    is_settled = time.time_ns() - changed_ns > _SETTLED_NS
    return (_group_series if is_settled else _group_series.__wrapped__)(folder, changed_ns)


@lru_cache(maxsize=256)
def _group_series(folder: Path, _changed_ns: int) -> Mapping[str, Sequence[Path]]:
    groups: dict[str, list[Path]] = {}
    for path in sorted(folder.iterdir()):
        if (
            path.name.startswith(".")
            or not DICOM_SUFFIX.fullmatch(path.suffix)
            or not path.is_file()
        ):
            continue
        head = read_head(path)
        if head and head.sop_class == WSI_CLASS and head.series_uid:
            groups.setdefault(head.series_uid, []).append(path)
    return MappingProxyType(groups)


def series_files(path: Path, series: str = "") -> list[Path]:
    """All files of the DICOM slide that `path` is part of, sorted by name.

    `path` is any file of the series, or a folder that has one series; `series` (SeriesInstanceUID)
    chooses where a folder has several, and must be the file's own otherwise. Raises
    `SlideOpenError` in words.
    """
    try:
        if path.is_dir():
            return list(_files_of_folder(path, series))
        head = read_head(path)
        if head is None or not head.series_uid:
            raise SlideOpenError("not a DICOM file with a SeriesInstanceUID")
        if series not in ("", head.series_uid):
            raise SlideOpenError(f"it is of series {head.series_uid}, not {series}")
        # A file that is named is taken, whatever its name; the others are found by theirs.
        return sorted({path, *group_series(path.parent).get(head.series_uid, ())})
    except OSError as error:
        raise SlideOpenError(f"cannot be read: {error.strerror}") from error


def _files_of_folder(folder: Path, series: str) -> Sequence[Path]:
    groups = group_series(folder)
    if not groups:
        raise SlideOpenError("a folder without whole-slide DICOM files")
    if series and series not in groups:
        raise SlideOpenError(f"no file of series {series}; there: {', '.join(groups)}")
    if not series and len(groups) > 1:
        firsts = list_some([files[0].name for files in groups.values()], 3)
        raise SlideOpenError(
            f"a folder of {len(groups)} DICOM slides; give one file of each: {firsts}"
        )
    return groups[series or next(iter(groups))]
