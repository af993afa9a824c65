"""Imported positions become candidates in place of detection, and selections of exactly them."""

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from common.console import Meter, meter, say
from common.errors import UserError
from pipeline.dataset import (
    CANDIDATES_SCHEMA,
    Dataset,
    Entry,
    Run,
    Selection,
    Slide,
    check_name,
    claim_identity,
    fingerprint,
    make_selection,
    read_journal,
    read_selection,
    read_slides,
    standing,
    write_candidates,
    write_selection,
)
from pipeline.imports.positions import Floats, Ints, RankedUnion, ranked_union
from pipeline.run.stage import Summary, report_summary, stage_versions, stands
from pipeline.selection.cohort import Cohort
from pipeline.selection.plan import IMPORTED, TRAIN, VAL_OUT, Ties, role_of_name, ties_to_json
from pipeline.selection.select import family_patients
from pipeline.selection.slides import cohort_of_slides
from pipeline.selection.ties import check_honoured, check_may_change, read_ties
from pipeline.tissue.stage import STAGE as TISSUE
from pipeline.tissue.stage import tissue_fingerprint

SELECT = "select"
_VERSION = 2
"""Of the selections' plans: 2 states ties."""
_WRITERS = 8
_BATCH_SLIDES = 64
_NO_ROWS = "no tile of this slide was imported"


@dataclass(frozen=True)
class Part:
    """The tiles that one selection names: slide indices int32 [n], x and y float64 [n] (level 0).

    `origin` says in the selection's plan where they came from.
    """

    name: str
    codes: Ints
    x: Floats
    y: Floats
    origin: dict[str, Any] = field(default_factory=dict)


def record_candidates(
    dataset: Dataset, slides: Sequence[Slide], parts: Sequence[Part], parameters: dict[str, Any]
) -> int:
    """Write the union of the parts as candidates and each part as a selection; the exit status.

    `parameters` identify what was imported: the dataset's detector from now on.
    """
    for part in parts:
        check_name(part.name, "selection")
    detector = f"{parameters['name']} {fingerprint(**parameters)}"
    claims = {"detector": detector, "detector_parameters": parameters}
    identity = claim_identity(dataset, claims, stage=TISSUE, versions=stage_versions())
    marks = {slide.slide_id: tissue_fingerprint(slide, identity) for slide in slides}
    summary = Summary("import")
    ranks: list[dict[str, Ints]] = [{} for _ in parts]
    duplicates = np.zeros(len(parts), np.int64)
    shared = 0
    with (
        Run(dataset, TISSUE, stage_versions()) as run,
        meter("import", len(slides), "slides") as progress,
    ):
        job = _Writer(dataset, run, marks, summary, progress)
        for batch in _batches(_unions(identity["seed"], slides, parts)):
            for slide, union in batch:
                for k, own in enumerate(union.ranks):
                    ranks[k][slide.slide_id] = own
                shared += sum(map(len, union.ranks)) - len(union.x)
            duplicates += np.sum([union.duplicates for _, union in batch], 0, dtype=np.int64)
            job.write(batch)
        summary.seconds = progress.seconds
    _write_selections(dataset, parts, ranks, marks, identity, summary)
    _say_what_was_dropped(parts, duplicates, shared)
    return report_summary(summary, dataset.root / "candidates")


def _unions(
    seed: int, slides: Sequence[Slide], parts: Sequence[Part]
) -> Iterator[tuple[Slide, RankedUnion]]:
    codes = np.concatenate([part.codes for part in parts])
    x = np.concatenate([part.x for part in parts])
    y = np.concatenate([part.y for part in parts])
    member = np.repeat(np.arange(len(parts), dtype=np.int16), [len(part.x) for part in parts])
    order = np.argsort(codes, kind="stable")
    bounds = np.searchsorted(codes[order], np.arange(len(slides) + 1))
    for index, slide in enumerate(slides):
        rows = order[bounds[index] : bounds[index + 1]]
        yield slide, ranked_union(seed, slide.slide_id, x[rows], y[rows], member[rows], len(parts))


def _batches(
    pairs: Iterator[tuple[Slide, RankedUnion]],
) -> Iterator[list[tuple[Slide, RankedUnion]]]:
    batch = []
    for pair in pairs:
        batch.append(pair)
        if len(batch) == _BATCH_SLIDES:
            yield batch
            batch = []
    if batch:
        yield batch


class _Writer:
    """Writes the candidates that do not stand; a journal line a slide, one sync a batch."""

    def __init__(
        self, dataset: Dataset, run: Run, marks: dict[str, str], summary: Summary, progress: Meter
    ) -> None:
        self.dataset, self.run, self.marks = dataset, run, marks
        self.summary, self.progress = summary, progress
        self.known = standing(read_journal(dataset, TISSUE))

    def write(self, batch: Sequence[tuple[Slide, RankedUnion]]) -> None:
        """Write one batch; its files wait for the disk together."""
        todo = []
        for slide, union in batch:
            mark = self.marks[slide.slide_id]
            stood = stands(self.dataset, self.known.get(slide.slide_id, []), mark)
            if stood is None:
                todo.append((slide, union))
            else:
                self.summary.skipped += stood.outcome == "done"
        with ThreadPoolExecutor(_WRITERS) as pool:
            entries = list(pool.map(self._entry, todo))
        if entries:
            self.run.append(entries)
        for entry in entries:
            if entry.outcome != "rejected":
                self.summary.add(entry)
        self.progress.advance(len(batch))

    def _entry(self, pair: tuple[Slide, RankedUnion]) -> Entry:
        slide, union = pair
        mark = self.marks[slide.slide_id]
        if not len(union.x):
            return Entry(slide.slide_id, "rejected", mark, _NO_ROWS)
        try:
            table = candidates_table(union.x, union.y)
            record = write_candidates(self.dataset, self.run.run_id, slide.slide_id, table)
        except UserError as error:
            return Entry(slide.slide_id, "failed", mark, str(error))
        counts = {"candidate tiles": len(union.x)}
        return Entry(slide.slide_id, "done", mark, files=(record,), counts=counts)


def candidates_table(x: Floats | pa.Array, y: Floats | pa.Array) -> pa.Table:
    """Candidates in rank order whose tissue and artifacts nobody measured: null."""
    nothing = pa.nulls(len(x), pa.float32())
    ranks = pa.array(np.arange(len(x), dtype=np.int32))
    columns = [ranks, pa.array(x, pa.float64()), pa.array(y, pa.float64()), nothing, nothing]
    return pa.table(columns, schema=CANDIDATES_SCHEMA)


@dataclass(frozen=True)
class _Draft:
    """A selection that is to be written, with what ties it to others and its fingerprint."""

    selection: Selection
    ties: Ties
    mark: str


def _write_selections(
    dataset: Dataset,
    parts: Sequence[Part],
    ranks: Sequence[dict[str, Ints]],
    marks: dict[str, str],
    identity: dict[str, Any],
    summary: Summary,
) -> None:
    known = standing(read_journal(dataset, SELECT))
    drafts = list(_drafts(dataset, parts, ranks, marks, identity, summary, known))
    _check_dependents(dataset, drafts, known)
    with Run(dataset, SELECT, stage_versions()) as run:
        for draft in drafts:
            one = draft.selection
            record = write_selection(dataset, run.run_id, one)
            counts, values = {"tiles": one.rows}, {"ties": ties_to_json(draft.ties)}
            done = Entry(one.name, "done", draft.mark, files=(record,), counts=counts,
                         values=values)  # fmt: skip
            run.append([done])
            summary.files += 1
            summary.bytes += record.bytes
            where = f"selection '{one.name}': {one.rows:,} tiles of {len(one.slide_ids):,} slides"
            say(f"import: {where}, wrote {dataset.selection_file(one.name)}")


def _drafts(
    dataset: Dataset,
    parts: Sequence[Part],
    ranks: Sequence[dict[str, Ints]],
    marks: dict[str, str],
    identity: dict[str, Any],
    summary: Summary,
    known: dict[str, list[Entry]],
) -> Iterator[_Draft]:
    """The parts that do not stand, as selections; says of the others that they do."""
    failed = {slide_id for slide_id, _ in summary.failed}
    all_slides = read_slides(dataset)
    cohort = cohort_of_slides(all_slides, np.zeros(len(all_slides), np.int64))
    for part, own in zip(parts, ranks, strict=True):
        mine = {slide: rows for slide, rows in own.items() if len(rows) and slide not in failed}
        parents = sorted((slide_id, marks[slide_id]) for slide_id in mine)
        role = role_of_name(part.name)
        # Where the name says nothing it is taken for training, the one that must share nothing.
        ties = Ties(role or TRAIN, held_patients(cohort, mine) if role == VAL_OUT else ())
        mark = fingerprint(
            stage="import", version=_VERSION, name=part.name, detector=identity["detector"],
            parents=parents, patients=ties.patients_hash,
        )  # fmt: skip
        if stands(dataset, known.get(part.name, []), mark) is not None:
            rows = sum(map(len, mine.values()))
            where = f"selection '{part.name}': {rows:,} tiles of {len(mine):,} slides"
            say(f"import: {where} already there, nothing to redo")
            continue
        plan = {"rule": IMPORTED, "seed": identity["seed"], **part.origin}
        plan |= {"ties": ties_to_json(ties)} | ({"role": role} if role else {})
        yield _Draft(make_selection(part.name, mine, plan), ties, mark)


def held_patients(cohort: Cohort, slides: Iterable[str]) -> tuple[str, ...]:
    """The patients of the slides, and those who share a file with them."""
    return family_patients(cohort, cohort.take(np.isin(cohort.slide_id, sorted(slides))))


def _check_dependents(
    dataset: Dataset, drafts: Sequence[_Draft], known: dict[str, list[Entry]]
) -> None:
    """Refuse, before any is written, what would change a selection that others rely on."""
    there = read_ties(dataset, whole=False) if drafts else {}
    for draft in drafts:
        name = draft.selection.name
        check_honoured(there, name, draft.ties.patients)
        # One whose file was lost is written again as it was.
        same = any(entry.fingerprint == draft.mark for entry in known.get(name, []))
        if name in there and not same and not _has_rows(dataset, draft.selection):
            check_may_change(there, name, "import")


def _has_rows(dataset: Dataset, selection: Selection) -> bool:
    """Whether the file of that name holds these very rows: only its plan would change."""
    if selection.name not in dataset.selection_names():
        return False
    return read_selection(dataset, selection.name).content_hash == selection.content_hash


def _say_what_was_dropped(
    parts: Sequence[Part], duplicates: npt.NDArray[np.int64], shared: int
) -> None:
    for part, count in zip(parts, duplicates.tolist(), strict=True):
        if count:
            say(f"import: {count:,} rows of '{part.name}' repeat a tile of it and were dropped")
    if shared:
        say(f"import: {shared:,} tiles are in more than one of these selections: do they overlap?")
