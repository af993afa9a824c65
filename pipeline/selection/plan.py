"""The plan that a selection carries: how it was made, what was left out, how it is spread."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.dataset import Selection
from pipeline.selection.cohort import Cohort, Exclusion
from pipeline.selection.config import SelectConfig
from pipeline.selection.distribution import Spread, spread
from pipeline.selection.draw import Division

COLUMNS = ("project", "site")
TRAIN, VAL_IN, VAL_OUT, ALL = "train", "val-in", "val-out", "all"
"""What a selection is for; a part of another has the role of the whole."""
IMPORTED = "imported"
"""The `rule` in the plan of a selection that others made."""


@dataclass(frozen=True)
class Ties:
    """What binds a selection to others: which may not change or go while this one stands.

    `patients` are those it holds out itself; `honours` maps the hold-outs whose patients it
    leaves alone to `patients_mark` of theirs; `parent` and `deny` name what it was drawn with.
    """

    role: str
    patients: tuple[str, ...] = ()
    honours: Mapping[str, str] = field(default_factory=dict)
    parent: str = ""
    deny: Mapping[str, str] = field(default_factory=dict)

    @property
    def patients_mark(self) -> str:
        """Hash of the held-out patients."""
        return patients_mark(self.patients)


def patients_mark(patients: Iterable[str]) -> str:
    """Hash of a set of patients."""
    return hashlib.sha256("\0".join(sorted(patients)).encode()).hexdigest()[:32]


def role_of_name(name: str) -> str:
    """The role that a name states, as `verify --leakage` reads names; '' where it states none."""
    if name.startswith(VAL_OUT):
        return VAL_OUT
    if name.startswith(("train", "guidance")):
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
) -> dict[str, Any]:
    """The plan as JSON values.

    `cohort` is all that was eligible before any patient was held out; `chosen` are the indices in
    it of the slides that the division was made for, `counts` the tiles of each in this selection.
    """
    tiles = np.zeros(len(cohort), np.int64)
    tiles[chosen] = counts
    return {
        "parameters": asdict(config),
        "role": ties.role,
        "ties": ties_to_json(ties),
        "rule": "sainte-lague",
        "seed": seed,
        "slides_sha256": slides_sha256,
        "cohort": _size(cohort),
        "selected": _size(cohort.take(tiles > 0)) | {"tiles": int(counts.sum())},
        "exclusions": count_exclusions(excluded),
        "strata": _strata_rows(division, cohort, chosen, counts, config.stratify),
        "largest_share_deviation": division.largest_deviation,
        "strata_below_quota": len(division.below_quota),
        "distribution": {
            column: spread_to_json(spread(getattr(cohort, column), cohort.candidates, tiles))
            for column in COLUMNS
        },
    }


def _strata_rows(
    division: Division,
    cohort: Cohort,
    chosen: npt.NDArray[np.int64],
    counts: npt.NDArray[np.int64],
    stratify: str,
) -> list[dict[str, Any]]:
    """The table wanted and got; where the rows were dealt to several sets, this set's part."""
    drawn = int(division.counts.sum())
    part = int(counts.sum()) / drawn if drawn else 0.0
    names, place = np.unique(cohort.take(chosen).strata(stratify), return_inverse=True)
    got = dict(zip(names.tolist(), np.bincount(place, counts, len(names)), strict=True))
    return [
        asdict(one) | {"quota": one.quota * part, "selected": int(got[one.name])}
        for one in division.strata
    ]


def _size(cohort: Cohort) -> dict[str, int]:
    return {
        "slides": len(cohort),
        "patients": len(np.unique(cohort.patient)),
        "sites": len(np.unique(cohort.site)),
        "projects": len(np.unique(cohort.project)),
        "candidates": int(cohort.candidates.sum()),
    }


def count_exclusions(excluded: Iterable[Exclusion]) -> list[dict[str, Any]]:
    """Slides and candidates left out by each reason, sorted by reason."""
    table: dict[str, dict[str, Any]] = {}
    for one in excluded:
        row = table.setdefault(one.reason, {"reason": one.reason, "slides": 0, "candidates": 0})
        row["slides"] += 1
        row["candidates"] += one.candidates
    return [table[reason] for reason in sorted(table)]


def spread_to_json(one: Spread) -> dict[str, Any]:
    """A spread's divergences and coverage, and its table."""
    rows = zip(one.names, one.cohort_slides, one.cohort_tiles, one.slides, one.tiles, strict=True)
    return {
        "covered": one.covered,
        "of": len(one.names),
        "jsd_bits_slides": _number(one.jsd_slides),
        "jsd_bits_tiles": _number(one.jsd_tiles),
        "rows": [
            {
                "name": name, "cohort_slides": int(a), "cohort_tiles": int(b),
                "slides": int(c), "tiles": int(d),
            }
            for name, a, b, c, d in rows
        ],
    }  # fmt: skip


def _number(value: float) -> float | None:
    return None if np.isnan(value) else value


def ties_to_json(ties: Ties) -> dict[str, Any]:
    """Ties as JSON values, for the plan and the journal."""
    return {
        "role": ties.role, "patients": list(ties.patients), "honours": dict(ties.honours),
        "parent": ties.parent, "deny": dict(ties.deny),
    }  # fmt: skip


def ties_from_json(value: Any) -> Ties | None:
    """Ties of a plan or a journal line, or None where there are none."""
    if not isinstance(value, dict) or "role" not in value:
        return None
    return Ties(
        str(value["role"]), tuple(value.get("patients", ())), dict(value.get("honours", {})),
        str(value.get("parent", "")), dict(value.get("deny", {})),
    )  # fmt: skip


def build_selection(
    name: str,
    cohort: Cohort,
    offsets: npt.NDArray[np.int64],
    ranks: npt.NDArray[np.int32],
    plan: dict[str, Any],
) -> Selection:
    """A selection of the cohort's slides that have rows; `cohort` is in the order of `offsets`."""
    sizes = np.diff(offsets)
    kept = np.flatnonzero(sizes)
    own = np.concatenate([[0], np.cumsum(sizes[kept])]).astype(np.int64)
    return Selection(name, tuple(cohort.slide_id[kept].tolist()), own, ranks, plan)
