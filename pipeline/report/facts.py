"""What the page shows of every slide, read from slides.parquet and the journals."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from common.errors import UserError
from pipeline.dataset import (
    Dataset,
    Entry,
    Slide,
    check_slide_id,
    files_present,
    read_identity,
    read_journal,
    read_slides,
)
from pipeline.dataset.ledger import supersedes_failure
from pipeline.tissue.classes import CLASS_NAMES, TissueClass
from pipeline.tissue.detector import ClassicalDetector
from pipeline.tissue.stage import imported_source, tissue_fingerprint

STATUSES = ("ok", "rejected", "failed", "waiting")
TISSUE = "tissue"
_PATH = re.compile(r"\S*[/\\]\S*[^\s,;:.)]")
_NUMBER = re.compile(r"\d+(,\d{3})*(\.\d+)?")

LastEntries = Mapping[str, Mapping[str, Entry]]
"""Per scope of a stage and slide, the latest line of the journal."""


@dataclass(frozen=True)
class SlideFacts:
    """One slide of the page.

    `status` is one of `STATUSES`; `stage` is the stage that decided it and `reason` its words
    ('' for ok). `class_mm2` and `tiles` are the tissue stage's mm² by class and grid tiles by
    verdict, empty where it said nothing; `note` is what a stage remarked of a slide that it took.
    `refusing` are the classes for which tiles are refused: not those that a detector marks on
    trial only.
    """

    slide: Slide
    status: str
    stage: str = ""
    reason: str = ""
    note: str = ""
    class_mm2: Mapping[str, float] = field(default_factory=dict)
    tiles: Mapping[str, int] = field(default_factory=dict)
    glass: tuple[float, ...] = ()
    plan: str = ""
    grid_tiles: int | None = None
    candidates: int | None = None
    has_overlay: bool = False
    refusing: frozenset[str] = frozenset()

    @property
    def found_mm2(self) -> float | None:
        """Tissue and artifacts together; None where the tissue stage measured nothing."""
        return sum(self.class_mm2.values()) if self.tiles else None

    def class_share(self, name: str) -> float | None:
        """The class's part of what was found; None where there is nothing to divide."""
        return self.class_mm2.get(name, 0.0) / self.found_mm2 if self.found_mm2 else None

    @property
    def artifact_share(self) -> float | None:
        """The part of what was found for which tiles are refused."""
        if not self.found_mm2:
            return None
        return sum(self.class_mm2.get(name, 0.0) for name in sorted(self.refusing)) / self.found_mm2

    @property
    def reason_kind(self) -> str:
        """The reason without what is this slide's own."""
        return f"{self.stage}: {reason_kind(self.reason, self.slide)}" if self.reason else ""


@dataclass(frozen=True)
class Facts:
    """A dataset's identity, its slides sorted by id, and its stages' latest journal lines."""

    identity: Mapping[str, Any]
    slides: tuple[SlideFacts, ...]
    journals: Mapping[str, LastEntries]
    counts: Mapping[str, Mapping[str, int]]


def read_facts(dataset: Dataset) -> Facts:
    """Read slides and journals; raises `UserError` where the dataset holds no scanned slides."""
    slides = read_slides(dataset)
    if slides and all(slide.reader == "generated" for slide in slides):
        raise UserError(
            f"{dataset.root} holds generated tiles and no slides; its page is made by "
            "`python -m evaluate report`"
        )
    identity = read_identity(dataset)
    lines = {stage: read_journal(dataset, stage) for stage in stages_begun(dataset)}
    last = {stage: last_entries(entries) for stage, entries in lines.items()}
    return Facts(
        identity,
        tuple(_slide_facts(dataset, slide, identity, last) for slide in slides),
        last,
        {stage: done_counts(entries) for stage, entries in lines.items()},
    )


def stages_begun(dataset: Dataset) -> list[str]:
    """The stages that have a journal, sorted by name."""
    return sorted(path.name for path in (dataset.root / "status").glob("*") if path.is_dir())


def last_entries(entries: Iterable[Entry]) -> dict[str, dict[str, Entry]]:
    """The latest line of every scope and slide; entries come oldest first.

    A failure without a scope is left out where the slide was done since.
    """
    last: dict[str, dict[str, Entry]] = {}
    for entry in entries:
        before = last.get("", {}).get(entry.slide_id)
        if before is not None and supersedes_failure(entry, before):
            del last[""][entry.slide_id]
        last.setdefault(entry.scope, {})[entry.slide_id] = entry
    return {scope: slides for scope, slides in last.items() if slides}


def done_counts(entries: Iterable[Entry]) -> dict[str, int]:
    """Per scope, the `tiles` of the rank ranges that stand.

    Of two lines for one range the later counts; lines of an older fingerprint do not.
    """
    current: dict[tuple[str, str], str] = {}
    ranges: dict[tuple[str, str], dict[tuple[int, int], int]] = {}
    for entry in entries:
        key = (entry.scope, entry.slide_id)
        if current.get(key) != entry.fingerprint:
            current[key], ranges[key] = entry.fingerprint, {}
        made = entry.counts.get("tiles", 0) if entry.outcome == "done" else 0
        ranges[key][entry.start, entry.stop] = made
    totals: dict[str, int] = {}
    for (scope, _), parts in ranges.items():
        totals[scope] = totals.get(scope, 0) + sum(parts.values())
    return totals


def reason_kind(reason: str, slide: Slide) -> str:
    """A reason with the slide's name, paths and numbers left open, so that like ones meet."""
    text = _PATH.sub("…", reason)
    for name in (slide.path.replace("\\", "/").rpartition("/")[2], slide.slide_id):
        text = re.sub(rf"(?<!\w){re.escape(name)}(?!\w)", "…", text) if name else text
    return _NUMBER.sub("N", text)


def _slide_facts(
    dataset: Dataset, slide: Slide, identity: Mapping[str, Any], last: Mapping[str, LastEntries]
) -> SlideFacts:
    if slide.status != "ok":
        return SlideFacts(slide, slide.status, "scan", slide.reason or "no reason was recorded")
    note = _entry(last, "scan", slide.slide_id)
    said = note.reason if note else ""
    entry = _entry(last, TISSUE, slide.slide_id)
    if entry is None or not _holds(dataset, slide, identity, entry):
        reason = "not looked at yet, or changed since: run `tissue`"
        return SlideFacts(slide, "waiting", TISSUE, reason, said)
    status, stage, reason = _verdict(entry, last)
    values, source = entry.values, imported_source([entry])
    return SlideFacts(
        slide, status, stage, reason, "; ".join(filter(None, (said, _imported(source)))),
        class_mm2={str(k): float(v) for k, v in values.get("class_mm2", {}).items()},
        tiles={str(k): int(v) for k, v in values.get("tiles", {}).items()},
        glass=tuple(float(v) for v in values.get("glass", ())),
        plan=plan_in_words(values.get("plan", {})),
        grid_tiles=entry.counts.get("grid tiles"),
        candidates=entry.counts.get("candidate tiles"),
        has_overlay=_has_overlay(dataset, entry),
        refusing=refusing_classes(identity),
    )  # fmt: skip


def _entry(last: Mapping[str, LastEntries], stage: str, slide_id: str) -> Entry | None:
    return last.get(stage, {}).get("", {}).get(slide_id)


def _holds(dataset: Dataset, slide: Slide, identity: Mapping[str, Any], entry: Entry) -> bool:
    """Whether the line is about the slide as it is now, and its files are there."""
    if entry.fingerprint != tissue_fingerprint(slide, dict(identity), imported_source([entry])):
        return False
    return files_present(dataset, entry)


def _imported(source: str) -> str:
    return f"imported, not detected (sha256 {source[:12]})" if source else ""


def _verdict(entry: Entry, last: Mapping[str, LastEntries]) -> tuple[str, str, str]:
    """Status, deciding stage and reason of a slide whose tissue line holds."""
    if entry.outcome != "done":
        return entry.outcome, TISSUE, entry.reason or "no reason was recorded"
    for stage, scopes in last.items():
        for scope in scopes.values() if stage not in ("scan", TISSUE) else ():
            later = scope.get(entry.slide_id)
            if later is not None and later.outcome == "failed":
                return "failed", stage, later.reason or "no reason was recorded"
    return "ok", "", ""


def refusing_classes(identity: Mapping[str, Any]) -> frozenset[str]:
    """Names of the artifact classes that cost the dataset's detector tiles."""
    name = str((identity.get("detector_parameters") or {}).get("name", ""))
    spared = ClassicalDetector.experimental if name.startswith("classical") else frozenset()
    return frozenset(
        CLASS_NAMES[one] for one in TissueClass if one > TissueClass.TISSUE and one not in spared
    )


def _has_overlay(dataset: Dataset, entry: Entry) -> bool:
    try:
        check_slide_id(entry.slide_id)  # the id becomes a file name
    except UserError:
        return False
    name = dataset.relative(dataset.overlay_file(entry.slide_id))
    return any(record.path == name for record in entry.files)


def plan_in_words(plan: Mapping[str, Any]) -> str:
    """From which level tiles are read, and how they are brought to the target resolution."""
    if not plan:
        return ""
    factor, downsample = float(plan.get("factor", 1)), float(plan.get("downsample", 1))
    level = f"level {plan.get('level')}"
    where = level if downsample == 1 else f"{level} ({downsample:.4g} times smaller than level 0)"
    how = "as it is" if factor == 1 else f"reduced {factor:.4g} times"
    return f"{where}, {how}: {float(plan.get('mpp', 0)):.4g} mpp"
