"""The `scan` stage: open every slide once, record what it is in slides.parquet."""

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from common.console import print_line
from common.errors import UserError
from common.redact import redact_secrets
from pipeline.dataset import (
    Dataset,
    DatasetKind,
    Entry,
    Ledger,
    Missing,
    Run,
    Slide,
    fingerprint_of,
    write_slides,
)
from pipeline.dataset.journal import Outcome
from pipeline.run.stage import Stage, run_stage
from pipeline.run.summary import Summary
from pipeline.run.tasks import SlideTask
from pipeline.run.workers import EngineConfig
from pipeline.slides.barcode import Barcode, parse_barcode
from pipeline.slides.config import ScanConfig
from pipeline.slides.describe import describe_slide
from pipeline.slides.entries import SlideEntry, find_slides
from pipeline.slides.reader import SlideOpenError, SlideReadError
from pipeline.slides.resolution import ResolutionError
from pipeline.slides.staging import StageInError, local_slide
from pipeline.slides.tiff_extent import what_is_missing

STAGE, VERSION = "scan", 5
TABLE_SCOPE = "table"
"""Scope of the journal line that names slides.parquet."""
_HASH_CHUNK = 1 << 22


def record_slides(dataset: Dataset, run: Run, summary: Summary) -> None:
    """Write slides.parquet from the stage's journals, if it does not say the same already."""
    # From all journals, not from this run: array elements and earlier runs scanned other slides.
    ledger = Ledger.read(dataset, STAGE)
    rows = {
        slide_id: _slide_of_entry(entry)
        for slide_id in ledger[""]
        for entry in ledger[""].entries(slide_id)
    }
    fingerprint = fingerprint_of(rows=[asdict(rows[key]) for key in sorted(rows)])
    name = dataset.slides_file.name
    if ledger[TABLE_SCOPE].done(name, fingerprint) is None:
        record = write_slides(dataset, run.run_id, rows.values())
        run.append([Entry(name, "done", fingerprint, scope=TABLE_SCOPE, files=(record,))])
        summary.files, summary.bytes = 1, record.bytes


def _slide_of_entry(entry: Entry) -> Slide:
    """The slide of a journal line; one whose worker died has only what was known before."""
    values = dict(entry.values)
    values["levels"] = tuple(map(tuple, values.get("levels", ())))
    for key in ("levels_left_out", "notes"):
        values[key] = tuple(values.get(key, ()))
    values["reason"] = "" if entry.outcome == "done" else redact_secrets(entry.reason)
    if entry.outcome == "failed":
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
    return (source.bytes, 0) if source.uri else _file_state(source.path)


def _source_fingerprint(source: SlideEntry, config: ScanConfig) -> str:
    size, mtime_ns = _bytes_and_time(source)
    row = {key: str(value) for key, value in asdict(source).items()}
    return fingerprint_of(
        stage=STAGE, version=VERSION, row=row, bytes=size, mtime=mtime_ns, **config.row_parameters()
    )


def _file_state(path: Path) -> tuple[int, int]:
    """Bytes and newest modification time of a slide; of all its files where it is a folder."""
    try:
        files = [f for f in path.iterdir() if f.is_file()] if path.is_dir() else [path]
        stats = [file.stat() for file in files]
    except OSError:
        return 0, 0
    return sum(s.st_size for s in stats), max((s.st_mtime_ns for s in stats), default=0)


def scan_slide(
    source: SlideEntry, config: ScanConfig, fingerprint: str, scratch: str
) -> list[Entry]:
    """Open one slide and describe it; every way to fail becomes an entry with a reason.

    What is recorded: µm per px, sizes in level-0 px, bytes of the file.
    """
    slide, why = _slide_before_opening(source), ""
    try:
        if source.taken_by:
            raise SlideOpenError(
                f"{source.location} has the name of {source.taken_by}; rename one of them, "
                "or give a CSV with a slide_id column"
            )
        with local_slide(slide, config.stage_in, Path(scratch)) as path:
            if source.uri:
                slide = replace(slide, bytes=_file_state(path)[0])
            # The sum before anything is read from it: it is of the file also where that is damaged.
            if config.sha256:
                slide = replace(slide, sha256=_hash_slide(path))
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


def _require_whole(path: Path) -> None:
    try:
        missing = what_is_missing(path)
    except OSError as error:
        raise SlideOpenError(f"cannot be read: {error.strerror}") from error
    if missing:
        raise SlideOpenError(f"the file is cut off: {missing}; fetch it again")


def _hash_slide(path: Path) -> str:
    sha = hashlib.sha256()
    # A DICOM or MIRAX slide is a folder: its files in the order of their names.
    files: Sequence[Path] = sorted(path.iterdir()) if path.is_dir() else [path]
    for file in files:
        with file.open("rb") as data:
            while chunk := data.read(_HASH_CHUNK):
                sha.update(chunk)
    return sha.hexdigest()


class ScanStage(Stage[SlideEntry]):
    """Open every slide once."""

    name = label = STAGE
    kind = DatasetKind.SLIDES
    packages = ("tifffile", "imagecodecs")
    work = staticmethod(scan_slide)

    def __init__(self, dataset: Dataset, config: ScanConfig) -> None:
        super().__init__(dataset)
        self.config = config
        self.sources = find_slides(config.inputs)
        if not self.sources:
            raise UserError(
                f"no slides in {', '.join(config.inputs)}: expected files ending in .svs, .tiff, "
                ".ndpi, .mrxs, .dcm or the like, or a CSV with a path column"
            )

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
        return SlideTask(
            item.slide_id, fingerprint, (item, self.config, fingerprint, scratch),
            _bytes_and_time(item)[0], values=slide_values(_slide_before_opening(item)),
        )  # fmt: skip

    def after_tasks(self, runs: Sequence[Run], summary: Summary, engine: EngineConfig) -> None:
        """Write slides.parquet; the elements of a job array leave it to one more scan."""
        if engine.is_part:
            print_line(
                f"{self.output_path} is written by one more `scan`, without --array, at the end"
            )
        else:
            record_slides(self.dataset, runs[0], summary)

    @property
    def output_path(self) -> Path:
        """slides.parquet."""
        return self.dataset.slides_file


def scan(dataset: Dataset, config: ScanConfig, engine: EngineConfig) -> int:
    """Scan slides into the dataset; returns the exit status (1 if any slide failed)."""
    return run_stage(ScanStage(dataset, config), engine)
