"""The `scan` stage: open every slide once, record what it is in slides.parquet."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from common.console import print_line
from common.errors import UserError
from common.redact import redact_secrets
from common.terms import Terms, merge_terms
from common.text import describe_joined, joined_names, list_some
from pipeline.dataset import (
    Dataset,
    DatasetKind,
    Entry,
    Ledger,
    Missing,
    Run,
    Slide,
    bounds_from,
    fingerprint_of,
    write_slides,
)
from pipeline.dataset.claim import SLIDES, hold_claim
from pipeline.dataset.journal import Outcome
from pipeline.dataset.tables.slides import can_be_rows, describe_copies
from pipeline.run.stage import Stage, run_stage, stage_versions
from pipeline.run.summary import Summary
from pipeline.run.tasks import SlideTask
from pipeline.run.workers import EngineConfig
from pipeline.slides.barcode import Barcode, parse_barcode
from pipeline.slides.config import ScanConfig
from pipeline.slides.describe import describe_slide
from pipeline.slides.entries import SlideEntry, SlideSearch, refuse_entry
from pipeline.slides.identity import (
    KnownSlides,
    has_samples,
    hash_slide,
    sample_slide,
    slide_state,
)
from pipeline.slides.reader import SlideOpenError, SlideReadError
from pipeline.slides.resolution import ResolutionError
from pipeline.slides.slide_terms import read_slide_terms, stated_terms
from pipeline.slides.staging import StageInError, local_slide
from pipeline.slides.tiff_extent import what_is_missing, what_is_unwritten
from pipeline.slides.tiff_limits import refuse_unbounded

STAGE, VERSION = "scan", 5
TABLE_SCOPE = "table"
"""Scope of the journal line that names slides.parquet."""
IDS_SCOPE = "ids"
"""Scope of the line by which a scan claims ids, before it opens the slides that are to have them.
No file belongs to it, so that its outcome is `pruned`."""


def record_slides(dataset: Dataset, run: Run, summary: Summary) -> dict[str, Slide]:
    """Write slides.parquet from the stage's journals, if it does not say the same already.

    Returns its rows by slide_id.
    """
    # The journals are read under the claim: a scan that ends at the same time either has its lines
    # in them by now, or writes the table after this one, with the lines of both.
    with hold_claim(dataset, SLIDES, STAGE):
        # From all journals, not from this run: array elements and earlier runs scanned other
        # slides.
        ledger = Ledger.read(dataset, STAGE)
        rows = _slides_of_entries(
            {key: entry for key in ledger[""] if (entry := ledger[""].latest(key))}
        )
        # A slide that was refused for its id, and now has one of its own, is one row.
        taken = {slide.path for slide in rows.values() if slide.status != "failed"}
        rows = {
            k: row for k, row in rows.items() if row.status != "failed" or row.path not in taken
        }
        fingerprint = fingerprint_of(rows=[asdict(rows[key]) for key in sorted(rows)])
        name = dataset.slides_file.name
        if ledger[TABLE_SCOPE].done(name, fingerprint) is None:
            record = write_slides(dataset, run.run_id, rows.values())
            # Another scan may have ended since this run began: the table is of its slides too.
            run.take_precedence()
            run.append([Entry(name, "done", fingerprint, scope=TABLE_SCOPE, files=(record,))])
            summary.files, summary.bytes = 1, record.bytes
    return rows


def _list_joined(slides: Collection[Slide]) -> list[str]:
    """What a person should know of names that differ only in form, a line for each kind."""
    lines = []
    if line := describe_joined("patients", joined_names(slide.patient for slide in slides)):
        lines.append(line)
    # Their files have names that are one where a file system ignores case.
    if same := joined_names(slide.slide_id for slide in slides):
        some = list_some([" and ".join(names) for names in same.values()], 3)
        lines.append(
            f"slides whose ids differ only in case: {some}; on a file system that ignores case "
            "their files would be one: give them other ids (a slide_id column)"
        )
    return lines


def known_slides(lines: Iterable[Entry]) -> list[Slide]:
    """The slides that `scan` recorded, each as it last could be read; `lines` are its journal."""
    entries: dict[str, Entry] = {}
    for entry in lines:
        before = entries.get(entry.slide_id)
        is_read = entry.outcome in ("done", "rejected")
        if entry.scope == "" and (is_read or before is None or before.outcome == "failed"):
            entries[entry.slide_id] = entry
    return list(_slides_of_entries(entries).values())


def claimed_slides(lines: Iterable[Entry]) -> dict[str, Slide]:
    """Slides whose ids scans claimed before they opened them, by id: what was known of each then.

    They are of status "failed": nothing was read of them yet. `lines` are the journal of `scan`.
    """
    claimed: dict[str, Slide] = {}
    for entry in lines:
        ids = entry.values.get("ids") if entry.scope == IDS_SCOPE else None
        for slide_id, claim in ids.items() if isinstance(ids, dict) else ():
            match claim:
                case [str(path), int(size), int(mtime_ns)]:
                    claimed[slide_id] = Slide(
                        slide_id, path, status="failed", bytes=size, mtime_ns=mtime_ns
                    )
                case _:
                    continue  # no scan wrote this
    return claimed


def _refuse_other_file(entry: SlideEntry, known: KnownSlides) -> SlideEntry:
    """The entry, refused where its id is that of another file in the dataset."""
    reason = "" if entry.taken_by else known.reason_to_refuse(entry)
    return refuse_entry(entry, known.path_of(entry.slide_id), reason) if reason else entry


def _list_replaced(before: Mapping[str, Slide], after: Mapping[str, Slide]) -> list[str]:
    """The ids of usable slides whose bytes are other ones than before."""
    return [
        slide_id
        for slide_id, old in before.items()
        if (new := after.get(slide_id)) is not None
        and old.status == new.status == "ok"
        and old.sampled_sha256 not in ("", new.sampled_sha256)
    ]


def _slides_of_entries(entries: Mapping[str, Entry]) -> dict[str, Slide]:
    """The slides of journal lines, by id; where no scan writes such values, a failed slide."""
    slides = {slide_id: _slide_of_entry(entry) for slide_id, entry in entries.items()}
    if can_be_rows(slides.values()):
        return slides
    # Some are not: which, takes a hundred times as long.
    return {
        slide_id: slide if can_be_rows([slide]) else _slide_without_values(slide_id)
        for slide_id, slide in slides.items()
    }


def _slide_without_values(slide_id: str) -> Slide:
    reason = "its line in the journal has values that no scan writes; run `scan` again"
    return Slide(slide_id, "", status="failed", reason=reason)


def _slide_of_entry(entry: Entry) -> Slide:
    """The slide of a journal line; one whose worker died has only what was known before."""
    try:
        return _parse_slide(entry)
    except (TypeError, ValueError):
        return _slide_without_values(entry.slide_id)


def _parse_slide(entry: Entry) -> Slide:
    # Values of newer releases are passed over.
    values = {key: value for key, value in entry.values.items() if key in Slide.__annotations__}
    values["levels"] = tuple(map(tuple, values.get("levels", ())))
    for key in ("levels_left_out", "notes"):
        values[key] = tuple(values.get(key, ()))
    values["bounds"] = bounds_from(values.get("bounds"))
    values["reason"] = "" if entry.outcome == "done" else redact_secrets(entry.reason)
    # Withdrawn where a later stage found another file in its place.
    if entry.outcome in ("failed", "pruned"):
        values["status"] = "failed"
    return Slide(**({"slide_id": entry.slide_id, "path": ""} | values))


def slide_values(slide: Slide) -> dict[str, object]:
    """What a journal line of `scan` says of a slide, but for the reason, which the line has itself.

    A reason is only where secrets are taken out of it; the rest is data.
    """
    values = asdict(slide)
    del values["reason"]
    return values


def _bytes_and_time(source: SlideEntry) -> tuple[int, int]:
    """Bytes and modification time (0 for a slide that is no local file)."""
    return (source.bytes, 0) if source.uri else slide_state(source.path, source.series)


def _source_fingerprint(source: SlideEntry, config: ScanConfig) -> str:
    size, mtime_ns = _bytes_and_time(source)
    row = {key: str(value) for key, value in asdict(source).items()}
    return fingerprint_of(
        stage=STAGE, version=VERSION, row=row, bytes=size, mtime=mtime_ns, **config.row_parameters()
    )


def scan_slide(
    source: SlideEntry, config: ScanConfig, fingerprint: str, scratch: str, before: str = ""
) -> list[Entry]:
    """Open one slide and describe it; every way to fail becomes an entry with a reason.

    What is recorded: µm per px, sizes in level-0 px, bytes of the file. `before` is the sum of
    samples that a file of as many bytes, with this time, had when it was recorded; '' for none.
    """
    slide, why = _slide_before_opening(source), ""
    try:
        if source.refusal:
            raise SlideOpenError(source.refusal)
        with local_slide(slide, config.stage_in, Path(scratch)) as path:
            if source.uri:
                slide = replace(slide, bytes=slide_state(path, source.series)[0])
            # The sums before it is opened: they are of the file also where that is damaged.
            slide = _add_sums(slide, path, source.series, config.sha256)
            if before and not has_samples(path, source.series, before):
                # Neither number nor time tells the files apart, as later stages would do.
                sha256 = hash_slide(path, source.series, companions=True)
                slide = replace(slide, sha256=sha256)
            _require_whole(path)
            slide, why = describe_slide(slide, path, source, config)
    except ResolutionError as error:
        slide = replace(slide, status="rejected", reason=str(error))
    except (SlideOpenError, SlideReadError, StageInError, OSError) as error:
        slide = replace(slide, status="failed", reason=str(error))
    outcome: Outcome = "done" if slide.status == "ok" else slide.status  # type: ignore[assignment]
    entry = Entry(
        slide.slide_id,
        outcome,
        fingerprint,
        slide.reason or why,
        values=slide_values(slide),
    )
    return [entry]


def _slide_before_opening(source: SlideEntry) -> Slide:
    """What is known of a slide before it is opened: from the table, or from its barcode."""
    size, mtime_ns = _bytes_and_time(source)
    barcode = parse_barcode(source.slide_id) or Barcode("", "", "", "")
    return Slide(
        source.slide_id,
        source.location,
        bytes=size,
        mtime_ns=mtime_ns,
        patient=source.patient or barcode.patient,
        site=source.site or barcode.site,
        project=source.project or barcode.project,
        sample_type=source.sample_type or barcode.sample_type,
        md5=source.md5,
        preparation=source.preparation or barcode.preparation,
    )


def _add_sums(slide: Slide, path: Path, series: str, is_whole: bool) -> Slide:
    """The slide with the sum of its samples, and of all its bytes where that is wanted."""
    try:
        slide = replace(slide, sampled_sha256=sample_slide(path, series))
        return replace(slide, sha256=hash_slide(path, series)) if is_whole else slide
    except OSError as error:
        raise SlideOpenError(f"cannot be read: {error.strerror}") from error


def _require_whole(path: Path) -> None:
    try:
        if path.is_file():
            refuse_unbounded(path)
        missing = what_is_missing(path)
        unwritten = "" if missing else what_is_unwritten(path)
    except OSError as error:
        raise SlideOpenError(f"cannot be read: {error.strerror}") from error
    if missing:
        raise SlideOpenError(f"the file is cut off: {missing}; fetch it again")
    if unwritten:
        raise SlideOpenError(
            f"the file is not whole: {unwritten}; is it still being copied? If not, fetch it again"
        )


class ScanStage(Stage[SlideEntry]):
    """Open every slide once."""

    name = label = STAGE
    kind = DatasetKind.SLIDES
    packages = ("tifffile", "imagecodecs")
    work = staticmethod(scan_slide)

    def __init__(self, dataset: Dataset, config: ScanConfig) -> None:
        super().__init__(dataset)
        self.config = config
        self.search = SlideSearch(config.id_from)
        self.search.add_inputs(config.inputs)
        self.terms = merge_terms(read_slide_terms(config.terms), self.search.terms)
        self.before: dict[str, Slide] = {}
        self.claimed: dict[str, Slide] = {}
        self._read_known()
        self.passed_over = self.search.folders.describe_passed()
        if not self.sources:
            there = f"; there: {'; '.join(self.passed_over)}" if self.passed_over else ""
            raise UserError(
                f"no slides in {', '.join(config.inputs)}: expected files ending in .svs, .tiff, "
                f".ndpi, .mrxs, .dcm or the like, or a CSV with a path column{there}"
            )

    def _read_known(self) -> None:
        """Give every slide its id, by the ids that the dataset's slides have."""
        known_before = self.before, self.claimed
        lines = Ledger.read(self.dataset, STAGE).lines
        self.before = {slide.slide_id: slide for slide in known_slides(lines)}
        self.claimed = claimed_slides(lines)
        if known_before == (self.before, self.claimed) and known_before != ({}, {}):
            return
        known = KnownSlides([] if self.config.replace else (self.claimed | self.before).values())
        self.sources = [
            _refuse_other_file(entry, known)
            for entry in self.search.entries(known.keep_id, known.is_known)
        ]

    def claim_items(self) -> None:
        """Claim the ids of new slides, so that no scan at the same time gives them to others."""
        with hold_claim(self.dataset, SLIDES, STAGE):
            self._read_known()
            new = {
                entry.slide_id: (entry.location, *_bytes_and_time(entry))
                for entry in self.sources
                if not entry.taken_by and self._holder_of(entry.slide_id) != entry.location
            }
            if new:
                line = Entry("ids", "pruned", "", scope=IDS_SCOPE, values={"ids": new})
                with Run(self.dataset, STAGE, stage_versions()) as run:
                    run.append([line])

    def _holder_of(self, slide_id: str) -> str:
        """The path or address of the slide that has the id, or has claimed it; '' for none."""
        holder = self.before.get(slide_id) or self.claimed.get(slide_id)
        return holder.path if holder else ""

    def stated_terms(self) -> tuple[Terms, ...] | None:
        """Those of --terms and of the tables' columns, beside those of slides that stay."""
        others = self.before.keys() - {entry.slide_id for entry in self.sources}
        return stated_terms(self.dataset, STAGE, self.terms, others_stay=bool(others))

    def identity_claims(self) -> dict[str, object]:
        """Resolution, grid and seed of the tiles to come."""
        return self.config.identity()

    def list_items(self) -> list[SlideEntry]:
        """The slides that were named."""
        return self.sources

    def item_fingerprint(self, item: SlideEntry) -> str:
        """Of the slide's file, its row of a table and the configuration."""
        return _source_fingerprint(item, self.config)

    def make_task(
        self, item: SlideEntry, fingerprint: str, missing: Missing, run_id: str
    ) -> SlideTask:
        """Open one slide; of one whose worker dies, what was known before is journalled."""
        scratch = str(self.dataset.staging_dir(run_id))
        state = _bytes_and_time(item)
        known = self.before.get(item.slide_id)
        is_alike = known is not None and (known.bytes, known.mtime_ns) == state
        before = known.sampled_sha256 if known and (is_alike or item.uri) else ""
        return SlideTask(
            item.slide_id, fingerprint, (item, self.config, fingerprint, scratch, before),
            state[0], values=slide_values(_slide_before_opening(item)),
        )  # fmt: skip

    def after_tasks(self, runs: Sequence[Run], summary: Summary, engine: EngineConfig) -> None:
        """Write slides.parquet; the elements of a job array leave it to one more scan."""
        refused = {slide_id for slide_id, _ in (*summary.rejected, *summary.failed)}
        if engine.is_part:
            print_line(
                f"{self.output_path} is written by one more `scan`, without --array, at the end"
            )
        else:
            rows = record_slides(self.dataset, runs[0], summary)
            if replaced := _list_replaced(self.before, rows):
                summary.add_closing(
                    f"{STAGE}: another file than before: {list_some(replaced, 5)}; run `tissue` "
                    "and `select` again before `tile`"
                )
            copies = describe_copies(rows.values())
            for line in [*([copies] if copies else []), *_list_joined(rows.values())]:
                summary.add_closing(f"{STAGE}: {line}")
            if len(refused) == len(self.sources):
                summary.fail(
                    f"none of the {len(refused):,} slides can be used: see the reasons above"
                )
        if self.passed_over:
            if summary.done_slides or refused:
                runs[0].log_event("not taken", what=self.passed_over)
            summary.add_closing(f"{STAGE}: not taken:", *(f"  {line}" for line in self.passed_over))

    @property
    def output_path(self) -> Path:
        """slides.parquet."""
        return self.dataset.slides_file


def scan(dataset: Dataset, config: ScanConfig, engine: EngineConfig) -> int:
    """Scan slides into the dataset; returns the exit status (1 if any slide failed)."""
    return run_stage(ScanStage(dataset, config), engine)
