"""The slides of a dataset as a cohort, with what tissue found on each."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from common.errors import UserError
from pipeline.dataset import Dataset, Ledger, Slide, candidate_count, read_identity, read_slides
from pipeline.selection.cohort import Cohort, make_cohort
from pipeline.tissue.stage import imported_source, tissue_fingerprint


@dataclass(frozen=True)
class Tissue:
    """The dataset's slides as a cohort (0 candidates where tissue has none) and their state.

    `barred` says of slides without a standing result why; `marks` are the others' fingerprints.
    """

    cohort: Cohort
    barred: dict[str, tuple[str, str]]
    marks: dict[str, str]


def read_tissue(dataset: Dataset) -> Tissue:
    """All slides of slides.parquet with their candidates, and why some have none."""
    identity = read_identity(dataset)
    known = Ledger.read(dataset, "tissue")[""]
    slides, barred, marks = read_slides(dataset), {}, {}
    counts = np.zeros(len(slides), np.int64)
    for index, slide in enumerate(slides):
        if slide.status != "ok":
            barred[slide.slide_id] = (f"{slide.status} by scan", slide.reason)
            continue
        entries = known.entries(slide.slide_id)
        mark = tissue_fingerprint(slide, identity, imported_source(entries))
        entry = known.done(slide.slide_id, mark)
        if entry is None:
            barred[slide.slide_id] = ("no tissue result", "run `tissue`")
        elif entry.outcome == "rejected":
            barred[slide.slide_id] = ("rejected by tissue", entry.reason)
        else:
            # The line that stands says it; 100,000 footers on a shared file system take minutes.
            stated = entry.counts.get("candidate tiles")
            counts[index] = stated or candidate_count(dataset, slide.slide_id)
            marks[slide.slide_id] = mark
    if not marks:
        waiting = sum(reason == "no tissue result" for reason, _ in barred.values())
        what = f"{waiting} slides wait for it" if waiting else "none was found"
        raise UserError(f"no slide of {dataset.root} has tissue candidates ({what}); run `tissue`")
    return Tissue(cohort_of_slides(slides, counts), barred, marks)


def cohort_of_slides(slides: Sequence[Slide], candidates: npt.NDArray[np.int64]) -> Cohort:
    """Rows of slides.parquet as a cohort, with the candidates of each."""
    return make_cohort(
        slide_id=[s.slide_id for s in slides],
        patient=[s.patient for s in slides],
        site=[s.site for s in slides],
        project=[s.project for s in slides],
        sample_type=[s.sample_type for s in slides],
        preparation=[s.preparation for s in slides],
        md5=[s.md5.lower() for s in slides],
        sha256=[s.sha256.lower() for s in slides],
        candidates=candidates,
    )


def slides_sha256(dataset: Dataset) -> str:
    """sha256 of slides.parquet, which the plan records."""
    return hashlib.sha256(dataset.slides_file.read_bytes()).hexdigest()


def cohort_hash(cohort: Cohort) -> str:
    """Hash of the cohort's columns."""
    sha = hashlib.sha256()
    for name in cohort.__dataclass_fields__:
        sha.update("\0".join(map(str, getattr(cohort, name).tolist())).encode() + b"\1")
    return sha.hexdigest()
