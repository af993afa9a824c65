"""The slides of a dataset as a cohort, with what tissue found on each."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from common.errors import UserError
from common.text import list_some
from pipeline.dataset import Dataset, Ledger, Slide, read_identity, read_slides
from pipeline.dataset.tables.slides import describe_copies
from pipeline.selection.cohort import Cohort, make_cohort
from pipeline.tissue.stage import (
    candidates_origin,
    count_candidates,
    imported_source,
    is_lost,
    tissue_fingerprint,
)

_NO_RESULT = "no tissue result"
_LOST = "tissue result lost or damaged"


@dataclass(frozen=True)
class Tissue:
    """The dataset's slides as a cohort (0 candidates where tissue has none) and their state.

    `unusable` maps slides without a current result to reason and detail; `fingerprints` are the
    others' results, and `candidates` what the ranks of each count in (see
    `candidates_origin`). `copies` says which are one file under several names, '' for none.
    """

    cohort: Cohort
    unusable: dict[str, tuple[str, str]]
    fingerprints: dict[str, str]
    candidates: dict[str, str]
    copies: str = ""


def read_tissue(dataset: Dataset, *, skip_lost: bool = False) -> Tissue:
    """All slides of slides.parquet with their candidates, and why some have none.

    Raises `UserError` where the tissue result of a slide is lost or damaged, unless `skip_lost`
    makes that slide unusable, and where no slide has candidates.
    """
    identity = read_identity(dataset)
    ledger = Ledger.read(dataset, "tissue")[""]
    slides, fingerprints = read_slides(dataset), {}
    unusable: dict[str, tuple[str, str]] = {}
    origins: dict[str, str] = {}
    counts = np.zeros(len(slides), np.int64)
    lost: list[str] = []
    for index, slide in enumerate(slides):
        if slide.status != "ok":
            unusable[slide.slide_id] = (f"{slide.status} by scan", slide.reason)
            continue
        entries = ledger.entries(slide.slide_id)
        expected = tissue_fingerprint(slide, identity, imported_source(entries))
        entry = ledger.done(slide.slide_id, expected)
        if entry is None and is_lost(entries, expected):
            lost.append(slide.slide_id)
        elif entry is None:
            unusable[slide.slide_id] = (_NO_RESULT, "run `tissue`")
        elif entry.outcome == "rejected":
            unusable[slide.slide_id] = ("rejected by tissue", entry.reason)
        else:
            try:
                counts[index] = count_candidates(dataset, slide.slide_id, entry)
            except UserError:
                lost.append(slide.slide_id)
                continue
            fingerprints[slide.slide_id] = expected
            origins[slide.slide_id] = candidates_origin(slide, entry)
    unusable |= dict.fromkeys(lost, (_LOST, "run `tissue`"))
    if lost and not skip_lost:
        # A selection without them would be another one, under the name of the whole.
        raise UserError(
            f"slides whose tissue result is lost or damaged: {len(lost):,} "
            f"({list_some(lost)}); run `tissue` (or the `import` that made it), then `select` "
            "again; `select --skip-lost` leaves them out"
        )
    if not fingerprints:
        waiting = sum(reason == _NO_RESULT for reason, _ in unusable.values())
        what = f"{waiting} slides wait for it" if waiting else "none was found"
        raise UserError(f"no slide of {dataset.root} has tissue candidates ({what}); run `tissue`")
    copies = describe_copies(slide for slide in slides if slide.slide_id in fingerprints)
    return Tissue(cohort_of_slides(slides, counts), unusable, fingerprints, origins, copies)


def cohort_of_slides(slides: Sequence[Slide], candidates: npt.NDArray[np.int64]) -> Cohort:
    """Rows of slides.parquet as a cohort, with their `candidates` int64 [slides]."""
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
        sampled=[s.sampled_key for s in slides],
    )


def hash_cohort(cohort: Cohort) -> str:
    """sha256 of the cohort's columns (bytes of their text), in hex."""
    sha = hashlib.sha256()
    for name in cohort.__dataclass_fields__:
        sha.update("\0".join(map(str, getattr(cohort, name).tolist())).encode() + b"\1")
    return sha.hexdigest()
