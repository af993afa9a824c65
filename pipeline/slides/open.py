"""Opening a slide with the reader that fits, and finding slides in folders, globs and tables."""

import csv
import glob
import hashlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from common.errors import UserError
from common.text import one_line
from pipeline.dataset import check_slide_id, safe_slide_id
from pipeline.slides.reader import SlideOpenError, SlideReader
from pipeline.slides.readers import AUTO, READERS, SLIDE_SUFFIXES, reader_entry

TABLE_SUFFIXES = frozenset({".csv", ".tsv", ".txt"})
_PATH_COLUMNS = ("path", "slide_path", "file_name", "filename", "slide")
_GDC_COLUMNS = frozenset({"id", "filename", "md5", "size"})
"""The columns of a manifest of the Genomic Data Commons."""
_SITE_COLUMNS = ("site", "tss")


@dataclass(frozen=True)
class Source:
    """A slide to scan: its path, and what a table says of it ('' where it does not).

    `taken_by` is the path of another slide that bears the same name: this one cannot be taken.
    `uri` is where a slide is fetched from that is no local file; its `bytes` are the table's.
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

    @property
    def location(self) -> str:
        """Where the slide is: a local path or a URI."""
        return self.uri or str(self.path)


def open_slide(path: Path, reader: str = AUTO) -> SlideReader:
    """Open a slide with the named reader; "auto" is the first in `READERS` that opens it.

    Whether the native reader may be used is for `scan` to find out (see `best_reader`). Raises
    `SlideOpenError` with the reasons in one line.
    """
    _refuse_known_non_slides(path)
    reasons = []
    unchecked = [name for name, entry in READERS.items() if not entry.is_checked]
    for name in unchecked if reader == AUTO else [reader]:
        try:
            return reader_entry(name).open(path)
        except SlideOpenError as error:
            reasons.append(one_line(error, 120))
    raise SlideOpenError(f"cannot be opened: {'; '.join(reasons)}")


def best_reader(path: Path) -> tuple[SlideReader, str]:
    """The native reader where it shows what OpenSlide shows; else OpenSlide or tiffslide.

    Returns the open slide and, where it is not the native reader, why. Raises `SlideOpenError`.
    """
    from pipeline.slides.compare import disagreement
    from pipeline.slides.native_reader import NativeReader

    reference = open_slide(path)
    if reference.name != "openslide":
        return reference, "OpenSlide does not open it"
    try:
        native = NativeReader(path)
    except SlideOpenError as error:
        return reference, one_line(error, 160)
    reason = disagreement(native, reference)
    chosen, other = (reference, native) if reason else (native, reference)
    other.close()
    return chosen, reason


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


def find_sources(inputs: Iterable[str]) -> list[Source]:
    """Slides of folders, globs, files and CSV tables, sorted by slide_id.

    A folder is searched recursively for known suffixes; a folder of .dcm files is one slide.
    Of two files with one slide_id the first by path keeps it; the other is marked `taken_by`.
    What a table says of a slide holds wherever else its path is given. Raises `UserError` where
    two rows say different things of one path.
    """
    by_path: dict[Path, _Mention] = {}
    for one in inputs:
        for mention in _expand(one):
            before = by_path.setdefault(mention.source.path, mention)
            if before.row and mention.row:
                _check_same(before, mention)
            elif mention.row:
                by_path[mention.source.path] = mention
    found: dict[str, Source] = {}
    for path in sorted(by_path):
        source = by_path[path].source
        other = found.get(source.slide_id)
        if other is not None:
            mark = hashlib.sha256(str(path).encode()).hexdigest()[:8]
            source = replace(source, slide_id=f"{source.slide_id}.{mark}", taken_by=str(other.path))
        found[source.slide_id] = source
    return [found[key] for key in sorted(found)]


@dataclass(frozen=True)
class _Mention:
    """A slide as one input names it; `row` is the line of the table, '' for a bare path."""

    source: Source
    row: str = ""


def _check_same(one: _Mention, other: _Mention) -> None:
    for key, value in asdict(one.source).items():
        second = getattr(other.source, key)
        if value != second:
            raise UserError(
                f"{other.row}: {key} '{_shown(second)}' of {other.source.location}, but "
                f"'{_shown(value)}' in {one.row}; leave one of the two lines"
            )


def _shown(value: object) -> str:
    return "" if value is None else str(value)


def _expand(text: str) -> Iterator[_Mention]:
    path = Path(text)
    if path.suffix.lower() in TABLE_SUFFIXES and path.is_file():
        for number, source in enumerate(_from_table(path), 2):
            yield _Mention(source, f"{path}, line {number}")
    elif path.is_dir():
        for slide in sorted(set(_slides_under(path))):
            yield _Mention(Source(_absolute(slide), slide_id_of(slide)))
    elif path.is_file():
        yield _Mention(Source(_absolute(path), slide_id_of(path)))
    else:
        matches = sorted(glob.glob(text, recursive=True))
        if not matches:
            raise UserError(f"{text}: no such file, folder or match; expected slides or a table")
        for match in matches:
            yield from _expand(match)


def _slides_under(folder: Path) -> Iterator[Path]:
    for path in folder.rglob("*"):
        if path.suffix.lower() in SLIDE_SUFFIXES and path.is_file():
            yield path.parent if path.suffix.lower() == ".dcm" else path


def _absolute(path: Path) -> Path:
    """Absolute and without '..', but with its links as the user wrote them."""
    return Path(os.path.abspath(path))


def slide_id_of(path: Path) -> str:
    """The slide's name without its suffix (also `.ome`), as a safe file name."""
    known = path.suffix.lower() in SLIDE_SUFFIXES or path.is_file()
    name = path.name[: -len(path.suffix)] if known and path.suffix else path.name
    return safe_slide_id(name.removesuffix(".ome"))


def _from_table(table: Path) -> Iterator[Source]:
    try:
        yield from _table_rows(table)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{table} cannot be read as a table of slides: {error}") from error


def _table_rows(table: Path) -> Iterator[Source]:
    with table.open(newline="", encoding="utf-8-sig") as file:
        header = file.readline()
        file.seek(0)
        rows = csv.DictReader(file, delimiter="\t" if "\t" in header else ",")
        columns = rows.fieldnames or []
        if set(columns) >= _GDC_COLUMNS:
            yield from (_gdc_source(table, number, row) for number, row in enumerate(rows, 2))
            return
        path_column = next((name for name in _PATH_COLUMNS if name in columns), None)
        if path_column is None:
            raise UserError(
                f"{table}: no column with the slide's path; expected one of "
                f"{', '.join(_PATH_COLUMNS)}, there: {', '.join(columns) or 'none'}"
            )
        for number, row in enumerate(rows, 2):
            yield _row_source(table, number, path_column, row)


def _row_source(table: Path, number: int, path_column: str, row: dict[str, str]) -> Source:
    text = _plain_path(table, number, row.get(path_column))
    if not text:
        raise UserError(f"{table}, line {number}: no value in column '{path_column}'")
    remote = "://" in text
    if not remote:
        check_below(table, number, text)
    path = Path(text) if remote or Path(text).is_absolute() else table.parent / text
    site = next((row[name] for name in _SITE_COLUMNS if row.get(name)), "")
    slide_id = row.get("slide_id") or slide_id_of(path)
    return Source(
        path if remote else _absolute(path),
        check_slide_id(slide_id),
        _csv_mpp(table, number, row.get("mpp")),
        (row.get("patient") or "").strip(),
        site.strip(),
        (row.get("project") or "").strip(),
        (row.get("sample_type") or "").strip(),
        md5=(row.get("md5") or row.get("md5sum") or "").strip().lower(),
        preparation=(row.get("preparation") or "").strip().lower(),
        uri=text if remote else "",
        bytes=_table_bytes(table, number, row.get("bytes") or row.get("size_bytes")),
    )


def _gdc_source(table: Path, number: int, row: dict[str, str]) -> Source:
    """A row of a GDC manifest: the slide is `<id>/<filename>`, as gdc-client lays it out."""
    uuid, name = (_plain_path(table, number, row[key]) for key in ("id", "filename"))
    if not uuid or not name:
        raise UserError(f"{table}, line {number}: no id or no filename")
    if "/" in name or {uuid, name} & {".", ".."}:
        raise UserError(f"{table}, line {number}: '{name}' of '{uuid}' is no file's name")
    size = _table_bytes(table, number, row["size"])
    uri = f"{uuid}/{name}"
    return Source(
        Path(uri), slide_id_of(Path(name)), md5=(row["md5"] or "").strip().lower(), uri=uri,
        bytes=size,
    )  # fmt: skip


def check_below(table: Path, number: int, text: str) -> None:
    """A relative path in a table is below the table's folder; an absolute one says where it is."""
    if not os.path.isabs(text) and os.path.normpath(text).split(os.sep)[0] == os.pardir:
        raise UserError(
            f"{table}, line {number}: '{text}' leaves the table's folder; "
            "write the absolute path if that is meant"
        )


def _plain_path(table: Path, number: int, text: str | None) -> str:
    """A path or address as written; one that a command would take for an option is refused."""
    plain = (text or "").strip()
    if plain.startswith("-") or "\0" in plain or "\n" in plain:
        raise UserError(f"{table}, line {number}: {plain[:80]!r} is neither a path nor an address")
    return plain


def _table_bytes(table: Path, number: int, text: str | None) -> int:
    if text is None or not text.strip():
        return 0
    if not (text.isascii() and text.strip().isdigit()):
        raise UserError(f"{table}, line {number}: size '{text}', expected a number of bytes")
    return int(text)


def _csv_mpp(table: Path, number: int, text: str | None) -> float | None:
    if text is None or not text.strip():
        return None
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.01 < value < 100:
        raise UserError(f"{table}, line {number}: mpp '{text}', expected micrometres per pixel")
    return value
