"""What the page shows of every slide, read from slides.parquet and the journals."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from common.errors import UserError
from pipeline.dataset import (
    Dataset,
    DatasetKind,
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
_UNKNOWN_REASON = "no reason was recorded"
_PATH = re.compile(r"\S*[/\\]\S*[^\s,;:.)]")
_NUMBER = re.compile(r"\d+(,\d{3})*(\.\d+)?")

LastEntries = Mapping[str, Mapping[str, Entry]]
"""Per scope of a stage and slide, the latest line of the journal."""


@dataclass(frozen=True)
class SlideFacts:
    """One slide of the page.

    `status` is one of `STATUSES`; `stage` is the stage that decided it and `reason` its words
    ('' for ok). `class_mm2` and `tiles` are the tissue stage's mm² by class and grid tiles by
    verdict, empty where there is no result; `note` is a stage's remark on a slide that it took.
    `overlay_sha256` is that of the current overlay by its journal line, None where there is none.
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
    overlay_sha256: str | None = None
    refusing: frozenset[str] = frozenset()

    @property
    def found_mm2(self) -> float | None:
        """mm² of tissue and artifacts together; None where the tissue stage measured nothing."""
        return sum(self.class_mm2.values()) if self.tiles else None

    def class_share(self, *names: str) -> float | None:
        """The classes' part of what was found, 0 to 1; None where nothing was."""
        if not self.found_mm2:
            return None
        return sum(self.class_mm2.get(name, 0.0) for name in names) / self.found_mm2

    @property
    def artifact_share(self) -> float | None:
        """The part of what was found for which tiles are refused, 0 to 1."""
        return self.class_share(*sorted(self.refusing))

    @property
    def reason_kind(self) -> str:
        """The reason without what is this slide's own."""
        return f"{self.stage}: {reason_kind(self.reason, self.slide)}" if self.reason else ""


@dataclass(frozen=True)
class Facts:
    """A dataset's identity, its slides sorted by id, and its stages' latest journal lines.

    `counts` are the tiles of the current rank ranges, by stage and scope; `refusing` are the
    classes for which the dataset's detector refuses tiles.
    """

    identity: Mapping[str, Any]
    slides: tuple[SlideFacts, ...]
    journals: Mapping[str, LastEntries]
    counts: Mapping[str, Mapping[str, int]]
    refusing: frozenset[str]


def read_facts(dataset: Dataset) -> Facts:
    """Read slides and journals; raises `UserError` where the dataset has no scanned slides."""
    slides = read_slides(dataset)
    if slides and all(slide.reader == DatasetKind.GENERATED for slide in slides):
        raise UserError(
            f"{dataset.root} has generated tiles and no slides; its page is made by "
            "`python -m evaluate report`"
        )
    # Each journal is read once: a cohort's take seconds, and both views need every line.
    identity = read_identity(dataset)
    stages = sorted(path.name for path in (dataset.root / "status").glob("*") if path.is_dir())
    lines = {stage: read_journal(dataset, stage) for stage in stages}
    reader = _FactsReader(
        dataset, identity, {stage: last_entries(entries) for stage, entries in lines.items()}
    )
    return Facts(
        identity,
        tuple(map(reader.read, slides)),
        reader.journals,
        {stage: count_done(entries) for stage, entries in lines.items()},
        reader.refusing,
    )


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


def count_done(entries: Iterable[Entry]) -> dict[str, int]:
    """Per scope, the `tiles` of the current rank ranges.

    Of two lines for one range the later counts; lines of an older fingerprint do not.
    """
    current: dict[tuple[str, str], str] = {}
    ranges: dict[tuple[str, str], dict[tuple[int, int], int]] = {}
    for entry in entries:
        key = (entry.scope, entry.slide_id)
        if current.get(key) != entry.fingerprint:
            current[key], ranges[key] = entry.fingerprint, {}
        # A failed or pruned range supersedes what was done of it. Of a slide's kinds of features
        # only one has the count, so that a run's total counts a tile once: the range has it too.
        made = entry.counts.get("tiles", entry.stop - entry.start)
        made = made if entry.outcome == "done" else 0
        ranges[key][entry.start, entry.stop] = made
    totals: dict[str, int] = {}
    for (scope, _), parts in ranges.items():
        totals[scope] = totals.get(scope, 0) + sum(parts.values())
    return totals


def reason_kind(reason: str, slide: Slide) -> str:
    """A reason with the slide's name, paths and numbers left open, so that like ones meet.

    >>> reason_kind("a-17: 12 of 300 tiles in /x/a-17.svs", Slide("a-17", "/x/a-17.svs"))
    '…: N of N tiles in …'
    """
    text = _PATH.sub("…", reason)
    for name in (slide.path.replace("\\", "/").rpartition("/")[2], slide.slide_id):
        text = re.sub(rf"(?<!\w){re.escape(name)}(?!\w)", "…", text) if name else text
    return _NUMBER.sub("N", text)


class _FactsReader:
    """Reads the facts of single slides of a dataset."""

    def __init__(
        self, dataset: Dataset, identity: dict[str, Any], journals: Mapping[str, LastEntries]
    ) -> None:
        self.dataset, self.identity, self.journals = dataset, identity, journals
        # Classes on trial refuse no tile, so that the page must not blame them.
        detector = str((identity.get("detector_parameters") or {}).get("name", ""))
        on_trial = (
            ClassicalDetector.experimental if detector.startswith("classical") else frozenset()
        )
        self.refusing = frozenset(
            CLASS_NAMES[artifact]
            for artifact in TissueClass
            if artifact > TissueClass.TISSUE and artifact not in on_trial
        )

    def read(self, slide: Slide) -> SlideFacts:
        """The facts of a slide, by the first stage that did not take it."""
        if slide.status != "ok":
            return SlideFacts(slide, slide.status, "scan", slide.reason or _UNKNOWN_REASON)
        # `scan` remarks on slides that it takes, such as a resolution from a table.
        scanned = self._last_entry("scan", slide.slide_id)
        note = scanned.reason if scanned else ""
        entry = self._last_entry(TISSUE, slide.slide_id)
        source = imported_source([entry] if entry else [])
        # A line counts while it is about the slide as it is now, and its files are there.
        if (
            entry is None
            or entry.fingerprint != tissue_fingerprint(slide, self.identity, source)
            or not files_present(self.dataset, entry)
        ):
            reason = "not looked at yet, or changed since: run `tissue`"
            return SlideFacts(slide, "waiting", TISSUE, reason, note)
        status, stage, reason = self._judge_slide(entry)
        values = entry.values
        if source:
            imported = f"imported, not detected (sha256 {source[:12]})"
            note = "; ".join(filter(None, (note, imported)))
        return SlideFacts(
            slide, status, stage, reason, note,
            class_mm2={str(name): float(mm2) for name, mm2 in values.get("class_mm2", {}).items()},
            tiles={str(name): int(count) for name, count in values.get("tiles", {}).items()},
            glass=tuple(float(v) for v in values.get("glass", ())),
            plan=describe_plan(values.get("plan", {})),
            grid_tiles=entry.counts.get("grid tiles"),
            candidates=entry.counts.get("candidate tiles"),
            overlay_sha256=self._overlay_sha256(entry),
            refusing=self.refusing,
        )  # fmt: skip

    def _last_entry(self, stage: str, slide_id: str) -> Entry | None:
        return self.journals.get(stage, {}).get("", {}).get(slide_id)

    def _judge_slide(self, entry: Entry) -> tuple[str, str, str]:
        """Status, deciding stage and reason of a slide whose tissue line is current."""
        if entry.outcome != "done":
            return entry.outcome, TISSUE, entry.reason or _UNKNOWN_REASON
        # A later stage's failure decides: the slide is not usable as far as it got.
        for stage, scopes in self.journals.items():
            for scope in scopes.values() if stage not in ("scan", TISSUE) else ():
                later = scope.get(entry.slide_id)
                if later is not None and later.outcome == "failed":
                    return "failed", stage, later.reason or _UNKNOWN_REASON
        return "ok", "", ""

    def _overlay_sha256(self, entry: Entry) -> str | None:
        try:
            check_slide_id(entry.slide_id)  # the id becomes a file name
        except UserError:
            return None
        name = self.dataset.relative_path(self.dataset.overlay_file(entry.slide_id))
        return next((record.sha256 for record in entry.files if record.path == name), None)


def describe_plan(plan: Mapping[str, Any]) -> str:
    """From which level tiles are read, and how they are brought to the target resolution.

    >>> describe_plan({"level": 1, "downsample": 4.0, "factor": 1.25, "mpp": 0.5})
    'level 1 (4 times smaller than level 0), reduced 1.25 times: 0.5 mpp'
    """
    if not plan:
        return ""
    factor, downsample = float(plan.get("factor", 1)), float(plan.get("downsample", 1))
    level = f"level {plan.get('level')}"
    where = level if downsample == 1 else f"{level} ({downsample:.4g} times smaller than level 0)"
    how = "as it is" if factor == 1 else f"reduced {factor:.4g} times"
    return f"{where}, {how}: {float(plan.get('mpp', 0)):.4g} mpp"
