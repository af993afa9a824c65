"""The `scan` stage: open every slide once, record what it is in slides.parquet."""

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from model.errors import UserError
from pipeline.dataset import (
    Dataset,
    Entry,
    Run,
    Slide,
    claim_identity,
    fingerprint,
    read_journal,
    read_slides,
    standing,
    write_slides,
)
from pipeline.engine import EngineConfig, SlideTask
from pipeline.grid import RESERVE_PER_CANDIDATES
from pipeline.slides.barcode import parse_barcode
from pipeline.slides.open import Source, best_reader, find_sources, open_slide
from pipeline.slides.reader import SlideOpenError, SlideReader, SlideReadError
from pipeline.slides.resolution import ResolutionError, plan_read, resolve_mpp
from pipeline.stage import Summary, report_summary, run_stage, stage_versions

STAGE, VERSION = "scan", 2
_PROBE_PX = 64
_HASH_CHUNK = 1 << 22


@dataclass(frozen=True)
class ScanConfig:
    """What to scan and at which resolution tiles will be cut."""

    inputs: tuple[str, ...]
    mpp: float = 0.5
    mpp_tolerance: float = 0.02
    tile_px: int = 224
    seed: int = 0
    assume_mpp: float | None = None
    reader: str = "auto"
    sha256: bool = False

    def identity(self) -> dict[str, Any]:
        """The values that make it this dataset and no other."""
        return {
            "mpp": self.mpp,
            "mpp_tolerance": self.mpp_tolerance,
            "tile_px": self.tile_px,
            "grid": "adjacent",
            "seed": self.seed,
            "reserve_per_candidates": RESERVE_PER_CANDIDATES,
        }

    def parameters(self) -> dict[str, Any]:
        """What a scanned row depends on beside the slide's bytes."""
        return {"assume_mpp": self.assume_mpp, "reader": self.reader, **self.identity()}


def scan(dataset: Dataset, config: ScanConfig, engine: EngineConfig) -> int:
    """Scan slides into the dataset; returns the exit status (1 if any slide failed)."""
    sources = find_sources(config.inputs)
    if not sources:
        raise UserError(
            f"no slides in {', '.join(config.inputs)}: expected files ending in .svs, .tiff, "
            ".ndpi, .mrxs, .dcm or the like, or a CSV with a path column"
        )
    versions = stage_versions("tifffile", "imagecodecs")
    claim_identity(dataset, config.identity(), stage=STAGE, versions=versions)
    known = standing(read_journal(dataset, STAGE))
    summary = Summary(STAGE)
    tasks = []
    for source in sources:
        mark = _source_fingerprint(source, config)
        stood = [e for e in known.get(source.slide_id, []) if e.fingerprint == mark]
        if stood and stood[-1].outcome != "failed":
            summary.skipped += 1
            if stood[-1].outcome == "rejected":
                summary.rejected.append((source.slide_id, stood[-1].reason))
        else:
            tasks.append(SlideTask(source.slide_id, mark, (source, config, mark), _size(source)))
    with Run(dataset, STAGE, versions) as run:
        run_stage(run, scan_slide, tasks, engine, summary)
        _write_slides(dataset, run, summary)
    return report_summary(summary, dataset.slides_file)


def _write_slides(dataset: Dataset, run: Run, summary: Summary) -> None:
    rows = {
        slide_id: Slide(**entry.values | {"levels": tuple(map(tuple, entry.values["levels"]))})
        for slide_id, entries in standing(read_journal(dataset, STAGE)).items()
        for entry in entries
    }
    if not dataset.slides_file.exists() or read_slides(dataset) != [rows[k] for k in sorted(rows)]:
        record = write_slides(dataset, run.run_id, rows.values())
        summary.files, summary.bytes = 1, record.bytes


def _size(source: Source) -> float:
    try:
        return float(source.path.stat().st_size)
    except OSError:
        return 0.0


def _source_fingerprint(source: Source, config: ScanConfig) -> str:
    size, mtime_ns = _file_state(source.path)
    row = {key: str(value) for key, value in asdict(source).items()}
    return fingerprint(
        stage=STAGE, version=VERSION, row=row, bytes=size, mtime=mtime_ns, **config.parameters()
    )


def _file_state(path: Path) -> tuple[int, int]:
    """Bytes and newest modification time of a slide; of all its files where it is a folder."""
    try:
        files = [f for f in path.iterdir() if f.is_file()] if path.is_dir() else [path]
        stats = [file.stat() for file in files]
    except OSError:
        return 0, 0
    return sum(s.st_size for s in stats), max((s.st_mtime_ns for s in stats), default=0)


def scan_slide(source: Source, config: ScanConfig, mark: str) -> list[Entry]:
    """Open one slide and describe it; every way to fail becomes an entry with a reason."""
    size, mtime_ns = _file_state(source.path)
    barcode = parse_barcode(source.slide_id)
    slide = Slide(
        source.slide_id,
        str(source.path),
        bytes=size,
        mtime_ns=mtime_ns,
        patient=source.patient or (barcode.patient if barcode else ""),
        site=source.site or (barcode.site if barcode else ""),
        project=source.project or (barcode.project if barcode else ""),
        sample_type=source.sample_type or (barcode.sample_type if barcode else ""),
    )
    note = ""
    try:
        if source.taken_by:
            raise SlideOpenError(
                f"{source.path} bears the name of {source.taken_by}; rename one of them, "
                "or give a CSV with a slide_id column"
            )
        if config.sha256:
            slide = replace(slide, sha256=_sha256(source.path))
        reader, note = _open(source.path, config.reader)
        with reader:
            _probe(reader)
            slide = _described(slide, reader, source, config)
    except ResolutionError as error:
        slide = replace(slide, status="rejected", reason=str(error))
    except (SlideOpenError, SlideReadError, OSError) as error:
        slide = replace(slide, status="failed", reason=str(error))
    outcome = {"ok": "done"}.get(slide.status, slide.status)
    values = asdict(slide)
    reason = slide.reason or note
    return [Entry(slide.slide_id, outcome, mark, reason, values=values)]  # type: ignore[arg-type]


def _open(path: Path, name: str) -> tuple[SlideReader, str]:
    """The slide with the reader that was asked for, and why it is not the native one."""
    if name != "auto":
        return open_slide(path, name), ""
    reader, why = best_reader(path)
    return reader, f"read by {reader.name}: {why}" if why else ""


def _described(slide: Slide, reader: SlideReader, source: Source, config: ScanConfig) -> Slide:
    base = reader.levels[0]
    slide = replace(
        slide,
        reader=reader.name,
        vendor=reader.vendor,
        codec=reader.codec,
        width=base.width,
        height=base.height,
        levels=tuple((v.width, v.height, v.downsample) for v in reader.levels),
    )
    try:
        mpp = resolve_mpp(reader.resolution, table=source.mpp, assumed=config.assume_mpp)
        slide = replace(slide, mpp=mpp.value, mpp_source=mpp.source)
        plan = plan_read(reader.levels, mpp.value, config.mpp, config.mpp_tolerance, config.tile_px)
    except ResolutionError as error:
        return replace(slide, status="rejected", reason=str(error))
    needed = plan.window * plan.downsample
    if min(base.width, base.height) < needed - 0.5:
        reason = (
            f"{base.width}x{base.height} px is smaller than one tile ({needed:.0f} px at level 0)"
        )
        return replace(slide, status="rejected", reason=reason)
    return slide


def _probe(reader: SlideReader) -> None:
    """Read the middle and the corners of every level: some files open and then cannot be read."""
    for index, level in enumerate(reader.levels):
        width, height = min(_PROBE_PX, level.width), min(_PROBE_PX, level.height)
        right, bottom = level.width - width, level.height - height
        corners = {(0, 0), (right, 0), (0, bottom), (right, bottom), (right // 2, bottom // 2)}
        for x, y in sorted(corners):
            reader.read(index, x, y, width, height)


def _sha256(path: Path) -> str:
    sha = hashlib.sha256()
    files: Sequence[Path] = sorted(path.iterdir()) if path.is_dir() else [path]
    for file in files:
        with file.open("rb") as data:
            while chunk := data.read(_HASH_CHUNK):
                sha.update(chunk)
    return sha.hexdigest()
