"""Finding pictures of tiles: one folder per slide, or a CSV; positions from their names."""

import csv
import hashlib
import os
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from common.csv_rows import CsvRows, describe_columns
from common.errors import UserError
from common.files import open_text
from common.text import list_some
from pipeline.dataset import check_slide_id, fingerprint_of, safe_slide_id
from pipeline.dataset.grid import rank_order
from pipeline.imports.picture_names import find_barcode, name_slides
from pipeline.slides.barcode import parse_barcode
from pipeline.slides.entries import SlideTableRow

AUTO = "auto"
_RULES = {
    "folder": "their folders' names",
    "barcode": "the TCGA barcodes in their names",
    "name": "what their names begin with",
    "expression": "the regular expression",
    "table": "the table",
}
"""In words, what may name a slide."""
_PICTURES = frozenset({".png", ".jpg", ".jpeg"})
_PATHS = ("path", "tile_path", "file", "filename", "file_name", "image")
_SLIDES = ("slide_id", "slide", "wsi")
_POSITION = re.compile(r"^(?:.*[^0-9])?(\d+)_(\d+)$")


@dataclass(frozen=True)
class TileFolder:
    """The pictures of one slide: paths relative to `root`, sorted.

    `positions` are (x, y) or (column, row) per picture as a table states them, empty where names
    are to be read; `cells` says that they are columns and rows. `taken_by` is the other folder
    that has the same name: this one cannot be imported. `rule` is what named the slide.
    """

    slide_id: str
    root: Path
    files: tuple[str, ...]
    positions: tuple[tuple[float, float], ...] = ()
    cells: bool = False
    patient: str = ""
    site: str = ""
    project: str = ""
    sample_type: str = ""
    preparation: str = ""
    taken_by: str = ""
    rule: str = "folder"


@dataclass(frozen=True)
class Listing:
    """State of a folder's files: bytes in all, newest change, and a hash of every name and state.

    A picture that was renamed changes neither its bytes nor its time, but its place.
    """

    bytes: int
    mtime_ns: int
    sha256: str


def find_tile_folders(
    source: Path, slide_from: str = AUTO, taken: Mapping[str, str] | None = None
) -> list[TileFolder]:
    """Slides of the pictures below a folder (any depth), or of a CSV, by slide id.

    `slide_from` says what names a slide: its folder (DSMIL's `<class>/<slide>/<col>_<row>.jpeg` and
    plain `<slide>/*.png` alike), the pictures' names, the group of a regular expression that is
    found in the path below `source`, or "auto" (see `_name_rule`). `taken` are ids and paths of the
    slides that the dataset has: they stay what they are. Raises `UserError` where there is no
    picture, where a picture names no slide, or a folder with pictures has another one inside: two
    magnifications are two datasets.
    """
    if source.is_file():
        return _from_csv(source)
    if not source.is_dir():
        raise UserError(f"{source}: no such folder or CSV; expected folders of PNG or JPEG tiles")
    # A folder's name may be a link or '.', what it is called is in its path.
    top = source.absolute()
    pictures: dict[Path, list[str]] = {}
    for folder, _, names in sorted(os.walk(top)):
        if files := sorted(name for name in names if Path(name).suffix.lower() in _PICTURES):
            pictures[Path(folder)] = files
    if not pictures:
        raise UserError(f"{source} has no pictures; expected <slide>/<tile>.png, .jpg or .jpeg")
    if slide_from not in (AUTO, "folder", "name"):
        return _group_pictures(top, _match_pictures(top, pictures, slide_from), "expression")
    _refuse_nested(pictures)
    folders = []
    named: dict[str, list[tuple[str, str]]] = {"barcode": [], "name": []}
    for root, files in pictures.items():
        slides = name_slides(files)
        rule = _name_rule(top, root, slides, taken or {}) if slide_from == AUTO else slide_from
        if rule == "folder":
            folders.append(TileFolder(safe_slide_id(root.name), root, tuple(files)))
        else:
            below = root.relative_to(top)
            named[rule] += [(s, str(below / f)) for s, f in zip(slides, files, strict=True)]
    for rule, pairs in named.items():
        folders += _group_pictures(top, pairs, rule)
    return _number_repeated([_with_barcode(folder) for folder in folders])


def _number_repeated(folders: Sequence[TileFolder]) -> list[TileFolder]:
    """The folders by slide id; of two with one name the second is called otherwise."""
    by_id: dict[str, TileFolder] = {}
    for folder in sorted(folders, key=lambda folder: folder.root):
        if (first := by_id.get(folder.slide_id)) is not None:
            # Under another name, so that the refusal is recorded and the first is kept.
            digest = hashlib.sha256(str(folder.root).encode()).hexdigest()[:8]
            slide_id = f"{folder.slide_id}.{digest}"
            folder = replace(folder, slide_id=slide_id, taken_by=str(first.root))
        by_id[folder.slide_id] = folder
    return [by_id[slide_id] for slide_id in sorted(by_id)]


def _name_rule(top: Path, root: Path, slides: Sequence[str], taken: Mapping[str, str]) -> str:
    """What names the slides of a folder's pictures: "barcode", "name" or "folder".

    `slides` are those that the pictures' names begin with. TCGA barcodes count, unless the folder
    is one slide's; other names count in the folder that was given, where each occurs more than
    once on average. A folder that the dataset has as one slide stays one.
    """
    distinct = set(slides)
    if taken.get(safe_slide_id(root.name)) == str(root):
        return "folder"
    if all(find_barcode(slide) for slide in slides):
        is_slide = len(distinct) == 1 and find_barcode(root.name)
        return "folder" if is_slide else "barcode"
    is_repeated = len(distinct) > 1 and "" not in distinct and len(slides) >= 2 * len(distinct)
    return "name" if root == top and is_repeated else "folder"


def _match_pictures(
    top: Path, pictures: Mapping[Path, Sequence[str]], expression: str
) -> list[tuple[str, str]]:
    """The slide and the path of each picture, by a regular expression."""
    try:
        pattern = re.compile(expression)
    except re.error as error:
        raise UserError(f"--slide-from '{expression}' is no regular expression: {error}") from error
    if not pattern.groups:
        raise UserError(
            f"--slide-from '{expression}': expected auto, folder, name, or a regular expression "
            "with one group in parentheses, which is the slide"
        )
    pairs = []
    for root, files in pictures.items():
        for file in files:
            path = (root / file).relative_to(top).as_posix()
            match = pattern.search(path)
            pairs.append((match[1] or "" if match else "", path))
    return pairs


def _group_pictures(top: Path, pairs: Sequence[tuple[str, str]], rule: str) -> list[TileFolder]:
    """The slides of pictures by (slide, path below `top`)."""
    if unnamed := [path for slide, path in pairs if not slide]:
        raise UserError(
            f"{top}: {len(unnamed):,} of {len(pairs):,} pictures name no slide, such as "
            f"{unnamed[0]}; give --slide-from folder, a regular expression, or a CSV"
        )
    groups: dict[str, list[str]] = {}
    names: dict[str, str] = {}
    for slide, path in sorted(pairs):
        slide_id = safe_slide_id(slide)
        if names.setdefault(slide_id, slide) != slide:
            raise UserError(
                f"{top}: slide '{slide}' and '{names[slide_id]}' would both be called {slide_id}; "
                "rename one of them, or give a CSV"
            )
        groups.setdefault(slide_id, []).append(path)
    return [
        _with_barcode(TileFolder(slide_id, top, tuple(sorted(files)), rule=rule))
        for slide_id, files in sorted(groups.items())
    ]


def _refuse_nested(roots: Collection[Path]) -> None:
    for root in roots:
        above = next((parent for parent in root.parents if parent in roots), None)
        if above is not None:
            raise UserError(
                f"{above} has pictures and so does {root} inside it (two "
                "magnifications?): give the folder of one of them, or a CSV with path and slide"
            )


def describe_folders(folders: Sequence[TileFolder]) -> str:
    """A source in one line: how many slides and tiles, and by what the slides are named."""
    parts = []
    for rule, words in _RULES.items():
        of_rule = [folder for folder in folders if folder.rule == rule]
        if of_rule:
            tiles = sum(len(folder.files) for folder in of_rule)
            example = f"such as {of_rule[0].slide_id}"
            parts.append(f"{tiles:,} tiles of {len(of_rule):,} slides by {words}, {example}")
    return "; ".join(parts)


def doubtful_folders(folders: Sequence[TileFolder]) -> list[str]:
    """Folders taken for one slide whose pictures' names begin as if they were of several."""
    doubtful = []
    for folder in folders:
        if folder.rule != "folder":
            continue
        slides = sorted(set(name_slides(folder.files)))
        is_only = len(folders) == 1
        # Names without a repetition, such as hashes, are a habit inside a slide's folder.
        if len(slides) > 1 and (is_only or len(folder.files) >= 2 * len(slides)):
            doubtful.append(f"{folder.root} ({len(slides):,}: {list_some(slides)})")
    return doubtful


def _with_barcode(folder: TileFolder) -> TileFolder:
    """Patient, site, project and kind of section of a TCGA barcode, unless a table says them."""
    barcode = parse_barcode(folder.slide_id)
    if barcode is None:
        return folder
    return replace(
        folder,
        patient=folder.patient or barcode.patient,
        site=folder.site or barcode.site,
        project=folder.project or barcode.project,
        sample_type=folder.sample_type or barcode.sample_type,
        preparation=folder.preparation or barcode.preparation,
    )


@dataclass
class _SlideRows:
    """Rows of a CSV for one slide, as they are read.

    `name` is the slide's name as the first row has it; `lines` are those of the pictures, by
    their path without detours.
    """

    first: SlideTableRow
    name: str
    files: list[str] = field(default_factory=list)
    lines: dict[str, int] = field(default_factory=dict)
    positions: list[tuple[float, float]] = field(default_factory=list)


def _from_csv(table: Path) -> list[TileFolder]:
    """Slides of a CSV with path and slide, and perhaps x and y or col and row, patient, site ..."""
    slides: dict[str, _SlideRows] = {}
    try:
        with open_text(table, newline="", encoding="utf-8-sig") as file:
            rows = CsvRows(table, file)
            columns = rows.columns
            path_column = _find_column(table, columns, _PATHS)
            slide_column = _find_column(table, columns, _SLIDES)
            pairs = (("x", "y"), ("col", "row"))
            pair = next((pair for pair in pairs if set(pair) <= set(columns)), None)
            for number, values in rows:
                row = SlideTableRow(table, number, values)
                _add_row(slides, row, path_column, slide_column, pair)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{table} cannot be read as a table of tiles: {error}") from error
    if not slides:
        raise UserError(f"{table} has no rows; expected one per tile, with path and slide")
    is_cells = pair == ("col", "row")
    return [_csv_folder(slide_id, slides[slide_id], is_cells) for slide_id in sorted(slides)]


def _add_row(
    slides: dict[str, _SlideRows],
    row: SlideTableRow,
    path_column: str,
    slide_column: str,
    pair: tuple[str, str] | None,
) -> None:
    """Add a picture; refuse one that would merge two slides, or count a picture twice."""
    name, path = row.read_text(slide_column), row.read_text(path_column)
    if not name or not path:
        raise row.line_error(f"needs {path_column} and {slide_column}")
    row.check_below(path)
    slide_id = safe_slide_id(name)
    rows = slides.setdefault(slide_id, _SlideRows(row, name))
    if name != rows.name:
        raise row.line_error(
            f"slide '{name}' and '{rows.name}' of line {rows.first.number} would both be called "
            f"{slide_id}; rename one of them"
        )
    line = rows.lines.setdefault(os.path.normpath(path), row.number)
    if line != row.number:
        raise row.line_error(
            f"{path} of slide '{name}' is there in line {line} already; leave one of the two lines"
        )
    rows.files.append(path)
    if pair:
        try:
            rows.positions.append((float(row.read_text(pair[0])), float(row.read_text(pair[1]))))
        except ValueError as error:
            raise row.line_error(f"{pair[0]} and {pair[1]} are no numbers") from error


def _find_column(table: Path, columns: Sequence[str], names: Sequence[str]) -> str:
    column = next((name for name in names if name in columns), None)
    if column is None:
        raise UserError(
            f"{table}: expected a column {' or '.join(names)}, there: {describe_columns(columns)}"
        )
    return column


def _csv_folder(slide_id: str, rows: _SlideRows, is_cells: bool) -> TileFolder:
    # By path, so that the order of a table's rows changes nothing.
    order = sorted(range(len(rows.files)), key=lambda i: rows.files[i])
    folder = TileFolder(
        check_slide_id(slide_id),
        rows.first.table.absolute().parent,
        tuple(rows.files[i] for i in order),
        tuple(rows.positions[i] for i in order) if rows.positions else (),
        is_cells,
        rows.first.read_text("patient"),
        rows.first.read_text("site", "tss"),
        rows.first.read_text("project"),
        rows.first.read_text("sample_type"),
        rows.first.read_text("preparation").lower(),
        rule="table",
    )
    return _with_barcode(folder)


def list_files(folder: TileFolder) -> Listing:
    """State of the folder's files; raises `UserError` naming one that is not there."""
    total, newest = 0, 0
    states = []
    for name in folder.files:
        try:
            stat = (folder.root / name).stat()
        except OSError as error:
            raise UserError(f"{folder.root / name}: {error.strerror}") from error
        total, newest = total + stat.st_size, max(newest, stat.st_mtime_ns)
        states.append((name, stat.st_size, stat.st_mtime_ns))
    return Listing(total, newest, fingerprint_of(files=states, positions=folder.positions))


def tile_positions(
    folder: TileFolder, names: str, tile_px: int
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]] | None:
    """Positions (x, y), float64 [n] each, in the order of `files`; None where none are stated.

    `names` says what a name ends in: `x_y` pixels, `col_row` cells of `tile_px`; a table's
    columns come first. Raises `UserError` for a name without, and for two pictures of one place.
    """
    if not folder.positions and names == "none":
        return None
    pairs, cells = list(folder.positions), folder.cells
    if not pairs:
        cells = names == "col_row"
        for name in folder.files:
            match = _POSITION.match(Path(name).stem)
            if match is None:
                what = "<col>_<row>" if cells else "<x>_<y>"
                raise UserError(
                    f"{folder.root / name}: the name does not end in {what}; see --names"
                )
            pairs.append((float(match[1]), float(match[2])))
    xy = np.array(pairs, np.float64).reshape(len(pairs), 2) * (tile_px if cells else 1)
    # Two pictures of one place would be one candidate twice.
    distinct, first = np.unique(xy, axis=0, return_index=True)
    if len(distinct) < len(xy):
        again = sorted(set(range(len(xy))) - set(first.tolist()))[0]
        raise UserError(f"{folder.root / folder.files[again]} has the position of another picture")
    return xy[:, 0], xy[:, 1]


def tile_order(
    seed: int,
    folder: TileFolder,
    positions: tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]] | None,
) -> npt.NDArray[np.int64]:
    """Indices of the pictures in rank order: by position, else by the hash of their names.

    Without positions the key is the first 8 bytes (little endian) of BLAKE2b of
    "<seed>\\0<slide_id>\\0<name>", ties by name.
    """
    if positions is not None:
        return rank_order(seed, folder.slide_id, *positions)
    # A hash, since names in order would put neighbouring tiles into one block.
    keys = [
        hashlib.blake2b(f"{seed}\0{folder.slide_id}\0{name}".encode(), digest_size=8).digest()
        for name in folder.files
    ]
    return np.argsort(np.frombuffer(b"".join(keys), "<u8"), kind="stable")
