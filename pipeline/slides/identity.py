"""Which slide a file is: a name is no identity, since every batch of slides has its own `1.svs`.

A slide id belongs to the bytes that were first recorded under it. Files are compared by size and by
samples of their bytes, which takes milliseconds where a checksum of the whole takes minutes.
"""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

from common.files import open_regular
from common.text import format_bytes
from pipeline.dataset import Slide
from pipeline.slides.dicom_series import DICOM_SUFFIX, series_files
from pipeline.slides.entries import SlideEntry
from pipeline.slides.reader import SlideOpenError
from pipeline.slides.readers import SLIDE_SUFFIXES

_SAMPLES, _SAMPLE_BYTES = 8, 1 << 15
_MIRAX, _NAMED_ALIKE = ".mrxs", frozenset({".vms", ".vmu"})
_HASH_CHUNK = 1 << 22


def slide_files(path: Path, series: str = "") -> list[Path]:
    """The files of a slide, sorted by name: several where it is a DICOM series, else one.

    A folder that is no DICOM slide has all files in it. Raises `OSError`.
    """
    is_folder = path.is_dir()
    if is_folder or DICOM_SUFFIX.fullmatch(path.suffix):
        try:
            return series_files(path, series)
        except SlideOpenError:
            # It will be refused when it is opened; until then its files identify it.
            pass
    return sorted(file for file in path.iterdir() if file.is_file()) if is_folder else [path]


def slide_state(path: Path, series: str = "") -> tuple[int, int]:
    """Bytes and newest modification time (ns) of a slide; (0, 0) where it cannot be read."""
    try:
        stats = [file.stat() for file in slide_files(path, series)]
    except OSError:
        return 0, 0
    return sum(s.st_size for s in stats), max((s.st_mtime_ns for s in stats), default=0)


def companion_files(path: Path) -> list[Path]:
    """The files that a slide's format has next to the slide's own, sorted; [] for most formats.

    Those of MIRAX are in the folder of the slide's name, those of VMS and VMU begin with its name.
    Raises `OSError`.
    """
    suffix = path.suffix.lower()
    if suffix == _MIRAX and (folder := path.with_suffix("")).is_dir():
        return sorted(file for file in folder.iterdir() if file.is_file())
    if suffix in _NAMED_ALIKE:
        alike = (file for file in path.parent.iterdir() if file.name.startswith(path.stem))
        return sorted(file for file in alike if file.is_file() and file != path)
    return []


def file_states(path: Path, series: str = "") -> list[tuple[str, int, int, int]]:
    """Name, inode, bytes and time (ns) of the last change of all files of a slide.

    The time is the file system's own, which no program sets. [] if a file cannot be read.
    """
    try:
        files = [*slide_files(path, series), *companion_files(path)]
        stats = [(file.name, file.stat()) for file in files]
    except OSError:
        return []
    return [(name, stat.st_ino, stat.st_size, stat.st_ctime_ns) for name, stat in stats]


def hash_slide(path: Path, series: str = "", *, companions: bool = False) -> str:
    """sha256, in hex, of a slide's files one after the other, sorted by name."""
    sha = hashlib.sha256()
    for file in [*slide_files(path, series), *(companion_files(path) if companions else ())]:
        with open_regular(file) as data:
            while chunk := data.read(_HASH_CHUNK):
                sha.update(chunk)
    return sha.hexdigest()


def sample_slide(path: Path, series: str = "", *, companions: bool = True) -> str:
    """sha256, in hex, of the sizes of a slide's files and of eight samples of each file's bytes.

    Raises `OSError`.
    """
    sha = hashlib.sha256()
    for file in [*slide_files(path, series), *(companion_files(path) if companions else ())]:
        size = file.stat().st_size
        sha.update(size.to_bytes(8, "little"))
        with open_regular(file) as data:
            # From the first bytes to the last, evenly: a header alone is the scanner's.
            for index in range(_SAMPLES):
                data.seek(max(0, size - _SAMPLE_BYTES) * index // (_SAMPLES - 1))
                sha.update(data.read(_SAMPLE_BYTES))
    return sha.hexdigest()


def has_samples(path: Path, series: str, sampled_sha256: str) -> bool:
    """Whether a slide's samples are those with this sum; raises `OSError`."""
    if sample_slide(path, series) == sampled_sha256:
        return True
    # Earlier releases took none of the files that a format has next to the slide's own.
    has_companions = bool(companion_files(path))
    return has_companions and sample_slide(path, series, companions=False) == sampled_sha256


class OtherFileError(SlideOpenError):
    """A slide's file is no longer the one that `scan` recorded: its mask and tiles are another's.

    `values` are those of the slide's line in the journal: they have `scan` open the slide again.
    """

    values: ClassVar[Mapping[str, object]] = {"withdraw": "scan"}

    def __init__(self, slide_id: str, what: str) -> None:
        super().__init__(
            f"slide {slide_id} is no longer the file that scan recorded ({what}); run `scan` again"
        )


def check_recorded(slide: Slide, path: Path) -> None:
    """Refuse a file that is not the slide that `scan` recorded; one that was only touched is.

    By its bytes in number and samples of them, never by its time alone, which a copy may keep or
    lose. Raises `OtherFileError`.
    """
    size, _ = slide_state(path, slide.series)
    # What cannot be read is refused, with its reason, when it is opened.
    if not size:
        return
    if not slide.sampled_sha256:
        # Recorded by an earlier release, which counted all files in a DICOM slide's folder.
        is_one_file = len(slide_files(path, slide.series)) == 1 and not path.is_dir()
        if slide.mtime_ns and is_one_file and size != slide.bytes:
            raise OtherFileError(slide.slide_id, _other_size(slide, path, size))
        return
    if size != slide.bytes:
        raise OtherFileError(slide.slide_id, _other_size(slide, path, size))
    try:
        is_same = has_samples(path, slide.series, slide.sampled_sha256)
    except OSError as error:
        raise SlideOpenError(f"slide {slide.slide_id}: {path}: {error.strerror}") from error
    if not is_same:
        raise OtherFileError(slide.slide_id, f"{path} has other bytes, and as many as before")


def recorded_state(slide: Slide) -> dict[str, object]:
    """Which file of a slide a result was made from, for the values of its journal line."""
    return {
        "bytes": slide.bytes, "mtime_ns": slide.mtime_ns, "sampled_sha256": slide.sampled_sha256,
    }  # fmt: skip


def _other_size(slide: Slide, path: Path, size: int) -> str:
    return f"{path} has {size:,} bytes, {slide.bytes:,} then"


class KnownSlides:
    """The slides that a dataset has already; none of them is replaced by another file."""

    def __init__(self, slides: Iterable[Slide]) -> None:
        self._by_id = {slide.slide_id: slide for slide in slides}
        # A slide that could not be read has nothing that another file could be mistaken for.
        self._by_path = {s.path: s for s in self._by_id.values() if s.status != "failed"}

    def id_of(self, entry: SlideEntry) -> str:
        """The id that the slide has in the dataset, '' where its path is not known."""
        if entry.uri:
            known = self._by_path.get(entry.uri)
            return known.slide_id if known else ""
        for path in _paths_of(entry.path):
            if known := self._by_path.get(str(path)):
                return known.slide_id
        # A folder that was one DICOM slide may have become several: the same files keep the name.
        known = self._by_path.get(str(entry.path.parent))
        return known.slide_id if known and is_same_content(known, entry) else ""

    def keep_id(self, entry: SlideEntry, is_bare: bool) -> SlideEntry:
        """The entry under the id that the slide has in the dataset already.

        Of a slide that no table names (`is_bare`), what an earlier table said with that id stays.
        """
        slide_id = self.id_of(entry)
        if slide_id in ("", entry.slide_id):
            return entry
        known = self._by_id[slide_id]
        if not is_bare:
            return replace(entry, slide_id=slide_id)
        return replace(
            entry, slide_id=slide_id, patient=known.patient, site=known.site, md5=known.md5,
            project=known.project, sample_type=known.sample_type, preparation=known.preparation,
            mpp=known.mpp if known.mpp_source == "table" else None,
        )  # fmt: skip

    def path_of(self, slide_id: str) -> str:
        """The path or address of the slide that has the id."""
        return self._by_id[slide_id].path

    def is_known(self, entry: SlideEntry) -> bool:
        """Whether the entry is the slide that the dataset has under its id, moved or not."""
        known = self._by_id.get(entry.slide_id)
        if known is None:
            return False
        if known.path == entry.location or self.id_of(entry) == entry.slide_id:
            return True
        return is_same_content(known, entry)

    def reason_to_refuse(self, entry: SlideEntry) -> str:
        """Why an entry must not take its id, '' where it may: nothing else has it."""
        known = self._by_id.get(entry.slide_id)
        if known is None or self.is_known(entry):
            return ""
        if known.status == "failed" and not Path(known.path).exists():
            return ""
        size = "" if not known.bytes else f" ({format_bytes(known.bytes)})"
        return (
            f"slide id '{entry.slide_id}' is that of {known.path}{size} in this dataset, and "
            f"{entry.location} is another file: give it an id of its own (--id-from path, or a CSV "
            "with a slide_id column); if it is a new scan of that slide, give --replace"
        )


def _paths_of(path: Path) -> list[Path]:
    """The path, and the files of its slide, by any of which a DICOM slide may be known."""
    # By the name alone where it says enough: there may be 100,000 slides.
    if path.suffix.lower() in SLIDE_SUFFIXES - {".dcm"}:
        return [path]
    try:
        return [path, *slide_files(path)]
    except OSError:
        return [path]


def is_same_content(known: Slide, entry: SlideEntry) -> bool:
    """Whether a file has the bytes of a known slide at another path; false where in doubt."""
    if known.md5 and entry.md5:
        return known.md5 == entry.md5
    if entry.uri:
        return False
    size, mtime_ns = slide_state(entry.path, entry.series)
    if not size or size != known.bytes:
        return False
    try:
        if known.sampled_sha256:
            return has_samples(entry.path, entry.series, known.sampled_sha256)
        # Recorded by an earlier release, which took no samples.
        if known.sha256:
            return known.sha256 == hash_slide(entry.path, entry.series)
        before = Path(known.path)
        if known.mtime_ns and before.exists():
            return sample_slide(before, known.series) == sample_slide(entry.path, entry.series)
    except OSError:
        return False
    return bool(known.mtime_ns) and known.mtime_ns == mtime_ns
