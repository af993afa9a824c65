"""Finding the slides to scan: in folders, globs, CSV tables and GDC manifests."""

import csv
import glob
import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from common.errors import UserError
from pipeline.dataset import check_slide_id, safe_slide_id
from pipeline.slides.readers import SLIDE_SUFFIXES

_TABLE_SUFFIXES = frozenset({".csv", ".tsv", ".txt"})
_PATH_COLUMNS = ("path", "slide_path", "file_name", "filename", "slide")
_GDC_COLUMNS = frozenset({"id", "filename", "md5", "size"})
"""The columns of a manifest of the Genomic Data Commons."""


@dataclass(frozen=True)
class SlideEntry:
    """A slide to scan: its path, and what a table says of it ('' where it does not).

    `mpp` is in µm per pixel. `taken_by` is the path of another slide that has the same name: this
    one cannot be scanned. `uri` is where a slide is fetched from that is no local file; its
    `bytes` are the table's. `series` names the image of a file that has several.
    """

    path: Path
    slide_id: str
    mpp: float | None = None
    patient: str = ""
    site: str = ""
    project: str = ""
    sample_type: str = ""
    taken_by: str = ""
    md5: str = ""
    preparation: str = ""
    uri: str = ""
    bytes: int = 0
    series: str = ""

    @property
    def location(self) -> str:
        """Where the slide is: a local path or a URI."""
        return self.uri or str(self.path)


@dataclass(frozen=True)
class _Mention:
    """A slide as one input names it; `row` is the line of the table, '' for a bare path."""

    entry: SlideEntry
    row: str = ""


def find_slides(inputs: Iterable[str]) -> list[SlideEntry]:
    """Slides of folders, globs, files and tables, sorted by slide_id.

    A folder is searched recursively for known suffixes; a folder of .dcm files is one slide.
    Of two files with one slide_id the first by path keeps it; the other names it in `taken_by`.
    What a table says of a slide is true wherever else its path is given. Raises `UserError` where
    two rows say different things of one path.
    """
    # One slide may be named several times, in a folder and in a table: a table's words win.
    by_path: dict[Path, _Mention] = {}
    for text in inputs:
        for mention in _expand_input(text):
            before = by_path.setdefault(mention.entry.path, mention)
            if before.row and mention.row:
                _check_same_entry(before, mention)
            elif mention.row:
                by_path[mention.entry.path] = mention
    by_id: dict[str, SlideEntry] = {}
    for path in sorted(by_path):
        entry = by_path[path].entry
        if (first := by_id.get(entry.slide_id)) is not None:
            # Under another name, so that the refusal is recorded and the first slide is kept.
            digest = hashlib.sha256(str(path).encode()).hexdigest()[:8]
            entry = replace(entry, slide_id=f"{entry.slide_id}.{digest}", taken_by=str(first.path))
        by_id[entry.slide_id] = entry
    return [by_id[slide_id] for slide_id in sorted(by_id)]


def _check_same_entry(before: _Mention, mention: _Mention) -> None:
    for key, value in asdict(before.entry).items():
        again = getattr(mention.entry, key)
        if value != again:
            shown, shown_again = ("" if v is None else v for v in (value, again))
            raise UserError(
                f"{mention.row}: {key} '{shown_again}' of {mention.entry.location}, but "
                f"'{shown}' in {before.row}; leave one of the two lines"
            )


def _expand_input(text: str) -> Iterator[_Mention]:
    path = Path(text)
    if path.suffix.lower() in _TABLE_SUFFIXES and path.is_file():
        yield from _read_table(path)
    elif path.is_dir():
        slides = {
            # The .dcm files of a folder are one slide.
            found.parent if found.suffix.lower() == ".dcm" else found
            for found in path.rglob("*")
            if found.suffix.lower() in SLIDE_SUFFIXES and found.is_file()
        }
        for slide in sorted(slides):
            yield _Mention(SlideEntry(_absolute_path(slide), slide_id_of(slide)))
    elif path.is_file():
        yield _Mention(SlideEntry(_absolute_path(path), slide_id_of(path)))
    else:
        matches = sorted(glob.glob(text, recursive=True))
        if not matches:
            raise UserError(f"{text}: no such file, folder or match; expected slides or a table")
        for match in matches:
            yield from _expand_input(match)


def _absolute_path(path: Path) -> Path:
    """Absolute and without '..', but with its links as the user wrote them."""
    return Path(os.path.abspath(path))


def slide_id_of(path: Path) -> str:
    """The slide's name without its suffix (also `.ome`), as a safe file name.

    >>> slide_id_of(Path("store/TCGA-02 0001.ome.tiff"))
    'TCGA-02_0001'
    """
    is_known = path.suffix.lower() in SLIDE_SUFFIXES or path.is_file()
    name = path.name[: -len(path.suffix)] if is_known and path.suffix else path.name
    return safe_slide_id(name.removesuffix(".ome"))


def _read_table(table: Path) -> Iterator[_Mention]:
    try:
        with table.open(newline="", encoding="utf-8-sig") as file:
            header = file.readline()
            file.seek(0)
            rows = csv.DictReader(file, delimiter="\t" if "\t" in header else ",")
            columns = rows.fieldnames or []
            is_manifest = set(columns) >= _GDC_COLUMNS
            path_column = next((name for name in _PATH_COLUMNS if name in columns), "")
            if not is_manifest and not path_column:
                raise UserError(
                    f"{table}: no column with the slide's path; expected one of "
                    f"{', '.join(_PATH_COLUMNS)}, there: {', '.join(columns) or 'none'}"
                )
            for number, values in enumerate(rows, 2):
                row = SlideTableRow(table, number, values)
                entry = _manifest_entry(row) if is_manifest else _table_entry(row, path_column)
                yield _Mention(entry, f"{table}, line {number}")
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{table} cannot be read as a table of slides: {error}") from error


@dataclass(frozen=True)
class SlideTableRow:
    """A line of a CSV table; its values are None where the line is too short."""

    table: Path
    number: int
    values: Mapping[str, str | None]

    def line_error(self, problem: str) -> UserError:
        """The error to raise, naming table and line."""
        return UserError(f"{self.table}, line {self.number}: {problem}")

    def read_text(self, *columns: str) -> str:
        """The first of the columns that has a value here, '' without one."""
        return next((v.strip() for name in columns if (v := self.values.get(name))), "")

    def read_path(self, column: str) -> str:
        """A path or address; one that a command would take for an option is refused."""
        text = self.read_text(column)
        if text.startswith("-") or "\0" in text or "\n" in text:
            raise self.line_error(f"{text[:80]!r} is neither a path nor an address")
        return text

    def check_below(self, path: str) -> None:
        """Refuse a relative path that leaves the table's folder."""
        if not os.path.isabs(path) and os.path.normpath(path).split(os.sep)[0] == os.pardir:
            raise self.line_error(
                f"'{path}' leaves the table's folder; write the absolute path if that is meant"
            )

    def byte_count(self, *columns: str) -> int:
        """A number of bytes, 0 without one."""
        text = self.read_text(*columns)
        if text and not (text.isascii() and text.isdigit()):
            raise self.line_error(f"size '{text}', expected a number of bytes")
        return int(text or 0)

    def read_mpp(self) -> float | None:
        """Micrometres per pixel, None without."""
        text = self.read_text("mpp")
        try:
            value = float(text) if text else None
        except ValueError:
            value = 0.0
        if value is not None and not 0.01 < value < 100:
            raise self.line_error(f"mpp '{text}', expected micrometres per pixel")
        return value


def _table_entry(row: SlideTableRow, path_column: str) -> SlideEntry:
    text = row.read_path(path_column)
    if not text:
        raise row.line_error(f"no value in column '{path_column}'")
    is_remote = "://" in text
    if not is_remote:
        row.check_below(text)
    path = Path(text) if is_remote or Path(text).is_absolute() else row.table.parent / text
    return SlideEntry(
        path if is_remote else _absolute_path(path),
        check_slide_id(row.values.get("slide_id") or slide_id_of(path)),
        row.read_mpp(),
        patient=row.read_text("patient"),
        site=row.read_text("site", "tss"),
        project=row.read_text("project"),
        sample_type=row.read_text("sample_type"),
        md5=row.read_text("md5", "md5sum").lower(),
        preparation=row.read_text("preparation").lower(),
        uri=text if is_remote else "",
        bytes=row.byte_count("bytes", "size_bytes"),
        series=row.read_text("series"),
    )


def _manifest_entry(row: SlideTableRow) -> SlideEntry:
    """A row of a GDC manifest: the slide is `<id>/<filename>`, as gdc-client lays it out."""
    uuid, name = row.read_path("id"), row.read_path("filename")
    if not uuid or not name:
        raise row.line_error("no id or no filename")
    if "/" in name or {uuid, name} & {".", ".."}:
        raise row.line_error(f"'{name}' of '{uuid}' is no file's name")
    return SlideEntry(
        Path(f"{uuid}/{name}"),
        slide_id_of(Path(name)),
        md5=row.read_text("md5").lower(),
        uri=f"{uuid}/{name}",
        bytes=row.byte_count("size"),
    )
