"""The cells of a protocol, measured: sides are read, metrics taken, results kept."""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from common.errors import UserError
from evaluate.compare.measure import make_pair, real_halves
from evaluate.compare.sides import FeatureSide, slide_attribute, source_features
from evaluate.metrics.likelihood import METRIC as LIKELIHOOD
from evaluate.metrics.likelihood import LikelihoodBaseline, likelihood_result
from evaluate.metrics.metric import FeaturePair, Metric, MetricSettings
from evaluate.metrics.registry import METRICS
from evaluate.processes import choose_device
from evaluate.protocols.comparable import basis, check_sides
from evaluate.protocols.config import Protocol
from evaluate.protocols.controls import grouped_distances, halves_by_label, neighbour_cosines
from evaluate.protocols.plan import Cell, Seen, guiding_set, needs_sources
from evaluate.protocols.store import ResultStore, digest
from evaluate.protocols.work import Workshop
from pipeline.dataset import Selection
from pipeline.dataset.features import FeatureStore

_OPEN_SIDES = 4
"""Of 100,000 tiles a side of 1536 features is 0.6 GB."""


@dataclass(frozen=True)
class OpenSide:
    """A side with the sum of its features, which names results."""

    side: FeatureSide
    sum: str


class Measurer:
    """Measures cells; keeps a few sides open, since neighbouring cells share them."""

    def __init__(self, protocol: Protocol, workshop: Workshop, store: ResultStore) -> None:
        self._protocol, self._workshop, self._store = protocol, workshop, store
        self._device = choose_device(protocol.device).type
        self._sides: OrderedDict[tuple[Seen, str], OpenSide] = OrderedDict()

    def feature_store(self, seen: Seen, encoder: str) -> FeatureStore:
        """The features of a source as seen."""
        tiles = self._workshop.tiles(seen.source)
        return FeatureStore(
            tiles.dataset, tile_px=seen.px or tiles.px, encoder=encoder, view=seen.view
        )

    def side(self, seen: Seen, encoder: str) -> OpenSide:
        """A side, read or still open."""
        key = (seen, encoder)
        if key not in self._sides:
            tiles, store = self._workshop.tiles(seen.source), self.feature_store(seen, encoder)
            features = np.asarray(store.read_selection(tiles.used))
            side = FeatureSide(tiles.dataset, tiles.used, store, features)
            self._sides[key] = OpenSide(side, digest(features))
            if len(self._sides) > _OPEN_SIDES:
                self._sides.popitem(last=False)
        self._sides.move_to_end(key)
        return self._sides[key]

    def selection(self, seen: Seen) -> Selection:
        """The tiles of a source that are used."""
        return self._workshop.tiles(seen.source).used

    def kept(self, inputs: dict[str, Any], compute: Callable[[], Any]) -> Any:
        """A result of these inputs, read where it stands and computed where it does not."""
        return self._store.get(inputs, compute)

    def basis(self, cell: Cell) -> dict[str, Any]:
        """What the cell's numbers rest on, from records and selections alone.

        Raises `UserError` where the two sides were made by different encoders.
        """
        stores = [self.feature_store(one, cell.encoder) for one in (cell.real, cell.generated)]
        records = [store.record for store in stores]
        check_sides(records[0], records[1], f"{cell.label}, {cell.encoder}, {cell.column}")
        rows = [self._workshop.tiles(s.source).used.rows for s in (cell.real, cell.generated)]
        settings = self._protocol.settings
        n = {"n_real": rows[0], "n_generated": rows[1], "k": settings.k}
        if cell.train is not None:
            n["n_train"] = self._workshop.tiles(cell.train.source).used.rows
        return basis(records[0], records[1], n)

    def measure(self, cell: Cell) -> dict[str, Any]:
        """The cell's results by metric; each is looked for before it is computed."""
        if cell.control in ("floor-tile", "floor-patient", "neighbour"):
            return self._control(cell)
        opened = self._open(cell)
        pair = self._pair(cell, opened)
        settings = self._settings(cell)
        found = {}
        for metric in (METRICS[name] for name in cell.metrics):
            inputs = self._inputs(metric, pair, opened, settings)
            compute = self._likelihood(opened) if metric is LIKELIHOOD else metric.compute
            found[metric.name] = self._store.get(inputs, partial(compute, pair, settings))
        if cell.kind == "model" and "groups" in self._protocol.plots:
            found["groups"] = self._groups(cell, opened)
        return found

    def _open(self, cell: Cell) -> dict[str, OpenSide]:
        sides = {"real": cell.real, "generated": cell.generated}
        if cell.train is not None:
            sides["train"] = cell.train
        return {name: self.side(seen, cell.encoder) for name, seen in sides.items()}

    def _settings(self, cell: Cell) -> MetricSettings:
        """Widths are taken of models, whose numbers are compared; not of floors and ceilings."""
        settings = self._protocol.settings
        return settings if cell.kind == "model" else replace(settings, draws=0)

    def _pair(self, cell: Cell, opened: dict[str, OpenSide]) -> FeaturePair:
        generated, real = opened["generated"].side, opened["real"].side
        guide = guiding_set(self._protocol, cell.generated.source)
        holder = self._workshop.tiles(guide).dataset if guide else real.dataset
        sources = None
        if needs_sources(cell.metrics):
            seen = Seen(guide, cell.real.view, cell.real.px)
            sources, reason = source_features(generated, self.feature_store(seen, cell.encoder))
            if sources is None:
                raise UserError(f"{cell.label}, {cell.column}: {reason}")
        train = opened["train"].side if "train" in opened else None
        return make_pair(real, generated, holder, sources, train, self._device)

    def _inputs(
        self,
        metric: Metric,
        pair: FeaturePair,
        opened: dict[str, OpenSide],
        settings: MetricSettings,
    ) -> dict[str, Any]:
        """Everything that a metric's result depends on."""
        labels = {**(pair.clusters or {})}
        real = {f"real {key}": value for key, value in (pair.real_clusters or {}).items()}
        clustered = metric.reads_clusters and settings.draws
        return self._rounding(metric) | {
            "metric": metric.name,
            "settings": asdict(settings) | {"fld_seeds": list(settings.fld_seeds)},
            "sides": {name: one.sum for name, one in opened.items()},
            "sources": digest(pair.sources) if "sources" in metric.needs else "",
            "clusters": {key: digest(value) for key, value in (labels | real).items()}
            if clustered
            else {},
        }

    def _rounding(self, metric: Metric) -> dict[str, Any]:
        """The device, where a metric's rounding depends on it."""
        is_named = metric.depends_on_device and self._device != "cpu"
        return {"device": self._device} if is_named else {}

    def _likelihood(
        self, opened: dict[str, OpenSide]
    ) -> Callable[[FeaturePair, MetricSettings], dict[str, Any]]:
        """FLD with its baseline looked for first: it depends on the real sets alone."""

        def compute_with_baseline(pair: FeaturePair, settings: MetricSettings) -> dict[str, Any]:
            inputs = self._rounding(LIKELIHOOD) | {
                "metric": f"{LIKELIHOOD.name} baseline",
                "sides": {name: opened[name].sum for name in ("real", "train")},
                "n_generated": len(pair.generated),
                "cap": settings.fld_max_generated,
                "seeds": list(settings.fld_seeds),
                "dtype": settings.fld_dtype,
            }
            known: list[dict[str, Any]] = []

            def compute() -> dict[str, Any]:
                known.append(likelihood_result(pair, settings))
                return dict(known[0]["baseline"])

            kept = self._store.get(inputs, compute)
            if known:
                return known[0]
            nll = {int(seed): value for seed, value in kept["nll"].items()}
            return likelihood_result(pair, settings, LikelihoodBaseline(nll, kept["fingerprint"]))

        return compute_with_baseline

    def _control(self, cell: Cell) -> dict[str, Any]:
        opened = self.side(cell.real, cell.encoder)
        side, settings = opened.side, self._protocol.settings
        slides = labels = side.own_slides
        if cell.control == "floor-patient":
            labels = slide_attribute(side.dataset, slides, "patient")

        def compute() -> Any:
            if cell.control == "floor-tile":
                return real_halves(side, settings, self._device)
            if cell.control == "neighbour":
                return neighbour_cosines(side.features, slides, seed=settings.seed)
            return halves_by_label(side.features, labels, settings, self._device)

        inputs = {"metric": cell.control, "sides": {"real": opened.sum},
                  "seed": settings.seed, "clusters": digest(labels)}  # fmt: skip
        if cell.control != "neighbour":
            inputs |= {"k": settings.k, "max_generated": settings.max_generated}
        found = self._store.get(inputs, compute) or {}
        return {"cosine_similarity": found} if cell.control == "neighbour" and found else found

    def _groups(self, cell: Cell, opened: dict[str, OpenSide]) -> dict[str, Any]:
        real, generated = opened["real"].side, opened["generated"].side
        guide = guiding_set(self._protocol, cell.generated.source)
        sources = generated.slides()
        if not guide or sources is None:
            return {}
        holder, least = self._workshop.tiles(guide).dataset, self._protocol.group_tiles
        found = {}
        for kind in self._protocol.groups:
            labels = (
                slide_attribute(real.dataset, real.own_slides, kind),
                slide_attribute(holder, sources, kind),
            )
            inputs = {"metric": f"by {kind}", "least": least,
                      "sides": {name: opened[name].sum for name in ("real", "generated")},
                      "clusters": [digest(one) for one in labels]}  # fmt: skip
            found[kind] = self._store.get(
                inputs,
                partial(grouped_distances, real.features, generated.features, labels, least=least),
            )
        return found
