"""The `tissue` stage: a mask, an overlay and the ranked candidates of every slide."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from common.errors import UserError
from pipeline.dataset import (
    CANDIDATES_SCHEMA,
    Dataset,
    DatasetKind,
    Entry,
    FileRecord,
    Missing,
    Slide,
    candidate_count,
    commit_bytes,
    fingerprint_of,
    read_identity,
    read_slides,
    write_candidates,
)
from pipeline.dataset.grid import grid_positions, rank_order
from pipeline.dataset.journal import Outcome
from pipeline.run.stage import Stage, run_stage
from pipeline.run.tasks import SlideTask, collect_entries
from pipeline.run.workers import EngineConfig
from pipeline.slides.cost import overview_cost
from pipeline.slides.identity import recorded_state
from pipeline.slides.open import open_scanned
from pipeline.slides.reader import SlideReader
from pipeline.slides.region import read_overview
from pipeline.slides.resolution import ReadPlan, plan_read
from pipeline.slides.staging import local_slide
from pipeline.tissue.classes import CLASS_NAMES, TissueClass
from pipeline.tissue.colour import NotHematoxylinEosinError
from pipeline.tissue.config import TissueConfig
from pipeline.tissue.detect import Detection
from pipeline.tissue.detector import ClassicalDetector, Detector, detector_name, open_detector
from pipeline.tissue.focus import mark_out_of_focus, slide_patches
from pipeline.tissue.overlay import draw_overlay, draw_refused, encode_jpeg
from pipeline.tissue.verdict import Judgement, judge_tiles

STAGE, VERSION = "tissue", 2
_OVERLAY_PX, _OVERLAY_BYTES = 1600, 600_000
_GRID_KEYS = ("mpp", "mpp_tolerance", "tile_px", "grid", "seed")
_IDENTITY_KEYS = (*_GRID_KEYS, "detector", "min_tissue", "max_artifact")


def detector_identity(detector: Detector) -> dict[str, object]:
    """The detector's hash and, to be read, what was hashed."""
    parameters = detector.identity()
    return {"detector": fingerprint_of(**parameters), "detector_parameters": parameters}


def slide_key(slide: Slide) -> dict[str, object]:
    """What identifies a slide for the stages after scan: its bytes and how they are read."""
    key: dict[str, object] = {**slide.content_key, "mpp": slide.mpp, "reader": slide.reader}
    # Only where they say something: earlier releases knew neither.
    if slide.series:
        key["series"] = slide.series
    if slide.levels_left_out:
        key["levels_left_out"] = slide.levels_left_out
    return key


def tissue_fingerprint(slide: Slide, identity: dict[str, Any], source: str = "") -> str:
    """Fingerprint of a slide's mask and candidates.

    `source` is the sha256 of what was imported for this slide in place of detection (see
    `imported_source`).
    """
    values = {f"identity_{key}": identity[key] for key in _IDENTITY_KEYS if key in identity}
    if source:
        values["source"] = source
    return fingerprint_of(
        stage=STAGE, version=VERSION, slide_id=slide.slide_id, slide=slide_key(slide), **values
    )


def imported_source(entries: Iterable[Entry]) -> str:
    """What a slide's current candidates were imported from, '' where they were detected."""
    return next((str(e.values["source"]) for e in entries if "source" in e.values), "")


def is_lost(entries: Iterable[Entry], fingerprint: str) -> bool:
    """Whether a slide had this very result, for where the ledger has none that is done.

    Its files are missing or damaged, and `entries` are the slide's current lines.
    """
    return any(e.fingerprint == fingerprint and e.outcome != "failed" for e in entries)


def count_candidates(dataset: Dataset, slide_id: str, entry: Entry) -> int:
    """How many candidates a slide has, by its line of this stage, or by the table's footer.

    Raises `UserError` where the line does not say and the table cannot be read.
    """
    # From the journal: 100,000 Parquet footers on a shared file system take minutes.
    return entry.counts.get("candidate tiles") or candidate_count(dataset, slide_id)


def candidates_sha256(entry: Entry) -> str:
    """The sum of the candidates that a line of this stage names, '' where it names none."""
    written = [file.sha256 for file in entry.files if file.path.startswith("candidates/")]
    return written[0] if written else ""


def candidates_origin(slide: Slide, entry: Entry) -> str:
    """Which tissue a slide's ranks count, as two parts of 12 hex digits: its candidates, its bytes.

    A part is '' where it is not known. `entry` is the slide's current line.
    """
    return f"{candidates_sha256(entry)[:12]}.{slide.sampled_sha256[:12]}"


def is_same_origin(one: str, other: str) -> bool:
    """Whether nothing says that ranks of two origins are other places."""
    parts = zip(one.split("."), other.split("."), strict=False)
    return all(a == b or not a or not b for a, b in parts)


def usable_slides(dataset: Dataset) -> list[Slide]:
    """The slides that scan found fit for tiling."""
    slides = [slide for slide in read_slides(dataset) if slide.status == "ok"]
    if not slides:
        raise UserError(f"{dataset.slides_file} has no usable slide; see the reasons of `scan`")
    return slides


def tissue_slide(
    root: str, run_id: str, slide: Slide, config: TissueConfig, fingerprint: str
) -> list[Entry]:
    """Mask, overlay and candidates of one slide, on a worker."""
    dataset = Dataset(Path(root))

    def make_entry() -> Iterator[Entry]:
        detector = _same_detector(config.detector, read_identity(dataset)["detector"])
        yield record_tissue(dataset, run_id, slide, config, fingerprint, detector)

    return collect_entries(make_entry(), slide.slide_id, fingerprint)


def record_tissue(
    dataset: Dataset,
    run_id: str,
    slide: Slide,
    config: TissueConfig,
    fingerprint: str,
    detector: Detector,
) -> Entry:
    """Write mask uint8 [h, w], overlay and candidates of one slide, as the detector sees it.

    Of a slide that is no brightfield H&E only the picture.
    """
    # All that needs the slide's pixels, so that a slide that is staged in can go again.
    identity = read_identity(dataset)
    mpp = float(slide.mpp or 0)
    with (
        local_slide(slide, config.stage_in, dataset.staging_dir(run_id)) as path,
        open_scanned(slide, path) as reader,
    ):
        plan = plan_read(
            reader.levels, mpp, identity["mpp"], identity["mpp_tolerance"], identity["tile_px"]
        )
        overview, um_per_px = read_overview(reader, mpp, detector.um_per_px)
        picture, picture_um_per_px = _read_picture(reader, mpp, overview, um_per_px)
        try:
            detection = detector.detect(overview, um_per_px)
        except NotHematoxylinEosinError as error:
            return _refused_entry(dataset, run_id, slide, fingerprint, picture, str(error))
        detection = _with_focus(detector, detection, reader, mpp, um_per_px)
    # Mask and picture have different scales; the grid is in level-0 pixels until it meets them.
    grid = TileGrid.of_slide(slide, plan)
    judgement = grid.judge_tiles(detection.mask, um_per_px / mpp, config, detector)
    to_picture = mpp / picture_um_per_px
    overlay = draw_overlay(
        picture, detection.mask, grid.x * to_picture, grid.y * to_picture,
        grid.size_level0 * to_picture, judgement.verdict,
        _overlay_title(slide, detection, um_per_px),
    )  # fmt: skip
    files = _write_pictures(dataset, run_id, slide.slide_id, overlay, detection.mask)
    table = _candidates_table(identity["seed"], slide.slide_id, grid, judgement)
    files.append(write_candidates(dataset, run_id, slide.slide_id, table))
    counts = {"grid tiles": len(grid.x), "candidate tiles": table.num_rows}
    values = {
        "glass": detection.glass, "um_per_px": um_per_px, "plan": asdict(plan),
        "class_mm2": _class_areas(detection.mask, um_per_px), "tiles": judgement.count_verdicts(),
        "slide": recorded_state(slide),
    }  # fmt: skip
    # Only where they say something: most slides have even glass and no notes.
    if detection.glass_variation:
        values["glass_variation"] = round(detection.glass_variation, 3)
    if detection.notes:
        values["notes"] = detection.notes
    # Files are kept also where no tile is: the overlay shows why.
    outcome: Outcome = "done" if table.num_rows else "rejected"
    reason = "" if table.num_rows else _why_none(judgement)
    return Entry(
        slide.slide_id,
        outcome,
        fingerprint,
        reason,
        files=tuple(files),
        counts=counts,
        values=values,
    )


def _refused_entry(
    dataset: Dataset, run_id: str, slide: Slide, fingerprint: str, picture: npt.NDArray[np.uint8],
    reason: str,
) -> Entry:  # fmt: skip
    """The entry of a slide that is no H&E, with its picture: so that it can be checked."""
    files: tuple[FileRecord, ...] = ()
    if picture.size:
        jpeg = encode_jpeg(draw_refused(picture, f"{slide.slide_id}   {reason}"), _OVERLAY_BYTES)
        files = (commit_bytes(dataset, run_id, dataset.overlay_file(slide.slide_id), jpeg),)
    return Entry(slide.slide_id, "rejected", fingerprint, reason, files=files)


def _same_detector(name: str, expected: str) -> Detector:
    """The detector, refused where its file is no longer the one the stage began with."""
    detector = open_detector(name)
    if detector_identity(detector)["detector"] != expected:
        raise UserError(
            f"detector {name} is not the one this dataset was begun with; restore its files, "
            "or make another dataset"
        )
    return detector


def _refuse_earlier(dataset: Dataset, claims: Mapping[str, Any]) -> None:
    """Refuse a dataset whose tissue an earlier release of the same detector found."""
    begun = read_identity(dataset).get("detector_parameters")
    wanted = claims["detector_parameters"]
    before = str(begun.get("name", "")) if isinstance(begun, dict) else ""
    kind = str(wanted["name"]).rpartition("-")[0]
    if before != wanted["name"] and before.rpartition("-")[0] == kind:
        raise UserError(
            f"{dataset.identity_file}: tissue was found by detector {before}, and this release has "
            f"{wanted['name']}; this dataset goes on with `select`, `tile` and `cache`; for new or "
            "changed slides make another --dataset"
        )


def _with_focus(
    detector: Detector, detection: Detection, reader: SlideReader, mpp: float, um_per_px: float
) -> Detection:
    """The detection with blurred tissue marked; a learned detector knows its own classes."""
    if not isinstance(detector, ClassicalDetector):
        return detection
    patches = slide_patches(reader, mpp, detector.focus)
    if patches is None:
        return detection
    return replace(
        detection, mask=mark_out_of_focus(detection.mask, um_per_px, patches, detector.focus)
    )


def _class_areas(mask: npt.NDArray[np.uint8], um_per_px: float) -> dict[str, float]:
    """Area in mm² of each class that occurs, background left out."""
    pixels = np.bincount(mask.ravel(), minlength=len(TissueClass))
    return {
        CLASS_NAMES[value]: round(float(pixels[value]) * um_per_px**2 / 1e6, 4)
        for value in TissueClass
        if value != TissueClass.BACKGROUND and pixels[value]
    }


def _overlay_title(slide: Slide, detection: Detection, um_per_px: float) -> str:
    areas = _class_areas(detection.mask, um_per_px)
    parts = [f"{name} {area:.3g} mm2" for name, area in areas.items()] or ["nothing found"]
    glass = "/".join(f"{value:.0f}" for value in detection.glass)
    if detection.glass_variation:
        glass += f", varies by {detection.glass_variation:.0%}"
    title = f"{slide.slide_id}   {slide.mpp:.4g} mpp   {', '.join(parts)}   glass {glass}"
    return "\n".join((title, *detection.notes))


def _why_none(judgement: Judgement) -> str:
    """Why a slide has no candidate, from what became of its tiles."""
    refused = {
        name: count for name, count in judgement.count_verdicts().items() if name != "no tissue"
    }
    if not refused:
        return "no tile has enough tissue: an empty slide, or tissue too pale to be found"
    tally = ", ".join(f"{name} {count}" for name, count in refused.items())
    return f"no tile has enough tissue free of artifacts; tiles refused: {tally}"


@dataclass(frozen=True)
class TileGrid:
    """Tiles of a slide: corners float64 [n] and size in level-0 px."""

    x: npt.NDArray[np.float64]
    y: npt.NDArray[np.float64]
    size_level0: float

    @classmethod
    def of_slide(cls, slide: Slide, plan: ReadPlan) -> "TileGrid":
        """The grid of a slide whose tiles are read by that plan, in level-0 px."""
        size = plan.window * plan.downsample
        x, y = grid_positions(slide.width, slide.height, plan.stride_level0, size)
        return cls(x, y, size)

    def judge_tiles(
        self, mask: npt.NDArray[np.uint8], scale: float, config: TissueConfig, detector: Detector
    ) -> Judgement:
        """The verdict on each tile; `scale` is level-0 pixels per pixel of the mask."""
        return judge_tiles(
            mask, self.x / scale, self.y / scale, self.size_level0 / scale,
            min_tissue=config.min_tissue, max_artifact=config.max_artifact,
            experimental=detector.experimental,
        )  # fmt: skip


def _candidates_table(seed: int, slide_id: str, grid: TileGrid, judgement: Judgement) -> pa.Table:
    chosen = np.flatnonzero(judgement.kept)
    order = chosen[rank_order(seed, slide_id, grid.x[chosen], grid.y[chosen])]
    columns = [
        np.arange(len(order), dtype=np.int32),
        grid.x[order],
        grid.y[order],
        judgement.tissue[order],
        judgement.artifact[order],
    ]
    return pa.table([pa.array(column) for column in columns], schema=CANDIDATES_SCHEMA)


def _read_picture(
    reader: SlideReader, mpp: float, overview: npt.NDArray[np.uint8], um_per_px: float
) -> tuple[npt.NDArray[np.uint8], float]:
    """The slide at a size to look at: finer than the mask where the slide is small."""
    # A small slide's mask is a few pixels wide: too few to judge it by eye.
    longest_um = max(reader.levels[0].width, reader.levels[0].height) * mpp
    wanted = longest_um / _OVERLAY_PX
    if wanted >= um_per_px:
        return overview, um_per_px
    return read_overview(reader, mpp, max(mpp, wanted))


def _write_pictures(
    dataset: Dataset,
    run_id: str,
    slide_id: str,
    overlay: npt.NDArray[np.uint8],
    mask: npt.NDArray[np.uint8],
) -> list[FileRecord]:
    mask_png = cv2.imencode(".png", mask)[1].tobytes()
    jpeg = encode_jpeg(overlay, _OVERLAY_BYTES)
    return [
        commit_bytes(dataset, run_id, dataset.mask_file(slide_id), mask_png),
        commit_bytes(dataset, run_id, dataset.overlay_file(slide_id), jpeg),
    ]


class TissueStage(Stage[Slide]):
    """Detect tissue on every usable slide."""

    name = label = STAGE
    kind = DatasetKind.SLIDES
    rate_of = "candidate tiles"
    packages = ("onnxruntime",)
    work = staticmethod(tissue_slide)

    def __init__(self, dataset: Dataset, config: TissueConfig) -> None:
        super().__init__(dataset)
        self.config = replace(config, detector=detector_name(config.detector))
        self.um_per_px = open_detector(self.config.detector).um_per_px
        self.slides = usable_slides(dataset)

    def identity_claims(self) -> dict[str, object]:
        """The detector and its thresholds."""
        claims = self.config.identity()
        _refuse_earlier(self.dataset, claims)
        return claims

    def list_items(self) -> list[Slide]:
        """The slides that scan found fit for tiling."""
        return self.slides

    def item_fingerprint(self, item: Slide) -> str:
        """Of the slide and the detector."""
        return tissue_fingerprint(item, self.identity)

    def make_task(self, item: Slide, fingerprint: str, missing: Missing, run_id: str) -> SlideTask:
        """Mask, overlay and candidates of one slide."""
        arguments = (str(self.dataset.root), run_id, item, self.config, fingerprint)
        return SlideTask(item.slide_id, fingerprint, arguments, overview_cost(item, self.um_per_px))

    @property
    def output_path(self) -> Path:
        """The folder of masks and overlays."""
        return self.dataset.root / "tissue"


def tissue(dataset: Dataset, config: TissueConfig, engine: EngineConfig) -> int:
    """Detect tissue on every usable slide; returns the exit status."""
    return run_stage(TissueStage(dataset, config), engine)
