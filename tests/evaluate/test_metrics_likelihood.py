"""The feature likelihood divergence against its definition written with autograd."""

import errno
import math

import numpy as np
import pytest
import torch

from common.errors import UserError
from evaluate.metrics import feature_likelihood_divergence, mixture


def clouds(n=120, m=90, g=60, d=8, seed=0):
    rng = np.random.default_rng(seed)
    mixing = rng.standard_normal((d, d))
    train, test, generated = (rng.standard_normal((size, d)) @ mixing for size in (n, m, g))
    return train + 3, test + 3, generated * 1.1 + 3.1


def naive_fit(train, centres, *, batch_rows=10_000):
    """Every step as in the definition: all distances, autograd, torch's own Adam."""
    n, d = train.shape
    m = len(centres)
    squared = ((train[:, None] - centres[None]) ** 2).sum(-1)
    origin = 0.81 * ((train - train.mean(0)) ** 2).sum(-1)
    s = ((squared.min(0).values + 1e-3) / d).log().requires_grad_()
    s0 = torch.zeros(1, dtype=train.dtype, requires_grad=True)
    adam = torch.optim.Adam([s, s0], lr=0.5)
    log_density = lambda D, s: -D / (2 * s.exp()) - d / 2 * s - d / 2 * math.log(2 * math.pi)  # noqa: E731
    history = []
    for epoch in range(50):
        losses = []
        for a in range(0, n, batch_rows):
            batch = slice(a, a + batch_rows)
            scores = log_density(squared[batch], s) - math.log(m)
            both = torch.cat([scores, log_density(origin[batch, None], s0)], dim=1)
            loss = -both.logsumexp(1).mean() / d
            adam.zero_grad()
            loss.backward()
            adam.step()
            s.data.clamp_(-40, 40)
            losses.append(loss.item())
        history.append(np.mean(losses))
        if epoch > 5 and max(abs(history[-1] - history[-1 - k]) for k in range(5)) < 5e-4:
            break
    s = s.detach()
    return s, lambda rows: float(
        -(log_density(((rows[:, None] - centres[None]) ** 2).sum(-1), s) - math.log(m))
        .logsumexp(1)
        .mean()
        / d
    )


def naive(train, test, generated, seed, mode, *, cap=10_000, batch_rows=10_000):
    mean, std = test.mean(0), test.std(0, ddof=1)
    train, test, generated = (torch.from_numpy((x - mean) / std) for x in (train, test, generated))
    random = np.random.RandomState(seed)
    n = len(train)
    if len(generated) > cap:
        generated = generated[random.choice(len(generated), cap, replace=False)]
    _, nll = naive_fit(train[random.choice(n, n, replace=False)], generated, batch_rows=batch_rows)
    order = random.choice(n, n, replace=False)
    k = min(len(generated), n // 2)
    rest = train[order[k:]][random.choice(n - k, n - k, replace=False)]
    _, baseline = naive_fit(rest, train[order[:k]], batch_rows=batch_rows)
    if mode == "gap":
        return 100 * (nll(train) - nll(test))
    return 100 * (nll(test if mode == "test" else train) - baseline(test))


@pytest.mark.parametrize("mode", ["test", "train", "gap"])
def test_equals_the_definition_with_autograd(mode):
    sets = clouds()
    found = feature_likelihood_divergence(*sets, mode=mode, seeds=(0, 7))
    assert found.values == pytest.approx([naive(*sets, s, mode) for s in (0, 7)], abs=1e-6)
    assert found.value == pytest.approx(np.mean(found.values))
    assert found.std == pytest.approx(np.std(found.values, ddof=1))
    assert (found.baseline is None) == (mode == "gap")


def test_equals_the_definition_with_several_batches_blocks_and_a_capped_generated_set(monkeypatch):
    monkeypatch.setattr(mixture, "_BATCH_ROWS", 50)
    monkeypatch.setattr(mixture, "_CHUNK_BYTES", 7 * 40 * 8)
    sets = clouds()
    found = feature_likelihood_divergence(*sets, max_generated=40, seeds=(3,))
    assert found.value == pytest.approx(naive(*sets, 3, "test", cap=40, batch_rows=50), abs=1e-6)
    assert (found.n_generated, found.std) == (40, None)


def test_distances_on_disk_change_nothing(monkeypatch):
    sets = clouds()
    in_memory = feature_likelihood_divergence(*sets, seeds=(0,))
    monkeypatch.setattr(mixture, "_CACHE_BYTES", 1000)
    assert feature_likelihood_divergence(*sets, seeds=(0,)).values == in_memory.values


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_a_full_temporary_disk_is_one_line_and_no_signal(monkeypatch, dtype):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(mixture, "_CACHE_BYTES", 1000)
    monkeypatch.setattr(mixture.os, "posix_fallocate", full)
    with pytest.raises(UserError, match=r"No space left on device.*set TMPDIR") as error:
        feature_likelihood_divergence(*clouds(), seeds=(0,), dtype=dtype)
    assert ("settings.fld_dtype=float32" in str(error.value)) == (dtype == "float64")


@pytest.mark.gpu
def test_a_gpu_gives_the_same_value_but_for_rounding():
    sets = clouds(400, 300, 200, 16)
    cpu, gpu = (
        feature_likelihood_divergence(*sets, seeds=(0,), device=device)
        for device in ("cpu", "cuda")
    )
    assert gpu.value == pytest.approx(cpu.value, abs=1e-3)
    assert gpu.memorisation == pytest.approx(cpu.memorisation, abs=1e-3)


def test_distances_from_the_mean_are_the_same_in_blocks(monkeypatch):
    rows = torch.from_numpy(np.random.default_rng(0).normal(2, 1, (101, 9)))
    monkeypatch.setattr(mixture, "_CHUNK_BYTES", 7 * 9 * 8)
    found = mixture._squared_from_mean(rows)
    assert (found == (rows - rows.mean(dim=0)).square().sum(dim=1)).all()


def test_gradient_equals_a_finite_difference():
    rng = np.random.default_rng(1)
    squared = torch.from_numpy(rng.uniform(1, 20, (30, 12)))
    origin = torch.from_numpy(rng.uniform(1, 20, 30))
    s = torch.from_numpy(rng.uniform(-1, 2, 13))
    _, gradient = mixture._loss_and_gradient(squared, origin, s, 8)
    for j in range(13):
        step = torch.zeros(13, dtype=torch.float64)
        step[j] = 1e-5
        above, below = (
            mixture._loss_and_gradient(squared, origin, s + sign * step, 8)[0] for sign in (1, -1)
        )
        assert float(gradient[j]) == pytest.approx((above - below) / 2e-5, abs=1e-9)


def test_float32_stays_within_its_stated_distance():
    sets = clouds(400, 300, 200, 16)
    double = feature_likelihood_divergence(*sets, seeds=(0,))
    single = feature_likelihood_divergence(*sets, seeds=(0,), dtype="float32")
    assert single.value == pytest.approx(double.value, abs=5e-2)
    assert (double.dtype, single.dtype) == ("float64", "float32")


def test_orders_good_worse_and_copied_sets_and_warns_of_the_copy():
    rng = np.random.default_rng(2)
    train, test, fresh = (rng.standard_normal((n, 10)) for n in (400, 200, 200))

    def score(rows, mode="test"):
        return feature_likelihood_divergence(train, test, rows, mode=mode, seeds=(0,))

    good, shifted, copied = score(fresh), score(fresh + 2), score(train[:200])
    assert abs(good.value) < 10 < shifted.value
    assert good.warnings == ()
    assert copied.warnings[0] == "200 of 200 generated rows are copies of train rows"
    assert score(train, "gap").value < -1000 < score(fresh, "gap").value
    half = score(np.concatenate([train[:20], fresh[:180]]))
    assert half.memorisation[:20].min() > half.memorisation[20:].max()
    np.testing.assert_array_equal(half.memorisation_rows, np.arange(200))


def three_sets(n=400, m=200, g=200, d=10):
    rng = np.random.default_rng(2)
    return tuple(rng.standard_normal((size, d)) for size in (n, m, g))


@pytest.mark.parametrize("mode", ["test", "train", "gap"])
@pytest.mark.parametrize("noise", [0, 1e-7, 1e-2])
def test_a_value_of_copies_names_copies_whatever_its_sign(mode, noise):
    """Copies make train rows likely and test rows unlikely: far below zero, or far above it."""
    train, test, fresh = three_sets()
    found = feature_likelihood_divergence(
        train, test, train + noise * np.resize(fresh, train.shape), mode=mode, seeds=(0,)
    )
    (cause,) = [line for line in found.warnings if line.startswith("a value beyond")] or [""]
    assert bool(cause) == (abs(found.value) > 1000)
    assert "far from" not in cause
    assert noise > 0 or "the copies of train rows" in cause
    assert found.n_copied == (0 if noise == 1e-2 else 400)


@pytest.mark.parametrize("mode", ["test", "train"])
def test_a_value_of_far_rows_names_no_copies(mode):
    train, test, fresh = three_sets()
    found = feature_likelihood_divergence(train, test, fresh * 1e3 + 1e6, mode=mode, seeds=(0,))
    assert found.value > 1000
    assert found.n_copied == 0
    (cause,) = found.warnings
    assert "features far from the real ones" in cause
    assert "copies" not in cause


@pytest.mark.parametrize("mode", ["test", "train", "gap"])
def test_a_test_set_within_the_train_set_is_refused(mode):
    train, test, fresh = three_sets()
    for known in (test, np.concatenate([train, test])[::-1]):
        with pytest.raises(UserError, match="all 200 test rows are train rows too"):
            feature_likelihood_divergence(known, test, fresh, mode=mode, seeds=(0,))


def test_rows_that_sets_share_are_counted_and_said():
    train, test, fresh = three_sets()
    mixed = np.concatenate([test[:50], train])
    found = feature_likelihood_divergence(mixed, test, fresh, seeds=(0,))
    assert found.n_shared == 50
    assert found.warnings == (
        "50 of 200 test rows (25.0%) are train rows too, so the test is not on unseen rows alone",
    )
    found = feature_likelihood_divergence(train, test, test, seeds=(0,))
    assert found.warnings == (
        "200 of 200 generated rows are copies of test rows, which flatters them",
    )
    found = feature_likelihood_divergence(np.repeat(train, 2, axis=0), test, fresh, seeds=(0,))
    assert found.warnings == (
        "400 of 800 train rows are copies of other train rows: the baseline is of copies, which "
        "lowers the value",
    )


@pytest.mark.parametrize("generated", [199, 200, 201, 300])
def test_a_baseline_smaller_than_the_generated_set_is_said_with_its_size(generated):
    """By the authors' rule k = min(generated, train // 2) train rows stand in for generated."""
    train, test, fresh = three_sets(g=generated)
    found = feature_likelihood_divergence(train, test, fresh, seeds=(0,))
    assert found.n_baseline == min(generated, 200)
    said = [line for line in found.warnings if "the baseline has" in line]
    assert len(said) == (generated > 200)
    if said:
        assert (
            f"200 centres, half of 400 train rows, and the generated set has {generated}"
            in (said[0])
        )
        assert f"give {2 * generated} train rows or more" in said[0]


def test_the_baseline_of_one_model_serves_the_next_and_no_other_data():
    train, test, generated = clouds()
    whole = feature_likelihood_divergence(train, test, generated * 1.2, seeds=(0, 1))
    first = feature_likelihood_divergence(train, test, generated, seeds=(0,))
    reused = feature_likelihood_divergence(
        train, test, generated * 1.2, seeds=(0, 1), baseline=first.baseline
    )
    assert reused.values == whole.values
    assert reused.baseline == whole.baseline
    with pytest.raises(UserError, match="baseline given is of other train or test"):
        feature_likelihood_divergence(train + 1e-3, test, generated, baseline=first.baseline)


def test_features_constant_in_the_test_set_are_dropped_and_named():
    train, test, generated = clouds()
    widened = [np.hstack([rows, np.full((len(rows), 1), 2.0)]) for rows in (train, test, generated)]
    found = feature_likelihood_divergence(*widened, seeds=(0,))
    assert found.value == pytest.approx(
        feature_likelihood_divergence(train, test, generated, seeds=(0,)).value, abs=1e-6
    )
    assert found.dim == 8
    assert found.warnings == ("1 feature dimensions are constant in the test set and were dropped",)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mode": "other"}, "mode 'other' is unknown"),
        ({"dtype": "float16"}, "dtype 'float16' is unknown"),
        ({"seeds": ()}, "seeds are \\[\\]"),
        ({"seeds": (1, 1)}, "each once"),
        ({"max_generated": 1}, "max_generated is 1"),
        ({"test": np.ones((5, 8))}, "test features are all constant"),
        ({"train": np.ones((3, 8))}, "train features: 3 rows"),
        ({"generated": np.full((5, 8), np.nan)}, "generated features: 5 of 5 rows"),
        ({"generated": np.ones((5, 7))}, "generated features 7"),
    ],
)
def test_wrong_arguments_are_refused(change, message):
    names = dict(zip(("train", "test", "generated"), clouds(), strict=True))
    with pytest.raises(UserError, match=message):
        feature_likelihood_divergence(**(names | change))
