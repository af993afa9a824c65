"""Searching folders for slides: what is one, what is part of one, what is passed over and why.

One walk with `os.scandir`: a file is known by its name, so that 100,000 files on a network file
system cost a listing each folder and no more. Only DICOM files are opened, for their series.
"""

import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from common.text import one_line
from pipeline.dataset import safe_slide_id
from pipeline.slides.dicom_series import group_series, read_head
from pipeline.slides.readers import PICTURE_SUFFIXES, SLIDE_SUFFIXES

_LINES_SHOWN, _OTHERS_SHOWN = 20, 12
_DICOM_SUFFIXES = frozenset({".dcm", ".dicom", ".dic"})
_PLAIN_SUFFIX = re.compile(r"\.[A-Za-z0-9]{1,9}")
_NO_SUFFIX = "files without a suffix"

_JUNK_FOLDERS = frozenset(
    [
        "@eadir",
        "#recycle",
        "#snapshot",
        "~snapshot",
        "$recycle.bin",
        "recycler",
        "lost+found",
        "__macosx",
        "system_volume_information",
        "network_trash_folder",
        "temporary_items",
    ]
)
"""Trash, snapshots and thumbnails of file systems and servers, in lower case, with _ for spaces.
All hidden folders (.Trash, .snapshot, .zfs) are passed over as well."""
_PARTIAL_SUFFIXES = frozenset(
    [
        ".partial",
        ".part",
        ".crdownload",
        ".download",
        ".opdownload",
        ".tmp",
        ".temp",
        ".aria2",
        ".filepart",
        ".incomplete",
        ".!ut",
        ".parts",
    ]
)
_DOWNLOAD_CONTROL = ".aria2"
"""aria2 writes a file under its own name, and keeps this one next to it until it is whole."""

_CLOSED_FORMATS = frozenset(
    [
        ".vsi",
        ".ets",
        ".isyntax",
        ".i2syntax",
        ".kfb",
        ".kfbf",
        ".sdpc",
        ".tmap",
        ".tron",
        ".mdsx",
        ".zvi",
        ".lif",
        ".oir",
        ".afi",
    ]
)
_ARCHIVES = frozenset([".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".zst", ".7z", ".rar"])
_COMPANIONS = {
    # The slide's suffix, and what lies next to it under names that begin with the slide's.
    ".vms": frozenset({".jpg", ".jpeg", ".opt"}),
    ".vmu": frozenset({".ngr", ".jpg", ".jpeg", ".opt"}),
}
_MIRAX, _MIRAX_PARTS = ".mrxs", frozenset({".dat", ".ini"})

_GENERIC = "not the suffix of a slide"


@dataclass(frozen=True)
class FoundSlide:
    """A slide in a folder: the path to open, its name, and the folder in which that name lies."""

    path: Path
    name: str
    folder: Path


@dataclass
class _Passed:
    count: int = 0
    example: str = ""


@dataclass
class FolderSearch:
    """The slides of the folders that were searched, and a count of what was not taken.

    Every regular file is in `slides`, is a part of one, or is counted once; a folder that is not
    searched counts as one.
    """

    slides: list[FoundSlide] = field(default_factory=list)
    _passed: dict[tuple[str, str], _Passed] = field(default_factory=dict)
    _visited: set[str] = field(default_factory=set)

    def search_folder(self, root: Path) -> list[FoundSlide]:
        """The slides below an absolute path, at any depth; links to folders are not followed.

        A folder that was searched before is not searched again.
        """
        before = len(self.slides)
        waiting = [_Folder(str(root))]
        while waiting:
            folder = waiting.pop()
            if folder.path in self._visited:
                continue
            self._visited.add(folder.path)
            try:
                with os.scandir(folder.path) as entries:
                    listing = list(entries)
            except OSError as error:
                self.pass_over("folders", f"cannot be read: {error.strerror}", folder.path)
                continue
            waiting += self._sort_listing(folder, listing)
        return self.slides[before:]

    def pass_over(self, what: str, reason: str, example: str, count: int = 1) -> None:
        """Count what is not taken: such as (".png", "pictures", "a/b.png")."""
        passed = self._passed.setdefault((what, reason), _Passed())
        passed.count += count
        # The same example in any order of the files.
        passed.example = min(passed.example or example, example)

    @property
    def counts(self) -> dict[str, int]:
        """How many were passed over, by suffix or kind and reason, the most frequent first."""
        return {f"{what}: {reason}": count for what, reason, count, _ in self._by_frequency()}

    def describe_passed(self) -> list[str]:
        """Lines of what was not taken, by suffix and reason; [] where everything was."""
        rows = self._by_frequency()
        special = [row for row in rows if row[1] != _GENERIC]
        generic = [row for row in rows if row[1] == _GENERIC]
        lines = [
            f"{_count_kind(count, what)}: {reason}, such as {_printable(example)}"
            for what, reason, count, example in special[:_LINES_SHOWN]
        ]
        if rest := special[_LINES_SHOWN:]:
            lines.append(f"{sum(row[2] for row in rest):,} of {len(rest)} more kinds")
        if generic:
            lines.append(_describe_generic(generic))
        return lines

    def _by_frequency(self) -> list[tuple[str, str, int, str]]:
        rows = [(*key, passed.count, passed.example) for key, passed in self._passed.items()]
        return sorted(rows, key=lambda row: (-row[2], row[0], row[1]))

    def _sort_listing(self, folder: "_Folder", listing: list[os.DirEntry[str]]) -> "list[_Folder]":
        """Take or count what a folder contains; returns the folders below to search."""
        folders: list[_Folder] = []
        names: list[str] = []
        for entry in listing:
            if self._is_file(entry):
                names.append(entry.name)
            elif _is_folder(entry) and not self._pass_folder(entry):
                folders.append(_Folder(entry.path, below_dicomdir=folder.below_dicomdir))
        dicomdir = folder.below_dicomdir or "DICOMDIR" in names
        mirax = {_stem_of(name) for name in names if _suffix_of(name) == _MIRAX}
        names = [name for name in names if not self._pass_junk(folder.path, name)]
        names = self._take_dicom(folder.path, names, dicomdir)
        self._take_others(folder, names, {entry.name for entry in listing})
        return [
            _Folder(below.path, os.path.basename(below.path) in mirax, dicomdir)
            for below in folders
        ]

    def _is_file(self, entry: os.DirEntry[str]) -> bool:
        """Whether it is a regular file or a link to one; other things than folders are counted."""
        try:
            if entry.is_file():
                return True
            is_folder = entry.is_dir()
        except OSError as error:
            self.pass_over("links", f"cannot be followed: {error.strerror}", entry.path)
            return False
        if entry.is_symlink():
            if is_folder:
                reason = "not followed into folders; name the folder to search it"
            elif os.path.exists(entry.path):
                reason = "the target is no regular file"
            else:
                reason = "the target is missing"
            self.pass_over("links", reason, entry.path)
        elif not is_folder:
            self.pass_over("devices, pipes or sockets", "no regular files", entry.path)
        return False

    def _pass_folder(self, entry: os.DirEntry[str]) -> bool:
        name = entry.name.lower().replace(" ", "_")
        is_junk = name.startswith(".") or name in _JUNK_FOLDERS
        if is_junk:
            self.pass_over("folders", "hidden, trash or snapshots: not searched", entry.path)
        return is_junk

    def _pass_junk(self, folder: str, name: str) -> bool:
        junk = kind_of_junk(name)
        if junk:
            self.pass_over(*junk, os.path.join(folder, name))
        return junk is not None

    def _take_dicom(self, folder: str, names: list[str], below_dicomdir: bool) -> list[str]:
        """Take the DICOM slides of a folder; returns the names that are no DICOM files."""
        named = {name for name in names if _suffix_of(name) in _DICOM_SUFFIXES}
        if not named and not below_dicomdir:
            return names
        path = Path(folder)
        try:
            groups = group_series(path)
        except OSError:
            groups = {}
        known = {file.name for files in groups.values() for file in files}
        others = sorted(named - known)
        if groups:
            self._take_series(path, list(groups.values()))
        elif others and any(read_head(path / name) is None for name in others):
            # As one slide, which fails by its name: damaged files are not passed over in silence.
            self.slides.append(FoundSlide(path, _name_of_folder(path), path.parent))
            others = []
        for name in others:
            self.pass_over(_suffix_of(name), "no whole-slide DICOM image", str(path / name))
        return [name for name in names if name not in known and name not in named]

    def _take_series(self, folder: Path, groups: Sequence[Sequence[Path]]) -> None:
        """One slide for each series with a VOLUME image; in a folder of its own, the folder."""
        folder_name = _name_of_folder(folder)
        if len(groups) == 1:
            self.slides.append(FoundSlide(folder, folder_name, folder.parent))
            return
        volumes = [files for files in groups if any(map(_is_volume, files))]
        for files in groups:
            if files not in volumes:
                self.pass_over(
                    "DICOM files", "of series without a VOLUME image", str(files[0]), len(files)
                )
        labels = name_series([files[0] for files in volumes]) if len(volumes) > 1 else [""]
        for files, label in zip(volumes, labels, strict=False):
            name = f"{folder_name}.{label}" if label else folder_name
            self.slides.append(FoundSlide(files[0], name, folder.parent))

    def _take_others(self, folder: "_Folder", names: list[str], listed: set[str]) -> None:
        stems = [
            (_stem_of(name), parts)
            for name in names
            if (parts := _COMPANIONS.get(_suffix_of(name))) is not None
        ]
        for name in names:
            suffix, path = _suffix_of(name), os.path.join(folder.path, name)
            if suffix in SLIDE_SUFFIXES and suffix not in PICTURE_SUFFIXES:
                if name + _DOWNLOAD_CONTROL in listed:
                    self.pass_over(suffix, "still being downloaded", path)
                else:
                    self.slides.append(FoundSlide(Path(path), "", Path(folder.path)))
            elif folder.is_mirax and suffix in _MIRAX_PARTS:
                continue
            elif not any(suffix in parts and name.startswith(stem) for stem, parts in stems):
                self.pass_over(*_reason_for(suffix), path)


@dataclass(frozen=True)
class _Folder:
    """A folder to search: the data folder of a MIRAX slide, or one below a DICOMDIR."""

    path: str
    is_mirax: bool = False
    below_dicomdir: bool = False


def kind_of_junk(name: str) -> tuple[str, str] | None:
    """What a file is that only looks like a slide, by its name, as (kind, reason); else None.

    >>> kind_of_junk("._a.svs")
    ('._*', 'companions of files (AppleDouble), as macOS leaves them')
    """
    if name.startswith("._"):
        return "._*", "companions of files (AppleDouble), as macOS leaves them"
    if name.startswith("~$"):
        return "~$*", "lock files of office programs"
    suffix = _suffix_of(name)
    if suffix in _PARTIAL_SUFFIXES or name.endswith("~"):
        inner = _suffix_of(name[: -len(suffix)]) if suffix else ""
        shown = f"{inner}{suffix}" if inner in SLIDE_SUFFIXES else suffix or "*~"
        return shown, "partial downloads and temporary files"
    if name.startswith("."):
        return ".*", "hidden files"
    if name.lower() in ("thumbs.db", "desktop.ini"):
        return name, "thumbnails and settings of Windows"
    return None


def name_series(firsts: Sequence[Path]) -> list[str]:
    """A short name for each of several DICOM series, given a file of each.

    That is the glass slide's identifier, with the series' number where slides share one, or else
    a digest of the series' UID: the same names in any order.
    """
    heads = [head for path in firsts if (head := read_head(path)) is not None]
    digests = [hashlib.sha256(head.series_uid.encode()).hexdigest()[:8] for head in heads]
    containers = [head.container and safe_slide_id(head.container) for head in heads]
    numbered = [
        safe_slide_id(f"{head.container}.{head.series_number}") if head.series_number else ""
        for head in heads
    ]
    names = [
        next(
            name
            for name, alike in zip(own, (containers, numbered, digests), strict=True)
            if name and (alike is digests or alike.count(name) == 1)
        )
        for own in zip(containers, numbered, digests, strict=True)
    ]
    return names if len(set(names)) == len(names) else digests


def _name_of_folder(folder: Path) -> str:
    return folder.stem if folder.suffix.lower() in SLIDE_SUFFIXES else folder.name


def _is_volume(path: Path) -> bool:
    head = read_head(path)
    return head is not None and "VOLUME" in head.image_type


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir(follow_symlinks=False)
    except OSError:
        return False


def _suffix_of(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def _stem_of(name: str) -> str:
    return os.path.splitext(name)[0]


def _reason_for(suffix: str) -> tuple[str, str]:
    """Under which kind and reason a file with this suffix, in lower case, is counted."""
    if suffix in PICTURE_SUFFIXES:
        return suffix, "pictures: name them in a CSV, or by a glob, to tile them"
    if suffix in _CLOSED_FORMATS:
        return suffix, "a slide format that no reader here opens; convert it to OME-TIFF or DICOM"
    if suffix in _ARCHIVES:
        return suffix, "archives: unpack them first"
    return (suffix if _PLAIN_SUFFIX.fullmatch(suffix) else _NO_SUFFIX), _GENERIC


def _count_kind(count: int, what: str) -> str:
    if count == 1:
        what = re.sub(r"^(DICOM file|file|folder|link)s\b", r"\1", what)
    return f"{count:,} {what}"


def _describe_generic(rows: Iterable[tuple[str, str, int, str]]) -> str:
    rows = list(rows)
    shown = ", ".join(_count_kind(count, what) for what, _, count, _ in rows[:_OTHERS_SHOWN])
    more = sum(count for _, _, count, _ in rows[_OTHERS_SHOWN:])
    tail = f", {more:,} more" if more else ""
    return f"{shown}{tail}: {_GENERIC}, such as {_printable(rows[0][3])}"


def _printable(path: str) -> str:
    """The end of a path that may contain anything, on one line."""
    shown = "/".join(path.split("/")[-2:])
    return one_line("".join(c if c.isprintable() else " " for c in shown), 80)


def unique_matches(matches: Iterable[str]) -> Iterator[str]:
    """Matches of a glob, each file once: `**` follows links, also those that lead in circles."""
    seen: set[tuple[str, str]] = set()
    for match in sorted(matches, key=lambda text: (text.count(os.sep), text)):
        folder, name = os.path.split(match)
        key = (os.path.realpath(folder), name)
        if key not in seen:
            seen.add(key)
            yield match
