"""How every stage ended: counts, the reasons of what was not taken, and what mends them."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from pipeline.dataset import Entry
from pipeline.report.facts import TISSUE, Facts, SlideFacts, reason_kind
from pipeline.report.selections import SelectionFacts
from pipeline.upkeep.status import is_bookkeeping

_ORDER = ("scan", "import", TISSUE, "select", "tile", "cache", "curate")
_EXAMPLES = 5
_MENDS = {
    "scan": "Repair the files or fetch them again, then run the same `pipeline scan`: it opens "
    "failed slides again and leaves the others as they are. A slide without a believable "
    "resolution is taken with `--assume-mpp` or a CSV with an mpp column.",
    TISSUE: "Look at the overlays first. A failed slide is tried again by `pipeline tissue`; a "
    "rejected one stays out as long as its file and the dataset's thresholds are the same.",
    "tile": "`pipeline tile` tries failed slides again and writes only the shards that miss.",
    "cache": "`pipeline cache` tries failed slides again and writes only what misses.",
}


@dataclass(frozen=True)
class ReasonGroup:
    """Slides that a stage did not take for reasons of one kind, with a few of their ids."""

    outcome: str
    kind: str
    count: int
    examples: tuple[str, ...]


@dataclass(frozen=True)
class StageOutcome:
    """One stage (and scope of it): its numbers in words, what it refused, what mends that."""

    name: str
    done: int
    rejected: int
    failed: int
    waiting: int
    result: str
    reasons: tuple[ReasonGroup, ...]
    mend: str


def stage_outcomes(facts: Facts, selections: Sequence[SelectionFacts]) -> list[StageOutcome]:
    """All stages that have begun, in the order of a dataset's life."""
    found = [_scan(facts), _tissue(facts)]
    if selections:
        found.append(_select(selections))
    others = [stage for stage in facts.journals if stage not in ("scan", TISSUE, "select")]
    for stage in sorted(others, key=_place):
        for scope, entries in sorted(facts.journals[stage].items()):
            if not is_bookkeeping(scope):
                found.append(_other(facts, stage, scope, entries, selections))
    return found


def _place(stage: str) -> tuple[int, str]:
    return (_ORDER.index(stage) if stage in _ORDER else len(_ORDER), stage)


def _scan(facts: Facts) -> StageOutcome:
    refused = [one for one in facts.slides if one.stage == "scan"]
    by_status = Counter(one.status for one in refused)
    taken = len(facts.slides) - len(refused)
    return _outcome(
        "scan", taken, by_status["rejected"], by_status["failed"], 0,
        f"{len(facts.slides):,} slides listed", _groups(refused),
    )  # fmt: skip


def _tissue(facts: Facts) -> StageOutcome:
    scanned = [one for one in facts.slides if one.stage != "scan"]
    refused = [one for one in scanned if one.stage == TISSUE]
    by_status = Counter(one.status for one in refused)
    grid = sum(one.grid_tiles or 0 for one in scanned)
    kept = sum(one.candidates or 0 for one in scanned)
    return _outcome(
        TISSUE, len(scanned) - len(refused), by_status["rejected"], by_status["failed"],
        by_status["waiting"], f"{kept:,} candidates of {grid:,} grid tiles",
        _groups(one for one in refused if one.status != "waiting"),
    )  # fmt: skip


def _select(selections: Sequence[SelectionFacts]) -> StageOutcome:
    said = ", ".join(f"{one.name} {one.tiles:,} tiles" for one in selections)
    return _outcome("select", len(selections), 0, 0, 0, said, ())


def _other(
    facts: Facts,
    stage: str,
    scope: str,
    entries: Mapping[str, Entry],
    selections: Sequence[SelectionFacts],
) -> StageOutcome:
    """A stage with one line a slide; slides that a selection names and it has none for, wait."""
    by_outcome = Counter(entry.outcome for entry in entries.values())
    known = {one.slide.slide_id: one for one in facts.slides}
    refused = [
        SlideFacts(known[slide_id].slide, entry.outcome, stage, entry.reason)
        for slide_id, entry in entries.items()
        if entry.outcome in ("rejected", "failed") and slide_id in known
    ]
    named = {slide_id for one in selections for slide_id in one.tiles_by_slide}
    waiting = len(named - entries.keys()) if stage in ("tile", "cache") else 0
    made = facts.counts[stage].get(scope, 0)
    return _outcome(
        f"{stage} {scope}".strip(), by_outcome["done"], by_outcome["rejected"],
        by_outcome["failed"], waiting, f"{made:,} tiles" if made else "", _groups(refused),
    )  # fmt: skip


def _outcome(
    name: str, done: int, rejected: int, failed: int, waiting: int, result: str,
    reasons: tuple[ReasonGroup, ...],
) -> StageOutcome:  # fmt: skip
    stage = name.partition(" ")[0]
    mends = [_MENDS.get(stage, f"Run `pipeline {stage}` again.")] if rejected or failed else []
    if waiting:
        mends.append(f"{waiting:,} wait: run `pipeline {stage}`.")
    return StageOutcome(name, done, rejected, failed, waiting, result, reasons, " ".join(mends))


def _groups(refused: Iterable[SlideFacts]) -> tuple[ReasonGroup, ...]:
    """Like reasons together: failures first, then the most frequent."""
    groups: dict[tuple[str, str], list[SlideFacts]] = {}
    for one in refused:
        kind = reason_kind(one.reason, one.slide)
        groups.setdefault((one.status, kind), []).append(one)
    found = []
    for (status, kind), slides in groups.items():
        ids = sorted(one.slide.slide_id for one in slides)
        # Of one slide the numbers themselves are wanted, of many what they have in common.
        said = slides[0].reason if len(slides) == 1 else kind
        found.append(ReasonGroup(status, said, len(ids), tuple(ids[:_EXAMPLES])))
    return tuple(sorted(found, key=lambda g: (g.outcome, -g.count, g.kind)))
