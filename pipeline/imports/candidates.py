"""Imported positions become candidates in place of detection, and selections of exactly them."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice

import numpy as np
import pyarrow as pa

from common.console import open_meter, print_line
from common.errors import UserError
from common.text import describe_joined, joined_names
from pipeline.dataset import (
    CANDIDATES_SCHEMA,
    Dataset,
    DatasetKind,
    Entry,
    Ledger,
    Run,
    ScopeLedger,
    Selection,
    Slide,
    check_name,
    claim_identity,
    fingerprint_of,
    make_selection,
    read_selection_rows,
    read_slides,
    write_candidates,
    write_selection,
)
from pipeline.imports.positions import Floats, Ints, RankedUnion, ranked_union
from pipeline.run.stage import stage_versions
from pipeline.run.summary import Summary, report_summary
from pipeline.selection.cohort import Cohort
from pipeline.selection.plan import IMPORTED, TRAIN, VAL_OUT, Ties, role_of_name, ties_to_json
from pipeline.selection.select import family_patients
from pipeline.selection.slides import cohort_of_slides
from pipeline.selection.ties import (
    check_honoured,
    check_may_change,
    describe_replacement,
    read_ties,
)
from pipeline.tissue.stage import STAGE as TISSUE
from pipeline.tissue.stage import tissue_fingerprint

SELECT = "select"
_VERSION = 2
"""Of the selections' plans: 2 records ties."""
_WRITERS = 8
_BATCH_SLIDES = 64
_NO_ROWS = "no tile of this slide was imported"


@dataclass(frozen=True)
class ImportedTiles:
    """The tiles that one selection names: slide indices int32 [n], x and y float64 [n] (level 0).

    `origin` says in the selection's plan where they came from.
    """

    name: str
    codes: Ints
    x: Floats
    y: Floats
    origin: Mapping[str, object] = field(default_factory=dict)


def record_candidates(
    dataset: Dataset,
    slides: Sequence[Slide],
    imported: Sequence[ImportedTiles],
    parameters: Mapping[str, object],
) -> int:
    """Write all imported tiles as candidates, and each part as a selection; the exit status.

    `parameters` identify what was imported: the dataset's detector from now on.
    """
    for tiles in imported:
        check_name(tiles.name, "selection")
    detector = f"{parameters['name']} {fingerprint_of(**parameters)}"
    claims = {"detector": detector, "detector_parameters": dict(parameters)}
    identity = claim_identity(
        dataset, claims, stage=TISSUE, versions=stage_versions(), kind=DatasetKind.SLIDES
    )
    fingerprints = {slide.slide_id: tissue_fingerprint(slide, identity) for slide in slides}
    summary = Summary("import")
    ranks: list[dict[str, Ints]] = [{} for _ in imported]
    duplicates = np.zeros(len(imported), np.int64)
    shared = 0
    with (
        Run(dataset, TISSUE, stage_versions()) as run,
        open_meter("import", len(slides), "slides") as progress,
    ):
        writer = CandidatesWriter(dataset, run, fingerprints, summary)
        unions = _union_by_slide(identity["seed"], slides, imported)
        # In batches, so that files wait for the disk together and few slides are in memory.
        while batch := list(islice(unions, _BATCH_SLIDES)):
            for slide, union in batch:
                for ranks_by_slide, slide_ranks in zip(ranks, union.ranks, strict=True):
                    ranks_by_slide[slide.slide_id] = slide_ranks
                shared += sum(map(len, union.ranks)) - len(union.x)
                duplicates += union.duplicates
            writer.write_batch(batch)
            progress.advance(len(batch))
        summary.seconds = progress.seconds
    _write_selections(dataset, imported, ranks, fingerprints, identity["seed"], detector, summary)
    for tiles, count in zip(imported, duplicates.tolist(), strict=True):
        if count:
            print_line(
                f"import: {count:,} rows of '{tiles.name}' repeat a tile of it and were dropped"
            )
    if shared:
        print_line(
            f"import: {shared:,} tiles are in more than one of these selections: do they overlap?"
        )
    return report_summary(summary, dataset.root / "candidates")


def _union_by_slide(
    seed: int, slides: Sequence[Slide], imported: Sequence[ImportedTiles]
) -> Iterator[tuple[Slide, RankedUnion]]:
    codes = np.concatenate([tiles.codes for tiles in imported])
    x = np.concatenate([tiles.x for tiles in imported])
    y = np.concatenate([tiles.y for tiles in imported])
    count = len(imported)
    member = np.repeat(np.arange(count, dtype=np.int16), [len(tiles.x) for tiles in imported])
    # Sorted once: a slide's rows are then a slice.
    order = np.argsort(codes, kind="stable")
    bounds = np.searchsorted(codes[order], np.arange(len(slides) + 1))
    for index, slide in enumerate(slides):
        rows = order[bounds[index] : bounds[index + 1]]
        yield slide, ranked_union(seed, slide.slide_id, x[rows], y[rows], member[rows], count)


class CandidatesWriter:
    """Writes the candidates that are not current; one journal line per slide, one sync per batch.

    `fingerprints` are the slides' by their ids.
    """

    def __init__(
        self, dataset: Dataset, run: Run, fingerprints: Mapping[str, str], summary: Summary
    ) -> None:
        self.dataset, self.run, self.fingerprints = dataset, run, fingerprints
        self.summary = summary
        self.ledger = Ledger.read(dataset, TISSUE)[""]

    def write_batch(self, batch: Sequence[tuple[Slide, RankedUnion]]) -> None:
        """Write one batch; its files wait for the disk together."""
        missing = []
        for slide, union in batch:
            current = self.ledger.done(slide.slide_id, self.fingerprints[slide.slide_id])
            if current is None:
                missing.append((slide, union))
            else:
                self.summary.skipped += current.outcome == "done"
        with ThreadPoolExecutor(_WRITERS) as pool:
            entries = list(pool.map(self._write_slide, missing))
        if entries:
            self.run.append(entries)
        for entry in entries:
            if entry.outcome != "rejected":
                self.summary.add_entry(entry)

    def _write_slide(self, pair: tuple[Slide, RankedUnion]) -> Entry:
        slide, union = pair
        slide_id, slide_fingerprint = slide.slide_id, self.fingerprints[slide.slide_id]
        if not len(union.x):
            return Entry(slide_id, "rejected", slide_fingerprint, _NO_ROWS)
        try:
            table = candidates_table(union.x, union.y)
            record = write_candidates(self.dataset, self.run.run_id, slide_id, table)
        except UserError as error:
            return Entry(slide_id, "failed", slide_fingerprint, str(error))
        counts = {"candidate tiles": len(union.x)}
        return Entry(slide_id, "done", slide_fingerprint, files=(record,), counts=counts)


def candidates_table(x: Floats | pa.Array, y: Floats | pa.Array) -> pa.Table:
    """Candidates in rank order, x and y float64 [n] in level-0 px; shares of tissue are null."""
    unknown = pa.nulls(len(x), pa.float32())
    ranks = pa.array(np.arange(len(x), dtype=np.int32))
    columns = [ranks, pa.array(x, pa.float64()), pa.array(y, pa.float64()), unknown, unknown]
    return pa.table(columns, schema=CANDIDATES_SCHEMA)


@dataclass(frozen=True)
class _Draft:
    """A selection that is to be written, with what ties it to others and its fingerprint."""

    selection: Selection
    ties: Ties
    fingerprint: str


def _write_selections(
    dataset: Dataset,
    imported: Sequence[ImportedTiles],
    ranks: Sequence[Mapping[str, Ints]],
    fingerprints: Mapping[str, str],
    seed: int,
    detector: str,
    summary: Summary,
) -> None:
    """Write the selections that are not current; refuses first what others rely on."""
    # Slides that failed have no candidates, so no selection may name them.
    ledger = Ledger.read(dataset, SELECT)[""]
    failed = {slide_id for slide_id, _ in summary.failed}
    all_slides = read_slides(dataset)
    cohort = cohort_of_slides(all_slides, np.zeros(len(all_slides), np.int64))
    if line := describe_joined("patients", joined_names(cohort.patient.tolist())):
        print_line(f"import: {line}")
    drafts = []
    for tiles, ranks_by_slide in zip(imported, ranks, strict=True):
        rows = {s: r for s, r in ranks_by_slide.items() if len(r) and s not in failed}
        draft = _draft_selection(tiles, rows, cohort, fingerprints, seed, detector)
        if ledger.done(tiles.name, draft.fingerprint) is None:
            drafts.append(draft)
        else:
            print_line(
                f"import: {_describe_selection(draft.selection)} already there, nothing to redo"
            )
    _check_dependents(dataset, drafts, ledger)
    with Run(dataset, SELECT, stage_versions()) as run:
        for draft in drafts:
            selection = draft.selection
            if change := describe_replacement(dataset, selection):
                print_line(f"import: selection '{selection.name}' is replaced: {change}")
            record = write_selection(dataset, run.run_id, selection)
            entry = Entry(
                selection.name, "done", draft.fingerprint, files=(record,),
                counts={"tiles": selection.rows}, values={"ties": ties_to_json(draft.ties)},
            )  # fmt: skip
            run.append([entry])
            summary.files += 1
            summary.bytes += record.bytes
            file = dataset.selection_file(selection.name)
            print_line(f"import: {_describe_selection(selection)}, wrote {file}")


def _describe_selection(selection: Selection) -> str:
    count = len(selection.slide_ids)
    return f"selection '{selection.name}': {selection.rows:,} tiles of {count:,} slides"


def _draft_selection(
    tiles: ImportedTiles,
    ranks_by_slide: dict[str, Ints],
    cohort: Cohort,
    fingerprints: Mapping[str, str],
    seed: int,
    detector: str,
) -> _Draft:
    role = role_of_name(tiles.name)
    # Where the name says nothing it is taken for training, the one that must share nothing.
    patients = held_patients(cohort, ranks_by_slide) if role == VAL_OUT else ()
    ties = Ties(role or TRAIN, patients)
    selection_fingerprint = fingerprint_of(
        stage="import", version=_VERSION, name=tiles.name, detector=detector,
        parents=sorted((slide_id, fingerprints[slide_id]) for slide_id in ranks_by_slide),
        patients=ties.patients_hash,
    )  # fmt: skip
    plan = {"rule": IMPORTED, "seed": seed, **tiles.origin}
    plan |= {"ties": ties_to_json(ties)} | ({"role": role} if role else {})
    selection = make_selection(tiles.name, ranks_by_slide, plan)
    return _Draft(selection, ties, selection_fingerprint)


def held_patients(cohort: Cohort, slides: Iterable[str]) -> tuple[str, ...]:
    """The patients of the slides, and those who share a file with them."""
    return family_patients(cohort, cohort.take(np.isin(cohort.slide_id, sorted(slides))))


def _check_dependents(dataset: Dataset, drafts: Sequence[_Draft], ledger: ScopeLedger) -> None:
    """Refuse, before any is written, what would change a selection that others rely on."""
    ties = read_ties(dataset, whole=False) if drafts else {}
    for draft in drafts:
        name = draft.selection.name
        check_honoured(ties, name, draft.ties.patients)
        # One whose file was lost is written again as it was.
        same = any(entry.fingerprint == draft.fingerprint for entry in ledger.entries(name))
        if name not in ties or same:
            continue
        # With the very rows of the file of that name only its plan would change.
        has_file = name in dataset.selection_names()
        content_hash = read_selection_rows(dataset, name).content_hash if has_file else ""
        if content_hash != draft.selection.content_hash:
            check_may_change(ties, name, "import")
