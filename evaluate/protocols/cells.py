"""The cells of a protocol, measured: sides are read, metrics computed, results kept."""

from collections import OrderedDict
from dataclasses import asdict, dataclass, replace
from functools import partial

import numpy as np

from common.errors import UserError
from common.torch_processes import choose_device
from evaluate.compare.inputs import TileRows, find_faults, stopped_metrics
from evaluate.compare.measure import make_pair, real_halves
from evaluate.compare.sides import FeatureSide, slide_attribute, source_features
from evaluate.metrics.likelihood import METRIC as LIKELIHOOD
from evaluate.metrics.likelihood import LikelihoodBaseline, likelihood_result
from evaluate.metrics.metric import FeaturePair, Metric, MetricSettings
from evaluate.metrics.registry import METRICS, describe_failure, needed_features
from evaluate.protocols.comparable import check_sides, number_basis
from evaluate.protocols.config import Protocol
from evaluate.protocols.controls import grouped_distances, halves_by_label, neighbour_cosines
from evaluate.protocols.plan import Cell, Seen, guiding_set
from evaluate.protocols.sources import ProtocolSources
from evaluate.protocols.store import ResultStore, digest_array

Results = dict[str, object]
"""Results by metric, or one metric's result, as JSON values."""
_OPEN_SIDES = 4
"""Of 100,000 tiles a side of 1536 features is 0.6 GB."""


@dataclass(frozen=True)
class OpenSide:
    """A side with the sum of its features, which names results."""

    side: FeatureSide
    sum: str


class Measurer:
    """Measures cells; keeps a few sides open, since neighbouring cells share them."""

    def __init__(self, protocol: Protocol, sources: ProtocolSources, store: ResultStore) -> None:
        self.protocol, self.sources, self.store = protocol, sources, store
        self._device = choose_device(protocol.device, setting="device=").type
        self._sides: OrderedDict[tuple[Seen, str], OpenSide] = OrderedDict()

    def open_side(self, seen: Seen, encoder: str) -> OpenSide:
        """A side, read or still open."""
        key = (seen, encoder)
        if key not in self._sides:
            tiles, features_of = self.sources.select_tiles(seen.source), self.sources.feature_store
            store = features_of(seen, encoder)
            features = np.asarray(store.read_selection(tiles.used))
            side = FeatureSide(tiles.dataset, tiles.used, store, features)
            self._sides[key] = OpenSide(side, digest_array(features))
            if len(self._sides) > _OPEN_SIDES:
                self._sides.popitem(last=False)
        self._sides.move_to_end(key)
        return self._sides[key]

    def cell_basis(self, cell: Cell) -> Results:
        """What the cell's numbers rest on, from records and selections alone.

        Raises `UserError` where the two sides were made by different encoders.
        """
        sides = cell.compared_sides()
        rows = {
            f"n_{name}": self.sources.select_tiles(s.source).used.rows for name, s in sides.items()
        }
        real, generated = (
            self.sources.feature_store(sides[name], cell.encoder).record
            for name in ("real", "generated")
        )
        check_sides(real, generated, cell.place)
        return number_basis(real, generated, rows | {"k": self.protocol.settings.k})

    def measure_cell(self, cell: Cell) -> Results:
        """The cell's results by metric; each is looked up before it is computed."""
        if cell.control in ("floor-tile", "floor-patient", "neighbour"):
            return self._measure_real(cell)
        opened = {
            name: self.open_side(s, cell.encoder) for name, s in cell.compared_sides().items()
        }
        pair = self._make_pair(cell, opened)
        # Widths are of models, whose numbers are compared; not of floors and ceilings.
        settings = self.protocol.settings
        settings = settings if cell.kind == "model" else replace(settings, draws=0)
        results: Results = {}
        failed: dict[str, str] = {}
        for metric in (METRICS[name] for name in cell.metrics):
            is_likelihood = metric is LIKELIHOOD
            compute = partial(self._measure_likelihood, opened) if is_likelihood else metric.compute
            inputs = self._result_inputs(metric, pair, opened, settings)
            # Hours of other metrics and cells are not lost for one that cannot be computed.
            try:
                results[metric.name] = self.store.get_or_compute(
                    inputs, partial(compute, pair, settings)
                )
            except (UserError, ValueError, ArithmeticError, RuntimeError, MemoryError) as error:
                failed[metric.name] = self._describe_failure(metric, opened, error)
        if failed:
            results["failed"] = failed
        if cell.kind == "model" and "groups" in self.protocol.plots:
            results["groups"] = self._measure_groups(cell, opened)
        return results

    def _describe_failure(
        self, metric: Metric, opened: dict[str, OpenSide], error: Exception
    ) -> str:
        """Why a metric has no value, with slide, rank and file where rows are the cause."""
        sides = {name: TileRows.of_side(name, one.side) for name, one in opened.items()}
        return stopped_metrics([metric], find_faults(sides)).get(
            metric.name, describe_failure(error)
        )

    def _make_pair(self, cell: Cell, opened: dict[str, OpenSide]) -> FeaturePair:
        generated, real = opened["generated"].side, opened["real"].side
        guide = guiding_set(self.protocol, cell.generated.source)
        guide_dataset = self.sources.select_tiles(guide).dataset if guide else real.dataset
        sources = None
        if "sources" in needed_features(cell.metrics):
            seen = Seen(guide, cell.real.view, cell.real.px)
            guiding = self.sources.feature_store(seen, cell.encoder)
            sources, reason = source_features(generated, guiding)
            if sources is None:
                raise UserError(f"{cell.label}, {cell.column}: {reason}")
        train = opened["train"].side if "train" in opened else None
        return make_pair(real, generated, guide_dataset, sources, train, self._device)

    def _result_inputs(
        self,
        metric: Metric,
        pair: FeaturePair,
        opened: dict[str, OpenSide],
        settings: MetricSettings,
    ) -> Results:
        """Everything that a metric's result depends on."""
        real = {f"real {key}": labels for key, labels in (pair.real_clusters or {}).items()}
        # Labels count only where they are drawn: others would split equal results.
        is_clustered = metric.reads_clusters and settings.draws
        clusters = (pair.clusters or {}) | real if is_clustered else {}
        return self._device_inputs(metric) | {
            "metric": metric.name,
            "settings": asdict(settings) | {"fld_seeds": list(settings.fld_seeds)},
            "sides": {name: side.sum for name, side in opened.items()},
            "sources": digest_array(pair.sources) if "sources" in metric.needs else "",
            "clusters": {key: digest_array(labels) for key, labels in clusters.items()},
        }

    def _device_inputs(self, metric: Metric) -> Results:
        """The device, where a metric's rounding depends on it."""
        is_named = metric.depends_on_device and self._device != "cpu"
        return {"device": self._device} if is_named else {}

    def _measure_likelihood(
        self, opened: dict[str, OpenSide], pair: FeaturePair, settings: MetricSettings
    ) -> Results:
        """FLD with its baseline looked up first: it depends on the real sets alone."""
        inputs = self._device_inputs(LIKELIHOOD) | {
            "metric": f"{LIKELIHOOD.name} baseline",
            "sides": {name: opened[name].sum for name in ("real", "train")},
            "n_generated": len(pair.generated),
            "cap": settings.fld_max_generated,
            "seeds": list(settings.fld_seeds),
            "dtype": settings.fld_dtype,
        }
        computed: Results = {}

        def compute_baseline() -> object:
            computed.update(likelihood_result(pair, settings))
            return computed["baseline"]

        # A baseline that had to be computed came with the result itself.
        kept = self.store.get_or_compute(inputs, compute_baseline)
        if computed:
            return computed
        nll = {int(seed): value for seed, value in kept["nll"].items()}
        return likelihood_result(pair, settings, LikelihoodBaseline(nll, kept["fingerprint"]))

    def _measure_real(self, cell: Cell) -> Results:
        """A control that compares real tiles with real tiles of the same set."""
        opened = self.open_side(cell.real, cell.encoder)
        side, settings = opened.side, self.protocol.settings
        slides = labels = side.row_slides
        if cell.control == "floor-patient":
            labels = slide_attribute(side.dataset, slides, "patient")
        compute = {
            "floor-tile": lambda: real_halves(side, settings, self._device),
            "floor-patient": lambda: halves_by_label(side.features, labels, settings, self._device),
            "neighbour": lambda: neighbour_cosines(side.features, slides, seed=settings.seed),
        }[cell.control]
        inputs = {"metric": cell.control, "sides": {"real": opened.sum},
                  "seed": settings.seed, "clusters": digest_array(labels)}  # fmt: skip
        # Cosines do not depend on k or the cap: their file is shared by all values.
        if cell.control != "neighbour":
            inputs |= {"k": settings.k, "max_generated": settings.max_generated}
        result: Results = self.store.get_or_compute(inputs, compute) or {}
        is_cosine = cell.control == "neighbour" and result
        return {"cosine_similarity": result} if is_cosine else result

    def _measure_groups(self, cell: Cell, opened: dict[str, OpenSide]) -> Results:
        """Distances within each group of slides, by the kind of group."""
        real, generated = opened["real"].side, opened["generated"].side
        guide = guiding_set(self.protocol, cell.generated.source)
        sources = generated.source_slides()
        if not guide or sources is None:
            return {}
        guide_dataset, least = self.sources.select_tiles(guide).dataset, self.protocol.group_tiles
        groups: Results = {}
        for kind in self.protocol.groups:
            # A generated tile belongs to the group of the tile that guided it.
            labels = (
                slide_attribute(real.dataset, real.row_slides, kind),
                slide_attribute(guide_dataset, sources, kind),
            )
            inputs = {"metric": f"by {kind}", "least": least,
                      "sides": {name: opened[name].sum for name in ("real", "generated")},
                      "clusters": [digest_array(values) for values in labels]}  # fmt: skip
            groups[kind] = self.store.get_or_compute(
                inputs,
                partial(grouped_distances, real.features, generated.features, labels, least=least),
            )
        return groups
