"""TCGA barcodes: patient, tissue source site, project and sample type from a slide's name.

Codes are text: "02", "2E" and "NA" are sites.
"""

import csv
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

_BARCODE = re.compile(
    r"^TCGA-(?P<tss>[A-Z0-9]{2})-(?P<participant>[A-Z0-9]{4})(-(?P<sample>\d{2})[A-Z])?"
    r"(-\d{2}[A-Z]?-(?P<section>[A-Z]{2})\w)?",
    re.IGNORECASE,
)
_PREPARATION = {"DX": "ffpe", "TS": "frozen", "MS": "frozen", "BS": "frozen"}
"""Diagnostic sections are paraffin; top, middle and bottom sections of a sample are frozen."""
_TABLES = Path(__file__).parent / "tcga"


@dataclass(frozen=True)
class Barcode:
    """What a TCGA barcode says; `project` is '' for a site that the table lacks.

    `preparation` is `ffpe`, `frozen`, or '' where the barcode does not say.
    """

    patient: str
    site: str
    project: str
    sample_type: str
    preparation: str = ""


def parse_barcode(slide_id: str) -> Barcode | None:
    """Read a TCGA slide barcode, or None for any other name.

    >>> parse_barcode("TCGA-CV-7438-01Z-00-DX1.9F2C").patient
    'TCGA-CV-7438'
    >>> parse_barcode("slide-1") is None
    True
    """
    match = _BARCODE.match(slide_id)
    if match is None:
        return None
    site = match["tss"].upper()
    patient = f"TCGA-{site}-{match['participant'].upper()}"
    preparation = _PREPARATION.get((match["section"] or "").upper(), "")
    return Barcode(patient, site, project_of_site(site), match["sample"] or "", preparation)


def project_of_site(site: str) -> str:
    """The TCGA project (`TCGA-HNSC`) that a tissue source site collected for, '' if unknown.

    >>> project_of_site("CV"), project_of_site("00")
    ('TCGA-HNSC', '')
    """
    return _projects_by_site().get(site, "")


@cache
def _projects_by_site() -> dict[str, str]:
    """The two tables name studies alike but for case, spaces and hyphens."""
    codes = {
        _normalise_name(row["Study Name"]): row["Study Abbreviation"]
        for row in _read_rows("tcga_studies.tsv")
    }
    return {
        row["TSS Code"]: f"TCGA-{code}"
        for row in _read_rows("tissue_source_sites.tsv")
        if (code := codes.get(_normalise_name(row["Study Name"])))
    }


def _normalise_name(name: str) -> str:
    return " ".join(name.lower().replace("-", " ").split())


def _read_rows(name: str) -> list[dict[str, str]]:
    with (_TABLES / name).open(newline="", encoding="utf-8") as file:
        return [
            {key: (value or "").strip() for key, value in row.items() if key}
            for row in csv.DictReader(file, delimiter="\t")
        ]
