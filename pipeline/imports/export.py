"""`geojson`: masks and tiles of slides as GeoJSON files that QuPath opens."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from common.console import open_meter, print_line
from common.errors import UserError
from common.files import read_regular, write_bytes
from common.pictures import PictureSizeError, check_data
from common.text import list_some
from pipeline.dataset import (
    Dataset,
    Entry,
    FileRecord,
    Ledger,
    Slide,
    read_candidates,
    read_selection,
)
from pipeline.dataset.lineage import SLIDE, is_other_file
from pipeline.imports.config import CoordinatesExport, Frame
from pipeline.imports.coordinates import dataset_frames
from pipeline.imports.frames import inner_bounds, with_bounds
from pipeline.imports.geojson import encode_features, mask_features, tile_features
from pipeline.run.drain import run_tasks
from pipeline.run.summary import Summary, report_summary
from pipeline.run.tasks import SlideTask
from pipeline.run.workers import EngineConfig
from pipeline.tiles.stage import drawn_from
from pipeline.tissue.stage import STAGE as TISSUE
from pipeline.tissue.stage import candidates_origin, is_same_origin, usable_slides


@dataclass(frozen=True)
class SlideExport:
    """A slide to write: level-0 pixels per mask pixel (0: no mask), ranks and size of its tiles.

    `ranks` is int64 [n], None without tiles; `size` is a tile's side in level-0 pixels. Written
    coordinates count from `corner` (x, y), level-0 px; `frame` names it where the slide has two.
    `former` says why mask or ranks are of a former state of the slide, '' where they are not.
    """

    slide_id: str
    scale: float
    ranks: npt.NDArray[np.int64] | None = None
    size: float = 0.0
    corner: tuple[int, int] = (0, 0)
    frame: str = ""
    former: str = ""


def export_geojson(dataset: Dataset, config: CoordinatesExport, engine: EngineConfig) -> int:
    """Write `<slide_id>.geojson` for every slide with a mask or tiles; returns the exit status."""
    out = (config.out or dataset.root / "geojson").absolute()
    dataset.refuse_linked_folders(out / "slide.geojson")
    exports = plan_exports(dataset, config)
    if not exports:
        raise UserError(
            f"{dataset.root} has no masks to export"
            + ("" if config.tiles else "; its tiles alone: --tiles")
        )
    tasks = [SlideTask(e.slide_id, "", (str(dataset.root), e, str(out))) for e in exports]
    summary = Summary("geojson")

    def add_entries(entries: list[Entry]) -> None:
        for entry in entries:
            summary.add_entry(entry)

    with open_meter("geojson", len(tasks), "slides") as progress:
        run_tasks(export_slide, tasks, engine, add_entries, progress)
        summary.seconds = progress.seconds
    _report_frame(exports)
    return report_summary(summary, out)


def plan_exports(dataset: Dataset, config: CoordinatesExport) -> list[SlideExport]:
    """What to write of each slide that has a mask, or tiles that are wanted."""
    ledger = Ledger.read(dataset, TISSUE)[""]
    slides = [slide for slide in usable_slides(dataset) if ledger.entries(slide.slide_id)]
    # A slide's latest entry says whether it has a mask, and how many candidates.
    entries = {slide.slide_id: ledger.entries(slide.slide_id)[-1] for slide in slides}
    exports = []
    for slide in slides:
        entry = entries[slide.slide_id]
        mask = dataset.relative_path(dataset.mask_file(slide.slide_id))
        has_mask = any(record.path == mask for record in entry.files)
        scale = entry.values["um_per_px"] / float(slide.mpp or 1) if has_mask else 0.0
        export = SlideExport(slide.slide_id, scale)
        exports.append(replace(export, **_export_frame(slide, config.frame)))
    # Imported pictures have no place on a slide, so that their corners would mean nothing.
    if config.tiles or config.selections:
        if any(not slide.levels for slide in slides):
            raise UserError(f"{dataset.root} has imported tiles, which have no slide to be on")
        sizes = dataset_frames(dataset, slides).size.tolist()
        ranks = _tile_ranks(dataset, config, entries)
        exports = [
            replace(export, ranks=ranks.get(export.slide_id), size=size)
            for export, size in zip(exports, sizes, strict=True)
        ]
    former = _find_former(dataset, config, {slide.slide_id: slide for slide in slides}, entries)
    return [
        replace(export, former=former.get(export.slide_id, ""))
        for export in exports
        if export.scale or export.ranks is not None
    ]


def _find_former(
    dataset: Dataset, config: CoordinatesExport, slides: Mapping[str, Slide],
    entries: Mapping[str, Entry],
) -> dict[str, str]:  # fmt: skip
    """The slides whose mask, or whose ranks in a selection, are of a former state, and why."""
    former = {
        slide_id: "its mask and candidates are of another file than the slide is now: run `tissue`"
        for slide_id, entry in entries.items()
        if is_other_file(slides[slide_id], entry.values.get(SLIDE))
    }
    for name, origins in drawn_from(dataset, config.selections):
        for slide_id, origin in origins.items():
            entry = entries.get(slide_id)
            if entry and not is_same_origin(origin, candidates_origin(slides[slide_id], entry)):
                former.setdefault(
                    slide_id,
                    f"selection '{name}' was drawn from another file or other candidates than the "
                    "slide's as they are now: `select` again",
                )
    return former


def _export_frame(slide: Slide, frame: Frame) -> dict[str, Any]:
    """Corner and frame of what is written for the slide: QuPath's, unless another is requested."""
    if frame == "canvas" and slide.bounds is None:
        return {}
    bounds = inner_bounds(with_bounds(slide))
    if bounds is None:
        return {}
    if frame == "canvas":
        return {"frame": "canvas"}
    return {"corner": bounds[:2], "frame": "bounds"}


def _report_frame(exports: Sequence[SlideExport]) -> None:
    """Say whose coordinates do not count from the corner of the whole slide."""
    shifted = [e.slide_id for e in exports if e.frame == "bounds"]
    if shifted:
        print_line(
            f"geojson: coordinates of {len(shifted):,} slides count from the corner of the scanned "
            f"area, as QuPath shows it (--frame canvas: from that of the whole slide): "
            f"{list_some(shifted)}"
        )


def _tile_ranks(
    dataset: Dataset, config: CoordinatesExport, entries: Mapping[str, Entry]
) -> dict[str, npt.NDArray[np.int64]]:
    """By slide, the ranks of all candidates, or of those that are selected."""
    if not config.selections:
        return {
            slide_id: np.arange(entry.counts["candidate tiles"], dtype=np.int64)
            for slide_id, entry in entries.items()
            if entry.outcome == "done"
        }
    chosen: dict[str, list[npt.NDArray[np.int32]]] = {}
    for name in config.selections:
        for slide_id, ranks in read_selection(dataset, name).items():
            chosen.setdefault(slide_id, []).append(ranks)
    return {s: np.unique(np.concatenate(parts)).astype(np.int64) for s, parts in chosen.items()}


def export_slide(root: str, export: SlideExport, out: str) -> list[Entry]:
    """Write one slide's file; the same dataset gives the same bytes."""
    dataset, path = Dataset(Path(root)), Path(out) / f"{export.slide_id}.geojson"
    regions, tiles = [], []
    try:
        if export.former:
            raise UserError(export.former)
        if export.scale:
            mask = _read_mask(dataset, export.slide_id)
            regions = mask_features(mask, export.scale, export.corner)
        if export.ranks is not None:
            table = read_candidates(dataset, export.slide_id).take(export.ranks)
            x = table["x_level0"].to_numpy() - export.corner[0]
            y = table["y_level0"].to_numpy() - export.corner[1]
            tiles = tile_features(export.ranks, x, y, export.size)
        data = encode_features([*regions, *tiles], export.frame)
        dataset.refuse_linked_folders(path)
        write_bytes(path, data)
    except UserError as error:
        return [Entry(export.slide_id, "failed", "", str(error))]
    counts = {"regions": len(regions), "tiles": len(tiles)}
    record = FileRecord(str(path), len(data), "")
    return [Entry(export.slide_id, "done", "", files=(record,), counts=counts)]


def _read_mask(dataset: Dataset, slide_id: str) -> npt.NDArray[np.uint8]:
    path = dataset.mask_file(slide_id)
    try:
        data = read_regular(path)
        check_data(data, ("PNG",), is_mask=True)
        mask = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    except (OSError, PictureSizeError, cv2.error):
        mask = None
    if mask is None or mask.ndim != 2:
        raise UserError(
            f"{path} cannot be read as a mask; run `pipeline verify --repair`, then `tissue` (or "
            "the `import` that made it)"
        )
    return np.asarray(mask, np.uint8)
