"""The memorisation protocol: is a generated tile nearer to a training tile than a new real one is?

Generated tiles are compared with both validation sets: val-in comes from the training slides, so
that nearness to a slide counts for both; val-out from slides never seen.
"""

from collections.abc import Iterator
from typing import TypedDict

import numpy as np
import numpy.typing as npt

from common.console import open_meter
from common.errors import UserError
from common.torch_processes import choose_device
from evaluate.generate.condition_source import guiding_fingerprint
from evaluate.generate.plan import source_order
from evaluate.metrics import feature_likelihood_divergence
from evaluate.metrics.neighbours import Neighbours
from evaluate.protocols.cells import Measurer, OpenSide
from evaluate.protocols.nearest import copying_test, distance_ratios, nearest_in_blocks
from evaluate.protocols.plan import Seen, all_images
from evaluate.protocols.store import digest_array

Features = npt.NDArray[np.floating]
Found = dict[str, object]
"""Plain numbers, as JSON values."""

_BLOCK_ROWS = 16_384
_SAMPLE_ROWS = 100_000
"""Of more training tiles FLD and C_T use this many, drawn in a fixed order."""
_BINS = 60
_VALIDATION = ("val_in", "val_out")
_QUANTILES = {"q01": 0.01, "q05": 0.05, "median": 0.5, "q95": 0.95, "q99": 0.99}


class Likelihood(TypedDict):
    """FLD's gap over its seeds, and the memorisation scores ``[n]`` of the `rows` ``[n]``."""

    gap: float
    gap_std: float
    warnings: list[str]
    score: list[float]
    rows: list[int]


def measure_memorisation(measurer: Measurer) -> list[Found]:
    """One entry per encoder and dataset of images: distances, tests, the most suspicious tiles."""
    protocol = measurer.protocol
    if len(protocol.columns) != 2 or not protocol.train:
        raise UserError("memorisation needs columns=[val-in,val-out] and train=SET")
    searches = []
    images = all_images(protocol)
    with open_meter("memorisation", len(protocol.encoders) * len(images), "searches") as shown:
        for encoder in protocol.encoders:
            for source in images:
                searches.append(CopySearch(measurer, encoder, source.key).search_copies())
                shown.advance(1, f"{encoder}, {source.key}")
    return searches


class CopySearch:
    """One encoder's search of the training tiles for the neighbours of one source's images."""

    def __init__(self, measurer: Measurer, encoder: str, source: str) -> None:
        self._measurer, self._protocol, self._encoder = measurer, measurer.protocol, encoder
        self._source = source
        self._device = choose_device(self._protocol.device, setting="device=").type
        train = Seen(self._protocol.train)
        self._selection = measurer.sources.select_tiles(train.source).used
        self._store = measurer.sources.feature_store(train, encoder)

    def search_copies(self) -> Found:
        """Everything the panel shows, as plain numbers."""
        names = dict(zip(("generated", *_VALIDATION), (self._source, *self._protocol.columns),
                         strict=True))  # fmt: skip
        sides = {
            key: self._measurer.open_side(Seen(name), self._encoder) for key, name in names.items()
        }
        nearest = {key: self._find_nearest(opened) for key, opened in sides.items()}
        # FLD and C_T fit models to the training tiles: a fixed sample bounds their cost.
        order = source_order(self._selection.rows, self._selection.content_hash)
        sample = self._train_rows(np.sort(order[:_SAMPLE_ROWS]))
        likelihood = {key: self._measure_likelihood(sample, sides, key) for key in sides}
        among_training = self._own_distances(nearest["generated"].indices[:, 0])
        distances = {key: neighbours.distances[:, 0] for key, neighbours in nearest.items()}
        compared = {key: (sides[key].side.features, distances[key]) for key in sides}
        return {
            "encoder": self._encoder,
            "source": self._source,
            "train": {"set": self._protocol.train, "rows": self._selection.rows,
                      "sample": len(sample)},
            "names": names,
            "sets": {key: _summarise_set(key, nearest[key], likelihood[key]) for key in sides},
            "authenticity": float((distances["generated"] > among_training).mean()),
            "copying_test": {
                key: copying_test(sample, compared["generated"], compared[key])
                for key in _VALIDATION
            },
            "suspicious_share": _suspicious_share(nearest),
            "top": self._most_suspicious(
                sides["generated"], nearest["generated"], likelihood["generated"]
            ),
        }  # fmt: skip

    def _find_nearest(self, opened: OpenSide) -> Neighbours:
        inputs = {"metric": "nearest", "sides": {"queries": opened.sum},
                  "train": self.train_fingerprint(), "k": 2}  # fmt: skip

        def find_neighbours() -> object:
            neighbours = nearest_in_blocks(
                opened.side.features, self._train_blocks(), k=2, device=self._device
            )
            return {
                "indices": neighbours.indices.tolist(),
                "distances": neighbours.distances.tolist(),
            }

        kept = self._measurer.store.get_or_compute(inputs, find_neighbours)
        return Neighbours(np.array(kept["indices"], np.int64), np.array(kept["distances"]))

    def train_fingerprint(self) -> list[object]:
        """What names the training features without reading them all: selection and encoder."""
        record, dataset = self._store.record, self._store.dataset
        return [str(dataset.root.resolve()), guiding_fingerprint(dataset),
                self._selection.content_hash, record.get("weights_sha256"), record.get("view"),
                record.get("compute_dtype"), record["tile_px"], self._encoder]  # fmt: skip

    def _train_blocks(self) -> Iterator[Features]:
        """The training features in the selection's order, some 16,384 rows at a time."""
        pending: list[Features] = []
        for slide_id, ranks in self._selection.items():
            pending.append(self._store.read(slide_id, ranks))
            if sum(map(len, pending)) >= _BLOCK_ROWS:
                yield np.concatenate(pending)
                pending = []
        if pending:
            yield np.concatenate(pending)

    def _train_rows(self, rows: npt.NDArray[np.int64]) -> Features:
        """Training features [n, d] by their place in the selection."""
        slides = self._slides_of(rows)
        result: Features = np.empty((len(rows), int(self._store.record["dim"])), np.float32)
        for slide in np.unique(slides):
            where = np.flatnonzero(slides == slide)
            ranks = self._selection.ranks[rows[where]]
            result[where] = self._store.read(self._selection.slide_ids[slide], ranks)
        return result

    def _slides_of(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.intp]:
        return np.searchsorted(self._selection.offsets, rows, side="right") - 1

    def _own_distances(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        """The distance of each of these training tiles to its own nearest training tile."""
        unique, member = np.unique(rows, return_inverse=True)
        inputs = {"metric": "own nearest", "rows": digest_array(unique),
                  "train": self.train_fingerprint()}  # fmt: skip

        def find_distances() -> object:
            queries = self._train_rows(unique)
            neighbours = nearest_in_blocks(queries, self._train_blocks(), k=2, device=self._device)
            # The nearest is the tile itself, unless a copy of it comes before it.
            is_itself = neighbours.indices[:, 0] == unique
            return np.where(
                is_itself, neighbours.distances[:, 1], neighbours.distances[:, 0]
            ).tolist()

        return np.array(self._measurer.store.get_or_compute(inputs, find_distances))[member]

    def _measure_likelihood(
        self, sample: Features, sides: dict[str, OpenSide], key: str
    ) -> Likelihood:
        """FLD's gap and memorisation score of one of the three sets; val-out is the test set.

        So a gap of val-out itself, Gaussians on the very rows that they are tested on, says
        nothing; `_summarise_set` leaves it out.
        """
        settings = self._protocol.settings
        inputs = {"metric": "memorisation score", "sides": {k: sides[k].sum for k in
                  (key, "val_out")}, "train": digest_array(sample),
                  "seeds": list(settings.fld_seeds), "dtype": settings.fld_dtype,
                  "cap": settings.fld_max_generated}  # fmt: skip

        def fit_likelihood() -> object:
            divergence = feature_likelihood_divergence(
                sample, sides["val_out"].side.features, sides[key].side.features, mode="gap",
                seeds=settings.fld_seeds,
                dtype="float32" if settings.fld_dtype == "float32" else "float64",
                max_generated=settings.fld_max_generated,
            )  # fmt: skip
            return {"gap": divergence.value, "gap_std": divergence.std,
                    "warnings": list(divergence.warnings),
                    "score": divergence.memorisation.tolist(),
                    "rows": divergence.memorisation_rows.tolist()}  # fmt: skip

        kept: Likelihood = self._measurer.store.get_or_compute(inputs, fit_likelihood)
        return kept

    def _most_suspicious(
        self, opened: OpenSide, nearest: Neighbours, likelihood: Likelihood
    ) -> dict[str, list[Found]]:
        """The most suspicious images by the ratio of distances and by FLD's score."""
        # Scores exist for a sample of the images alone; ratios for all of them.
        ratios = distance_ratios(nearest)
        by_score = np.array(likelihood["rows"])[np.argsort(likelihood["score"])[::-1]]
        score = dict(zip(likelihood["rows"], likelihood["score"], strict=True))
        orders = {"ratio": np.argsort(ratios, kind="stable"), "score": by_score}
        return {
            name: [
                self._describe_image(opened, int(row), nearest)
                | {"ratio": float(ratios[row]), "score": score.get(int(row))}
                for row in order[: self._protocol.top]
            ]
            for name, order in orders.items()
        }

    def _describe_image(self, opened: OpenSide, row: int, nearest: Neighbours) -> Found:
        """An image, its guide, its nearest training tile and the next of that tile's slide."""
        side = opened.side
        place = int(np.searchsorted(side.selection.offsets, row, side="right")) - 1
        sources = side.sources
        first = int(nearest.indices[row, 0])
        slide = int(self._slides_of(np.array([first]))[0])
        return {
            "generated": [side.selection.slide_ids[place], int(side.selection.ranks[row])],
            "guide": None if sources is None
            else [str(sources.slides[row]), int(sources.ranks[row])],
            "nearest": [self._selection.slide_ids[slide], int(self._selection.ranks[first])],
            "same_slide": self._next_of_slide(side.features[row], slide, first),
            "distance": float(nearest.distances[row, 0]),
        }  # fmt: skip

    def _next_of_slide(self, query: Features, slide: int, first: int) -> list[object] | None:
        """The next nearest tile of the slide that the nearest one is of."""
        start, stop = self._selection.offsets[slide : slide + 2]
        if stop - start < 2:
            return None
        ranks = self._selection.ranks[start:stop]
        rows = self._store.read(self._selection.slide_ids[slide], ranks)
        distances = np.linalg.norm(rows.astype(np.float64) - query, axis=1)
        distances[first - start] = np.inf  # the nearest tile itself is already shown
        best = int(distances.argmin())
        return [self._selection.slide_ids[slide], int(ranks[best]), float(distances[best])]


def _summarise_set(key: str, nearest: Neighbours, likelihood: Likelihood) -> Found:
    """Quantiles and histograms of one set's distances, ratios and scores."""
    ratios, is_test_set = distance_ratios(nearest), key == "val_out"
    counts, edges = np.histogram(ratios, bins=_BINS, range=(0.0, 1.0))
    return {
        "n": len(ratios),
        "distance": _summarise_values(nearest.distances[:, 0]),
        "ratio": _summarise_values(ratios),
        "score": _summarise_values(np.array(likelihood["score"])),
        "gap": None if is_test_set else likelihood["gap"],
        "gap_std": None if is_test_set else likelihood["gap_std"],
        "warnings": likelihood["warnings"],
        "ratio_histogram": {"counts": counts.tolist(), "edges": edges.tolist()},
    }


def _summarise_values(values: npt.NDArray[np.floating]) -> dict[str, float]:
    return {name: float(np.quantile(values, share)) for name, share in _QUANTILES.items()}


def _suspicious_share(nearest: dict[str, Neighbours]) -> dict[str, float]:
    """Share of images with a smaller ratio than 99 % of a validation set; 0.01 is to expect."""
    made = distance_ratios(nearest["generated"])
    return {
        key: float((made < np.quantile(distance_ratios(nearest[key]), 0.01)).mean())
        for key in _VALIDATION
    }
