"""The `select` stage: a named selection, its budget divided among sites and slides."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace

import numpy as np
import numpy.typing as npt

from common.console import print_line
from common.errors import UserError
from common.files import hash_file
from common.text import describe_joined, joined_names, same_identity_key
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
    read_selection_rows,
    write_selection,
)
from pipeline.dataset.claim import SELECTIONS, hold_claim
from pipeline.dataset.hold_outs import ancestors, check_held_out
from pipeline.dataset.tables.selections import read_plan
from pipeline.run.stage import stage_versions
from pipeline.selection.cohort import (
    Cohort,
    Exclusion,
    identity_keys,
    keep_eligible,
    without_patients,
)
from pipeline.selection.config import SelectConfig
from pipeline.selection.denied import read_denied
from pipeline.selection.draw import (
    Division,
    RangePool,
    Ranks,
    SelectionPool,
    TilePool,
    divide_budget,
    draw_ranks,
    pool_bounds,
    split_rows,
)
from pipeline.selection.hold_out import choose_hold_out, parse_cover
from pipeline.selection.outcome import (
    excluded_csv,
    name_option,
    print_below_quota,
    print_exclusions,
    print_selection,
)
from pipeline.selection.plan import (
    ALL,
    TRAIN,
    VAL_IN,
    VAL_OUT,
    Ties,
    build_selection,
    count_exclusions,
    hash_patients,
    make_plan,
    ties_to_json,
)
from pipeline.selection.slides import Tissue, hash_cohort, read_tissue
from pipeline.selection.ties import (
    STAGE,
    check_may_change,
    check_new_hold_out,
    check_not_imported,
    check_replaced,
    excluded_file,
    held_out,
    read_ties,
)

VERSION = 2
_ROLES = {"train": TRAIN, "reserve": VAL_IN, "all": ALL}


@dataclass(frozen=True)
class Drawing:
    """All that a selection is drawn from, before the budget is divided.

    `cohort` is what was eligible before any patient was held out, `chosen` the indices in it of
    the slides to draw from, and `pool` gives tiles of those, by position in `chosen`.
    """

    cohort: Cohort
    excluded: list[Exclusion]
    chosen: npt.NDArray[np.int64]
    pool: TilePool
    ties: Ties


def select(
    dataset: Dataset,
    config: SelectConfig,
    *,
    replace_other: bool = False,
    skip_lost: bool = False,
) -> int:
    """Write selections/<name>.parquet with its plan; returns the exit status.

    A selection of that name with other tiles is refused where it was made with other options,
    unless `replace_other`; where the dataset has changed it is made again. Another command that
    changes selections is waited for, and then counts. A slide whose tissue result is lost or
    damaged ends it, unless `skip_lost` leaves the slide out.
    """
    with hold_claim(dataset, SELECTIONS, STAGE):
        return select_claimed(dataset, config, replace_other=replace_other, skip_lost=skip_lost)


def select_claimed(
    dataset: Dataset,
    config: SelectConfig,
    *,
    replace_other: bool = False,
    skip_lost: bool = False,
) -> int:
    """`select`, where the claim on selections is held already; returns the exit status."""
    config = _check_config(dataset, config)
    # Read once: the fingerprints and the drawing must see the same cohort and ties.
    tissue, known = read_tissue(dataset, skip_lost=skip_lost), read_ties(dataset)
    fingerprints = _fingerprint_all(dataset, config, tissue, known)
    ledger = Ledger.read(dataset, STAGE)[""]
    if all(ledger.done(name, fingerprints[name]) for name in config.names):
        for name in config.names:
            rows = read_selection_rows(dataset, name).rows
            print_line(f"select: selection '{name}' ({rows:,} tiles) already done, nothing to redo")
        return 0
    # Only a part of an imported selection is sure to be on its side of the split.
    if not config.parent:
        check_not_imported(dataset, f"--name {config.name} without --from")
    seed = int(read_identity(dataset).get("seed", 0))
    prepare = prepare_part if config.parent else prepare_drawing
    drawing = prepare(dataset, config, tissue, known, seed)
    _check_others(dataset, config, drawing, tissue, known, ledger, fingerprints)
    if line := describe_joined("patients", joined_names(tissue.cohort.patient.tolist())):
        print_line(f"select: {line}")
    if tissue.copies:
        print_line(f"select: {tissue.copies}")
    slides_sha256 = hash_file(dataset.slides_file)
    division, selections = make_selections(config, drawing, seed, slides_sha256)
    for selection in selections:
        # By name hold-outs were left alone already: a table may have given their slides others.
        others = set(drawing.ties.honours) - ancestors(dataset, config.parent)
        check_held_out(dataset, selection.name, selection.slide_ids, others)
        is_same = has_options(dataset, selection.name, config)
        check_replaced(dataset, selection, is_same=is_same, replace=replace_other)
    _write_selections(dataset, selections, drawing, fingerprints, tissue.candidates)
    print_exclusions(f"select {config.name}", drawing.excluded)
    for selection in selections:
        print_selection(selection, dataset.selection_file(selection.name))
    if config.tiles is not None:
        print_below_quota(division)
    return 0


def has_options(dataset: Dataset, name: str, config: SelectConfig) -> bool:
    """Whether the selection of that name was made with these options."""
    if name not in dataset.selection_names():
        return False
    recorded = read_plan(dataset, name).get("parameters")
    if not isinstance(recorded, dict):
        return False
    # An option that an older version did not have was at its default then.
    former = asdict(SelectConfig("")) | recorded
    return bool(json.loads(json.dumps(former)) == json.loads(json.dumps(asdict(config))))


def _check_config(dataset: Dataset, config: SelectConfig) -> SelectConfig:
    """The configuration without contradictions; a part of a selection inherits its rules."""
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
    if config.parent not in dataset.selection_names():
        read_selection(dataset, config.parent)  # refuses it, with the names of those there are
    inherited = read_plan(dataset, config.parent).get("parameters", {})
    return replace(
        config,
        sample_types=tuple(inherited.get("sample_types", ())),
        min_candidates=int(inherited.get("min_candidates", 1)),
        frozen=bool(inherited.get("frozen", False)),
    )


def _fingerprint_all(
    dataset: Dataset, config: SelectConfig, tissue: Tissue, known: Mapping[str, Ties]
) -> dict[str, str]:
    """The fingerprint of each selection: all that its rows depend on."""
    # A selection leaves the patients of every other hold-out alone: a change of them changes it.
    others = {
        name: hash_patients(patients)
        for name, patients in held_out(known).items()
        if name not in config.names
    }
    parent = read_selection(dataset, config.parent).content_hash if config.parent else ""
    shared = {
        "stage": STAGE, "version": VERSION, "config": asdict(config), "parent": parent,
        "cohort": hash_cohort(tissue.cohort), "parents": sorted(tissue.fingerprints.items()),
        "held_out": others, "deny": read_denied(dataset, config.deny)[1],
    }  # fmt: skip
    return {name: fingerprint_of(name=name, **shared) for name in config.names}


def _check_others(
    dataset: Dataset,
    config: SelectConfig,
    drawing: Drawing,
    tissue: Tissue,
    known: Mapping[str, Ties],
    ledger: ScopeLedger,
    fingerprints: Mapping[str, str],
) -> None:
    """Refuse what selections that are there contradict, or depend on."""
    patients, whole = drawing.ties.patients, tissue.cohort
    # All slides of the patients, also those that the rules exclude or that give no tile.
    wanted = np.array([same_identity_key(patient) for patient in patients], np.str_)
    held = whole.slide_id[np.isin(identity_keys(whole.patient), wanted)].tolist()
    for name in config.names:
        check_new_hold_out(dataset, name, patients, held)
        last = ledger.latest(name)
        is_same = bool(last and last.outcome == "done" and last.fingerprint == fingerprints[name])
        if name in known and not is_same:
            check_may_change(known, name, "--name")


def prepare_drawing(
    dataset: Dataset, config: SelectConfig, tissue: Tissue, known: Mapping[str, Ties], seed: int
) -> Drawing:
    """What a selection is drawn from: the eligible slides and a pool of their tiles.

    Raises `UserError` with the reasons, by number of slides, where none is left.
    """
    cohort, excluded = keep_eligible(_usable_cohort(tissue), config.rules)
    excluded += _list_unusable(tissue)
    # A hold-out that is made again may choose its own patients once more.
    held = {name: group for name, group in held_out(known).items() if name not in config.names}
    free, others = without_patients(cohort, held)
    excluded += others
    patients: tuple[str, ...] = ()
    if config.hold_out is not None:
        free = free.take(choose_hold_out(free, config.hold_out, parse_cover(config.cover), seed))
        patients = family_patients(tissue.cohort, free)
    if not len(free):
        rows = count_exclusions(excluded)
        reasons = ", ".join(f"{row['slides']} {name_option(row['reason'])}" for row in rows)
        raise UserError(f"selection '{config.name}': no slide is left; left out: {reasons}")
    denied, deny = read_denied(dataset, config.deny)
    honours = {name: hash_patients(held[name]) for name in held}
    return Drawing(
        cohort, excluded, np.searchsorted(cohort.slide_id, free.slide_id),
        RangePool(*pool_bounds(free.candidates, config.pool), _index_denied(free, denied)),
        Ties(VAL_OUT if patients else _ROLES[config.pool], patients, honours, deny=deny),
    )  # fmt: skip


def prepare_part(
    dataset: Dataset, config: SelectConfig, tissue: Tissue, known: Mapping[str, Ties], seed: int
) -> Drawing:
    """What a part of another selection is drawn from: the rows of that one."""
    usable = _usable_cohort(tissue)
    excluded = keep_eligible(usable, config.rules)[1] + _list_unusable(tissue)
    parent, ties = read_selection(dataset, config.parent), known[config.parent]
    missing = sorted(set(parent.slide_ids) - set(usable.slide_id.tolist()))
    if missing:
        raise UserError(
            f"--from {config.parent}: slide {missing[0]} is no longer usable in {dataset.root} "
            f"({len(missing)} such slides); make '{config.parent}' again"
        )
    # The slides that the parent's rules exclude are not part of the cohort that it is compared
    # with, unless the parent has them all the same.
    left_out = {exclusion.slide_id for exclusion in excluded} - set(parent.slide_ids)
    slide_ids = usable.slide_id.tolist()
    cohort = usable.take(np.array([slide not in left_out for slide in slide_ids], bool))
    chosen = np.searchsorted(cohort.slide_id, np.array(parent.slide_ids))
    denied, deny = read_denied(dataset, config.deny)
    pool = SelectionPool(parent.offsets, parent.ranks, _index_denied(cohort.take(chosen), denied))
    # A part relies on the whole's hold-outs, or on the whole's own patients.
    own = {config.parent: ties.patients_hash} if ties.patients else {}
    part_ties = Ties(ties.role, (), {**ties.honours, **own}, config.parent, deny)
    return Drawing(cohort, excluded, chosen, pool, part_ties)


def _usable_cohort(tissue: Tissue) -> Cohort:
    slide_ids = tissue.cohort.slide_id.tolist()
    return tissue.cohort.take(np.array([s not in tissue.unusable for s in slide_ids], bool))


def _list_unusable(tissue: Tissue) -> list[Exclusion]:
    return [Exclusion(slide_id, *why) for slide_id, why in tissue.unusable.items()]


def family_patients(whole: Cohort, chosen: Cohort) -> tuple[str, ...]:
    """All patients of the chosen slides' families, also those whose slides are not eligible."""
    members = np.isin(whole.family, np.unique(chosen.family))
    return tuple(np.unique(whole.patient[members]).tolist())


def _index_denied(cohort: Cohort, denied: Mapping[str, Ranks]) -> dict[int, Ranks]:
    """Denied ranks by the slide's position in the cohort."""
    place = {slide_id: index for index, slide_id in enumerate(cohort.slide_id.tolist())}
    return {place[slide]: ranks for slide, ranks in denied.items() if slide in place}


def make_selections(
    config: SelectConfig, drawing: Drawing, seed: int, slides_sha256: str
) -> tuple[Division, list[Selection]]:
    """The selections of a drawing, with their plans: one, or one per part of `split`."""
    chosen = drawing.cohort.take(drawing.chosen)
    strata, capacities = chosen.strata(config.stratify), drawing.pool.capacities
    # Each of several sets gets as many tiles as the others, or the smallest would limit a study.
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
    # Divided once over all sets, then row by row: the sets get alike slides and strata.
    division = divide_budget(strata, chosen.candidates, capacities, tiles * sets, config.share)
    offsets, ranks = draw_ranks(drawing.pool, division.counts)
    parts = split_rows(strata, offsets, ranks, sets) if config.split else [(offsets, ranks)]
    selections = []
    for name, (part_offsets, part_ranks) in zip(config.names, parts, strict=True):
        plan = make_plan(
            config=config, ties=drawing.ties, seed=seed, slides_sha256=slides_sha256,
            cohort=drawing.cohort, excluded=drawing.excluded, division=division,
            chosen=drawing.chosen, counts=np.diff(part_offsets),
        )  # fmt: skip
        selections.append(build_selection(name, chosen, part_offsets, part_ranks, plan))
    return division, selections


def _write_selections(
    dataset: Dataset,
    selections: list[Selection],
    drawing: Drawing,
    fingerprints: Mapping[str, str],
    candidates: Mapping[str, str],
) -> None:
    left_out, ties = excluded_csv(drawing.excluded), ties_to_json(drawing.ties)
    with Run(dataset, STAGE, stage_versions()) as run:
        entries = []
        for selection in selections:
            path = excluded_file(dataset, selection.name)
            files = (
                write_selection(dataset, run.run_id, selection),
                commit_bytes(dataset, run.run_id, path, left_out),
            )
            counts = {"tiles": selection.rows}
            current = fingerprints[selection.name]
            # A rank is a row of the slide's candidates: of other ones it is another place.
            drawn_from = {k: candidates[k] for k in selection.slide_ids if k in candidates}
            values = {"ties": ties, "candidates": drawn_from}
            entries.append(
                Entry(selection.name, "done", current, files=files, counts=counts, values=values)
            )
        # All parts of a split become current together.
        run.append(entries)
