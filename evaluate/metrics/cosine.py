"""Sample-wise cosine similarity: how near each generated image is to the one it was made from.

The CytoSyn report (arXiv 2603.18089, table 2) gives the plain mean. Pathology features share a
large common direction, so that two unrelated tiles are similar already; the mean is therefore
never given without what a shuffled pairing scores, without the common direction, and without
the question whether the source is recognised at all.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

from common.errors import UserError
from common.record import Record
from evaluate.metrics.features import (
    CHUNK_ROWS,
    checked_pair,
    random_subset,
    refuse_zero_rows,
    row_chunks,
    unit_rows,
)
from evaluate.metrics.metric import (
    ContextEntry,
    FeaturePair,
    Metric,
    MetricPlot,
    MetricSettings,
    TableQuantity,
    plain_fields,
    value_at,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_NEAR_TIE = 1e-5  # float32 dot products of unit vectors are nearer to the truth than this
_BLOCK_ROWS = 2048
_HISTOGRAM_BINS = 100


@dataclass(frozen=True)
class CosineSimilarity:
    """Cosine similarities of the pairs (real i, generated i).

    Attributes:
        mean: mean of `values`, in [-1, 1].
        std: their standard deviation, divisor n - 1.
        values: ``[n]`` float64, one per pair.
        null_mean: the mean over pairs shuffled so that nothing is paired with its own source.
        centred_mean: the mean after the real set's mean was taken from both sides; a vector
            that this leaves without length counts as 0.
        retrieval_at_1: the fraction of generated images to which no real image of the pool is
            more similar than their own source.
        retrieval_pool: how many pairs that fraction was taken over.
        n: number of pairs.
        dim: feature dimension.
    """

    mean: float
    std: float
    values: NDArray[np.float64]
    null_mean: float
    centred_mean: float
    retrieval_at_1: float
    retrieval_pool: int
    n: int
    dim: int


def cosine_similarity(
    real: ArrayLike, generated: ArrayLike, *, seed: int = 0, retrieval_pool: int = 10_000
) -> CosineSimilarity:
    """Cosine similarity of each generated image to its source, with its null.

    Args:
        real: ``[n, d]``, the sources.
        generated: ``[n, d]``, row i made from row i of `real`.
        seed: of the shuffled pairing and of the retrieval pool.
        retrieval_pool: sources are searched among this many pairs, drawn without replacement
            where there are more (chance is 1 / pool).

    Raises:
        UserError: fewer than two pairs, NaN or infinity, differing dimensions or lengths, or a
            row of zeros, whose direction is undefined.

    >>> result = cosine_similarity(np.eye(3), 2 * np.eye(3))
    >>> result.mean, result.null_mean, result.retrieval_at_1
    (1.0, 0.0, 1.0)
    """
    sources, images = checked_pair(real, generated, any_scale=True)
    if len(sources) != len(images):
        raise UserError(
            f"{len(sources)} real and {len(images)} generated rows: a sample-wise similarity "
            f"needs one generated row for each real row, in the same order"
        )
    if retrieval_pool < 2:
        raise UserError(f"retrieval_pool is {retrieval_pool}, expected at least 2")
    refuse_zero_rows(sources, "real")
    refuse_zero_rows(images, "generated")
    values = _pair_cosines(sources, images)
    # The real set's mean: what all tissue shares, and would make any two tiles similar.
    centre = np.concatenate([b.sum(axis=0)[None] for b in row_chunks(sources)]).sum(0) / len(
        sources
    )
    pool = random_subset(len(sources), min(retrieval_pool, len(sources)), seed)
    return CosineSimilarity(
        mean=float(values.mean()),
        std=float(values.std(ddof=1)),
        values=values,
        null_mean=float(
            _pair_cosines(sources, images, order=_draw_derangement(len(sources), seed)).mean()
        ),
        centred_mean=float(_pair_cosines(sources, images, centre).mean()),
        retrieval_at_1=_retrieval_at_1(unit_rows(sources[pool]), unit_rows(images[pool])),
        retrieval_pool=len(pool),
        n=len(values),
        dim=sources.shape[1],
    )


def _pair_cosines(
    first: NDArray[np.floating],
    second: NDArray[np.floating],
    centre: NDArray[np.float64] | float = 0.0,
    *,
    order: NDArray[np.int64] | None = None,
) -> NDArray[np.float64]:
    """The cosine of each row pair ``[n]``, the first rows in `order`, `centre` taken from both."""
    result = np.empty(len(first))
    for start in range(0, len(first), CHUNK_ROWS):
        part = slice(start, start + CHUNK_ROWS)
        a = first[part] if order is None else first[order[part]]
        product = unit_rows(a - centre) * unit_rows(second[part] - centre)
        result[part] = np.clip(product.sum(axis=1), -1.0, 1.0)
    return result


def _draw_derangement(n: int, seed: int) -> NDArray[np.int64]:
    """A random permutation of 0..n-1 that leaves nothing in place: one random cycle."""
    # A random order read as a cycle: each row is paired with the one before it.
    cycle = np.random.RandomState(seed).permutation(n)
    partner = np.empty(n, dtype=np.int64)
    partner[cycle] = np.roll(cycle, 1)
    return partner


def _retrieval_at_1(sources: NDArray[np.float64], images: NDArray[np.float64]) -> float:
    """Blocks in float32; rows where the source and its best rival nearly tie, in float64."""
    n = len(sources)
    gallery = sources.astype(np.float32).T
    to_source = (sources * images).sum(axis=1)
    rival = np.empty(n)
    for start in range(0, n, _BLOCK_ROWS):
        rows = np.arange(start, min(start + _BLOCK_ROWS, n))
        similarity = images[rows].astype(np.float32) @ gallery
        # The source itself is no rival.
        similarity[rows - start, rows] = -np.inf
        rival[rows] = similarity.max(axis=1)
    for row in np.flatnonzero(np.abs(rival - to_source) < _NEAR_TIE):
        # The products are summed as `to_source` is, so that a duplicate of the source ties exactly.
        similarity = (sources * images[row]).sum(axis=1)
        similarity[row] = -np.inf
        rival[row] = similarity.max()
    return float((to_source >= rival).mean())


def cosine_histogram(values: NDArray[np.floating]) -> dict[str, object]:
    """Counts of values ``[n]`` in [-1, 1] in a hundred bins, and the bins' edges."""
    counts, edges = np.histogram(values, bins=_HISTOGRAM_BINS, range=(-1.0, 1.0))
    return {"edges": edges.tolist(), "counts": counts.tolist()}


def cosine_result(pair: FeaturePair, settings: MetricSettings) -> dict[str, object]:
    """The metric as plain values, with its settings."""
    if pair.sources is None:
        raise UserError("a cosine to the source needs generated tiles that real ones guided")
    result = cosine_similarity(pair.sources, pair.generated, seed=settings.seed)
    histogram = cosine_histogram(result.values)
    return plain_fields(result) | {"seed": settings.seed, "histogram": histogram}


def shuffled_context(result: Record) -> ContextEntry:
    """The cosine of shuffled pairs, in [-1, 1], a row of controls in tables."""
    return ContextEntry("Sources shuffled", result.number("null_mean"), {"n": result.count("n")})


def centred_context(result: Record) -> ContextEntry:
    """The centred cosine of unrelated tiles, which is 0."""
    return ContextEntry("Sources shuffled", 0.0, {"n": result.count("n")})


def chance_context(result: Record) -> ContextEntry:
    """The share of sources found first by chance, from 0 to 1."""
    pool = result.count("retrieval_pool")
    return ContextEntry("Chance", 1 / pool, {"n": pool})


def draw_cosines(axes: "Axes", result: Record) -> None:
    """The cosines of generated tiles to their sources, their mean and the shuffled null."""
    from matplotlib.ticker import MaxNLocator

    edges, counts = (np.array(result.part("histogram").numbers(key)) for key in ("edges", "counts"))
    mean, null_mean = result.number("mean"), result.number("null_mean")
    axes.bar(edges[:-1], counts, np.diff(edges), align="edge", color="C0", alpha=0.55)
    axes.axvline(mean, color="C0", linewidth=2, label="mean, own source")
    axes.axvline(null_mean, color="C1", linewidth=2, linestyle="--", label="mean, shuffled")
    axes.set_xlim(min(edges[:-1][counts > 0].min(), null_mean) - 0.1, 1.0)
    axes.set_title("Cosine to the source tile")
    axes.set_xlabel("cosine similarity")
    axes.set_ylabel("tiles")
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.set_ylim(0, 1.3 * max(counts.max(), 1))
    # On white: the lines run up behind it.
    axes.legend(loc="upper left", ncols=2, frameon=True, framealpha=1, edgecolor="white")


def cosine_summary(result: Record) -> str:
    """The cosines in a few words."""
    return f"cosine {result.number('mean'):.3f} (shuffled {result.number('null_mean'):.3f})"


METRIC = Metric(
    name="cosine_similarity",
    title="Cosine to the source tile",
    place=60,
    compute=cosine_result,
    quantities=(
        TableQuantity(
            "cosine", "Cosine to the source tile", "higher", value_at("mean"), value_at("std"),
            share=True, context=shuffled_context,
            meaning="How alike the features of a generated tile and of the real tile that guided "
            "it are; 1 is the same direction. Any two tiles share much, so what counts is how far "
            "it is above the shuffled pairing.",
        ),
        TableQuantity(
            "cosine_centred", "Cosine to the source tile, centred", "higher",
            value_at("centred_mean"), share=True, context=centred_context,
            meaning="The same after the mean of the real features was taken from both sides, "
            "which removes what all tiles share.",
        ),
        TableQuantity(
            "retrieval", "Source found first", "higher", value_at("retrieval_at_1"), share=True,
            context=chance_context,
            meaning="Share of generated tiles whose source is the most similar of all "
            "{retrieval_pool:,} source tiles compared.",
        ),
    ),
    needs=("sources",),
    reads=("generated",),
    reads_directions=True,
    summary=cosine_summary,
    plot=MetricPlot(
        draw_cosines,
        "Histogram of the cosine similarity of generated tiles to their source tiles",
        "Cosines of all generated tiles to their own sources, and the mean of a shuffled pairing. "
        "The further the two lines are apart, the more of its source a generated tile keeps.",
    ),
)  # fmt: skip
