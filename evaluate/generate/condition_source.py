"""What the images are conditioned on, and which real tile each of them comes from."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import numpy as np
import numpy.typing as npt

from common.errors import UserError
from common.terms import Terms
from evaluate.generate.plan import source_order
from evaluate.generators import EncoderRecord, Generator
from evaluate.generators.interface import Features
from pipeline.dataset import (
    BLOCK_ROWS,
    Dataset,
    Selection,
    fingerprint_of,
    identity_value,
    lineage_terms,
    read_identity,
    read_selection,
)
from pipeline.dataset.features import NETWORK, FeatureRecord, FeatureStore, require_fields

Positions = npt.NDArray[np.int64]
"""Numbers of conditions, from 0."""

GUIDING_FINGERPRINT = "guidance_dataset_fingerprint"
"""Key of a synthetic dataset's identity for the dataset that guided; older ones lack it."""
_MPP_TOLERANCE = 0.02


def guiding_fingerprint(dataset: Dataset) -> str:
    """What names a dataset whose tiles guide: the fingerprint of its identity section.

    A selection's sum is of slides and ranks, and which tile a rank is depends on the dataset's
    seed, grid, detector and resolution.
    """
    return fingerprint_of(**read_identity(dataset))


def foreign_guidance(synthetic: Dataset, guidance: Dataset) -> str:
    """Why a dataset's tiles are not those that guided the images; "" where they may be."""
    recorded = read_identity(synthetic).get(GUIDING_FINGERPRINT)
    if recorded is None or recorded == guiding_fingerprint(guidance):
        return ""
    return (
        f"the images in {synthetic.root} were guided by tiles of another dataset than "
        f"{guidance.root}: its grid, seed, detector or resolution is another, so the same rank is "
        "another tile; give the dataset that guided"
    )


@dataclass(frozen=True)
class SourceTiles:
    """The real tile behind each image: slide ids (None: no tile) and ranks int32 (-1: none)."""

    slide_ids: list[str | None]
    ranks: npt.NDArray[np.int32]


class ConditionSource(ABC):
    """A list of conditions, each of which guides `--variations` images.

    `name` is what people call it, "" for nothing; `count` the number of conditions that guide
    where nothing limits it, and `end` the number that exist, None where they never end. Side in
    pixels, resolution in micrometres per pixel and encoder of the guiding tiles are None where
    nothing guides.
    """

    name: str = ""
    count: int
    end: int | None = None
    tile_px: int | None = None
    mpp: float | None = None
    encoder_record: EncoderRecord | None = None

    @abstractmethod
    def identity(self) -> dict[str, object]:
        """What fixes the conditions, as JSON values for dataset.json; no paths."""

    @abstractmethod
    def source_tiles(self, positions: Positions) -> SourceTiles:
        """The real tiles behind the conditions at these positions, int64 [n]."""

    @abstractmethod
    def read_features(self, positions: Positions) -> Features | None:
        """Features float32 [n, d] of the conditions at positions [n]; None: unconditional."""

    def terms(self) -> tuple[Terms, ...]:
        """The terms of the tiles and features that guide; empty where nothing does."""
        return ()

    def guidance_files(self) -> dict[str, bytes]:
        """Files, bytes by name, that the synthetic dataset has in `guidance/`."""
        return {}

    def made_from(self, positions: Positions) -> str:
        """A sum of what the conditions at positions [n] were made from; "" where that is nothing.

        It is another one where their features were made again from other tiles.
        """
        return ""


class Unconditional(ConditionSource):
    """No guidance: the model's null condition, `count` times and without end."""

    def __init__(self, count: int) -> None:
        if count < 1:
            raise UserError(f"--count is {count}; expected a number of images of 1 or more")
        self.count = count

    def identity(self) -> dict[str, object]:
        """The kind of guidance alone."""
        return {"guidance": "none"}

    def source_tiles(self, positions: Positions) -> SourceTiles:
        """No image has a tile behind it."""
        return SourceTiles([None] * len(positions), np.full(len(positions), -1, np.int32))

    def read_features(self, positions: Positions) -> None:
        """Nothing guides."""


class ShuffledSelection(ConditionSource):
    """The tiles of a selection, `tile_px` pixels wide, in a fixed shuffled order."""

    tile_px: int

    def __init__(self, dataset: Dataset, selection: Selection, tile_px: int) -> None:
        self.dataset, self.selection, self.tile_px = dataset, selection, tile_px
        self.name, self.count, self.end = selection.name, selection.rows, selection.rows
        self.mpp = read_identity(dataset).get("mpp")
        order = source_order(selection.rows, selection.content_hash)
        slides = np.repeat(np.arange(len(selection.slide_ids)), np.diff(selection.offsets))
        self._slides, self._ranks = slides[order], selection.ranks[order]

    def terms(self) -> tuple[Terms, ...]:
        """The terms of the guiding dataset and, where features guide, of their encoder."""
        return lineage_terms([self.dataset], [self.encoder_record or {}])

    def source_tiles(self, positions: Positions) -> SourceTiles:
        """The tiles at these positions, int64 [n], of the order in which they guide."""
        names = self.selection.slide_ids
        slide_ids: list[str | None] = [names[slide] for slide in self._slides[positions]]
        return SourceTiles(slide_ids, self._ranks[positions].astype(np.int32))

    def hash_slides(self, positions: Positions, find: Callable[[str], str]) -> str:
        """A sum of the fingerprints that `find` gives of the slides at positions [n]."""
        slides = [self.selection.slide_ids[i] for i in np.unique(self._slides[positions])]
        return fingerprint_of(slides=[[slide_id, find(slide_id)] for slide_id in slides])

    def tile_identity(self, guidance: str) -> dict[str, object]:
        """The kind of guidance and whose tiles guide."""
        return {
            "guidance": guidance,
            "guidance_selection_sha256": self.selection.content_hash,
            GUIDING_FINGERPRINT: guiding_fingerprint(self.dataset),
        }


class SelectionConditions(ShuffledSelection):
    """The cached CLS features float32 [n, d] of a selection's tiles, of any size and view."""

    encoder_record: EncoderRecord

    def __init__(self, dataset: Dataset, selection: Selection, store: FeatureStore) -> None:
        require_fields(store, "encoder", "dim")
        super().__init__(dataset, selection, int(store.record["tile_px"]))
        self.store = store
        self.encoder_record = cast(EncoderRecord, dict(store.record))

    @classmethod
    def open_selection(
        cls, dataset: Dataset, selection_name: str, encoder: str
    ) -> "SelectionConditions":
        """Open a selection's features; names the `cache` command where they are missing."""
        selection = read_selection(dataset, selection_name)
        if selection.rows == 0:
            raise UserError(f"selection '{selection_name}' of {dataset.root} has no rows")
        tile_px = int(identity_value(dataset, "tile_px"))
        store = FeatureStore(dataset, tile_px=tile_px, encoder=encoder, selection=selection_name)
        return cls(dataset, selection, store)

    def made_from(self, positions: Positions) -> str:
        """A sum of the features' fingerprints: of their tiles, weights, arithmetic and view."""
        return self.hash_slides(positions, self.store.fingerprint_of)

    def require_features(self, conditions: int | None) -> None:
        """Refuse, before anything is sampled, a tile of the first `conditions` without features.

        All of them for None. Raises `UserError` with the `cache` command.
        """
        # A limit may be rounded up to a whole block of images.
        end = None if conditions is None else conditions + BLOCK_ROWS
        slides, ranks = self._slides[:end], self._ranks[:end]
        # Grouped by slide, since a store opens one file per slide.
        order = np.argsort(slides, kind="stable")
        starts = np.flatnonzero(np.diff(slides[order], prepend=-1))
        for rows in np.split(order, starts[1:]):
            self.store.require_ranks(self.selection.slide_ids[slides[rows[0]]], ranks[rows])

    def identity(self) -> dict[str, object]:
        """Which tiles guide, by which encoder's features, and through which view, if any."""
        view = self.encoder_record.get("view")
        return (
            self.tile_identity("selection")
            | encoder_identity(self.encoder_record)
            | ({"guidance_view": view} if view else {})
        )

    def read_features(self, positions: Positions) -> Features:
        """CLS features float32 [n, d]; every slide is read once."""
        slides, ranks = self._slides[positions], self._ranks[positions]
        features = np.empty((len(positions), self.encoder_record["dim"]), np.float32)
        for slide in np.unique(slides):
            rows = np.flatnonzero(slides == slide)
            features[rows] = self.store.read(self.selection.slide_ids[slide], ranks[rows])
        return features


def encoder_identity(record: EncoderRecord) -> dict[str, object]:
    """The guiding encoder's keys of a synthetic dataset's identity."""
    return {
        "guidance_encoder": record["encoder"],
        "guidance_encoder_sha256": record.get("weights_sha256"),
        "guidance_compute_dtype": record.get("compute_dtype"),
    }


def check_fit(source: ConditionSource, generator: Generator, *, force: bool = False) -> list[str]:
    """Compare conditions with what a model was made for: tile size, encoder, resolution.

    Returns the warnings of what does not fit. Raises `UserError` for the first of them where
    `force` is not set, and always for features of another width than the model's.
    """
    record = source.encoder_record
    # The width first: where it differs, --force must not be the advice.
    check_condition_dim(record, generator.condition_dim)
    warnings = []
    if source.tile_px not in (None, generator.tile_px):
        warnings.append(
            _allow_or_refuse(
                f"the guidance's tiles are {source.tile_px} px, the model draws "
                f"{generator.tile_px} px",
                "guide with a dataset of the model's tile size, or --force",
                force=force,
            )
        )
    warnings.append(check_encoder(record, generator.encoder_record, force=force))
    warnings.append(check_resolution(source.mpp, generator.mpp, force=force))
    return [message for message in warnings if message]


def check_condition_dim(record: EncoderRecord | None, condition_dim: int | None) -> None:
    """Refuse features of another width than the model's, and guidance of a model that takes none.

    Raises `UserError` with both widths.
    """
    if record is None:
        return
    if condition_dim is None:
        raise UserError("the model takes no features: leave --guidance out, give --unconditional")
    # Not even --force helps here: the network has no weights for another width.
    if int(record["dim"]) != condition_dim:
        raise UserError(
            f"the features of {record['encoder']} have {record['dim']} values, the model takes "
            f"{condition_dim}; use the encoder that the model was trained with"
        )


def check_resolution(guidance_mpp: float | None, model_mpp: float | None, *, force: bool) -> str:
    """Compare the resolution of the guiding tiles with that of the model's training tiles.

    Both are in micrometres per pixel. Returns a warning, empty where they agree within 2 % or
    one is not known. Raises `UserError` where they differ and `force` is not set.

    >>> check_resolution(0.503, 0.5, force=False)
    ''
    """
    if guidance_mpp is None or model_mpp is None:
        return ""
    if abs(guidance_mpp / model_mpp - 1) <= _MPP_TOLERANCE:
        return ""
    return _allow_or_refuse(
        f"the guidance's tiles are at {guidance_mpp} µm per pixel, the model was trained at "
        f"{model_mpp}",
        "guide with tiles of the model's resolution, or give --force",
        force=force,
    )


def check_encoder(
    guidance: EncoderRecord | None, model: EncoderRecord | None, *, force: bool
) -> str:
    """Compare the guidance's encoder with the one that the model was trained on.

    Returns a warning, empty where they agree in what the model records. Raises `UserError` where
    the encoder or the sum of its weights differ, or only one of them has random weights, and
    `force` is not set: features of another encoder steer the model at random.
    """
    if guidance is None or model is None:
        return ""
    given, trained = (FeatureRecord.parse(record) for record in (guidance, model))
    same_encoder = not given.differs_from(trained, NETWORK)
    if same_encoder and bool(guidance.get("random_weights")) == bool(model.get("random_weights")):
        return ""
    return _allow_or_refuse(
        f"the guidance's features are of {_describe_encoder(guidance)}, "
        f"the model was trained on {_describe_encoder(model)}",
        "cache the guidance with the model's encoder, or give --force",
        force=force,
    )


def _describe_encoder(record: EncoderRecord) -> str:
    random = " (random)" if record.get("random_weights") else ""
    weights = str(record.get("weights_sha256") or record.get("weights"))[:12]
    return f"{record.get('encoder')} {weights}{random}"


def _allow_or_refuse(message: str, advice: str, *, force: bool) -> str:
    """The message as a warning where `force` is set, else as a refusal."""
    if not force:
        raise UserError(f"{message}; {advice}")
    return message
