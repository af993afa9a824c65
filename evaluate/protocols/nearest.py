"""Nearest training tiles, however many there are: exact, in blocks of bounded memory.

Pure functions of feature arrays.
"""

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
from scipy.stats import rankdata
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA

from common.errors import UserError
from evaluate.metrics.neighbours import Neighbours, ScreenedRows, neighbours_between

Features = npt.NDArray[np.floating]
Distances = npt.NDArray[np.float64]


def nearest_in_blocks(
    queries: Features, blocks: Iterable[Features], *, k: int = 2, device: str = "cpu"
) -> Neighbours:
    """The k nearest, ``[queries, k]``, of all blocks' rows; indices count over the blocks.

    Each block's own k nearest are exact (`evaluate.metrics.neighbours`), so the merged ones are.
    Memory is that of the queries and one block. Raises `UserError` with fewer than k rows in all.
    """
    distances = np.full((len(queries), 0), np.inf)
    indices = np.zeros((len(queries), 0), np.int64)
    start, centre = 0, None
    for block in blocks:
        if not len(block):
            continue
        # Distances are computed about the first block's mean, where float32 cancels least.
        centre = block.mean(axis=0, dtype=np.float64) if centre is None else centre
        first, second = (ScreenedRows(rows, centre, device) for rows in (queries, block))
        found = neighbours_between(first, second, min(k, len(block)))
        distances = np.concatenate([distances, found.distances], axis=1)
        indices = np.concatenate([indices, found.indices + start], axis=1)
        # The k best so far: of equal distances the lower index comes first.
        order = np.lexsort((indices, distances), axis=1)[:, :k]
        distances, indices = (np.take_along_axis(x, order, axis=1) for x in (distances, indices))
        start += len(block)
    if start < k:
        raise UserError(f"{start} training tiles, at least {k} are needed to find the {k} nearest")
    return Neighbours(indices=indices, distances=distances)


def distance_ratios(neighbours: Neighbours) -> Distances:
    """Distance to the nearest over that to the second nearest, [n] in [0, 1]; 0 for a copy.

    Two copies of one tile in the training set make 0 / 0, which counts as 0.
    """
    first, second = neighbours.distances[:, 0], neighbours.distances[:, 1]
    return np.divide(first, second, out=np.zeros_like(first), where=second > 0)


def copying_test(
    train: Features,
    generated: tuple[Features, Distances],
    held_out: tuple[Features, Distances],
    *,
    cells: int = 3,
    components: int = 64,
    seed: int = 0,
) -> dict[str, object] | None:
    """C_T of Meehan et al. (arXiv 2004.05675): are generated tiles nearer to the training tiles?

    Both sets come as (features ``[n, d]``, distance ``[n]`` to the nearest training tile). The
    feature space is cut in cells by k-means on principal components of training features; in
    each the distances are compared by Mann-Whitney's z, and C_T is their mean weighted by the
    cells' training tiles. Below -3 means copying, above 3 underfitting. Distances are of the
    whole feature space, not of the components. None where a cell has fewer than 4 tiles of
    either set.
    """
    # C_T needs cells of similar tiles; k-means in hundreds of dimensions finds none.
    components = min(components, *train.shape)
    project = PCA(components, svd_solver="full", random_state=seed).fit(train)
    model = KMeans(cells, n_init=4, random_state=seed).fit(project.transform(train))
    labels = [model.predict(project.transform(x)) for x, _ in (generated, held_out)]
    scores, weights = [], []
    for cell in range(cells):
        near = [
            distances[cell_of == cell]
            for (_, distances), cell_of in zip((generated, held_out), labels, strict=True)
        ]
        if min(len(distances) for distances in near) < 4:
            return None
        scores.append(mann_whitney_z(*near))
        weights.append(float((model.labels_ == cell).mean()))
    value = float(np.dot(scores, weights) / sum(weights))
    return {"value": value, "cells": scores, "weights": weights, "components": components,
            "n_train": len(train)}  # fmt: skip


def mann_whitney_z(first: Distances, second: Distances) -> float:
    """z of the rank-sum test of ``[m]`` and ``[n]`` values; < 0 where the first are smaller."""
    m, n = len(first), len(second)
    ranks = rankdata(np.concatenate([first, second]))
    u = ranks[:m].sum() - m * (m + 1) / 2
    return float((u - m * n / 2) / np.sqrt(m * n * (m + n + 1) / 12))
