"""What the images are conditioned on, and which real tile each of them comes from."""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from common.errors import UserError
from evaluate.generate.plan import source_order
from pipeline.dataset import (
    BLOCK_ROWS,
    Dataset,
    Selection,
    fingerprint,
    identity_value,
    read_identity,
    read_selection,
)
from pipeline.dataset.features import NETWORK, FeatureRecord, FeatureStore

_MPP_SLACK = 0.02
GUIDING_MARK = "guidance_dataset_fingerprint"
"""Where a synthetic dataset's identity says whose tiles guided; older ones have no such key."""


def guiding_mark(dataset: Dataset) -> str:
    """What names a dataset whose tiles guide: the fingerprint of its identity section.

    A selection's sum is of slides and ranks, and which tile a rank is depends on the dataset's
    seed, grid, detector and resolution.
    """
    return fingerprint(**read_identity(dataset))


def foreign_guidance(synthetic: Dataset, guidance: Dataset) -> str:
    """Why a dataset's tiles are not those that guided the images; "" where they may be."""
    mark = read_identity(synthetic).get(GUIDING_MARK)
    if mark is None or mark == guiding_mark(guidance):
        return ""
    return (
        f"the images in {synthetic.root} were guided by tiles of another dataset than "
        f"{guidance.root}: its grid, seed, detector or resolution is another, so the same rank is "
        "another tile; give the dataset that guided"
    )


@dataclass(frozen=True)
class Sources:
    """The real tile behind each image: slide ids (None: no tile) and ranks int32 (-1: none)."""

    slide_ids: list[str | None]
    ranks: npt.NDArray[np.int32]


class Guidance(Protocol):
    """A list of conditions, each of which guides `--variations` images."""

    @property
    def name(self) -> str:
        """What a person calls it; empty where there is nothing to call."""
        ...

    @property
    def count(self) -> int:
        """Number of conditions that are asked for, where nothing limits it."""
        ...

    @property
    def end(self) -> int | None:
        """Number of conditions that there are; None where there is no end to them."""
        ...

    @property
    def tile_px(self) -> int | None:
        """Side of the guiding tiles in pixels; None where nothing guides."""
        ...

    @property
    def mpp(self) -> float | None:
        """Micrometres per pixel of the guiding tiles; None where nothing guides."""
        ...

    @property
    def encoder_record(self) -> dict[str, Any] | None:
        """encoder.json of the features; None where nothing guides."""
        ...

    def identity(self) -> dict[str, Any]:
        """What fixes the conditions, as JSON values for dataset.json."""
        ...

    def sources(self, positions: npt.NDArray[np.int64]) -> Sources:
        """The real tiles behind the conditions at these positions."""
        ...

    def features(self, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.float32] | None:
        """Features [n, d] of the conditions at these positions; None: unconditional."""
        ...

    def attachments(self) -> dict[str, bytes]:
        """Files, by name, that the synthetic dataset keeps in `guidance/`."""
        ...


class Unconditional:
    """No guidance: the model's null condition, `count` times and as often as is asked."""

    name = ""
    tile_px = None
    mpp = None
    encoder_record = None
    end = None

    def __init__(self, count: int) -> None:
        if count < 1:
            raise UserError(f"--count is {count}; expected a number of images of 1 or more")
        self.count = count

    def identity(self) -> dict[str, Any]:
        """The kind of guidance alone."""
        return {"guidance": "none"}

    def sources(self, positions: npt.NDArray[np.int64]) -> Sources:
        """No tile stands behind any image."""
        return Sources([None] * len(positions), np.full(len(positions), -1, np.int32))

    def features(self, positions: npt.NDArray[np.int64]) -> None:
        """Nothing guides."""

    def attachments(self) -> dict[str, bytes]:
        """Nothing to keep."""
        return {}


class SelectionGuidance:
    """The cached CLS features of a selection, in a fixed shuffled order (`source_order`)."""

    def __init__(self, dataset: Dataset, selection: Selection, store: FeatureStore) -> None:
        self.dataset, self.selection, self.store = dataset, selection, store
        self.name, self.count, self.end = selection.name, selection.rows, selection.rows
        order = source_order(selection.rows, selection.content_hash)
        slides = np.repeat(np.arange(len(selection.slide_ids)), np.diff(selection.offsets))
        self._slides = slides[order]
        self._ranks = selection.ranks[order]

    @classmethod
    def open(cls, dataset: Dataset, selection_name: str, encoder: str) -> "SelectionGuidance":
        """Open a selection's features; names the `cache` command where they are missing."""
        selection = read_selection(dataset, selection_name)
        if selection.rows == 0:
            raise UserError(f"selection '{selection_name}' of {dataset.root} has no rows")
        tile_px = int(identity_value(dataset, "tile_px"))
        store = FeatureStore(dataset, tile_px=tile_px, encoder=encoder, selection=selection_name)
        return cls(dataset, selection, store)

    def require_features(self, conditions: int | None) -> None:
        """Refuse, before anything is sampled, a tile of the first `conditions` without features.

        All of them for None. Raises `UserError` with the `cache` command.
        """
        # A limit may be rounded up to a whole block of images.
        end = None if conditions is None else conditions + BLOCK_ROWS
        slides, ranks = self._slides[:end], self._ranks[:end]
        order = np.argsort(slides, kind="stable")
        starts = np.flatnonzero(np.diff(slides[order], prepend=-1))
        for rows in np.split(order, starts[1:]):
            self.store.require(self.selection.slide_ids[slides[rows[0]]], ranks[rows])

    @property
    def tile_px(self) -> int:
        """Side of the dataset's tiles in pixels."""
        return int(identity_value(self.dataset, "tile_px"))

    @property
    def mpp(self) -> float | None:
        """Micrometres per pixel of the dataset's tiles."""
        return read_identity(self.dataset).get("mpp")

    @property
    def encoder_record(self) -> dict[str, Any]:
        """encoder.json of the features."""
        return dict(self.store.record)

    def identity(self) -> dict[str, Any]:
        """Which tiles guide, and by which encoder's features; no paths."""
        record = self.store.record
        return {
            "guidance": "selection",
            "guidance_selection_sha256": self.selection.content_hash,
            GUIDING_MARK: guiding_mark(self.dataset),
            "guidance_encoder": record["encoder"],
            "guidance_encoder_sha256": record["weights_sha256"],
            "guidance_compute_dtype": record.get("compute_dtype"),
        }

    def sources(self, positions: npt.NDArray[np.int64]) -> Sources:
        """The selection's tiles at these positions of the order in which they guide."""
        names = self.selection.slide_ids
        slide_ids: list[str | None] = [names[slide] for slide in self._slides[positions]]
        return Sources(slide_ids, self._ranks[positions].astype(np.int32))

    def features(self, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """CLS features float32 [n, d]; every slide is read once."""
        slides, ranks = self._slides[positions], self._ranks[positions]
        rows: list[npt.NDArray[np.float32] | None] = [None] * len(positions)
        for slide in np.unique(slides):
            where = np.flatnonzero(slides == slide)
            found = self.store.read(self.selection.slide_ids[slide], ranks[where])
            for place, row in zip(where, found, strict=True):
                rows[place] = np.asarray(row, np.float32)
        return np.stack([row for row in rows if row is not None])

    def attachments(self) -> dict[str, bytes]:
        """Nothing to keep: the candidates name the tiles."""
        return {}


def check_condition_dim(record: dict[str, Any] | None, condition_dim: int | None) -> None:
    """Refuse features of another width than the model's, and guidance of a model that takes none.

    Raises `UserError` with both widths.
    """
    if record is None:
        return
    if condition_dim is None:
        raise UserError("the model takes no features: leave --guidance out, give --unconditional")
    if int(record["dim"]) != condition_dim:
        raise UserError(
            f"the features of {record['encoder']} have {record['dim']} values, the model takes "
            f"{condition_dim}; use the encoder that the model was trained with"
        )


def check_tile_px(guidance_px: int | None, model_px: int, *, force: bool = False) -> str:
    """Compare the size of the guiding tiles with that of the tiles that the model draws.

    Returns a warning, empty where they agree. Raises `UserError` where they differ and `force` is
    not set.
    """
    if guidance_px is None or guidance_px == model_px:
        return ""
    message = f"the guidance's tiles are {guidance_px} px, the model draws {model_px} px"
    if not force:
        raise UserError(f"{message}; guide with a dataset of the model's tile size, or --force")
    return message


def check_resolution(guidance_mpp: float | None, model_mpp: float | None, *, force: bool) -> str:
    """Compare the resolution of the guiding tiles with that of the model's training tiles.

    Returns a warning, empty where they agree within 2% or one is not known. Raises `UserError`
    where they differ and `force` is not set.
    """
    if guidance_mpp is None or model_mpp is None or abs(guidance_mpp / model_mpp - 1) <= _MPP_SLACK:
        return ""
    message = (
        f"the guidance's tiles are at {guidance_mpp} µm per pixel, the model was trained at "
        f"{model_mpp}"
    )
    if not force:
        raise UserError(f"{message}; guide with tiles of the model's resolution, or give --force")
    return message


def check_encoder(
    guidance: dict[str, Any] | None, model: dict[str, Any] | None, *, force: bool
) -> str:
    """Compare the guidance's encoder record with the one that the model was trained on.

    Returns a warning, empty where they agree in what the model knows of its own. Raises
    `UserError` where the encoder or the sum of its weights differ, or random weights stand against
    trained ones, and `force` is not set: features of another encoder steer the model at random.
    """
    if guidance is None or model is None:
        return ""
    given, trained = (FeatureRecord.parse(record) for record in (guidance, model))
    alike = not given.differs_from(trained, NETWORK)
    if alike and bool(guidance.get("random_weights")) == bool(model.get("random_weights")):
        return ""
    message = (
        f"the guidance's features are of {_described(guidance)}, "
        f"the model was trained on {_described(model)}"
    )
    if not force:
        raise UserError(f"{message}; cache the guidance with the model's encoder, or give --force")
    return message


def _described(record: dict[str, Any]) -> str:
    random = " (random)" if record.get("random_weights") else ""
    weights = str(record.get("weights_sha256") or record.get("weights"))[:12]
    return f"{record.get('encoder')} {weights}{random}"
