"""`geojson`: masks and tiles of slides as GeoJSON files that QuPath opens."""

import os
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt

from common.console import meter
from common.errors import UserError
from pipeline.dataset import (
    Dataset,
    Entry,
    FileRecord,
    Ledger,
    ScopeLedger,
    Slide,
    read_candidates,
    read_selection,
)
from pipeline.imports.coordinates import dataset_frames
from pipeline.imports.geojson import encode, mask_features, tile_features
from pipeline.run.drain import run_tasks
from pipeline.run.summary import Summary, report_summary
from pipeline.run.tasks import SlideTask
from pipeline.run.workers import EngineConfig
from pipeline.tissue.stage import STAGE as TISSUE
from pipeline.tissue.stage import usable_slides


@dataclass(frozen=True)
class ExportConfig:
    """Where to write, and whether tiles go with the masks (of selections, where named)."""

    out: Path | None = None
    tiles: bool = False
    selections: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Work:
    """One slide: level-0 pixels a mask pixel (0: no mask), and its tiles' ranks and size."""

    slide_id: str
    scale: float
    ranks: npt.NDArray[np.int64] | None = None
    size: float = 0.0


def export_geojson(dataset: Dataset, config: ExportConfig, engine: EngineConfig) -> int:
    """Write `<slide_id>.geojson` for every slide with a mask or tiles; returns the exit status."""
    out = (config.out or dataset.root / "geojson").absolute()
    works = _works(dataset, config)
    if not works:
        raise UserError(
            f"{dataset.root} has no masks to export"
            + ("" if config.tiles else "; its tiles alone: --tiles")
        )
    tasks = [SlideTask(w.slide_id, "", (str(dataset.root), w, str(out))) for w in works]
    summary = Summary("geojson")

    def count(entries: list[Entry]) -> None:
        for entry in entries:
            summary.add(entry)

    with meter("geojson", len(tasks), "slides") as progress:
        run_tasks(export_slide, tasks, engine, count, progress)
        summary.seconds = progress.seconds
    return report_summary(summary, out)


def _works(dataset: Dataset, config: ExportConfig) -> list[_Work]:
    known = Ledger.read(dataset, TISSUE)[""]
    slides = [slide for slide in usable_slides(dataset) if known.entries(slide.slide_id)]
    works = []
    for slide in slides:
        entry = known.entries(slide.slide_id)[-1]
        mask = dataset.relative(dataset.mask_file(slide.slide_id))
        has_mask = any(record.path == mask for record in entry.files)
        scale = entry.values["um_per_px"] / float(slide.mpp or 1) if has_mask else 0.0
        works.append(_Work(slide.slide_id, scale))
    if config.tiles or config.selections:
        works = _with_tiles(dataset, config, slides, works, known)
    return [work for work in works if work.scale or work.ranks is not None]


def _with_tiles(
    dataset: Dataset,
    config: ExportConfig,
    slides: list[Slide],
    works: list[_Work],
    known: ScopeLedger,
) -> list[_Work]:
    """The slides' work with the ranks of all candidates, or of those that are selected."""
    if any(not slide.levels for slide in slides):
        raise UserError(f"{dataset.root} holds imported tiles, which have no slide to lie on")
    sizes = dataset_frames(dataset, slides).size
    chosen: dict[str, list[npt.NDArray[np.int32]]] = {}
    for name in config.selections:
        for slide_id, own in read_selection(dataset, name).items():
            chosen.setdefault(slide_id, []).append(own)
    found = []
    for work, size in zip(works, sizes.tolist(), strict=True):
        entry = known.entries(work.slide_id)[-1]
        ranks: npt.NDArray[np.int64] | None = None
        if work.slide_id in chosen:
            ranks = np.unique(np.concatenate(chosen[work.slide_id])).astype(np.int64)
        elif not config.selections and entry.outcome == "done":
            ranks = np.arange(entry.counts["candidate tiles"], dtype=np.int64)
        found.append(replace(work, ranks=ranks, size=size))
    return found


def export_slide(root: str, work: _Work, out: str) -> list[Entry]:
    """Write one slide's file; the same dataset gives the same bytes."""
    dataset = Dataset(Path(root))
    try:
        regions = (
            mask_features(_read_mask(dataset, work.slide_id), work.scale) if work.scale else []
        )
        tiles = []
        if work.ranks is not None:
            table = read_candidates(dataset, work.slide_id).take(work.ranks)
            x, y = table["x_level0"].to_numpy(), table["y_level0"].to_numpy()
            tiles = tile_features(work.ranks, x, y, work.size)
        record = _write(Path(out) / f"{work.slide_id}.geojson", encode([*regions, *tiles]))
    except UserError as error:
        return [Entry(work.slide_id, "failed", "", str(error))]
    counts = {"regions": len(regions), "tiles": len(tiles)}
    return [Entry(work.slide_id, "done", "", files=(record,), counts=counts)]


def _read_mask(dataset: Dataset, slide_id: str) -> npt.NDArray[np.uint8]:
    path = dataset.mask_file(slide_id)
    try:
        mask = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    except cv2.error:
        mask = None
    if mask is None or mask.ndim != 2:
        raise UserError(f"{path} cannot be read as a mask; run the stage that made it again")
    return np.asarray(mask, np.uint8)


def _write(path: Path, data: bytes) -> FileRecord:
    """Write beside, then rename: nothing half-written under the final name."""
    staged = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        staged.write_bytes(data)
        staged.replace(path)
    except OSError as error:
        staged.unlink(missing_ok=True)
        raise UserError(f"cannot write {path}: {error.strerror}; free space or choose --out") from (
            error
        )
    return FileRecord(str(path), len(data), "")
