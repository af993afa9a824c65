"""One side of a comparison: a selection of a dataset, its features, whose tiles they are."""

import shlex
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt

from common.errors import UserError
from common.text import first_forms, same_identity_key
from evaluate.compare.provenance import TileFacts, find_tile_facts
from evaluate.generate.condition_source import foreign_guidance
from evaluate.metrics.features import count_shared
from pipeline.dataset import (
    Dataset,
    Selection,
    identity_value,
    open_dataset,
    read_candidates,
    read_selection,
    read_slides,
)
from pipeline.dataset.features import FeatureRecord, FeatureStore, encoder_file

Features = npt.NDArray[np.float32]
Labels = npt.NDArray[np.str_]


@dataclass(frozen=True)
class FeatureSide:
    """One side of a comparison: a selection of a dataset, and its features float32 ``[n, d]``."""

    dataset: Dataset
    selection: Selection
    store: FeatureStore
    features: Features

    @classmethod
    def open_selection(
        cls,
        root: Path,
        selection_name: str,
        encoder: str,
        *,
        like: "FeatureSide | None",
        view: str = "",
        tile_px: int | None = None,
    ) -> "FeatureSide":
        """Read the CLS features float32 ``[n, d]`` of a selection; `tile_px` in pixels.

        Raises `UserError` naming the `cache` command where they are missing, and where they were
        made otherwise than those of `like`.
        """
        dataset = open_dataset(root)
        selection = read_selection(dataset, selection_name)
        # Both sides need the same weights, so the advice for a missing cache names them.
        store = open_store(
            dataset, selection_name, encoder, view=view, tile_px=tile_px,
            weights=like.store.record.get("weights") if like else None,
        )  # fmt: skip
        if like is not None:
            check_comparable(like.store, store)
        return cls(dataset, selection, store, np.asarray(store.read_selection(selection)))

    def describe_side(self) -> dict[str, object]:
        """The side's entry in results.json."""
        return {
            "dataset": str(self.dataset.root),
            "selection": self.selection.name,
            "selection_sha256": self.selection.content_hash,
            "rows": self.selection.rows,
            "slides": len(self.selection.slide_ids),
            "tiles": self.tile_facts.described,
        }

    @cached_property
    def tile_facts(self) -> TileFacts:
        """What the side's tiles are, by their files and pixels."""
        return find_tile_facts(self.dataset, self.selection, int(self.store.record["tile_px"]))

    def count_equal(self, other: "FeatureSide") -> int:
        """How many tiles of the other side are tiles of this one, by pixels or by features.

        Features tell where tiles are gone; equal pixels may differ in them by rounding.
        """
        equal = count_shared(self.features, other.features)
        keys = self.tile_facts.keys, other.tile_facts.keys
        if keys[0] is not None and keys[1] is not None:
            equal = max(equal, int(np.isin(keys[1], keys[0]).sum()))
        return equal

    @cached_property
    def row_slides(self) -> Labels:
        """The slide of each row ``[n]``."""
        counts = np.diff(self.selection.offsets)
        return np.repeat(np.array(self.selection.slide_ids, dtype=np.str_), counts)

    @cached_property
    def sources(self) -> "RowSources | None":
        """The real tile behind each row ``[n]`` of a synthetic dataset; None if one has none."""
        names: list[str | None] = []
        ranks: list[npt.NDArray[np.int64]] = []
        for slide_id, rows in self.selection.items():
            table = read_candidates(self.dataset, slide_id)
            if "source_slide_id" not in table.column_names:
                raise UserError(
                    f"{self.dataset.root} is no synthetic dataset: its candidates have no "
                    "source_slide_id; give one that `python -m evaluate generate` made"
                )
            picked = table.take(rows)
            names.extend(picked["source_slide_id"].to_pylist())
            ranks.append(picked["source_rank"].to_numpy().astype(np.int64))
        # A dataset is guided as a whole: one image without a source means none has one.
        if None in names:
            return None
        return RowSources(np.array(names, dtype=np.str_), np.concatenate(ranks))

    def source_slides(self) -> Labels | None:
        """The real slide ``[n]`` that each row is of or was made from; None where there is none."""
        if not self.is_generated:
            return self.row_slides
        return None if self.sources is None else self.sources.slides

    @cached_property
    def is_generated(self) -> bool:
        """Whether the rows are of a synthetic dataset."""
        first = self.selection.slide_ids[0]
        return "source_slide_id" in read_candidates(self.dataset, first).column_names


@dataclass(frozen=True)
class RowSources:
    """Slide and rank ``[m]`` of the source tile of each generated row."""

    slides: Labels
    ranks: npt.NDArray[np.int64]


def slide_attribute(dataset: Dataset, slides: Labels, attribute: str) -> Labels:
    """A column of slides.parquet (patient, site, project) for each of these slides ``[n]``.

    A slide without an entry is its own patient; its other attributes are ''. Values that differ
    only in form are one, in the form that sorts first.
    """
    known = {slide.slide_id: str(getattr(slide, attribute)) for slide in read_slides(dataset)}
    # A name of invisible characters alone is none.
    first = first_forms(known.values()) | {"": ""}
    known = {slide: first[same_identity_key(value)] for slide, value in known.items()}
    # One look-up per slide, not per tile.
    names, member = np.unique(slides, return_inverse=True)
    values = [
        known.get(str(name)) or (str(name) if attribute == "patient" else "") for name in names
    ]
    return np.array(values, dtype=np.str_)[member]


def open_store(
    dataset: Dataset,
    selection_name: str,
    encoder: str,
    *,
    view: str = "",
    tile_px: int | None = None,
    weights: str | None = None,
) -> FeatureStore:
    """The CLS features; where there are none, the message is the command that makes them."""
    tile_px = tile_px or int(identity_value(dataset, "tile_px"))
    if not encoder_file(dataset, tile_px, encoder, view, "cls").exists():
        # The command can be pasted as it is: it repeats weights and view.
        more = f" --weights {shlex.quote(weights)}" if weights else ""
        more += f" --view {view}" if view else ""
        raise UserError(
            f"no cls features of {encoder} in {dataset.root}; make them with `python -m pipeline "
            f"cache --dataset {shlex.quote(str(dataset.root))} --selection {selection_name} "
            f"--encoder {encoder}{more} --tokens none`"
        )
    return FeatureStore(dataset, tile_px=tile_px, encoder=encoder, view=view)


def check_comparable(first: FeatureStore, second: FeatureStore) -> None:
    """Refuse features that were made differently: no distance between them means anything.

    Raises `UserError` naming the first difference, with both values.
    """
    records = [FeatureRecord.parse(store.record) for store in (first, second)]
    for field, one, other in records[0].differs_from(records[1]):
        raise UserError(
            f"features cannot be compared: {field} is {one!r} in {first.dataset.root} and "
            f"{other!r} in {second.dataset.root}; cache both with the same encoder, weights and "
            "dtype"
        )


def source_features(
    generated: FeatureSide, store: FeatureStore
) -> tuple[Features | None, str | None]:
    """Features ``[m, d]`` of each generated tile's source tile, or None and the reason."""
    sources = generated.sources
    if sources is None:
        return None, "the tiles were generated without guidance: no cosine to a source tile"
    foreign = foreign_guidance(generated.dataset, store.dataset)
    if foreign:
        return None, f"no cosine to source tiles: {foreign}"
    rows = np.empty((len(sources.slides), generated.features.shape[1]), np.float32)
    try:
        # Each slide is read once, whatever the order of the images.
        for name in np.unique(sources.slides):
            where = np.flatnonzero(sources.slides == name)
            rows[where] = store.read(str(name), sources.ranks[where])
    except UserError as error:
        return None, f"no cosine to source tiles, whose features were not found: {error}"
    return rows, None
