"""A protocol's sources on disk: where their tiles and features are, and what of them is missing.

Images are in folders named by all that fixes them, so that a change makes a new folder, and
everything that is valid is reused: a killed protocol goes on where it was.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.errors import UserError
from common.files import read_regular
from evaluate.generate.condition_source import guiding_fingerprint
from evaluate.generate.plan import source_order
from evaluate.generate.write import SELECTION_NAME
from evaluate.generators.open import KINDS, settings_for
from evaluate.protocols.config import GenerationSpec, ModelSpec, Protocol
from evaluate.protocols.plan import Features, Seen, all_images, parse_vae
from model.sampler_settings import SamplerSettings
from pipeline.dataset import (
    Dataset,
    Ledger,
    Selection,
    identity_value,
    make_selection,
    open_dataset,
    read_selection,
)
from pipeline.dataset.features import FeatureStore, encoder_file, feature_scope, read_encoder_record


@dataclass(frozen=True)
class SelectedTiles:
    """A source's tiles, `px` pixels wide: the whole selection, and the part that is used."""

    dataset: Dataset
    whole: Selection
    used: Selection
    px: int


class ProtocolSources:
    """Finds the tiles and features of a protocol's sources."""

    def __init__(self, protocol: Protocol) -> None:
        self.protocol = protocol
        self.images = {images.key: images for images in all_images(protocol)}
        self._tiles: dict[str, SelectedTiles] = {}

    def select_tiles(self, source: str) -> SelectedTiles:
        """The tiles of a set, of images or of reconstructions; the latter two once made.

        Raises `UserError` where there are fewer than the protocol requires.
        """
        if source not in self._tiles:
            self._tiles[source] = self._find_tiles(source)
        return self._tiles[source]

    def forget_tiles(self, source: str) -> None:
        """Read a source's selection again at its next use: its images have changed."""
        self._tiles.pop(source, None)

    def _find_tiles(self, source: str) -> SelectedTiles:
        spec = self.protocol.sets.get(source)
        if spec is None:
            dataset = open_dataset(self.image_folder(source))
            whole = read_selection(dataset, SELECTION_NAME)
            used = first_images(whole, self.required_images(source), source)
            return SelectedTiles(dataset, whole, used, _tile_px(dataset))
        root = spec.dataset or self.protocol.dataset
        if not root:
            raise UserError(f"where are the tiles of set {source}? give dataset=DIR, or "
                            f"sets.{source}.dataset=DIR")  # fmt: skip
        dataset = open_dataset(Path(root))
        whole = read_selection(dataset, spec.selection)
        used = first_tiles(whole, self._required_count(spec.count) or whole.rows, f"set {source}")
        return SelectedTiles(dataset, whole, used, spec.tile_px or _tile_px(dataset))

    def _required_count(self, count: int) -> int:
        """Tiles to use for a `count` of the configuration; 0 for all."""
        return 0 if count < 0 else count or self.protocol.count

    def required_images(self, source: str) -> int:
        """How many images the protocol uses of a generation or of reconstructions."""
        vae = parse_vae(source)
        if vae:
            return self.select_tiles(vae[1]).used.rows
        spec = self.images[source].spec
        guided = self.select_tiles(spec.guidance).used.rows if spec.guidance else 0
        return self._required_count(spec.count) or guided

    def image_folder(self, source: str) -> Path:
        """Where the images are: a folder named by all that fixes them, or the given dataset."""
        vae = parse_vae(source)
        if vae:
            set_tiles = self.select_tiles(vae[1])
            return self._named_folder(f"vae-{vae[0]}-{vae[1]}", {
                "vae": self._model_fingerprint(vae[0]),
                "px": set_tiles.px,
                "set": set_tiles.whole.content_hash,
                "dataset": guiding_fingerprint(set_tiles.dataset),
            })  # fmt: skip
        spec = self.images[source].spec
        if spec.dataset:
            return Path(spec.dataset)
        model = self.protocol.models[spec.model]
        guide = self.select_tiles(spec.guidance) if spec.guidance else None
        return self._named_folder(source, {
            "model": self._model_fingerprint(spec.model),
            # As configured: `auto` is another dtype on another machine, and stays one folder.
            "dtype": model.dtype,
            "encoder": model.encoder if guide else "",
            "guidance": guide.whole.content_hash if guide else "",
            "dataset": guiding_fingerprint(guide.dataset) if guide else "",
            "weights": self.protocol.weights_of(model.encoder),
            "view": [spec.guidance_view, spec.guidance_px],
            "sampler": [spec.solver, spec.steps, spec.seed, spec.scale, spec.low, spec.high],
            "batch": spec.batch,
        })  # fmt: skip

    def _named_folder(self, name: str, fixed: dict[str, object]) -> Path:
        digest = hashlib.sha256(json.dumps(fixed, sort_keys=True).encode()).hexdigest()
        return Path(self.protocol.out) / "generated" / f"{name}.{digest[:12]}"

    def _model_fingerprint(self, name: str) -> str:
        """What a model is, without loading it: its configuration has its weights' sums."""
        spec = self.find_model(name)
        config = Path(spec.model) / "config.json"
        if config.exists():
            return hashlib.sha256(read_regular(config)).hexdigest()
        return f"{spec.generator} {spec.model}"

    def find_model(self, name: str) -> ModelSpec:
        """A model's entry. Raises `UserError` where it does not say where the model is."""
        spec = self.protocol.models[name]
        if spec.generator == "own" and not spec.model:
            raise UserError(f"which model? give models.{name}.model=DIR, an exported model's "
                            f"folder or a hub id, or leave_out=[{name}]")  # fmt: skip
        return spec

    def missing_images(self, source: str) -> int:
        """How many of a source's images are not on disk; 0 for a set."""
        if source in self.protocol.sets:
            return 0
        count = self.required_images(source)
        dataset = Dataset(self.image_folder(source))
        if not dataset.selection_file(SELECTION_NAME).exists():
            return count
        # Tables come before tiles, so the selection may name images that are not made yet.
        whole = read_selection(dataset, SELECTION_NAME)
        if whole.rows < count:
            return count - whole.rows
        used = first_images(whole, count, source)
        return Ledger.read(dataset, "tile")[str(_tile_px(dataset))].uncovered_rows(used.items())

    def feature_store(self, seen: Seen, encoder: str) -> FeatureStore:
        """The features of a source as seen."""
        tiles = self.select_tiles(seen.source)
        return FeatureStore(
            tiles.dataset, tile_px=seen.px or tiles.px, encoder=encoder, view=seen.view
        )

    def conditioning_features(self) -> list[Features]:
        """The features that guide images that are missing, each once."""
        features = {
            (Seen(images.spec.guidance, images.spec.guidance_view, images.spec.guidance_px),
             self.protocol.models[images.spec.model].encoder): None
            for images in self.images.values()
            if images.spec.guidance and self.missing_images(images.key)
        }  # fmt: skip
        return list(features)

    def missing_features(self, seen: Seen, encoder: str, *, whole: bool = False) -> int:
        """How many of the used tiles (or of the whole selection) have no features yet.

        Raises `UserError` where they have features of other weights or in another dtype.
        """
        tiles = self.select_tiles(seen.source)
        dataset, px = tiles.dataset, seen.px or tiles.px
        wanted = tiles.whole if whole else tiles.used
        # Without encoder.json nothing was cached: there is no record to compare.
        if not encoder_file(dataset, px, encoder, seen.view, "cls").exists():
            return wanted.rows
        record = read_encoder_record(dataset, tile_px=px, encoder=encoder, view=seen.view)
        configured = {"weights": self.protocol.weights_of(encoder),
                      "compute_dtype": self.protocol.dtype}  # fmt: skip
        for key, value in configured.items():
            if record.get(key) != value:
                raise UserError(
                    f"the features of {encoder} in {dataset.root} were made with {key} "
                    f"{record.get(key)!r}, the protocol asks for {value!r}; set it to the former, "
                    "or use another dataset"
                )
        scope = feature_scope(px, encoder, seen.view, "cls")
        return Ledger.read(dataset, "cache")[scope].uncovered_rows(wanted.items())


def sampler_settings(kind: str, spec: GenerationSpec) -> SamplerSettings:
    """A generation's settings; those that are as published are not passed to a published call."""
    published = KINDS[kind].published.arguments()
    configured = {
        "solver": spec.solver[0] if spec.solver else None,
        "steps": spec.steps[0] if spec.steps else None,
        "guidance_scale": spec.scale if spec.guidance else 1.0,
        "guidance_low": spec.low,
        "guidance_high": spec.high,
    }
    return settings_for(kind, {k: v for k, v in configured.items() if v != published[k]})


def _tile_px(dataset: Dataset) -> int:
    return int(identity_value(dataset, "tile_px"))


def first_tiles(whole: Selection, count: int, name: str) -> Selection:
    """The first `count` tiles of a selection in the fixed order in which they guide.

    Raises `UserError` where there are fewer.
    """
    if whole.rows < count:
        raise UserError(
            f"{name}: selection '{whole.name}' has {whole.rows:,} tiles, the protocol asks for "
            f"{count:,}; choose a larger selection, or count={whole.rows}"
        )
    if whole.rows == count:
        return whole
    # In the order of guidance, any prefix is a fair sample and the images' own sources.
    rows = np.sort(source_order(whole.rows, whole.content_hash)[:count])
    slides = np.searchsorted(whole.offsets, rows, side="right") - 1
    ranks = {
        whole.slide_ids[slide]: whole.ranks[rows[slides == slide]] for slide in np.unique(slides)
    }
    return make_selection(whole.name, ranks, {**whole.plan, "first": count})


def first_images(whole: Selection, count: int, name: str) -> Selection:
    """The first `count` images of a synthetic dataset, those of its first conditions."""
    if whole.rows < count:
        raise UserError(f"{name}: there are {whole.rows:,} images, {count:,} are required")
    if whole.rows == count:
        return whole
    # Slides of a synthetic dataset are in the order of its images.
    ranks = {
        slide_id: slide_ranks[: max(count - int(start), 0)]
        for (slide_id, slide_ranks), start in zip(whole.items(), whole.offsets, strict=False)
    }
    return make_selection(whole.name, ranks, {**whole.plan, "first": count})
