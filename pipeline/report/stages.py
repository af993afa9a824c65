"""How every stage ended: counts, the reasons of what was not taken, and what fixes them."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from pipeline.dataset import Entry
from pipeline.report.facts import TISSUE, Facts, SlideFacts, reason_kind
from pipeline.report.selections import SelectionFacts
from pipeline.upkeep.status import is_bookkeeping

_ORDER = ("scan", "import", TISSUE, "select", "tile", "cache", "curate")
_EXAMPLES = 5
_FIXES = {
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
    """One stage (and scope of it): slides by outcome, its result in words, what it refused."""

    name: str
    done: int
    rejected: int = 0
    failed: int = 0
    waiting: int = 0
    result: str = ""
    reasons: tuple[ReasonGroup, ...] = ()

    @property
    def fix(self) -> str:
        """What to do about slides that were not taken or wait; '' where there are none."""
        stage = self.name.partition(" ")[0]
        fixes = []
        if self.rejected or self.failed:
            fixes.append(_FIXES.get(stage, f"Run `pipeline {stage}` again."))
        if self.waiting:
            fixes.append(f"{self.waiting:,} wait: run `pipeline {stage}`.")
        return " ".join(fixes)


def stage_outcomes(facts: Facts, selections: Sequence[SelectionFacts]) -> list[StageOutcome]:
    """All stages that have begun, in the order of a dataset's life."""
    scanned = [slide for slide in facts.slides if slide.stage != "scan"]
    grid = sum(slide.grid_tiles or 0 for slide in scanned)
    kept = sum(slide.candidates or 0 for slide in scanned)
    outcomes = [
        _first_outcome("scan", facts.slides, f"{len(facts.slides):,} slides listed"),
        _first_outcome(TISSUE, scanned, f"{kept:,} candidates of {grid:,} grid tiles"),
    ]
    if selections:
        result = ", ".join(f"{one.name} {one.tiles:,} tiles" for one in selections)
        outcomes.append(StageOutcome("select", len(selections), result=result))
    others = [stage for stage in facts.journals if stage not in ("scan", TISSUE, "select")]
    places = {stage: index for index, stage in enumerate(_ORDER)}
    for stage in sorted(others, key=lambda stage: (places.get(stage, len(_ORDER)), stage)):
        for scope, entries in sorted(facts.journals[stage].items()):
            if not is_bookkeeping(scope):
                outcomes.append(_scope_outcome(facts, stage, scope, entries, selections))
    return outcomes


def _first_outcome(stage: str, slides: Sequence[SlideFacts], result: str) -> StageOutcome:
    """A stage that decides over all slides that come to it."""
    refused = [slide for slide in slides if slide.stage == stage]
    by_status = Counter(slide.status for slide in refused)
    return StageOutcome(
        stage, len(slides) - len(refused), by_status["rejected"], by_status["failed"],
        by_status["waiting"], result,
        _group_reasons(slide for slide in refused if slide.status != "waiting"),
    )  # fmt: skip


def _scope_outcome(
    facts: Facts,
    stage: str,
    scope: str,
    entries: Mapping[str, Entry],
    selections: Sequence[SelectionFacts],
) -> StageOutcome:
    """A stage with a line per slide; slides of a selection for which there is none wait."""
    by_outcome = Counter(entry.outcome for entry in entries.values())
    known = {row.slide.slide_id: row.slide for row in facts.slides}
    refused = [
        SlideFacts(known[slide_id], entry.outcome, stage, entry.reason)
        for slide_id, entry in entries.items()
        if entry.outcome in ("rejected", "failed") and slide_id in known
    ]
    # Tiles and features are made for selections: a slide in none of them does not wait.
    selected = {slide_id for selection in selections for slide_id in selection.tiles_by_slide}
    made = facts.counts[stage].get(scope, 0)
    return StageOutcome(
        f"{stage} {scope}".strip(), by_outcome["done"], by_outcome["rejected"],
        by_outcome["failed"], len(selected - entries.keys()) if stage in ("tile", "cache") else 0,
        f"{made:,} tiles" if made else "", _group_reasons(refused),
    )  # fmt: skip


def _group_reasons(refused: Iterable[SlideFacts]) -> tuple[ReasonGroup, ...]:
    """Like reasons together: failures first, then the most frequent."""
    by_kind: dict[tuple[str, str], list[SlideFacts]] = {}
    for facts in refused:
        kind = reason_kind(facts.reason, facts.slide)
        by_kind.setdefault((facts.status, kind), []).append(facts)
    groups = []
    for (status, kind), slides in by_kind.items():
        ids = sorted(facts.slide.slide_id for facts in slides)
        # Of one slide the numbers themselves are wanted, of many what they have in common.
        words = slides[0].reason if len(slides) == 1 else kind
        groups.append(ReasonGroup(status, words, len(ids), tuple(ids[:_EXAMPLES])))
    return tuple(sorted(groups, key=lambda g: (g.outcome, -g.count, g.kind)))
