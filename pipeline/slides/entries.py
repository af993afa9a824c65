"""Finding the slides to scan: in folders, globs, CSV tables and GDC manifests."""

import csv
import glob
import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from common.csv_rows import CsvRows, describe_columns
from common.errors import UserError
from common.files import MOST_LINE, open_text
from common.terms import Terms
from common.text import is_whole_number
from pipeline.dataset import MOST_SLIDES, check_slide_id, safe_slide_id
from pipeline.slides.config import IdSource
from pipeline.slides.dicom_series import group_series, read_head
from pipeline.slides.readers import SLIDE_SUFFIXES
from pipeline.slides.search import FolderSearch, FoundSlide, kind_of_junk, unique_matches
from pipeline.slides.slide_terms import terms_of_row

_TABLE_SUFFIXES = frozenset({".csv", ".tsv", ".txt"})
_PATH_COLUMNS = ("path", "slide_path", "file_name", "filename", "slide")
_GDC_COLUMNS = frozenset({"id", "filename", "md5", "size"})
"""The columns of a manifest of the Genomic Data Commons."""


@dataclass(frozen=True)
class SlideEntry:
    """A slide to scan: its path, and what a table says of it ('' where it does not).

    `mpp` is in µm per pixel. `taken_by` is the path of another slide that has the same name: this
    one cannot be scanned, and `refusal` says why. `uri` is where a slide is fetched from that is no
    local file; its `bytes` are the table's. `series` names the image of a file that has several.
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
    refusal: str = ""

    @property
    def location(self) -> str:
        """Where the slide is: a local path or a URI."""
        return self.uri or str(self.path)


@dataclass(frozen=True)
class _Mention:
    """A slide as one input names it; `row` is the line of the table, '' for a bare path.

    `has_id` where the table states the slide's id.
    """

    entry: SlideEntry
    row: str = ""
    has_id: bool = False


@dataclass
class SlideSearch:
    """The slides that inputs name, by path, and what their folders contain besides.

    `id_from` says where the ids come from that no table states (see `IdSource`).
    """

    id_from: IdSource = "stem"
    folders: FolderSearch = field(default_factory=FolderSearch)
    terms: dict[Terms, None] = field(default_factory=dict)  # that tables state, each once
    _by_path: dict[Path, _Mention] = field(default_factory=dict)
    _has_several: bool = False

    def add_inputs(self, inputs: Sequence[str]) -> None:
        """Add the slides of folders, globs, files and tables.

        Raises `UserError` where two rows of tables say different things of one path.
        """
        self._has_several = sum(os.path.isdir(text) for text in inputs) > 1
        # One slide may be named several times, in a folder and in a table: a table's words win.
        for text in inputs:
            for mention in self._expand_input(text):
                before = self._by_path.setdefault(mention.entry.path, mention)
                if before.row and mention.row:
                    _check_same_entry(before, mention)
                elif mention.row:
                    self._by_path[mention.entry.path] = mention

    def entries(
        self,
        keep_id: Callable[[SlideEntry, bool], SlideEntry] = lambda entry, _: entry,
        is_known: Callable[[SlideEntry], bool] = lambda _: False,
    ) -> list[SlideEntry]:
        """The slides sorted by slide_id, each id once, in any order of the inputs.

        `keep_id` gives a slide the id that it has already, where no table states one (its second
        argument: no table names the slide at all); `is_known` says whether an id is already this
        slide's. Of several slides with one id that one keeps it, or else the
        first by path; the others get ids of their own and say in `taken_by` and `refusal` why
        they cannot be scanned.
        """
        entries = []
        for mention in _one_per_series(self._by_path):
            entry = _refuse_bytes(mention.entry)
            if self.id_from == "csv" and not mention.has_id:
                raise UserError(
                    f"{entry.location}: no table has a slide_id for it, which --id-from csv needs"
                )
            if not mention.has_id:
                entry = keep_id(entry, not mention.row)
            entries.append(entry)
        return _one_per_id(entries, is_known)

    def _expand_input(self, text: str, base: Path | None = None) -> Iterator[_Mention]:
        """The slides of one input; `base` is the folder from which ids are made of paths."""
        path = Path(text)
        if path.suffix.lower() in _TABLE_SUFFIXES and path.is_file():
            yield from self._read_table(path)
        elif path.is_dir():
            root = _absolute_path(path)
            base = base or (root.parent if self._has_several else root)
            for found in sorted(self.folders.search_folder(root), key=lambda slide: slide.path):
                yield _Mention(SlideEntry(found.path, self._id_of_found(found, base)))
        elif path.is_file():
            absolute = _absolute_path(path)
            slide_id = self._make_id(path, absolute, base or absolute.parent.parent)
            yield _Mention(SlideEntry(absolute, slide_id))
        elif path.exists():
            raise UserError(
                f"{text} is a pipe or device, expected slides or a table: write what it gives to a "
                "file, and name that"
            )
        else:
            yield from self._expand_glob(text)

    def _expand_glob(self, text: str) -> Iterator[_Mention]:
        matches = list(unique_matches(glob.glob(text, recursive=True)))
        if not matches:
            raise UserError(f"{text}: no such file, folder or match; expected slides or a table")
        parts = Path(text).parts
        plain = next((n for n, part in enumerate(parts) if glob.has_magic(part)), len(parts) - 1)
        base = _absolute_path(Path(*parts[:plain]))
        for match in matches:
            # A glob searches as a folder does; only a file that is named is taken as it is.
            junk = kind_of_junk(os.path.basename(match))
            if not os.path.exists(match):
                self.folders.pass_over("links", "the target is missing", match)
            elif not (os.path.isfile(match) or os.path.isdir(match)):
                self.folders.pass_over("devices, pipes or sockets", "no regular files", match)
            elif junk and os.path.isfile(match):
                self.folders.pass_over(*junk, match)
            else:
                yield from self._expand_input(match, base)

    def _read_table(self, table: Path) -> Iterator[_Mention]:
        for row, path_column in _read_rows(table):
            if path_column:
                entry, has_id = _table_entry(row, path_column)
            else:
                entry, has_id = _manifest_entry(row), False
            if terms := _row_terms(row):
                self.terms[terms] = None
            if self.id_from == "path" and not has_id:
                named = Path(row.read_text(path_column)) if path_column else entry.path
                is_plain = not named.is_absolute() and not entry.uri
                base = table.parent if is_plain else entry.path.parent.parent
                slide_id = self._make_id(entry.path, entry.path, base)
                entry = replace(entry, slide_id=slide_id)
            yield _Mention(entry, f"{table}, line {row.number}", has_id)

    def _id_of_found(self, found: FoundSlide, base: Path) -> str:
        if not found.name:
            return self._make_id(found.path, found.path, base)
        if self.id_from != "path":
            return safe_slide_id(found.name)
        return self._make_id(Path(found.name), found.folder / found.name, base, found.name)

    def _make_id(self, path: Path, absolute: Path, base: Path, name: str = "") -> str:
        """The id of a slide that no table names; `absolute` is its path, `name` its last part."""
        if self.id_from != "path":
            return slide_id_of(path)
        try:
            folders = absolute.parent.relative_to(_absolute_path(base)).parts
        except ValueError:
            folders = (absolute.parent.name,)
        return _id_of_parts([*folders, name or _stem_of(path)])


def _one_per_id(
    entries: Sequence[SlideEntry], is_known: Callable[[SlideEntry], bool]
) -> list[SlideEntry]:
    """The entries sorted by slide_id; all but one of those that share an id are refused."""
    counts = Counter(entry.slide_id for entry in entries)
    clashing = [entry for entry in entries if counts[entry.slide_id] > 1]
    by_id: dict[str, SlideEntry] = {}
    for entry in sorted(clashing, key=lambda entry: not is_known(entry)):
        by_id.setdefault(entry.slide_id, entry)
    for entry in entries:
        first = by_id.setdefault(entry.slide_id, entry)
        if first is not entry:
            refused = refuse_entry(
                entry,
                first.location,
                f"{entry.location} has the name of {first.location}; give --id-from path or a CSV "
                "with a slide_id column, or rename one of them",
            )
            by_id[refused.slide_id] = refused
    return [by_id[slide_id] for slide_id in sorted(by_id)]


def _id_of_parts(parts: Sequence[str]) -> str:
    """One id for each path: where characters are replaced, a digest tells paths apart."""
    text = "__".join(parts)
    slide_id = safe_slide_id(text)
    if slide_id != text or any("__" in part for part in parts):
        digest = hashlib.sha256("\0".join(parts).encode(errors="surrogateescape")).hexdigest()[:8]
        slide_id = f"{slide_id[:190]}.{digest}"
    return slide_id


def refuse_entry(entry: SlideEntry, taken_by: str, refusal: str) -> SlideEntry:
    """The entry under an id of its own, so that its refusal is recorded and the other is kept."""
    digest = hashlib.sha256(entry.location.encode(errors="surrogateescape")).hexdigest()[:8]
    return replace(
        entry, slide_id=f"{entry.slide_id[:190]}.{digest}", taken_by=taken_by, refusal=refusal
    )


def _refuse_bytes(entry: SlideEntry) -> SlideEntry:
    """The entry, refused where no record can have its path: one with bytes that are no text."""
    try:
        entry.location.encode()
    except UnicodeEncodeError:
        shown = entry.location.encode(errors="backslashreplace").decode()
        refusal = f"the path {shown} is not UTF-8; rename the file or folder"
        return replace(entry, path=Path(shown), refusal=refusal)
    return entry


def find_slides(inputs: Iterable[str], id_from: IdSource = "stem") -> list[SlideEntry]:
    """Slides of folders, globs, files and tables, sorted by slide_id.

    A folder is searched recursively for known suffixes; the .dcm files of one series are one slide.
    Of two files with one slide_id the first by path keeps it; the other names it in `taken_by`.
    What a table says of a slide is true wherever else its path is given. Raises `UserError` where
    two rows say different things of one path.
    """
    search = SlideSearch(id_from)
    search.add_inputs(list(inputs))
    return search.entries()


def _one_per_series(by_path: Mapping[Path, _Mention]) -> list[_Mention]:
    """The mentions by path; of several files of one DICOM series one, by preference a table's."""
    chosen: dict[tuple[Path, str], _Mention] = {}
    for path in sorted(by_path, key=lambda path: (kind_of_junk(path.name) is not None, path)):
        mention = by_path[path]
        key = (path, "") if mention.has_id else _series_key(mention.entry)
        before = chosen.setdefault(key, mention)
        if mention.row and not before.row:
            chosen[key] = mention
    ids = {_series_key(m.entry) for m in chosen.values() if m.has_id}
    return [m for key, m in chosen.items() if m.row or key not in ids]


def _series_key(entry: SlideEntry) -> tuple[Path, str]:
    """Folder and series of a DICOM slide; of any other slide its path."""
    path, suffix = entry.path, entry.path.suffix.lower()
    if entry.uri or (suffix in SLIDE_SUFFIXES and suffix != ".dcm"):
        return path, ""
    try:
        if path.is_dir():
            return path, entry.series or next(iter(group_series(path)), "")
        head = read_head(path) if path.is_file() else None
    except OSError:
        head = None
    return (path.parent, head.series_uid) if head else (path, "")


def _check_same_entry(before: _Mention, mention: _Mention) -> None:
    for key, value in asdict(before.entry).items():
        again = getattr(mention.entry, key)
        if value != again:
            shown, shown_again = ("" if v is None else v for v in (value, again))
            raise UserError(
                f"{mention.row}: {key} '{shown_again}' of {mention.entry.location}, but "
                f"'{shown}' in {before.row}; leave one of the two lines"
            )


def _absolute_path(path: Path) -> Path:
    """Absolute and without '..', but with its links as the user wrote them."""
    return Path(os.path.abspath(path))


def slide_id_of(path: Path) -> str:
    """The slide's name without its suffix (also `.ome`), as a safe file name.

    >>> slide_id_of(Path("store/TCGA-02 0001.ome.tiff"))
    'TCGA-02_0001'
    """
    name = _stem_of(path)
    if name.startswith("._"):
        # Not the name of the file that it accompanies, which is there as well.
        name = f"AppleDouble_{name[2:]}"
    return safe_slide_id(name)


def _stem_of(path: Path) -> str:
    is_known = path.suffix.lower() in SLIDE_SUFFIXES or path.is_file()
    name = path.name[: -len(path.suffix)] if is_known and path.suffix else path.name
    return name.removesuffix(".ome")


def _read_rows(table: Path) -> Iterator[tuple["SlideTableRow", str]]:
    """The rows of a table with the name of the path's column, '' for a GDC manifest."""
    try:
        with open_text(table, newline="", encoding="utf-8-sig") as file:
            delimiter = "\t" if "\t" in file.readline(MOST_LINE) else ","
            file.seek(0)
            rows = CsvRows(table, file, delimiter, MOST_SLIDES)
            columns = rows.columns
            is_manifest = set(columns) >= _GDC_COLUMNS
            path_column = next((name for name in _PATH_COLUMNS if name in columns), "")
            if not is_manifest and not path_column:
                raise UserError(
                    f"{table}: no column with the slide's path; expected one of "
                    f"{', '.join(_PATH_COLUMNS)}, there: {describe_columns(columns)}"
                )
            for number, values in rows:
                row = SlideTableRow(table, number, values)
                yield row, "" if is_manifest else path_column
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{table} cannot be read as a table of slides: {error}") from error


@dataclass(frozen=True)
class SlideTableRow:
    """A line of a CSV table."""

    table: Path
    number: int
    values: Mapping[str, str]

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
        if text and not is_whole_number(text):
            raise self.line_error(f"size '{text[:40]}', expected a number of bytes")
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


def _table_entry(row: SlideTableRow, path_column: str) -> tuple[SlideEntry, bool]:
    """The slide of a row, and whether the row states its id."""
    text = row.read_path(path_column)
    if not text:
        raise row.line_error(f"no value in column '{path_column}'")
    is_remote = "://" in text
    if not is_remote:
        row.check_below(text)
    path = Path(text) if is_remote or Path(text).is_absolute() else row.table.parent / text
    slide_id = row.values.get("slide_id")
    entry = SlideEntry(
        path if is_remote else _absolute_path(path),
        check_slide_id(slide_id or slide_id_of(path)),
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
    return entry, bool(slide_id)


def _row_terms(row: SlideTableRow) -> Terms | None:
    """The terms that a row states of its slide; None for none."""
    licence, link = row.read_text("licence", "license"), row.read_text("licence_link")
    limit, project = row.read_text("non_commercial"), row.read_text("project")
    try:
        return terms_of_row(licence, limit, link, project)
    except ValueError as error:
        raise row.line_error(str(error)) from error


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
