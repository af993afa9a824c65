"""The memorisation protocol: is a generated tile nearer to a training tile than a new real one is?

Generated tiles are compared with both validation sets: val-in comes from the training slides, so
that nearness to a slide counts for both; val-out from slides never seen.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from common.console import meter
from common.errors import UserError
from common.torch_processes import choose_device
from evaluate.generate.guidance import guiding_mark
from evaluate.generate.plan import source_order
from evaluate.metrics import feature_likelihood_divergence
from evaluate.metrics.neighbours import Neighbours
from evaluate.protocols.cells import Measurer, OpenSide
from evaluate.protocols.config import Protocol
from evaluate.protocols.nearest import copying_test, distance_ratios, nearest_in_blocks
from evaluate.protocols.plan import Seen, all_images
from evaluate.protocols.store import digest
from pipeline.dataset import Selection
from pipeline.dataset.features import FeatureStore

Features = npt.NDArray[np.floating]

_BLOCK_ROWS = 16_384
_SAMPLE_ROWS = 100_000
"""Of more training tiles FLD and C_T take so many, drawn in a fixed order."""
_BINS = 60


def measure_memorisation(protocol: Protocol, measurer: Measurer) -> list[dict[str, Any]]:
    """One entry an encoder and a dataset of images: distances, tests, the most suspicious tiles."""
    if len(protocol.columns) != 2 or not protocol.train:
        raise UserError("memorisation needs columns=[val-in,val-out] and train=SET")
    found = []
    images = all_images(protocol)
    with meter("memorisation", len(protocol.encoders) * len(images), "searches") as shown:
        for encoder in protocol.encoders:
            for one in images:
                found.append(_Search(protocol, measurer, encoder, one.key).run())
                shown.advance(1, f"{encoder}, {one.key}")
    return found


class _Search:
    """One encoder's search of the training tiles for the neighbours of one set of images."""

    def __init__(self, protocol: Protocol, measurer: Measurer, encoder: str, source: str) -> None:
        self._protocol, self._measurer, self._encoder = protocol, measurer, encoder
        self._source, self._device = source, choose_device(protocol.device, setting="device=").type
        self._train = Seen(protocol.train)
        self._selection: Selection = measurer.selection(self._train)
        self._store: FeatureStore = measurer.feature_store(self._train, encoder)

    def run(self) -> dict[str, Any]:
        """Everything the panel shows, as plain numbers."""
        names = {"generated": self._source, "val_in": self._protocol.columns[0],
                 "val_out": self._protocol.columns[1]}  # fmt: skip
        sides = {key: self._measurer.side(Seen(name), self._encoder) for key, name in names.items()}
        nearest = {key: self._nearest(one) for key, one in sides.items()}
        sample = self._sample()
        likelihood = {key: self._likelihood(sample, sides, key) for key in sides}
        own = self._own_distances(nearest["generated"].indices[:, 0])
        distances = {key: found.distances[:, 0] for key, found in nearest.items()}
        made = (sides["generated"].side.features, distances["generated"])
        return {
            "encoder": self._encoder,
            "source": self._source,
            "train": {"set": self._protocol.train, "rows": self._selection.rows,
                      "sample": len(sample)},
            "names": names,
            "sets": {key: _summary(key, nearest[key], likelihood[key]) for key in sides},
            "authenticity": float((distances["generated"] > own).mean()),
            "copying_test": {
                key: copying_test(sample, made, (sides[key].side.features, distances[key]))
                for key in ("val_in", "val_out")
            },
            "suspicious_share": _suspicious_share(nearest),
            "top": self._top(sides["generated"], nearest["generated"], likelihood["generated"]),
        }  # fmt: skip

    def _nearest(self, opened: OpenSide) -> Neighbours:
        inputs = {"metric": "nearest", "sides": {"queries": opened.sum},
                  "train": self._train_mark(), "k": 2}  # fmt: skip

        def compute() -> dict[str, Any]:
            found = nearest_in_blocks(
                opened.side.features, self._blocks(), k=2, device=self._device
            )
            return {"indices": found.indices.tolist(), "distances": found.distances.tolist()}

        kept = self._measurer.kept(inputs, compute)
        return Neighbours(np.array(kept["indices"], np.int64), np.array(kept["distances"]))

    def _train_mark(self) -> list[Any]:
        """What names the training features without reading them all: selection and encoder."""
        record = self._store.record
        root = str(self._store.dataset.root.resolve())
        mark = guiding_mark(self._store.dataset)
        return [root, mark, self._selection.content_hash, record["weights_sha256"], record["view"],
                record["compute_dtype"], record["tile_px"], self._encoder]  # fmt: skip

    def _blocks(self) -> Iterator[Features]:
        """The training features in the selection's order, some 16,384 rows at a time."""
        held: list[Features] = []
        for slide_id, ranks in self._selection.items():
            held.append(self._store.read(slide_id, ranks))
            if sum(map(len, held)) >= _BLOCK_ROWS:
                yield np.concatenate(held)
                held = []
        if held:
            yield np.concatenate(held)

    def _rows(self, rows: npt.NDArray[np.int64]) -> Features:
        """Training features by their place in the selection."""
        slides = self._slides(rows)
        result: Features = np.empty((len(rows), int(self._store.record["dim"])), np.float32)
        for slide in np.unique(slides):
            where = np.flatnonzero(slides == slide)
            ranks = self._selection.ranks[rows[where]]
            result[where] = self._store.read(self._selection.slide_ids[slide], ranks)
        return result

    def _slides(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        found = np.searchsorted(self._selection.offsets, rows, side="right") - 1
        return np.asarray(found, np.int64)

    def _sample(self) -> Features:
        order = source_order(self._selection.rows, self._selection.content_hash)
        return self._rows(np.sort(order[:_SAMPLE_ROWS]))

    def _own_distances(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        """The distance of each of these training tiles to its own nearest training tile."""
        names, member = np.unique(rows, return_inverse=True)
        inputs = {"metric": "own nearest", "rows": digest(names), "train": self._train_mark()}

        def compute() -> list[float]:
            found = nearest_in_blocks(self._rows(names), self._blocks(), k=2, device=self._device)
            itself = found.indices[:, 0] == names
            return list(np.where(itself, found.distances[:, 1], found.distances[:, 0]).tolist())

        return np.array(self._measurer.kept(inputs, compute))[member]

    def _likelihood(self, sample: Features, sides: dict[str, OpenSide], key: str) -> dict[str, Any]:
        """FLD's gap and memorisation score of one of the three sets; val-out is the test set.

        So a gap of val-out itself, Gaussians on the very rows that they are tested on, says
        nothing; `_summary` leaves it out.
        """
        settings = self._protocol.settings
        inputs = {"metric": "memorisation score", "sides": {k: sides[k].sum for k in
                  (key, "val_out")}, "train": digest(sample),
                  "seeds": list(settings.fld_seeds), "dtype": settings.fld_dtype,
                  "cap": settings.fld_max_generated}  # fmt: skip

        def compute() -> dict[str, Any]:
            found = feature_likelihood_divergence(
                sample, sides["val_out"].side.features, sides[key].side.features, mode="gap",
                seeds=settings.fld_seeds,
                dtype="float32" if settings.fld_dtype == "float32" else "float64",
                max_generated=settings.fld_max_generated,
            )  # fmt: skip
            return {"gap": found.value, "gap_std": found.std, "warnings": list(found.warnings),
                    "score": found.memorisation.tolist(),
                    "rows": found.memorisation_rows.tolist()}  # fmt: skip

        return dict(self._measurer.kept(inputs, compute))

    def _top(
        self, opened: OpenSide, nearest: Neighbours, likelihood: dict[str, Any]
    ) -> dict[str, list[dict[str, Any]]]:
        """The most suspicious images by the ratio of distances and by FLD's score."""
        ratios = distance_ratios(nearest)
        by_score = np.array(likelihood["rows"])[np.argsort(likelihood["score"])[::-1]]
        score = dict(zip(likelihood["rows"], likelihood["score"], strict=True))
        orders = {"ratio": np.argsort(ratios, kind="stable"), "score": by_score}
        return {
            name: [
                self._entry(opened, int(row), nearest, float(ratios[row]), score.get(int(row)))
                for row in order[: self._protocol.top]
            ]
            for name, order in orders.items()
        }

    def _entry(
        self, opened: OpenSide, row: int, nearest: Neighbours, ratio: float, score: float | None
    ) -> dict[str, Any]:
        side = opened.side
        place = int(np.searchsorted(side.selection.offsets, row, side="right")) - 1
        sources = side.sources
        first = int(nearest.indices[row, 0])
        slide = int(self._slides(np.array([first]))[0])
        return {
            "generated": [side.selection.slide_ids[place], int(side.selection.ranks[row])],
            "guide": None if sources is None
            else [str(sources.slides[row]), int(sources.ranks[row])],
            "nearest": [self._selection.slide_ids[slide], int(self._selection.ranks[first])],
            "same_slide": self._same_slide(side.features[row], slide, first),
            "distance": float(nearest.distances[row, 0]),
            "ratio": ratio,
            "score": score,
        }  # fmt: skip

    def _same_slide(self, query: Features, slide: int, first: int) -> list[Any] | None:
        """The next nearest tile of the slide that the nearest one is of."""
        start, stop = self._selection.offsets[slide : slide + 2]
        if stop - start < 2:
            return None
        ranks = self._selection.ranks[start:stop]
        rows = self._store.read(self._selection.slide_ids[slide], ranks)
        distances = np.linalg.norm(rows.astype(np.float64) - query, axis=1)
        distances[first - start] = np.inf
        best = int(distances.argmin())
        return [self._selection.slide_ids[slide], int(ranks[best]), float(distances[best])]


def _summary(key: str, nearest: Neighbours, likelihood: dict[str, Any]) -> dict[str, Any]:
    """Quantiles and histograms of one set's distances, ratios and scores."""
    ratios, distances = distance_ratios(nearest), nearest.distances[:, 0]
    return {
        "n": len(ratios),
        "distance": _quantiles(distances),
        "ratio": _quantiles(ratios),
        "score": _quantiles(np.array(likelihood["score"])),
        "gap": None if key == "val_out" else likelihood["gap"],
        "gap_std": None if key == "val_out" else likelihood["gap_std"],
        "warnings": likelihood["warnings"],
        "ratio_histogram": _histogram(ratios, 0.0, 1.0),
    }


_QUANTILES = {"q01": 0.01, "q05": 0.05, "median": 0.5, "q95": 0.95, "q99": 0.99}


def _quantiles(values: npt.NDArray[np.floating]) -> dict[str, float]:
    return {name: float(np.quantile(values, share)) for name, share in _QUANTILES.items()}


def _histogram(values: npt.NDArray[np.floating], low: float, high: float) -> dict[str, Any]:
    counts, edges = np.histogram(values, bins=_BINS, range=(low, high))
    return {"counts": counts.tolist(), "edges": edges.tolist()}


def _suspicious_share(nearest: dict[str, Neighbours]) -> dict[str, float]:
    """Share of images with a smaller ratio than 99 % of a validation set; 0.01 is to expect."""
    made = distance_ratios(nearest["generated"])
    return {
        key: float((made < np.quantile(distance_ratios(nearest[key]), 0.01)).mean())
        for key in ("val_in", "val_out")
    }
