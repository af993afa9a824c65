"""A cohort from a CSV list of slides, before a slide was opened; candidates simulated."""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from common.csv_rows import CsvRows, describe_columns
from common.errors import UserError
from common.files import open_text
from common.text import is_whole_number
from pipeline.dataset import MOST_SLIDES, Slide, check_slide_id
from pipeline.selection.allocate import sainte_lague
from pipeline.slides.barcode import parse_barcode
from pipeline.slides.entries import slide_id_of

_SITE, _BYTES = ("site", "tss"), ("size_bytes", "bytes", "size", "file_size")
_PATH, _MD5 = ("file_name", "filename", "path"), ("md5", "md5sum")
_CANDIDATES = "candidates"

_SIMULATED = (
    "A slide's number of candidate tiles is simulated as proportional to its file's size, rounded "
    "by Sainte-Laguë so that all slides of the list together have exactly {total:,} candidates."
)
_FROM_COLUMN = "Candidate tiles are those of the list's 'candidates' column."


@dataclass(frozen=True)
class CohortTable:
    """Slides sorted by slide_id, their candidates int64 [slides], and how those were found."""

    slides: list[Slide]
    candidates: npt.NDArray[np.int64]
    model: str


def read_cohort_csv(path: Path, total_candidates: int) -> CohortTable:
    """Slides of a CSV with a slide_id or file name column; every value is read as text.

    Columns patient, site (or tss), project, sample_type, preparation, md5 are taken where they
    are; a TCGA barcode in the slide_id fills in what is missing. Candidates come from a column of
    that name, else they are simulated from file sizes. Raises `UserError` naming file and line.
    """
    try:
        with open_text(path, newline="", encoding="utf-8-sig") as file:
            lines = CsvRows(path, file, most_rows=MOST_SLIDES)
            columns = lines.columns
            _require_columns(path, columns)
            rows = [_parse_row(path, number, row, _CANDIDATES in columns) for number, row in lines]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} cannot be read as a CSV table: {error}") from error
    if not rows:
        raise UserError(f"{path} has no slide: expected one row per slide below the header")
    # Sorted before candidates are simulated: ties in size are broken by the slide's name.
    rows.sort(key=lambda row: row[0].slide_id)
    slides = [slide for slide, _ in rows]
    if _CANDIDATES in columns:
        return CohortTable(slides, np.array([n for _, n in rows], np.int64), _FROM_COLUMN)
    sizes = np.array([slide.bytes for slide in slides], np.int64)
    model = _SIMULATED.format(total=total_candidates)
    return CohortTable(slides, simulated_candidates(sizes, total_candidates), model)


def simulated_candidates(sizes: npt.NDArray[np.int64], total: int) -> npt.NDArray[np.int64]:
    """Candidates in proportion to file sizes in bytes, `total` in all (Sainte-Laguë).

    >>> simulated_candidates(np.array([300, 100]), 8).tolist()
    [6, 2]
    """
    return sainte_lague(sizes, np.full(len(sizes), total, np.int64), total)


def _require_columns(path: Path, columns: Sequence[str]) -> None:
    wanted = {
        "a slide_id or file_name column": ("slide_id", *_PATH),
        "a size_bytes or candidates column": (*_BYTES, _CANDIDATES),
    }
    for what, names in wanted.items():
        if not any(name in columns for name in names):
            raise UserError(f"{path}: expected {what}; columns there: {describe_columns(columns)}")


def _parse_row(path: Path, number: int, row: Mapping[str, str], stated: bool) -> tuple[Slide, int]:
    def text(*names: str) -> str:
        return next((row[name].strip() for name in names if (row.get(name) or "").strip()), "")

    # What the list states comes first: codes in a barcode may be of a merged or renamed site.
    slide_id = text("slide_id") or slide_id_of(Path(text(*_PATH)))
    barcode = parse_barcode(slide_id)
    slide = Slide(
        check_slide_id(slide_id),
        text(*_PATH),
        patient=text("patient") or (barcode.patient if barcode else ""),
        site=text(*_SITE) or (barcode.site if barcode else ""),
        project=text("project") or (barcode.project if barcode else ""),
        sample_type=text("sample_type") or (barcode.sample_type if barcode else ""),
        preparation=text("preparation").lower() or (barcode.preparation if barcode else ""),
        md5=text(*_MD5).lower(),
        bytes=0 if stated and not text(*_BYTES) else _parse_whole(path, number, text(*_BYTES), 1),
    )
    return slide, _parse_whole(path, number, text(_CANDIDATES), 0) if stated else 0


def _parse_whole(path: Path, number: int, text: str, least: int) -> int:
    if not is_whole_number(text) or int(text) < least:
        raise UserError(
            f"{path}, line {number}: '{text[:40]}', expected a whole number from {least} up"
        )
    return int(text)
