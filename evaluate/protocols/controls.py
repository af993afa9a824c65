"""What every table is compared with: floors between real tiles and the neighbour's cosine.

Pure functions of feature arrays and labels.
"""

import numpy as np
import numpy.typing as npt

from evaluate.compare.measure import FLOOR_SPLIT_ROWS, FLOOR_SPLITS, least_rows, mean_floors
from evaluate.metrics import cosine_similarity, frechet_distance
from evaluate.metrics.cosine import cosine_histogram
from evaluate.metrics.metric import MetricSettings

Features = npt.NDArray[np.floating]
Labels = npt.NDArray[np.str_]

_GROUP_KEYS = ("value", "mean_term", "covariance_term", "noise_floor", "n_real", "n_generated")


def split_in_halves(labels: Labels, seed: int) -> npt.NDArray[np.bool_]:
    """Rows, bool ``[n]``, of the first of two halves; a label (patient) is whole on one side.

    In a random order of labels each goes to the half that has fewer rows so far.
    """
    names, member, counts = np.unique(labels, return_inverse=True, return_counts=True)
    side = np.zeros(len(names), bool)
    rows = [0, 0]
    for name in np.random.RandomState(seed).permutation(len(names)):
        smaller = int(rows[1] < rows[0])
        side[name] = bool(smaller)
        rows[smaller] += int(counts[name])
    return np.asarray(~side[member])


def halves_by_label(
    features: Features, labels: Labels, settings: MetricSettings | None = None, device: str = "cpu"
) -> dict[str, object] | None:
    """Fréchet distance and precision, recall between halves that share no label.

    Means over 8 splits where there are at most 4,096 rows. None with fewer than two labels or
    with fewer than 8 rows (or k + 1) on a side. The halves are about equal in size, so counts are
    the first split's.
    """
    settings = settings or MetricSettings()
    splits = []
    for number in range(FLOOR_SPLITS if len(features) <= FLOOR_SPLIT_ROWS else 1):
        # Another split for each number; seeds wrap, as numpy takes 32 bits.
        first = split_in_halves(labels, (settings.seed + number) % 2**32)
        if min(first.sum(), (~first).sum()) < least_rows(settings):
            return None
        splits.append((features[first], features[~first]))
    return {"labels": len(np.unique(labels)), **mean_floors(splits, settings, device)}


def neighbour_cosines(
    features: Features, slides: Labels, *, seed: int = 0
) -> dict[str, object] | None:
    """Cosines, in [-1, 1], of each row of ``[n, d]`` to another random row of its slide.

    Rows of slides with a single row are left out; None where all are.
    """
    # A random cycle pairs every row once with another one of its slide.
    random = np.random.RandomState(seed)
    first, second = [], []
    for name in np.unique(slides):
        rows = np.flatnonzero(slides == name)
        if len(rows) > 1:
            cycle = random.permutation(rows)
            first.append(cycle)
            second.append(np.roll(cycle, 1))
    if not first:
        return None
    cosines = cosine_similarity(
        features[np.concatenate(first)], features[np.concatenate(second)], seed=seed
    )
    return {
        "mean": cosines.mean,
        "std": cosines.std,
        "centred_mean": cosines.centred_mean,
        "n": cosines.n,
        "seed": seed,
        "histogram": cosine_histogram(cosines.values),
    }


def grouped_distances(
    real: Features, generated: Features, labels: tuple[Labels, Labels], *, least: int
) -> list[dict[str, object]]:
    """Fréchet distances within each group of slides (a project, a site), largest groups first.

    `labels` are those of the real rows ``[n]`` and of the generated rows ``[m]``. Groups with
    fewer than `least` rows on either side are left out, as is the group without a name.
    """
    groups: list[tuple[int, dict[str, object]]] = []
    for name in sorted(set(np.unique(labels[0])) & set(np.unique(labels[1])) - {""}):
        sides = [rows[names == name] for rows, names in zip((real, generated), labels, strict=True)]
        # A covariance needs two rows, even where the configuration allows fewer.
        if min(len(side) for side in sides) < max(least, 2):
            continue
        distance = frechet_distance(*sides, max_generated=None)
        numbers = {key: getattr(distance, key) for key in _GROUP_KEYS}
        groups.append((distance.n_real, {"group": str(name), **numbers}))
    return [entry for _, entry in sorted(groups, key=lambda group: -group[0])]
