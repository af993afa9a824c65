"""The configurations of the kinds of `import`, and of `geojson`."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from common.errors import UserError
from common.options import option_field, option_metadata, parse_count
from pipeline.options import (
    MAX_ARTIFACT,
    MIN_TISSUE,
    PNG,
    RANK_SEED,
    SELECTIONS,
    TERMS,
    Icc,
    PngEffort,
    parse_mpp,
)
from pipeline.slides.config import IN_PLACE, ScanConfig, StageIn
from pipeline.tiles.config import PNG_CODECS

Anchor = Literal["corner", "center"]
Units = Literal["", "level0", "level", "mpp"]
Frame = Literal["auto", "bounds", "canvas"]

_ANCHOR = option_metadata("what of the tile a position is: its upper left corner, or its centre")
_FRAME = option_metadata(
    "corner that coordinates count from: of the scanned area (QuPath) or of the whole slide "
    "(OpenSlide); auto: whichever puts them on tissue"
)
_DROP_OUTSIDE = option_metadata(
    "leave out tiles that are not wholly on their slide (default: refuse)"
)


def _column_option(of: str, role: str) -> str:
    text = f"name of the table's column of {of} (default: the first known name, see docs/import.md)"
    return option_field("", text, flag=f"--{role}-column", metavar="NAME")


@dataclass(frozen=True)
class Columns:
    """The columns' names in the table; '' where the synonyms or nothing will do."""

    slide: str = _column_option("slide names", "slide")
    x: str = _column_option("x positions", "x")
    y: str = _column_option("y positions", "y")
    level: str = _column_option("pyramid levels", "level")
    mpp: str = _column_option("µm per pixel", "mpp")

    def as_dict(self) -> dict[str, str]:
        """By role."""
        return asdict(self)


def parse_named_file(text: str) -> tuple[str, Path]:
    """The selection's name and the table of `NAME=FILE`.

    >>> parse_named_file("train=train.csv")
    ('train', PosixPath('train.csv'))
    """
    name, equals, path = text.partition("=")
    if not equals or not name or not path:
        raise UserError(f"'{text}': expected NAME=FILE, such as train=train.csv")
    return name, Path(path)


@dataclass(frozen=True)
class CoordinatesConfig:
    """Which table makes which selection, and how its positions are meant.

    `anchor` says whether (x, y) is a tile's upper left corner or its centre; `drop_outside`
    leaves out rows that are not wholly on their slide instead of refusing the table.
    """

    files: tuple[tuple[str, Path], ...] = field(
        metadata=option_metadata(
            "a CSV or Parquet table and the selection that it becomes; all of them in one call",
            metavar="NAME=FILE", positional=True, parse=parse_named_file,
        )
    )  # fmt: skip
    columns: Columns = field(default_factory=Columns)
    units: Units = option_field(
        "", "what the coordinates are pixels of (default: as the columns say)"
    )
    anchor: Anchor = option_field("corner", _ANCHOR)
    frame: Frame = option_field("auto", _FRAME)
    drop_outside: bool = option_field(False, _DROP_OUTSIDE)


@dataclass(frozen=True)
class H5Config:
    """The folder, the selection's name, and how tiles are placed in the patches.

    `anchor` "corner" puts a tile's upper left corner on the patch's, "center" their centres on
    each other.
    """

    folder: Path = field(
        metadata=option_metadata(
            "folder of <slide_id>.h5 or <slide_id>_patches.h5", metavar="FOLDER", positional=True
        )
    )
    name: str = field(metadata=option_metadata("the selection that they become"))
    anchor: Anchor = option_field("corner", _ANCHOR)
    frame: Frame = option_field("auto", _FRAME)
    drop_outside: bool = option_field(False, _DROP_OUTSIDE)


@dataclass(frozen=True)
class TilesConfig:
    """Where pictures are and what they are: µm per pixel, size in pixels, what names say."""

    source: Path = field(
        metadata=option_metadata(
            "folder of <slide>/<tile>.png or .jpeg, at any depth; or a CSV with path and slide",
            metavar="FOLDER", positional=True,
        )
    )  # fmt: skip
    mpp: float = field(metadata=option_metadata("µm per pixel of the pictures", parse=parse_mpp))
    tile_px: int = option_field(224, "side of the pictures in pixels", parse=parse_count)
    seed: int = option_field(0, RANK_SEED)
    names: Literal["none", "x_y", "col_row"] = option_field(
        "none", "what names end in: the corner in pixels, or the cell of the grid"
    )
    slide_from: str = option_field(
        "auto",
        "what names a slide: folder, name (what pictures' names begin with), or a regular "
        "expression whose group is the slide in a picture's path; auto: names where they have "
        "TCGA barcodes or the folder is flat, else folders",
        metavar="RULE",
    )
    crop: bool = option_field(False, "take the centre of larger pictures")
    icc: Icc = option_field("ignore", "srgb: apply a picture's colour profile")
    png: PngEffort = option_field("small", PNG)
    terms: str = option_field("", TERMS)

    def identity(self) -> dict[str, object]:
        """The values that every run on a dataset must share."""
        from pipeline.dataset import DatasetKind, fingerprint_of
        from pipeline.dataset.grid import RESERVE_PER_CANDIDATES
        from pipeline.imports.tiles import VERSION

        parameters = {
            "name": DatasetKind.IMPORTED_TILES,
            "version": VERSION,
            "names": self.names,
            "crop": self.crop,
        }
        return {
            "mpp": self.mpp,
            # Nothing is cut, so only `scan` would compare it: it shall find the grid first.
            "mpp_tolerance": ScanConfig.mpp_tolerance,
            "tile_px": self.tile_px,
            "grid": DatasetKind.IMPORTED_TILES,
            "seed": self.seed,
            "reserve_per_candidates": RESERVE_PER_CANDIDATES,
            "detector": f"{DatasetKind.IMPORTED_TILES} {fingerprint_of(**parameters)}",
            "detector_parameters": parameters,
            "resampler": "none",
            "icc": self.icc,
            "codec": PNG_CODECS[self.png],
        }


@dataclass(frozen=True)
class MasksConfig:
    """The folder of masks, the thresholds of candidates, and what names of classes mean.

    `classes` are texts `NAME=CLASS`, such as `Tumor=tissue` (see `geojson.parse_classes`).
    """

    folder: Path = field(
        metadata=option_metadata(
            "folder of <slide_id>.geojson (QuPath) or .png", metavar="FOLDER", positional=True
        )
    )
    min_tissue: float = option_field(0.5, MIN_TISSUE)
    max_artifact: float = option_field(0.1, MAX_ARTIFACT)
    classes: tuple[str, ...] = option_field(
        (),
        "what a class of the annotations is here, such as Tumor=tissue; repeatable",
        flag="--class",
        metavar="NAME=CLASS",
    )
    frame: Frame = option_field("auto", _FRAME)
    stage_in: StageIn = IN_PLACE


@dataclass(frozen=True)
class CoordinatesExport:
    """Where to write GeoJSON, and whether tiles go with the masks (of selections, where named)."""

    out: Path | None = option_field(
        None, "folder to write (default: DATASET/geojson)", metavar="DIR"
    )
    tiles: bool = option_field(False, "with the tiles that were kept")
    selections: tuple[str, ...] = option_field((), SELECTIONS)
    frame: Frame = option_field(
        "auto",
        "corner that coordinates count from: of the scanned area, as QuPath does (bounds, and auto "
        "where the slide states one), or of the whole slide (canvas)",
    )
