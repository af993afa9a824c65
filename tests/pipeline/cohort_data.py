"""Cohorts for the tests: a list with the traps of the real one, and a dataset made from it."""

import csv
import hashlib
from pathlib import Path

import numpy as np
import pyarrow as pa

from pipeline.dataset import (
    CANDIDATES_SCHEMA,
    Dataset,
    Entry,
    Run,
    Slide,
    claim_identity,
    read_identity,
    write_candidates,
    write_slides,
)
from pipeline.slides.barcode import parse_barcode
from pipeline.tissue.stage import tissue_fingerprint

SITES = ("02", "05", "2E", "3E", "NA", "CR", "OR", "12")
PROJECTS = ("TCGA-GBM", "TCGA-OV", "TCGA-HNSC")


def trap_rows(patients: int = 60, seed: int = 0) -> list[dict[str, str]]:
    """A list of slides whose sites look like numbers, nulls and exponents, with shared files.

    Sites are of unequal size, some patients have many slides, UUIDs differ in case, one file is
    there twice under one patient and one under two, one slide is frozen, one is normal tissue,
    one is tiny, one site has a single patient.
    """
    rng = np.random.default_rng(seed)
    rows = []
    for number in range(patients):
        site = SITES[min(len(SITES) - 2, int(rng.exponential(2)))] if number else "12"
        patient = f"TCGA-{site}-{number:04d}"
        for slide in range(9 if number == 7 else int(rng.integers(1, 4))):
            uuid = hashlib.md5(f"{number}/{slide}".encode()).hexdigest()
            uuid = uuid.upper() if number % 2 else uuid
            rows.append(
                {
                    "slide_id": f"{patient}-01Z-00-DX{slide + 1}.{uuid}",
                    "project": PROJECTS[SITES.index(site) % 3],
                    "patient": patient,
                    "tss": site,
                    "size_bytes": str(int(rng.integers(50_000_000, 2_000_000_000))),
                    "md5": hashlib.md5(uuid.encode()).hexdigest(),
                }
            )
    same, other = rows[3], next(row for row in rows[4:] if row["patient"] != rows[3]["patient"])
    other["md5"] = same["md5"]
    several = next(row for row in rows if "DX2" in row["slide_id"])
    first = next(r for r in rows if r["patient"] == several["patient"] and "DX1" in r["slide_id"])
    several["md5"] = first["md5"].upper()
    rows[20]["slide_id"] = rows[20]["slide_id"].replace("-DX", "-TS").replace("01Z", "01A")
    rows[21]["slide_id"] = rows[21]["slide_id"].replace("-01Z", "-11Z")
    rows[22]["size_bytes"] = "900000"
    return rows


def write_csv(path: Path, rows: list[dict[str, str]]) -> Path:
    """The rows as a CSV file."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def slides_of(rows: list[dict[str, str]]) -> list[Slide]:
    """The rows as scanned slides."""
    slides = []
    for row in rows:
        barcode = parse_barcode(row["slide_id"])
        assert barcode is not None
        slides.append(
            Slide(
                row["slide_id"], f"{row['slide_id']}.svs", mpp=0.5, bytes=int(row["size_bytes"]),
                mtime_ns=1, patient=row["patient"], site=row["tss"], project=row["project"],
                sample_type=barcode.sample_type, md5=row["md5"].lower(),
                preparation=barcode.preparation,
            )
        )  # fmt: skip
    return slides


def tissue_dataset(root: Path, slides: list[Slide], counts: list[int]) -> Dataset:
    """A dataset as scan and tissue leave it, without any slide file."""
    dataset = Dataset(root)
    identity = {"mpp": 0.5, "tile_px": 224, "grid": "adjacent", "seed": 0, "detector": "test"}
    claim_identity(dataset, identity, stage="scan", versions={})
    with Run(dataset, "scan", {}) as run:
        record = write_slides(dataset, run.run_id, slides)
        run.append([Entry("slides.parquet", "done", "x", scope="table", files=(record,))])
    with Run(dataset, "tissue", {}) as run:
        entries = []
        for slide, count in zip(slides, counts, strict=True):
            if slide.status != "ok":
                continue
            mark = tissue_fingerprint(slide, read_identity(dataset))
            if not count:
                entries.append(Entry(slide.slide_id, "rejected", mark, "no tile has enough tissue"))
                continue
            columns = [np.arange(count, dtype=np.int32), *np.zeros((4, count))]
            table = pa.table(
                [pa.array(c, t) for c, t in zip(columns, CANDIDATES_SCHEMA.types, strict=True)],
                schema=CANDIDATES_SCHEMA,
            )
            record = write_candidates(dataset, run.run_id, slide.slide_id, table)
            entries.append(Entry(slide.slide_id, "done", mark, files=(record,)))
        run.append(entries)
    return dataset
