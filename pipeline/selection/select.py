"""The `select` stage: a named selection, its budget divided among sites and slides."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from common.console import say
from common.errors import UserError
from pipeline.dataset import (
    Dataset,
    Entry,
    Ledger,
    Run,
    ScopeLedger,
    Selection,
    commit_bytes,
    fingerprint_of,
    read_identity,
    read_selection,
    write_selection,
)
from pipeline.dataset.tables import read_plan
from pipeline.run.stage import stage_versions
from pipeline.selection.cohort import (
    Cohort,
    Exclusion,
    eligible,
    without_patients,
)
from pipeline.selection.denied import read_denied
from pipeline.selection.draw import (
    POOLS,
    SHARES,
    Division,
    PoolSource,
    RowSource,
    Source,
    deal,
    divide,
    draw,
    pool_bounds,
)
from pipeline.selection.hold_out import Cover, choose_hold_out
from pipeline.selection.outcome import (
    excluded_csv,
    print_below_quota,
    print_exclusions,
    print_outcome,
)
from pipeline.selection.plan import (
    ALL,
    TRAIN,
    VAL_IN,
    VAL_OUT,
    SelectConfig,
    Ties,
    build_selection,
    count_exclusions,
    make_plan,
    patients_mark,
    ties_to_json,
)
from pipeline.selection.slides import Tissue, cohort_hash, read_tissue, slides_sha256
from pipeline.selection.ties import (
    STAGE,
    check_hold_out_may_be,
    check_may_change,
    check_not_imported,
    excluded_file,
    held_out,
    read_ties,
)

VERSION = 2
STRATA = ("site", "project", "project+site", "none")
_ROLES = {"train": TRAIN, "reserve": VAL_IN, "all": ALL}


@dataclass(frozen=True)
class Drawing:
    """All that a selection is drawn from, before the budget is divided.

    `cohort` is what was eligible before any patient was held out, `chosen` the indices in it of
    the slides to draw from, and `source` gives tiles of those, by position in `chosen`.
    """

    cohort: Cohort
    excluded: list[Exclusion]
    chosen: npt.NDArray[np.int64]
    source: Source
    ties: Ties


def select(dataset: Dataset, config: SelectConfig) -> int:
    """Write selections/<name>.parquet with its plan; returns the exit status."""
    config = _checked(dataset, config)
    tissue = read_tissue(dataset)
    known = read_ties(dataset)
    marks = _marks(dataset, config, tissue)
    journal = Ledger.read(dataset, STAGE)[""]
    stood = [journal.done(name, marks[name]) for name in config.names]
    if all(entry is not None for entry in stood):
        for name in config.names:
            rows = read_selection(dataset, name).rows
            say(f"select: selection '{name}' ({rows:,} tiles) already done, nothing to redo")
        return 0
    if not config.parent:
        check_not_imported(dataset, f"--name {config.name} without --from")
    drawing = gather(dataset, config, tissue)
    for name in config.names:
        held = slides_of_patients(tissue.cohort, drawing.ties.patients)
        check_hold_out_may_be(dataset, name, drawing.ties.patients, held)
        if name in known and _written_fingerprint(journal, name) != marks[name]:
            check_may_change(known, name, "--name")
    division, selections = make_selections(
        config, drawing, int(read_identity(dataset).get("seed", 0)), slides_sha256(dataset)
    )
    _write(dataset, selections, drawing, marks)
    print_exclusions(f"select {config.name}", drawing.excluded)
    for selection in selections:
        print_outcome(selection, dataset.selection_file(selection.name))
    if config.tiles is not None:
        print_below_quota(division)
    return 0


def _checked(dataset: Dataset, config: SelectConfig) -> SelectConfig:
    """The configuration without contradictions; a part of a selection inherits its rules."""
    for value, known, option in (
        (config.stratify, STRATA, "--stratify"),
        (config.pool, POOLS, "--pool"),
        (config.share, SHARES, "--share"),
    ):
        if value not in known:
            raise UserError(f"{option} {value}: expected one of {', '.join(known)}")
    if config.cover and config.hold_out is None:
        raise UserError("--cover is for --hold-out, which was not given")
    if config.split and (len(set(config.split)) != len(config.split) or len(config.split) < 2):
        raise UserError(f"--split {','.join(config.split)}: expected two or more different names")
    if config.parent in config.names:
        raise UserError(f"--from {config.parent}: a selection cannot be drawn from itself")
    parse_cover(config.cover)
    if config.hold_out is not None:
        if config.parent or config.pool != "train":
            raise UserError("--hold-out takes whole slides: leave --from and --pool out")
        return replace(config, pool="all")
    if not config.parent:
        return config
    if (config.pool, config.rules) != ("train", SelectConfig("").rules):
        raise UserError(
            f"--from {config.parent}: its slides and ranks are taken as they are; leave --pool, "
            "--sample-types, --min-candidates and --frozen out"
        )
    require_selection(dataset, config.parent)
    inherited = read_plan(dataset, config.parent).get("parameters", {})
    return replace(
        config,
        sample_types=tuple(inherited.get("sample_types", ())),
        min_candidates=int(inherited.get("min_candidates", 1)),
        frozen=bool(inherited.get("frozen", False)),
    )


def require_selection(dataset: Dataset, name: str) -> None:
    """Refuse the name of a selection that is not there, with those that are."""
    if name not in dataset.selection_names():
        read_selection(dataset, name)


def parse_cover(parts: Sequence[str]) -> Cover:
    """`project`, `site` and `site=N` as a `Cover`."""
    cover = Cover()
    for part in parts:
        name, _, number = part.partition("=")
        if name == "project" and not number:
            cover = replace(cover, project=True)
        elif name == "site" and (not number or number.isdigit()):
            cover = replace(cover, site=True, sites=int(number or 0))
        else:
            raise UserError(f"--cover {part}: expected project, site or site=N")
    return cover


def _marks(dataset: Dataset, config: SelectConfig, tissue: Tissue) -> dict[str, str]:
    """The fingerprint of each selection: all that its rows depend on."""
    known = read_ties(dataset)
    held = {n: patients_mark(p) for n, p in held_out(known).items() if n not in config.names}
    rows = cohort_hash(tissue.cohort)
    parent = read_selection(dataset, config.parent).content_hash if config.parent else ""
    deny = read_denied(dataset, config.deny)[1]
    return {
        name: fingerprint_of(
            stage=STAGE, version=VERSION, config=asdict(config), name=name, cohort=rows,
            parents=sorted(tissue.marks.items()), held_out=held, parent=parent, deny=deny,
        )
        for name in config.names
    }  # fmt: skip


def gather(dataset: Dataset, config: SelectConfig, tissue: Tissue) -> Drawing:
    """What the selection is drawn from: the eligible slides and their tiles."""
    usable = np.array([s not in tissue.barred for s in tissue.cohort.slide_id.tolist()], bool)
    cohort, excluded = eligible(tissue.cohort.take(usable), config.rules)
    excluded += [
        Exclusion(slide_id, reason, detail) for slide_id, (reason, detail) in tissue.barred.items()
    ]
    denied, hashes = read_denied(dataset, config.deny)
    if config.parent:
        return _from_parent(dataset, config, tissue.cohort.take(usable), excluded, denied, hashes)
    held = {n: p for n, p in held_out(read_ties(dataset)).items() if n not in config.names}
    free, barred = without_patients(cohort, held)
    honours = {name: patients_mark(patients) for name, patients in held.items()}
    patients: tuple[str, ...] = ()
    if config.hold_out is not None:
        seed = int(read_identity(dataset).get("seed", 0))
        mask = choose_hold_out(free, config.hold_out, parse_cover(config.cover), seed)
        free = free.take(mask)
        patients = family_patients(tissue.cohort, free)
    if not len(free):
        raise UserError(f"selection '{config.name}': no slide is left; {_why(excluded + barred)}")
    first, stop = pool_bounds(free.candidates, config.pool)
    role = VAL_OUT if patients else _ROLES[config.pool]
    return Drawing(
        cohort, excluded + barred, np.searchsorted(cohort.slide_id, free.slide_id),
        PoolSource(first, stop, by_index(free, denied)),
        Ties(role, patients, honours, deny=hashes),
    )  # fmt: skip


def family_patients(whole: Cohort, chosen: Cohort) -> tuple[str, ...]:
    """All patients of the chosen slides' families, also those whose slides are not eligible."""
    members = np.isin(whole.family, np.unique(chosen.family))
    return tuple(np.unique(whole.patient[members]).tolist())


def slides_of_patients(whole: Cohort, patients: tuple[str, ...]) -> list[str]:
    """All slides of the patients, also those that the rules bar or that give no tile."""
    members = np.isin(whole.patient, np.array(patients, np.str_))
    held: list[str] = whole.slide_id[members].tolist()
    return held


def by_index(cohort: Cohort, denied: dict[str, npt.NDArray[np.int32]]) -> Any:
    """Denied ranks by the slide's position in the cohort."""
    place = {slide_id: index for index, slide_id in enumerate(cohort.slide_id.tolist())}
    return {place[slide]: ranks for slide, ranks in denied.items() if slide in place}


def _from_parent(
    dataset: Dataset,
    config: SelectConfig,
    usable: Cohort,
    excluded: list[Exclusion],
    denied: dict[str, npt.NDArray[np.int32]],
    hashes: dict[str, str],
) -> Drawing:
    parent = read_selection(dataset, config.parent)
    missing = sorted(set(parent.slide_ids) - set(usable.slide_id.tolist()))
    if missing:
        raise UserError(
            f"--from {config.parent}: slide {missing[0]} is no longer usable in {dataset.root} "
            f"({len(missing)} such slides); make '{config.parent}' again"
        )
    # The slides that the parent's rules bar are none of the cohort it is compared with, unless
    # the parent holds them all the same.
    barred = {one.slide_id for one in excluded} - set(parent.slide_ids)
    cohort = usable.take(np.array([s not in barred for s in usable.slide_id.tolist()], bool))
    chosen = np.searchsorted(cohort.slide_id, np.array(parent.slide_ids))
    source = RowSource(parent.offsets, parent.ranks, by_index(cohort.take(chosen), denied))
    ties = read_ties(dataset)[config.parent]
    return Drawing(
        cohort, excluded, chosen, source,
        Ties(ties.role, (), _all_honours(ties, config.parent), config.parent, hashes),
    )  # fmt: skip


def _all_honours(ties: Ties, name: str) -> dict[str, str]:
    """What a part of a selection relies on: the whole's hold-outs, or the whole's own patients."""
    own = {name: ties.patients_mark} if ties.patients else {}
    return {**ties.honours, **own}


def _why(excluded: list[Exclusion]) -> str:
    rows = count_exclusions(excluded)
    return "left out: " + ", ".join(f"{row['slides']} {row['reason']}" for row in rows)


def make_selections(
    config: SelectConfig, drawing: Drawing, seed: int, slides_mark: str
) -> tuple[Division, list[Selection]]:
    """The selections of a drawing, with their plans: one, or one a part of `split`."""
    chosen = drawing.cohort.take(drawing.chosen)
    strata, capacities = chosen.strata(config.stratify), drawing.source.capacities
    sets = max(1, len(config.split))
    possible = int(capacities.sum()) // sets
    tiles = possible if config.tiles is None else config.tiles
    if tiles == 0 or possible == 0:
        raise UserError(f"selection '{config.name}' would be empty: no candidates in its pool")
    if tiles > possible:
        each = f" for each of {sets} sets" if config.split else ""
        raise UserError(
            f"--tiles {tiles:,}{each} for '{config.name}': the largest possible is {possible:,}"
        )
    division = divide(strata, chosen.candidates, capacities, tiles * sets, config.share)
    offsets, ranks = draw(drawing.source, division.counts)
    rows = deal(strata, offsets, ranks, sets) if config.split else [(offsets, ranks)]
    selections = []
    for name, (own_offsets, own_ranks) in zip(config.names, rows, strict=True):
        plan = make_plan(
            config=config, ties=drawing.ties, seed=seed, slides_sha256=slides_mark,
            cohort=drawing.cohort, excluded=drawing.excluded, division=division,
            chosen=drawing.chosen, counts=np.diff(own_offsets),
        )  # fmt: skip
        selections.append(build_selection(name, chosen, own_offsets, own_ranks, plan))
    return division, selections


def _written_fingerprint(journal: ScopeLedger, name: str) -> str:
    entry = journal.latest(name)
    return entry.fingerprint if entry is not None and entry.outcome == "done" else ""


def _write(
    dataset: Dataset, selections: list[Selection], drawing: Drawing, marks: dict[str, str]
) -> None:
    with Run(dataset, STAGE, stage_versions()) as run:
        entries = []
        for selection in selections:
            files = [write_selection(dataset, run.run_id, selection)]
            path = excluded_file(dataset, selection.name)
            files.append(commit_bytes(dataset, run.run_id, path, excluded_csv(drawing.excluded)))
            values = {"ties": ties_to_json(drawing.ties)}
            counted = {"tiles": selection.rows}
            entries.append(
                Entry(
                    selection.name, "done", marks[selection.name], files=tuple(files),
                    counts=counted, values=values,
                )
            )  # fmt: skip
        run.append(entries)
