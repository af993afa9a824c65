"""`import masks`: masks that others made take the place of the tissue detector."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from common.console import print_line
from common.errors import UserError
from common.files import hash_file
from common.pictures import open_picture
from common.text import list_some, one_line
from pipeline.dataset import (
    Dataset,
    DatasetKind,
    Entry,
    Ledger,
    Missing,
    Run,
    Slide,
    fingerprint_of,
)
from pipeline.dataset.journal import Outcome
from pipeline.imports.config import Frame, MasksConfig
from pipeline.imports.frames import Bounds, inner_bounds, with_bounds
from pipeline.imports.geojson import (
    class_areas,
    paint_areas,
    parse_classes,
    read_annotations,
    read_features,
    refuse_unknown,
    unknown_classes,
)
from pipeline.imports.mask_fit import Paint, place_mask
from pipeline.imports.polygons import Affine, Painted
from pipeline.run.stage import Stage, run_stage
from pipeline.run.summary import Summary
from pipeline.run.tasks import SlideTask
from pipeline.run.workers import EngineConfig
from pipeline.slides.identity import OtherFileError
from pipeline.tissue.classes import CLASS_NAMES, TissueClass
from pipeline.tissue.config import TissueConfig
from pipeline.tissue.detect import Detection, DetectorConfig
from pipeline.tissue.glass import glass_level
from pipeline.tissue.stage import (
    STAGE,
    imported_source,
    record_tissue,
    tissue_fingerprint,
    usable_slides,
)

SUFFIXES = (".geojson", ".png")
_DETECTOR = "imported masks"
_VERSION = 1
_NO_MASK = "no mask was imported for this slide"
_CHECKED_FIRST = 8
_MAX_STRETCH = 0.02
_MOST_MASK_PX = 1 << 28


@dataclass
class MaskFile:
    """A mask of one slide as a detector: it looks at the file, and at the slide where it belongs.

    What somebody annotated as a fold is an artifact: no class is experimental. `note` is what
    `detect` found that a person should know.
    """

    experimental: ClassVar[frozenset[TissueClass]] = frozenset()
    path: Path
    slide: Slide
    class_names: Mapping[str, TissueClass]
    frame: Frame = "auto"
    note: str = ""

    @property
    def um_per_px(self) -> float:
        """Resolution at which the mask is kept, in µm per px."""
        return DetectorConfig().um_per_px

    def identity(self) -> dict[str, object]:
        """The mask's file."""
        return {"name": _DETECTOR, "sha256": hash_file(self.path)}

    def detect(self, rgb: npt.NDArray[np.uint8], um_per_px: float) -> Detection:
        """The mask, uint8 [h, w], at the size of the overview uint8 [h, w, 3]."""
        shape = (rgb.shape[0], rgb.shape[1])
        scale = um_per_px / float(self.slide.mpp or 1)
        paint, frame, usual = self._open_file(shape, scale)
        placed = place_mask(
            paint, self.slide, frame, rgb, um_per_px, usual=usual, is_checked=self.frame == "auto"
        )
        self.note = placed.note
        return Detection(placed.mask, glass_level(rgb))

    def _open_file(self, shape: tuple[int, int], scale: float) -> tuple[Paint, Frame, Frame]:
        """How the file is painted, the frame that it must be in, and the usual one of such files.

        `shape` (h, w) is the mask's, `scale` level-0 pixels per mask pixel.
        """
        if self.path.suffix == ".png":
            picture = _to_classes(_read_picture(self.path))
            if picture.shape == shape:
                # One of ours, pixel by pixel.
                return lambda a: Painted(picture) if a == Affine() else None, "canvas", "canvas"
            return paint_picture(picture, shape, scale, self.slide), self.frame, "canvas"
        features, stated = read_annotations(self.path)
        areas = class_areas(features, self.class_names)
        frames: dict[str, Frame] = {"bounds": "bounds", "canvas": "canvas"}
        frame = frames.get(stated, "auto") if self.frame == "auto" else self.frame
        return partial(paint_areas, areas, shape, scale), frame, "bounds"


def masks_identity(config: MasksConfig) -> dict[str, object]:
    """The values that every run on a dataset must share; masks may be added and changed."""
    parameters = {
        "name": _DETECTOR, "version": _VERSION, "um_per_px": DetectorConfig().um_per_px,
    }  # fmt: skip
    return {
        "detector": f"{_DETECTOR} {fingerprint_of(**parameters)}",
        "detector_parameters": parameters,
        "min_tissue": config.min_tissue,
        "max_artifact": config.max_artifact,
    }


def mask_source(
    mask: Path, class_names: Mapping[str, TissueClass], frame: Mapping[str, object] | None = None
) -> str:
    """What a slide's candidates are made from: the mask's bytes and what its names mean.

    `frame` is what places the mask on a slide that has two frames.
    """
    classes = {name: int(value) for name, value in class_names.items()}
    try:
        return fingerprint_of(sha256=hash_file(mask), classes=classes, **(frame or {}))
    except OSError as error:
        raise UserError(f"{mask} cannot be read: {error.strerror}") from error


def find_masks(folder: Path, slides: list[Slide]) -> dict[str, Path]:
    """The mask of each slide that has one, by slide_id; masks of no slide are reported."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; expected one of <slide_id>.geojson or .png")
    files = {path.name: path for path in sorted(folder.iterdir()) if path.suffix in SUFFIXES}
    # By name alone, and each at most once: what is left over is reported below.
    masks = {}
    for slide in slides:
        names = [slide.slide_id + suffix for suffix in SUFFIXES]
        paths = [files.pop(name) for name in names if name in files]
        if len(paths) > 1:
            raise UserError(
                f"{folder}: two masks of {slide.slide_id} ({paths[0].name}, {paths[1].name}); "
                "leave one of them"
            )
        if paths:
            masks[slide.slide_id] = paths[0]
    if not masks:
        raise UserError(
            f"{folder} has no mask of a usable slide; expected names such as "
            f"{slides[0].slide_id}.geojson or .png, there: {', '.join([*files][:3]) or 'none'}"
        )
    if files:
        strangers = list_some([*files])
        print_line(
            f"import: {len(files):,} masks are of no usable slide of this dataset: {strangers}"
        )
    return masks


def mask_slide(
    run_id: str,
    root: str,
    slide: Slide,
    path: Path,
    config: MasksConfig,
    fingerprint: str,
    source: str,
) -> list[Entry]:
    """Mask uint8 [h, w], overlay and candidates of one slide, from its mask file."""
    tissue = TissueConfig(config.min_tissue, config.max_artifact, _DETECTOR, config.stage_in)
    detector = MaskFile(path, slide, parse_classes(config.classes), config.frame)
    try:
        entry = record_tissue(Dataset(Path(root)), run_id, slide, tissue, fingerprint, detector)
    except OtherFileError as error:
        return [Entry(slide.slide_id, "failed", fingerprint, str(error), values=dict(error.values))]
    except UserError as error:
        return [Entry(slide.slide_id, "failed", fingerprint, f"{path.name}: {error}")]
    values = {**entry.values, "source": source}
    if detector.note:
        values["notes"] = [*values.get("notes", ()), detector.note]
    return [replace(entry, values=values)]


def read_png_mask(
    path: Path, shape: tuple[int, int], scale: float, size_level0: tuple[int, int]
) -> npt.NDArray[np.uint8]:
    """Mask uint8 of `shape` (h, w) from a picture of the whole slide, nearest pixels.

    `scale` is level-0 pixels per mask pixel, `size_level0` the slide's (width, height). A picture
    of just that shape is taken pixel by pixel: it is one of ours.
    """
    picture = _to_classes(_read_picture(path))
    if picture.shape == shape:
        return picture
    if not _has_shape(picture, size_level0):
        raise _shape_error(picture, [size_level0])
    return _spread_picture(picture, shape, scale, (0, 0, *size_level0))


def _has_shape(picture: npt.NDArray[np.uint8], size: tuple[int, int]) -> bool:
    """Whether a picture [h, w] may be one of an area of that (width, height)."""
    # Rounding by a pixel or so does not make it another shape.
    across, down = picture.shape[1] / size[0], picture.shape[0] / size[1]
    slack = 1.5 / min(picture.shape)
    return abs(across - down) <= max(across, down) * (_MAX_STRETCH + slack)


def _shape_error(picture: npt.NDArray[np.uint8], sizes: Sequence[tuple[int, int]]) -> UserError:
    whole, *scanned = [f"{width}x{height}" for width, height in sizes]
    areas = f" or of the scanned area ({scanned[0]})" if scanned else ""
    return UserError(
        f"{picture.shape[1]}x{picture.shape[0]} px has another shape than the slide "
        f"({whole}); expected a picture of the whole slide{areas}"
    )


def _spread_picture(
    picture: npt.NDArray[np.uint8], shape: tuple[int, int], scale: float, area: Bounds,
    is_part: bool = False,
) -> npt.NDArray[np.uint8]:  # fmt: skip
    """Mask of `shape` with the picture spread over an area (x, y, width, height) in level-0 px.

    The area is the whole slide, or a part of it: what is outside a part is background.
    """
    x, y, width, height = area
    # By the centres of the mask's pixels, in pixels of the picture.
    columns = ((np.arange(shape[1]) + 0.5) * scale - x) * (picture.shape[1] / width)
    rows = ((np.arange(shape[0]) + 0.5) * scale - y) * (picture.shape[0] / height)
    columns_px = np.clip(columns, 0, picture.shape[1] - 1).astype(np.int64)
    rows_px = np.clip(rows, 0, picture.shape[0] - 1).astype(np.int64)
    mask = picture[np.ix_(rows_px, columns_px)]
    if is_part:
        mask[(rows < 0) | (rows >= picture.shape[0])] = 0
        mask[:, (columns < 0) | (columns >= picture.shape[1])] = 0
    return mask


def paint_picture(
    picture: npt.NDArray[np.uint8], shape: tuple[int, int], scale: float, slide: Slide
) -> Paint:
    """How a picture [h, w] of the whole slide or of its scanned area becomes a mask of `shape`.

    Raises `UserError` where it is of neither.
    """
    size, bounds = (slide.width, slide.height), inner_bounds(slide)
    areas = {(0.0, 0.0): (0, 0, *size)} if _has_shape(picture, size) else {}
    if bounds is not None and _has_shape(picture, bounds[2:]):
        areas[float(bounds[0]), float(bounds[1])] = bounds
    if not areas:
        raise _shape_error(picture, [size, bounds[2:]] if bounds else [size])

    def paint(affine: Affine) -> Painted | None:
        # A picture has the slide's size, so that it can be mirrored and nothing else.
        turned = picture
        shift = affine.shift
        if affine.scale != (1.0, 1.0):
            if affine.swap or set(map(abs, affine.scale)) != {1.0}:
                return None
            turned = picture[:: int(affine.scale[1]), :: int(affine.scale[0])]
            shift = (0.0, 0.0)
        if affine.swap or shift not in areas:
            return None
        area = areas[shift]
        return Painted(_spread_picture(turned, shape, scale, area, is_part=area == bounds))

    return paint


def _read_picture(path: Path) -> npt.NDArray[np.uint8]:
    try:
        # PNG alone: Pillow's reader of PostScript runs a program.
        with open_picture(path, ("PNG",), _MOST_MASK_PX, is_mask=True) as image:
            if image.mode == "1":
                return np.array(image.convert("L"), np.uint8)
            if image.mode not in ("L", "P"):
                raise UserError(
                    f"the picture is {image.mode}; expected one grey or palette value per pixel"
                )
            return np.array(image, np.uint8)
    except (OSError, ValueError, SyntaxError) as error:
        raise UserError(f"cannot be read as a PNG: {one_line(error, 120)}") from error


def _to_classes(values: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    present = np.flatnonzero(np.bincount(values.ravel(), minlength=256)).tolist()
    if set(present) <= {0, 255}:
        return np.where(values == 255, np.uint8(TissueClass.TISSUE), np.uint8(0))
    if max(present) <= max(TissueClass):
        return values
    raise UserError(
        f"pixel values {', '.join(map(str, present[:8]))}; expected 0 and 255, or our classes: "
        + ", ".join(f"{value} {name}" for value, name in CLASS_NAMES.items())
    )


class ImportMasksStage(Stage[Slide]):
    """Masks, overlays and candidates from a folder of masks, in place of detection."""

    name, label = STAGE, "import"
    kind = DatasetKind.SLIDES
    rate_of = "candidate tiles"
    work = staticmethod(mask_slide)

    def __init__(self, dataset: Dataset, config: MasksConfig) -> None:
        super().__init__(dataset)
        self.config = config
        self.sources: dict[str, str] = {}
        self.unreadable: dict[str, str] = {}
        self.class_names = parse_classes(config.classes)
        self.slides = usable_slides(dataset)
        self.masks = find_masks(config.folder, self.slides)
        if config.frame != "canvas":
            with_mask = [slide.slide_id in self.masks for slide in self.slides]
            pairs = zip(self.slides, with_mask, strict=True)
            self.slides = [with_bounds(slide) if has else slide for slide, has in pairs]
        # Before anything is written, look for unknown names in a few small files.
        texts = [path for path in self.masks.values() if path.suffix != ".png"]
        unknown: set[str] = set()
        for path in sorted(texts, key=lambda path: path.stat().st_size)[:_CHECKED_FIRST]:
            with suppress(UserError):
                unknown |= unknown_classes(read_features(path), self.class_names)
        refuse_unknown(unknown)

    def identity_claims(self) -> dict[str, object]:
        """Where the masks came from and the thresholds."""
        return masks_identity(self.config)

    def list_items(self) -> list[Slide]:
        """The slides that scan found fit for tiling."""
        # A mask is read once for its sum; a slide without one keeps what it was imported from.
        ledger = Ledger.read(self.dataset, STAGE)[""]
        self.sources, self.unreadable = {}, {}
        for slide in self.slides:
            mask, slide_id = self.masks.get(slide.slide_id), slide.slide_id
            try:
                self.sources[slide_id] = (
                    mask_source(mask, self.class_names, self._frame_of(slide))
                    if mask
                    else imported_source(ledger.entries(slide_id))
                )
            except UserError as error:
                self.sources[slide_id], self.unreadable[slide_id] = "", str(error)
        return self.slides

    def _frame_of(self, slide: Slide) -> dict[str, object]:
        """What places the slide's mask; {} where coordinates can mean one thing only."""
        bounds = inner_bounds(slide)
        return {"frame": self.config.frame, "bounds": bounds} if bounds else {}

    def item_fingerprint(self, item: Slide) -> str:
        """Of the slide and its mask."""
        return tissue_fingerprint(item, self.identity, self.sources[item.slide_id])

    def reason_to_refuse(
        self, item: Slide, fingerprint: str, ledger: Ledger
    ) -> tuple[Outcome, str] | None:
        """A slide whose mask cannot be read, or without one unless an earlier import had one."""
        if item.slide_id in self.unreadable:
            return "failed", self.unreadable[item.slide_id]
        if item.slide_id in self.masks or ledger[""].done(item.slide_id, fingerprint) is not None:
            return None
        return "rejected", _NO_MASK

    def make_task(self, item: Slide, fingerprint: str, missing: Missing, run_id: str) -> SlideTask:
        """Read one mask and write what tissue detection would."""
        path = self.masks[item.slide_id].absolute()
        arguments = (
            run_id, str(self.dataset.root), item, path, self.config, fingerprint,
            self.sources[item.slide_id],
        )  # fmt: skip
        return SlideTask(item.slide_id, fingerprint, arguments, item.bytes)

    def after_tasks(self, runs: Sequence[Run], summary: Summary, engine: EngineConfig) -> None:
        """Remind of selections that name former candidates."""
        if summary.done_slides and self.dataset.selection_names():
            print_line(
                "import: candidates changed; make the selections again, they name the former ones"
            )

    @property
    def output_path(self) -> Path:
        """The folder of masks and overlays."""
        return self.dataset.root / "tissue"


def import_masks(dataset: Dataset, config: MasksConfig, engine: EngineConfig) -> int:
    """Masks, overlays and candidates from a folder of masks; returns the exit status."""
    return run_stage(ImportMasksStage(dataset, config), engine)
