"""What no metric may do: answer with NaN, a complex or a senseless number, or a traceback."""

import numpy as np
import pytest

from common.errors import UserError
from evaluate.metrics import (
    bootstrap,
    cosine_similarity,
    feature_likelihood_divergence,
    frechet_distance,
    frechet_infinity,
    kid,
    mind,
    mmd,
    precision_recall,
)

SET_METRICS = {
    "bootstrap": lambda a, b: bootstrap(a, b, draws=3, size=len(b) // 2),
    "cluster bootstrap": lambda a, b: bootstrap(a, b, draws=3, clusters=np.arange(len(b)) % 5),
    "cosine": cosine_similarity,
    "frechet": frechet_distance,
    "infinity": frechet_infinity,
    "kid": lambda a, b: kid(a, b, subsets=2),
    "likelihood": lambda a, b: feature_likelihood_divergence(a, a + 0.1, b, seeds=(0,)),
    "mind": lambda a, b: mind(a, b, directions=5),
    "mmd": lambda a, b: mmd(a, b, sigma=1.0, unit_norm=False),
    "precision and recall": precision_recall,
}
ANY_SCALE = {"cosine"}


def clouds(n=40, d=6, seed=0):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((n, d)), rng.standard_normal((n, d)) + 0.2


def numbers(result):
    """All that a person may read off a result."""
    names = ("value", "mean", "precision", "recall", "density", "coverage", "authenticity", "low",
             "high", "std", "biased", "null_mean", "centred_mean", "retrieval_at_1", "mean_term",
             "covariance_term", "noise_floor")  # fmt: skip
    found = [getattr(result, name) for name in names if getattr(result, name, None) is not None]
    assert found
    return found


@pytest.mark.parametrize("name", SET_METRICS)
@pytest.mark.parametrize(
    "spoil",
    [
        lambda a, b: (a, np.where(np.arange(6) == 2, np.nan, b)),
        lambda a, b: (a, b[:1]),
        lambda a, b: (a, b[:, :4]),
        lambda a, b: (a, b * 1j),
        lambda a, b: (a, b.ravel()),
    ],
    ids=["NaN", "one row", "other dimension", "complex", "not a matrix"],
)
def test_what_cannot_be_measured_is_one_clear_line(name, spoil):
    with pytest.raises(UserError) as caught:
        SET_METRICS[name](*spoil(*clouds()))
    assert "\n" not in str(caught.value)
    assert any(word in str(caught.value) for word in ("generated", "real"))


@pytest.mark.filterwarnings("error::RuntimeWarning")
@pytest.mark.parametrize("name", SET_METRICS)
@pytest.mark.parametrize("scale", [1e-200, 1e-20, 1e-12, 1e12, 1e30, 1e200])
def test_magnitudes_are_measured_or_refused_but_never_overflow(name, scale):
    real, generated = (rows * scale for rows in clouds())
    if name in ANY_SCALE or 1e-15 < scale < 1e15:
        assert np.isfinite(numbers(SET_METRICS[name](real, generated))).all()
        return
    with pytest.raises(UserError, match=r"largest magnitude is .*, expected 1e-15 to 1e\+15"):
        SET_METRICS[name](real, generated)


@pytest.mark.filterwarnings("error::RuntimeWarning")
@pytest.mark.parametrize("name", [name for name in SET_METRICS if name != "likelihood"])
@pytest.mark.parametrize("constant", ["real", "generated", "both"])
def test_sets_of_one_repeated_row_have_an_answer(name, constant):
    real, generated = clouds()
    copies = np.ones_like(real)
    pair = (
        generated if constant == "generated" else copies,
        real if constant == "real" else copies,
    )
    found = numbers(SET_METRICS[name](*pair))
    assert np.isfinite(found).all()
    assert all(isinstance(number, float) for number in found)


def test_a_likelihood_cannot_be_fitted_to_copies():
    real, generated = clouds()
    with pytest.raises(UserError, match="train features are all constant"):
        feature_likelihood_divergence(np.ones_like(real), real, generated)


@pytest.mark.parametrize("n", [3, 5, 6, 7])
def test_no_more_rows_than_dimensions_still_give_real_non_negative_distances(n):
    real, generated = clouds(n)
    for name in ("frechet", "cluster bootstrap", "mind"):
        if name != "cluster bootstrap" or n > 5:
            assert min(numbers(SET_METRICS[name](real, generated))) >= 0
    with pytest.raises(UserError, match="generated features: 3 rows, but a line"):
        frechet_infinity(*clouds(3))
