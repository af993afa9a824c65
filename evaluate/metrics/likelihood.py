"""Feature likelihood divergence: fidelity, diversity and novelty in one number.

Jiralerspong et al., "Feature Likelihood Divergence" (arXiv 2302.04440), as its authors'
implementation computes it, down to the order of random draws: the same seed gives the same
subsets and splits. Float64 is canonical, because Adam at learning rate 0.5 turns float32's
rounding into differences of a thousandth.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Self, get_args

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from common.errors import UserError
from evaluate.metrics.features import CHUNK_ROWS, checked_pair, constant_features, row_digests
from evaluate.metrics.metric import (
    FeaturePair,
    Metric,
    MetricPart,
    MetricSettings,
    TableQuantity,
    WarningKind,
    plain_fields,
    value_at,
)
from evaluate.metrics.mixture import Mixture
from evaluate.metrics.moments import Moments

Mode = Literal["test", "train", "gap"]
Dtype = Literal["float64", "float32"]
_SUSPICIOUS = 1000.0
_COPY = 1e-6
"""Squared distance per dimension, in the test set's variances, below which a row is a copy: what
an encoder's rounding leaves between two passes over one image is far below it."""
_NEAR = 0.01
"""As `_COPY`, of rows that are no copies and still nearer to train rows than new ones ever are."""
_REPEATED_SHARE = 0.01
_DROPPED = WarningKind(
    "constant_dimensions",
    "{count} feature dimensions are constant in the test set and were dropped",
)
_FAR = WarningKind("suspicious_value", "a value beyond ±{limit:.0f} points to {cause}")
_COPIED = WarningKind("copied_rows", "{count} of {rows} generated rows are copies of train rows")
_COPIED_TEST = WarningKind(
    "copied_test_rows",
    "{count} of {rows} generated rows are copies of test rows, which flatters them",
)
_REPEATED = WarningKind(
    "repeated_train_rows",
    "{count} of {rows} train rows are copies of other train rows: the baseline is of copies, which "
    "lowers the value",
)
_OVERLAP = WarningKind(
    "train_in_test",
    "{count} of {rows} test rows ({share:.1%}) are train rows too, so the test is not on unseen "
    "rows alone",
)
_SMALL_BASELINE = WarningKind(
    "small_baseline",
    "the baseline has {centres} centres, half of {train} train rows, and the generated set has "
    "{used}: that lowers the value, so it compares only at these sizes; give {needed} train rows "
    "or more, or at most {centres} generated ones",
)


@dataclass(frozen=True)
class LikelihoodBaseline:
    """What real train rows score in place of generated ones; reusable for other models.

    Attributes:
        nll: seed to mean negative log-likelihood per dimension of the test rows ``[t, d]``.
        fingerprint: of all it depends on: both real sets, the row counts and the dtype.
    """

    nll: Mapping[int, float]
    fingerprint: str


@dataclass(frozen=True)
class FeatureLikelihoodDivergence:
    """A feature likelihood divergence over several seeds.

    Attributes:
        value: mean over the seeds of 100 times a difference of log-likelihoods per dimension, in
            nats. Mode "test": generated against real train rows as a model of the test rows, 0
            is as good as real. "train": the same for the train rows. "gap": train rows against
            test rows, clearly negative where the train rows were copied.
        std: standard deviation over the seeds, divisor n - 1; None for one seed. Differences
            between models below it mean nothing.
        values: one a seed.
        seeds: the seeds.
        mode: see `value`.
        baseline: to hand to the next call with the same real sets; None in mode "gap".
        memorisation: ``[n_generated]``, how narrow a spike on its nearest train row each
            generated row of the first seed became: log-density per dimension, high is suspicious.
        memorisation_rows: ``[n_generated]``, the rows of `generated` these belong to.
        n_train: train rows.
        n_test: test rows.
        n_generated: generated rows used, after the cap.
        n_baseline: train rows that stand in for generated ones in the baseline, at most half of
            the train rows; None in mode "gap".
        n_copied: generated rows of the first seed that are copies of train rows.
        n_shared: test rows that are train rows too.
        dim: feature dimensions used, after constant ones were dropped.
        dtype: of the computation.
        warnings: what makes the value doubtful, one sentence each.
    """

    value: float
    std: float | None
    values: tuple[float, ...]
    seeds: tuple[int, ...]
    mode: str
    baseline: LikelihoodBaseline | None
    memorisation: NDArray[np.float64]
    memorisation_rows: NDArray[np.int64]
    n_train: int
    n_test: int
    n_generated: int
    n_baseline: int | None
    n_copied: int
    n_shared: int
    dim: int
    dtype: str
    warnings: tuple[str, ...]


def feature_likelihood_divergence(
    train: ArrayLike,
    test: ArrayLike,
    generated: ArrayLike,
    *,
    mode: Mode = "test",
    dtype: Dtype = "float64",
    seeds: Sequence[int] = (0, 1, 2, 3, 4),
    max_generated: int = 10_000,
    baseline: LikelihoodBaseline | None = None,
    device: str = "cpu",
) -> FeatureLikelihoodDivergence:
    """How well Gaussians around generated rows, fitted to train rows, explain test rows.

    Features are scaled by the test set's mean and standard deviation; those constant in it have
    none and are dropped, with a warning.

    Args:
        train: ``[n, d]``, what the model was trained on.
        test: ``[m, d]``, unseen.
        generated: ``[g, d]``.
        mode: which likelihoods are compared, see the result's `value`.
        dtype: of the fit; float32 halves time and memory and moves the value by about 0.001.
        seeds: each draws another generated subset, row order and baseline split.
        max_generated: of more generated rows this many are drawn.
        baseline: a former result's, which halves the work.
        device: where the fit is computed.

    Raises:
        UserError: fewer than 4 train or 2 other rows, NaN or infinity, differing dimensions, no
            or repeated seeds, only constant train or test features, a test set that is wholly in
            the train set, a baseline of other data.
    """
    _check_arguments(mode, dtype, seeds, max_generated)
    train_rows, test_rows = checked_pair(train, test, names=("train", "test"))
    train_rows, generated_rows = checked_pair(train_rows, generated, names=("train", "generated"))
    if len(train_rows) < 4:
        raise UserError(f"train features: {len(train_rows)} rows, this metric needs at least 4")
    if constant_features(train_rows).all():
        raise UserError("train features are all constant: no likelihood can be fitted to copies")
    # All rows are scaled by the test set alone, so that every model is seen in the same space.
    normalise = _Normaliser(test_rows, dtype, device)
    equal = _EqualRows.count(train_rows, test_rows, generated_rows)
    if equal.shared == len(test_rows):
        raise UserError(
            f"all {equal.shared:,} test rows are train rows too: the divergence is tested on rows "
            "that are not in the train set; give another train or test set"
        )
    fits = _Fits(normalise(train_rows), normalise(test_rows), len(generated_rows), max_generated)
    baseline = None if mode == "gap" else fits.complete_baseline(seeds, baseline)
    first, values = None, []
    for seed in seeds:
        draw = fits.draw_orders(seed)
        mixture = Mixture(normalise(generated_rows[draw.generated]), fits.train[draw.order])
        if first is None:
            nearest = mixture.nearest_squared.cpu().numpy() / fits.train.shape[1]
            first = (mixture.memorisation_scores(), draw.generated, nearest)
        nll = mixture.mean_nll(fits.test if mode == "test" else fits.train)
        # The gap needs no baseline: it compares train and test rows under the same mixture.
        compared = mixture.mean_nll(fits.test) if baseline is None else baseline.nll[seed]
        values.append(100 * (nll - compared))
    assert first is not None
    copied = int((first[2] <= _COPY).sum())
    warnings = normalise.warnings + equal.warnings(has_baseline=baseline is not None)
    if baseline is not None:
        warnings += fits.baseline_warnings()
    if copied:
        warnings += (_COPIED.format_sentence(count=copied, rows=len(first[1])),)
    extreme = max(values, key=abs)
    if abs(extreme) > _SUSPICIOUS:
        cause = _find_cause(extreme, mode, first[2])
        warnings += (_FAR.format_sentence(limit=_SUSPICIOUS, cause=cause),)
    return FeatureLikelihoodDivergence(
        value=float(np.mean(values)),
        std=float(np.std(values, ddof=1)) if len(values) > 1 else None,
        values=tuple(values),
        seeds=tuple(seeds),
        mode=mode,
        baseline=baseline,
        memorisation=first[0],
        memorisation_rows=first[1],
        n_train=len(train_rows),
        n_test=len(test_rows),
        n_generated=len(first[1]),
        n_baseline=None if baseline is None else fits.n_baseline,
        n_copied=copied,
        n_shared=equal.shared,
        dim=fits.train.shape[1],
        dtype=dtype,
        warnings=warnings,
    )


@dataclass(frozen=True)
class _EqualRows:
    """How many rows of the three sets are equal: test rows in train, and so on."""

    train: int
    test: int
    generated: int
    shared: int
    repeated: int
    copied_test: int

    @classmethod
    def count(
        cls,
        train: NDArray[np.floating],
        test: NDArray[np.floating],
        generated: NDArray[np.floating],
    ) -> Self:
        """Count them, in sets ``[n, d]``, ``[m, d]`` and ``[g, d]``."""
        sums = [row_digests(rows) for rows in (train, test, generated)]
        known, unseen = set(sums[0]), set(sums[1]) - set(sums[0])
        return cls(
            train=len(train),
            test=len(test),
            generated=len(generated),
            shared=sum(digest in known for digest in sums[1]),
            repeated=len(train) - len(known),
            copied_test=sum(digest in unseen for digest in sums[2]),
        )

    def warnings(self, *, has_baseline: bool) -> tuple[str, ...]:
        """What they do to the value, one sentence each; `has_baseline` is of its mode."""
        found: list[str] = []
        if self.shared:
            share = self.shared / self.test
            found.append(_OVERLAP.format_sentence(count=self.shared, rows=self.test, share=share))
        # Some empty tiles are alike in any real set: that many move nothing.
        if has_baseline and self.repeated > _REPEATED_SHARE * self.train:
            found.append(_REPEATED.format_sentence(count=self.repeated, rows=self.train))
        if self.copied_test:
            found.append(_COPIED_TEST.format_sentence(count=self.copied_test, rows=self.generated))
        return tuple(found)


def _find_cause(value: float, mode: str, nearest: NDArray[np.float64]) -> str:
    """What takes a value beyond ±1000; `nearest` ``[M]`` are squared distances per dimension.

    A copy's variance collapses: it explains its own train row alone, so that train rows become
    far likelier and test rows far less likely. Far rows explain neither.
    """
    if (nearest <= _COPY).any():
        return "the copies of train rows"
    if np.median(nearest) < _NEAR or (mode != "test" and value < 0):
        return "near copies of train rows"
    return "features far from the real ones, such as another encoder's"


def _check_arguments(mode: str, dtype: str, seeds: Sequence[int], max_generated: int) -> None:
    if mode not in get_args(Mode):
        raise UserError(f"mode {mode!r} is unknown, expected one of {', '.join(get_args(Mode))}")
    if dtype not in get_args(Dtype):
        raise UserError(f"dtype {dtype!r} is unknown, expected {' or '.join(get_args(Dtype))}")
    if not seeds or len(set(seeds)) != len(seeds):
        raise UserError(f"seeds are {list(seeds)}, expected at least one and each once")
    if max_generated < 2:
        raise UserError(f"max_generated is {max_generated}, expected at least 2")


class _Normaliser:
    """Centres and scales by the test rows, without the features that are constant in them."""

    def __init__(self, test: NDArray[np.floating], dtype: str, device: str) -> None:
        self._kept = ~constant_features(test)
        dropped = int((~self._kept).sum())
        if dropped == len(self._kept):
            raise UserError("test features are all constant: nothing can be scaled by them")
        moments = Moments.from_rows(test[:, self._kept])
        self._mean, self._std = moments.mean, np.sqrt(np.diag(moments.covariance))
        self._dtype, self._device = getattr(torch, dtype), device
        self.warnings: tuple[str, ...] = (
            (_DROPPED.format_sentence(count=dropped),) if dropped else ()
        )

    def __call__(self, rows: NDArray[np.floating]) -> torch.Tensor:
        # In chunks: a float64 copy of all rows would double the memory.
        scaled = torch.empty((len(rows), len(self._mean)), dtype=self._dtype)
        for start in range(0, len(rows), CHUNK_ROWS):
            part = slice(start, start + CHUNK_ROWS)
            scaled[part] = torch.from_numpy((rows[part][:, self._kept] - self._mean) / self._std)
        return scaled.to(self._device)


@dataclass(frozen=True)
class _Draw:
    """One seed's random choices, in the order in which the authors' implementation makes them."""

    generated: NDArray[np.int64]
    order: NDArray[np.int64]
    baseline_order: NDArray[np.int64]
    baseline_fit_order: NDArray[np.int64]


class _Fits:
    """The two real sets, normalised, and the fits that need nothing else."""

    def __init__(
        self, train: torch.Tensor, test: torch.Tensor, n_generated: int, max_generated: int
    ) -> None:
        self.train, self.test = train, test
        self._n_generated, self._used = n_generated, min(n_generated, max_generated)
        self.n_baseline = min(self._used, len(train) // 2)

    def baseline_warnings(self) -> tuple[str, ...]:
        """A sentence where the baseline has fewer centres than the generated set."""
        if self.n_baseline == self._used:
            return ()
        return (
            _SMALL_BASELINE.format_sentence(
                centres=self.n_baseline, train=len(self.train), used=self._used,
                needed=2 * self._used,
            ),
        )  # fmt: skip

    def draw_orders(self, seed: int) -> _Draw:
        # One stream for all four, in this order: the same seed gives the authors' numbers.
        random, n = np.random.RandomState(seed), len(self.train)
        everything = np.arange(self._n_generated)
        capped = self._used < self._n_generated
        return _Draw(
            random.choice(self._n_generated, self._used, replace=False) if capped else everything,
            random.choice(n, n, replace=False),
            random.choice(n, n, replace=False),
            random.choice(n - self.n_baseline, n - self.n_baseline, replace=False),
        )

    def complete_baseline(
        self, seeds: Sequence[int], known: LikelihoodBaseline | None
    ) -> LikelihoodBaseline:
        # A baseline of other rows would shift the value without a trace.
        digest = hashlib.sha256()
        for rows in (self.train, self.test):
            digest.update(
                f"{tuple(rows.shape)} {rows.dtype} {self._n_generated} {self._used};".encode()
            )
            digest.update(rows.cpu().numpy().data)
        fingerprint = digest.hexdigest()
        if known is not None and known.fingerprint != fingerprint:
            raise UserError(
                "the baseline given is of other train or test features, row counts or dtype; "
                "leave it out to have it computed"
            )
        nll = dict(known.nll) if known else {}
        nll |= {seed: self._baseline_nll(seed) for seed in seeds if seed not in nll}
        return LikelihoodBaseline(nll, fingerprint)

    def _baseline_nll(self, seed: int) -> float:
        # Centres must not be among the rows that they are fitted to: variances would vanish.
        draw = self.draw_orders(seed)
        centres = draw.baseline_order[: self.n_baseline]
        rest = draw.baseline_order[self.n_baseline :]
        fitted_to = self.train[rest[draw.baseline_fit_order]]
        return Mixture(self.train[centres], fitted_to).mean_nll(self.test)


def likelihood_result(
    pair: FeaturePair, settings: MetricSettings, baseline: LikelihoodBaseline | None = None
) -> dict[str, object]:
    """The divergence against held-out rows as plain values, and its baseline for later calls.

    Raises:
        UserError: the pair has no training features.
    """
    if pair.train is None:
        raise UserError("FLD needs the features of the training tiles: name their selection")
    result = feature_likelihood_divergence(
        pair.train, pair.real, pair.generated,
        seeds=settings.fld_seeds,
        dtype="float32" if settings.fld_dtype == "float32" else "float64",
        max_generated=settings.fld_max_generated,
        baseline=baseline,
        device=pair.device,
    )  # fmt: skip
    assert result.baseline is not None
    # JSON has no integer keys.
    nll = {str(seed): value for seed, value in result.baseline.nll.items()}
    kept = {"nll": nll, "fingerprint": result.baseline.fingerprint}
    return plain_fields(result) | {"baseline": kept}


_TITLE = "Feature likelihood divergence"

METRIC = Metric(
    name="feature_likelihood",
    title=_TITLE,
    place=30,
    compute=likelihood_result,
    quantities=(
        TableQuantity(
            "fld", _TITLE, "lower", value_at("value"), value_at("std"),
            ideal=(0.0, "real training tiles"),
            meaning="How well the generated tiles explain unseen real ones, against real training "
            "tiles. Copies of training tiles make it huge. ± is over seeds.",
        ),
    ),
    needs=("train",),
    depends_on_device=True,
    warnings=(
        _DROPPED, _OVERLAP, _REPEATED, _COPIED_TEST, _SMALL_BASELINE, _COPIED, _FAR,
    ),
    parts=(MetricPart("gap", "fld_gap", "FLD gap"),),
)  # fmt: skip
