"""The `tissue` stage: a mask, an overlay and the ranked candidates of every slide."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from model.errors import UserError
from pipeline.dataset import (
    CANDIDATES_SCHEMA,
    Dataset,
    Entry,
    FileRecord,
    Run,
    Slide,
    claim_identity,
    commit_bytes,
    fingerprint,
    read_identity,
    read_journal,
    read_slides,
    standing,
    write_candidates,
)
from pipeline.engine import EngineConfig, SlideTask
from pipeline.grid import grid_positions, rank_order, window_means
from pipeline.slides.open import open_slide
from pipeline.slides.reader import SlideReader
from pipeline.slides.region import read_overview
from pipeline.slides.resolution import ReadPlan, plan_read
from pipeline.stage import Summary, report_summary, run_stage, stage_versions, stands
from pipeline.tissue.detect import (
    Detection,
    DetectorConfig,
    NotHematoxylinEosinError,
    TissueClass,
    detect_tissue,
)
from pipeline.tissue.overlay import draw_overlay

STAGE, VERSION = "tissue", 1
_JPEG_QUALITY = 88
_OVERLAY_PX = 1600
_GRID_KEYS = ("mpp", "mpp_tolerance", "tile_px", "grid", "seed")
_IDENTITY_KEYS = (*_GRID_KEYS, "detector", "min_tissue", "max_artifact")


@dataclass(frozen=True)
class TissueConfig:
    """Which tiles become candidates."""

    min_tissue: float = 0.5
    max_artifact: float = 0.1

    def identity(self) -> dict[str, Any]:
        """The values that make it this dataset and no other."""
        detector = DetectorConfig().as_dict()
        return {
            "detector": fingerprint(**detector),
            "detector_parameters": detector,
            "min_tissue": self.min_tissue,
            "max_artifact": self.max_artifact,
        }


def slide_key(slide: Slide) -> dict[str, Any]:
    """What identifies a slide for the stages after scan: its bytes and its resolution."""
    return {**slide.content_key, "mpp": slide.mpp, "reader": slide.reader}


def tissue_fingerprint(slide: Slide, identity: dict[str, Any]) -> str:
    """Fingerprint of a slide's mask and candidates."""
    values = {f"identity_{key}": identity[key] for key in _IDENTITY_KEYS if key in identity}
    return fingerprint(
        stage=STAGE, version=VERSION, slide_id=slide.slide_id, slide=slide_key(slide), **values
    )


def usable_slides(dataset: Dataset) -> list[Slide]:
    """The slides that scan found fit for tiling."""
    slides = [slide for slide in read_slides(dataset) if slide.status == "ok"]
    if not slides:
        raise UserError(f"{dataset.slides_file} holds no usable slide; see the reasons of `scan`")
    return slides


def tissue(dataset: Dataset, config: TissueConfig, engine: EngineConfig) -> int:
    """Detect tissue on every usable slide; returns the exit status."""
    versions = stage_versions()
    slides = usable_slides(dataset)
    identity = claim_identity(dataset, config.identity(), stage=STAGE, versions=versions)
    known = standing(read_journal(dataset, STAGE))
    summary = Summary(STAGE)
    tasks = []
    with Run(dataset, STAGE, versions) as run:
        for slide in slides:
            mark = tissue_fingerprint(slide, identity)
            stood = stands(dataset, known.get(slide.slide_id, []), mark)
            if stood is None:
                arguments = (str(dataset.root), run.run_id, slide, config, mark)
                tasks.append(SlideTask(slide.slide_id, mark, arguments, slide.bytes))
            else:
                summary.skipped += 1
                if stood.outcome == "rejected":
                    summary.rejected.append((slide.slide_id, stood.reason))
        run_stage(run, tissue_slide, tasks, engine, summary)
    return report_summary(summary, dataset.root / "tissue", "candidate tiles")


def tissue_slide(
    root: str, run_id: str, slide: Slide, config: TissueConfig, mark: str
) -> list[Entry]:
    """Mask, overlay and candidates of one slide."""
    dataset = Dataset(Path(root))
    try:
        return [_tissue_slide(dataset, run_id, slide, config, mark)]
    except NotHematoxylinEosinError as error:
        return [Entry(slide.slide_id, "rejected", mark, str(error))]
    except UserError as error:
        return [Entry(slide.slide_id, "failed", mark, str(error))]


def _tissue_slide(
    dataset: Dataset, run_id: str, slide: Slide, config: TissueConfig, mark: str
) -> Entry:
    identity = read_identity(dataset)
    detector = DetectorConfig()
    mpp = float(slide.mpp or 0)
    with open_slide(Path(slide.path), slide.reader) as reader:
        plan = plan_read(
            reader.levels, mpp, identity["mpp"], identity["mpp_tolerance"], identity["tile_px"]
        )
        overview, um_per_px = read_overview(reader, mpp, detector.um_per_px)
        picture, picture_um_per_px = _picture(reader, mpp, overview, um_per_px)
    detection = detect_tissue(overview, um_per_px, detector)
    grid = _Grid.cut(slide, plan, detection, um_per_px)
    keep = grid.kept(config)
    overlay = draw_overlay(
        picture, detection.mask, grid.x[keep] * mpp / picture_um_per_px,
        grid.y[keep] * mpp / picture_um_per_px, grid.size_level0 * mpp / picture_um_per_px,
    )  # fmt: skip
    files = _write_pictures(dataset, run_id, slide.slide_id, overlay, detection.mask)
    table = _candidates(identity["seed"], slide.slide_id, grid, keep)
    files.append(write_candidates(dataset, run_id, slide.slide_id, table))
    counts = {"grid tiles": len(grid.x), "candidate tiles": table.num_rows}
    values = {"glass": detection.glass, "um_per_px": um_per_px, "plan": asdict(plan)}
    if table.num_rows == 0:
        reason = "no tile has enough tissue: an empty slide, or tissue too pale to be found"
        return Entry(
            slide.slide_id, "rejected", mark, reason, files=tuple(files), counts=counts,
            values=values,
        )  # fmt: skip
    return Entry(
        slide.slide_id, "done", mark, files=tuple(files), counts=counts, values=values
    )  # fmt: skip


@dataclass(frozen=True)
class _Grid:
    """Tiles of a slide: corners in level-0 px, class fractions."""

    x: npt.NDArray[np.float64]
    y: npt.NDArray[np.float64]
    size_level0: float
    tissue: npt.NDArray[np.float32]
    artifact: npt.NDArray[np.float32]

    @classmethod
    def cut(cls, slide: Slide, plan: ReadPlan, detection: Detection, um_per_px: float) -> "_Grid":
        size = plan.window * plan.downsample
        x, y = grid_positions(slide.width, slide.height, plan.stride_level0, size)
        scale = um_per_px / float(slide.mpp or 0)

        def fraction(chosen: npt.NDArray[np.bool_]) -> npt.NDArray[np.float32]:
            return window_means(chosen.astype(np.float32), x / scale, y / scale, size / scale)

        is_tissue = detection.mask == TissueClass.TISSUE
        is_artifact = detection.mask > TissueClass.TISSUE
        return cls(x, y, size, fraction(is_tissue), fraction(is_artifact))

    def kept(self, config: TissueConfig) -> npt.NDArray[np.bool_]:
        return (self.tissue >= config.min_tissue) & (self.artifact <= config.max_artifact)


def _candidates(seed: int, slide_id: str, grid: _Grid, keep: npt.NDArray[np.bool_]) -> pa.Table:
    chosen = np.flatnonzero(keep)
    order = chosen[rank_order(seed, slide_id, grid.x[chosen], grid.y[chosen])]
    columns = [
        np.arange(len(order), dtype=np.int32),
        grid.x[order],
        grid.y[order],
        grid.tissue[order],
        grid.artifact[order],
    ]
    return pa.table([pa.array(column) for column in columns], schema=CANDIDATES_SCHEMA)


def _picture(
    reader: SlideReader, mpp: float, overview: npt.NDArray[np.uint8], um_per_px: float
) -> tuple[npt.NDArray[np.uint8], float]:
    """The slide at a size to look at: finer than the mask where the slide is small."""
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
    bgr = cv2.cvtColor(overlay, cv2.COLOR_RGB2BGR)
    jpeg = cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY])[1].tobytes()
    return [
        commit_bytes(dataset, run_id, dataset.mask_file(slide_id), mask_png),
        commit_bytes(dataset, run_id, dataset.overlay_file(slide_id), jpeg),
    ]
