"""A linear artifact classifier under cross-validation by patient: pure functions of arrays."""

import hashlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedGroupKFold
from threadpoolctl import threadpool_limits

from common.errors import UserError

_MAX_ITERATIONS = 5000


@dataclass(frozen=True)
class LinearModel:
    """Logistic regressions, one per fold: weights float64 [folds, d], offsets float64 [folds].

    They apply to the features as they are: the standardisation of each fold is folded in.
    """

    weights: npt.NDArray[np.float64]
    offsets: npt.NDArray[np.float64]

    def scores(self, features: npt.NDArray[np.floating]) -> npt.NDArray[np.float32]:
        """Probability of artifact [n] of features [n, d], the mean over the folds."""
        return self.fold_scores(features).mean(1).astype(np.float32)

    def fold_scores(self, features: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
        """Each fold's probability of artifact, [n, folds]."""
        # One thread: the order of additions, and so the last bits, would depend on their number.
        with threadpool_limits(1):
            logits = features.astype(np.float64) @ self.weights.T + self.offsets
        return np.asarray(1 / (1 + np.exp(-np.clip(logits, -700, 700))))


@dataclass(frozen=True)
class Fold:
    """How one fold's classifier did on the tiles that it had not seen.

    `roc_auc` is None where those are of one class. Of the confusion at the common threshold,
    `artifact_kept` are artifacts that pass and `usable_removed` usable tiles that do not.
    """

    tiles: int
    patients: int
    roc_auc: float | None
    artifact_removed: int
    artifact_kept: int
    usable_removed: int
    usable_kept: int


@dataclass(frozen=True)
class Trained:
    """The classifiers, the threshold (a tile is removed above it), and how they did.

    `out_of_fold` float64 [n] are scores of the labelled tiles by the fold that had not seen them,
    in the order of the tiles; `fold_of` int64 [n] says which.
    """

    model: LinearModel
    threshold: float
    usable_recall: float
    artifact_recall: float
    roc_auc: float
    folds: tuple[Fold, ...]
    out_of_fold: npt.NDArray[np.float64]
    fold_of: npt.NDArray[np.int64]


def check_labels(
    is_artifact: npt.NDArray[np.bool_], groups: npt.NDArray[np.str_], folds: int
) -> None:
    """Refuse labels bool [n] that cannot be cross-validated by patient, `groups` [n]."""
    if len(is_artifact) < folds:
        raise UserError(f"{len(is_artifact)} labelled tiles are fewer than {folds} folds")
    for name, members in (("artifact", is_artifact), ("usable", ~is_artifact)):
        patients = len(np.unique(groups[members]))
        if not members.any():
            raise UserError(f"no tile is labelled {name}: both classes are needed to train")
        if patients < 2:
            raise UserError(
                f"all {name} tiles are of one patient: without them no classifier can be trained "
                "on the others; label tiles of at least two patients in each class"
            )
    if (patients := len(np.unique(groups))) < folds:
        raise UserError(
            f"the labelled tiles are of {patients} patients, fewer than {folds} folds; "
            f"label more patients or use --folds {patients}"
        )


def train_classifier(
    features: npt.NDArray[np.floating],
    is_artifact: npt.NDArray[np.bool_],
    groups: npt.NDArray[np.str_],
    *,
    folds: int = 5,
    usable_recall: float = 0.99,
    seed: int = 0,
) -> Trained:
    """Logistic regression on features [n, d] under cross-validation grouped by patient.

    The threshold keeps at least `usable_recall` of the usable labelled tiles, by the scores of
    the fold that had not seen each. Rows in another order give the same result only if `groups`
    move with them: sort them first. Raises `UserError` for labels that cannot be used.
    """
    check_labels(is_artifact, groups, folds)
    # By patient: tiles of one slide are alike, and would make the folds look better than they are.
    fold_of = grouped_folds(is_artifact, groups, folds, seed)
    weights, offsets = [], []
    for fold in range(folds):
        seen = fold_of != fold
        _check_classes(is_artifact[seen], fold, folds)
        weight, offset = _fit_regression(features[seen], is_artifact[seen])
        weights.append(weight)
        offsets.append(offset)
    model = LinearModel(np.stack(weights), np.array(offsets))
    out_of_fold = model.fold_scores(features)[np.arange(len(features)), fold_of]
    threshold = recall_threshold(out_of_fold[~is_artifact], usable_recall)
    return Trained(
        model, threshold,
        float((out_of_fold[~is_artifact] <= threshold).mean()),
        float((out_of_fold[is_artifact] > threshold).mean()),
        float(roc_auc_score(is_artifact, out_of_fold)),
        tuple(
            _rate_fold(out_of_fold[unseen], is_artifact[unseen], groups[unseen], threshold)
            for unseen in (fold_of == fold for fold in range(folds))
        ),
        out_of_fold, fold_of,
    )  # fmt: skip


def grouped_folds(
    is_artifact: npt.NDArray[np.bool_], groups: npt.NDArray[np.str_], folds: int, seed: int
) -> npt.NDArray[np.int64]:
    """The fold of each tile, int64 [n]: patients whole, classes as even as they allow."""
    names, place = np.unique(groups, return_inverse=True)
    # Patients in the order of a keyed hash: neither the rows' order nor the alphabet decides.
    keys = [
        hashlib.blake2b(f"{seed}\0fold\0{name}".encode(), digest_size=8).digest() for name in names
    ]
    rank = np.empty(len(names), np.int64)
    rank[sorted(range(len(names)), key=keys.__getitem__)] = np.arange(len(names))
    splitter = StratifiedGroupKFold(folds)
    fold_of = np.empty(len(groups), np.int64)
    for fold, (_, held) in enumerate(splitter.split(place, is_artifact, rank[place])):
        fold_of[held] = fold
    return fold_of


def recall_threshold(usable_scores: npt.NDArray[np.float64], recall: float) -> float:
    """The lowest threshold t such that at least `recall` (0 to 1) of the scores are <= t.

    >>> recall_threshold(np.array([0.4, 0.1, 0.2, 0.3]), 0.75)
    0.3
    """
    needed = int(np.ceil(recall * len(usable_scores) - 1e-9))
    return float(np.sort(usable_scores)[max(0, needed - 1)])


def _check_classes(is_artifact: npt.NDArray[np.bool_], fold: int, folds: int) -> None:
    if is_artifact.all() or not is_artifact.any():
        missing = "usable" if is_artifact.all() else "artifact"
        raise UserError(
            f"fold {fold + 1} of {folds} would be trained without any {missing} tile: its patients "
            "have all of them; label tiles of more patients, or use fewer --folds"
        )


def _fit_regression(
    features: npt.NDArray[np.floating], is_artifact: npt.NDArray[np.bool_]
) -> tuple[npt.NDArray[np.float64], float]:
    """Weights [d] and offset of a logistic regression on standardised features."""
    values = features.astype(np.float64)
    mean, std = values.mean(0), values.std(0)
    std[std == 0] = 1
    with threadpool_limits(1):
        fit = LogisticRegression(max_iter=_MAX_ITERATIONS).fit((values - mean) / std, is_artifact)
    weight = fit.coef_[0] / std
    return weight, float(fit.intercept_[0] - weight @ mean)


def _rate_fold(
    scores: npt.NDArray[np.float64],
    is_artifact: npt.NDArray[np.bool_],
    groups: npt.NDArray[np.str_],
    threshold: float,
) -> Fold:
    removed = scores > threshold
    both = bool(is_artifact.any()) and not bool(is_artifact.all())
    return Fold(
        tiles=len(scores),
        patients=len(np.unique(groups)),
        roc_auc=float(roc_auc_score(is_artifact, scores)) if both else None,
        artifact_removed=int((removed & is_artifact).sum()),
        artifact_kept=int((~removed & is_artifact).sum()),
        usable_removed=int((removed & ~is_artifact).sum()),
        usable_kept=int((~removed & ~is_artifact).sum()),
    )
