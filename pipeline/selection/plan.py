"""The plan in a selection's file: how it was made, what was left out, how it is spread."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, TypedDict, cast

import numpy as np
import numpy.typing as npt

from common.errors import UserError
from common.text import one_line
from pipeline.dataset import Selection
from pipeline.selection.cohort import Cohort, Exclusion
from pipeline.selection.config import SelectConfig
from pipeline.selection.distribution import measure_spread
from pipeline.selection.draw import Division

COLUMNS = ("project", "site")
TRAIN, GUIDANCE, VAL_IN, VAL_OUT, ALL = "train", "guidance", "val-in", "val-out", "all"
"""What a selection is for; a part of another has the role of the whole."""
IMPORTED = "imported"
"""The `rule` in the plan of a selection that others made."""


@dataclass(frozen=True)
class Ties:
    """What binds a selection to others: what may not change or go while this one is there.

    `patients` are those it holds out itself; `honours` maps the hold-outs whose patients it
    leaves alone to `patients_hash` of theirs; `parent` and `deny` name what it was drawn with.
    """

    role: str
    patients: tuple[str, ...] = ()
    honours: Mapping[str, str] = field(default_factory=dict)
    parent: str = ""
    deny: Mapping[str, str] = field(default_factory=dict)

    @property
    def patients_hash(self) -> str:
        """Hash of the held-out patients."""
        return hash_patients(self.patients)


class StratumRow(TypedDict):
    """A stratum: slides, candidates, tiles that it could give, should (`quota`) and does."""

    name: str
    slides: int
    candidates: int
    capacity: int
    quota: float
    selected: int


class GroupRow(TypedDict):
    """A project or site: slides and tiles of the cohort and of the selection."""

    name: str
    cohort_slides: int
    cohort_tiles: int
    slides: int
    tiles: int


class SpreadRecord(TypedDict):
    """Groups with selected slides, groups in all, divergences in bits (None: nothing selected)."""

    covered: int
    of: int
    jsd_bits_slides: float | None
    jsd_bits_tiles: float | None
    rows: list[GroupRow]


class ExclusionCount(TypedDict):
    """Slides left out for one reason, and their candidates."""

    reason: str
    slides: int
    candidates: int


class SelectionPlan(TypedDict):
    """The plan of a selection that `select` or `plan-cohort` made, as JSON values."""

    parameters: dict[str, object]
    role: str
    ties: dict[str, Any]
    rule: str
    seed: int
    slides_sha256: str
    cohort: dict[str, int]
    selected: dict[str, int]
    exclusions: list[ExclusionCount]
    strata: list[StratumRow]
    largest_share_deviation: float
    strata_below_quota: int
    distribution: dict[str, SpreadRecord]


def plan_of(selection: Selection) -> SelectionPlan:
    """The plan of a selection that was made just now; older files may lack some of it."""
    return cast(SelectionPlan, selection.plan)


def hash_patients(patients: Iterable[str]) -> str:
    """Hash of a set of patients, 32 hex digits."""
    return hashlib.sha256("\0".join(sorted(patients)).encode()).hexdigest()[:32]


def role_of_name(name: str) -> str:
    """The role that a selection's name states, '' where it states none.

    >>> [role_of_name(n) for n in ("train-40m", "guidance", "val-in", "val-out-2", "mine")]
    ['train', 'train', 'val-in', 'val-out', '']
    """
    if name.startswith(VAL_OUT):
        return VAL_OUT
    if name.startswith((TRAIN, GUIDANCE)):
        return TRAIN
    return VAL_IN if name.startswith("val-") else ""


def make_plan(
    *,
    config: SelectConfig,
    ties: Ties,
    seed: int,
    slides_sha256: str,
    cohort: Cohort,
    excluded: Sequence[Exclusion],
    division: Division,
    chosen: npt.NDArray[np.int64],
    counts: npt.NDArray[np.int64],
) -> SelectionPlan:
    """The plan as JSON values.

    `cohort` is all that was eligible before any patient was held out; `chosen` int64 [slides] are
    the indices in it of the slides that the division was made for, `counts` int64 [slides] the
    tiles of each in this selection.
    """
    # Over the whole cohort: a slide that gives nothing counts in the spread all the same.
    tiles = np.zeros(len(cohort), np.int64)
    tiles[chosen] = counts
    selected = _count_cohort(cohort.take(tiles > 0)) | {"tiles": int(counts.sum())}
    return {
        "parameters": asdict(config),
        "role": ties.role,
        "ties": ties_to_json(ties),
        "rule": "sainte-lague",
        "seed": seed,
        "slides_sha256": slides_sha256,
        "cohort": _count_cohort(cohort),
        "selected": selected,
        "exclusions": count_exclusions(excluded),
        "strata": _list_strata(division, cohort.take(chosen).strata(config.stratify), counts),
        "largest_share_deviation": division.largest_deviation,
        "strata_below_quota": len(division.below_quota),
        "distribution": {
            column: _record_spread(getattr(cohort, column), cohort.candidates, tiles)
            for column in COLUMNS
        },
    }


def _list_strata(
    division: Division, strata: npt.NDArray[np.str_], counts: npt.NDArray[np.int64]
) -> list[StratumRow]:
    """The table of strata; where the rows were split into several sets, this set's part."""
    # A quota is that of all sets together: each set is held to its share of it.
    drawn = int(division.counts.sum())
    part = int(counts.sum()) / drawn if drawn else 0.0
    names, group = np.unique(strata, return_inverse=True)
    selected = dict(zip(names.tolist(), np.bincount(group, counts, len(names)), strict=True))
    return [
        StratumRow(
            name=stratum.name, slides=stratum.slides, candidates=stratum.candidates,
            capacity=stratum.capacity, quota=stratum.quota * part,
            selected=int(selected[stratum.name]),
        )
        for stratum in division.strata
    ]  # fmt: skip


def _count_cohort(cohort: Cohort) -> dict[str, int]:
    return {
        "slides": len(cohort),
        "patients": len(np.unique(cohort.patient)),
        "sites": len(np.unique(cohort.site)),
        "projects": len(np.unique(cohort.project)),
        "candidates": int(cohort.candidates.sum()),
    }


def count_exclusions(excluded: Iterable[Exclusion]) -> list[ExclusionCount]:
    """Slides and candidates left out by each reason, sorted by reason."""
    table: dict[str, ExclusionCount] = {}
    for exclusion in excluded:
        empty = ExclusionCount(reason=exclusion.reason, slides=0, candidates=0)
        row = table.setdefault(exclusion.reason, empty)
        row["slides"] += 1
        row["candidates"] += exclusion.candidates
    return [table[reason] for reason in sorted(table)]


def _record_spread(
    values: npt.NDArray[np.str_], candidates: npt.NDArray[np.int64], tiles: npt.NDArray[np.int64]
) -> SpreadRecord:
    """A spread's divergences and coverage, and its table."""
    spread = measure_spread(values, candidates, tiles)
    columns = (spread.cohort_slides, spread.cohort_tiles, spread.slides, spread.tiles)
    rows = zip(spread.names, *(column.tolist() for column in columns), strict=True)
    # JSON has no NaN.
    jsd_slides, jsd_tiles = (
        None if np.isnan(divergence) else divergence
        for divergence in (spread.jsd_slides, spread.jsd_tiles)
    )
    return {
        "covered": spread.covered,
        "of": len(spread.names),
        "jsd_bits_slides": jsd_slides,
        "jsd_bits_tiles": jsd_tiles,
        "rows": [
            GroupRow(
                name=name, cohort_slides=cohort_slides, cohort_tiles=cohort_tiles, slides=slides,
                tiles=selected,
            )
            for name, cohort_slides, cohort_tiles, slides, selected in rows
        ],
    }  # fmt: skip


def ties_to_json(ties: Ties) -> dict[str, object]:
    """Ties as JSON values, for the plan and the journal."""
    return {
        "role": ties.role, "patients": list(ties.patients), "honours": dict(ties.honours),
        "parent": ties.parent, "deny": dict(ties.deny),
    }  # fmt: skip


def ties_from_json(value: Any) -> Ties | None:
    """Ties of a plan or a journal line, or None where there are none.

    Raises `UserError` where they are not as `ties_to_json` makes them.
    """
    if not isinstance(value, dict) or "role" not in value:
        return None
    patients, tables = value.get("patients", ()), (value.get("honours", {}), value.get("deny", {}))
    texts = isinstance(patients, list | tuple) and all(isinstance(one, str) for one in patients)
    named = all(
        isinstance(table, dict) and all(isinstance(one, str) for one in table.values())
        for table in tables
    )
    if not (texts and named):
        raise UserError(
            f"the ties of a selection are {one_line(value)}: expected lists of patients and names; "
            "remove the selection and make it again"
        )
    return Ties(
        str(value["role"]), tuple(value.get("patients", ())), dict(value.get("honours", {})),
        str(value.get("parent", "")), dict(value.get("deny", {})),
    )  # fmt: skip


def build_selection(
    name: str,
    cohort: Cohort,
    offsets: npt.NDArray[np.int64],
    ranks: npt.NDArray[np.int32],
    plan: SelectionPlan,
) -> Selection:
    """A selection of the cohort's slides that have rows.

    `offsets` int64 [slides + 1] are in the order of `cohort`; `ranks` int32 [rows].
    """
    sizes = np.diff(offsets)
    kept = np.flatnonzero(sizes)
    kept_offsets = np.concatenate([[0], np.cumsum(sizes[kept])]).astype(np.int64)
    slide_ids = tuple(cohort.slide_id[kept].tolist())
    return Selection(name, slide_ids, kept_offsets, ranks, dict(plan))
