"""The metrics against the packages that define the same quantities: prdc and torchmetrics.

They come with the extra "test"; without them this file is skipped.
"""

import numpy as np
import pytest
import torch

from evaluate.metrics import frechet_distance, kid, precision_recall

prdc = pytest.importorskip("prdc", reason="needs prdc: pip install -e '.[test]'")
fid = pytest.importorskip(
    "torchmetrics.image.fid", reason="needs torchmetrics: pip install -e '.[test]'"
)


def clouds(n, m, d, seed=0, dtype=np.float64):
    rng = np.random.default_rng(seed)
    mixing = rng.standard_normal((d, d)) * np.arange(1, d + 1)[:, None] ** -0.7
    real = rng.standard_normal((n, d)) @ mixing + 1.0
    generated = 0.9 * rng.standard_normal((m, d)) @ mixing + 1.2
    return real.astype(dtype), generated.astype(dtype)


@pytest.mark.parametrize("k", [3, 5])
def test_precision_recall_density_and_coverage_equal_those_of_prdc(k, capsys):
    real, generated = clouds(700, 600, 32)
    found = precision_recall(real, generated, k=k, semantics="prdc")
    expected = prdc.compute_prdc(real, generated, nearest_k=k)
    assert 0.1 < expected["precision"] < 0.99
    for name, value in expected.items():
        assert getattr(found, name) == pytest.approx(value, abs=1e-12), name


class Features(torch.nn.Module):
    """Takes features for images, as they are."""

    def __init__(self, dim):
        super().__init__()
        self.num_features = dim

    def forward(self, rows):
        return rows


@pytest.mark.parametrize(("n", "m", "d"), [(600, 500, 24), (1500, 1200, 256)])
def test_frechet_distance_equals_that_of_torchmetrics(n, m, d):
    real, generated = clouds(n, m, d, 1)
    metric = fid.FrechetInceptionDistance(feature=Features(d)).set_dtype(torch.float64)
    for rows, is_real in ((real, True), (generated, False)):
        for part in np.array_split(rows, 3):
            metric.update(torch.from_numpy(part), real=is_real)
    found = frechet_distance(real, generated).value
    assert found == pytest.approx(by_singular_values(real, generated), rel=1e-11)
    # Its one-pass covariance loses digits to the common mean, and the roots of a product's
    # eigenvalues more: by singular values it is 1e-9 to 1.6e-8 off, as the machine's LAPACK has it.
    assert float(metric.compute()) == pytest.approx(found, rel=1e-7)


def by_singular_values(real, generated):
    """tr (S_r S_g)^(1/2) as the sum of the singular values of C_r C_g^T, S = C^T C."""
    sides = [(rows - rows.mean(axis=0)) / np.sqrt(len(rows) - 1) for rows in (real, generated)]
    roots = [np.linalg.qr(rows, mode="r") for rows in sides]
    between = np.square(real.mean(axis=0) - generated.mean(axis=0)).sum()
    within = sum(np.square(rows).sum() for rows in sides)
    return between + within - 2 * np.linalg.svd(roots[0] @ roots[1].T, compute_uv=False).sum()


def test_kernel_distance_equals_that_of_torchmetrics():
    from torchmetrics.image.kid import poly_mmd

    real, generated = clouds(300, 300, 24, 2)
    expected = poly_mmd(torch.from_numpy(real), torch.from_numpy(generated))
    assert kid(real, generated, subsets=1, subset_size=300).value == pytest.approx(
        float(expected), rel=1e-9
    )
