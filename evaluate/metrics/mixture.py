"""The mixture of Gaussians behind the feature likelihood divergence, fitted without autograd.

One isotropic Gaussian sits on each generated row; only its variance is free and is fitted to the
train rows by Adam (Jiralerspong et al., arXiv 2302.04440, section 3). With the responsibilities
``R`` of a batch of B rows the gradient is closed,
``dL/ds_j = (d/2 sum_i R_ij - e^{-s_j}/2 sum_i R_ij D_ij) / (B d)``,
two matrix-vector products on exponentials that the loss needs anyway.
"""

import math
import os
import tempfile
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray

from common.errors import UserError
from evaluate.metrics.neighbours import exact_pairs

_LEARNING_RATE, _BETA1, _BETA2, _EPSILON = 0.5, 0.9, 0.999, 1e-8
_EPOCHS, _BATCH_ROWS = 50, 10_000
_PATIENCE, _FIRST_STOP, _SETTLED = 5, 6, 5e-4
_LOG_VARIANCE_LIMIT = 40.0
_ORIGIN_SHRINK = 0.9  # the extra component sees the train rows drawn in by a tenth
_CHUNK_BYTES = 64 << 20
_CACHE_BYTES = 4 << 30


class Mixture:
    """Isotropic Gaussians on given rows, of equal weight, with fitted variances.

    Attributes:
        log_variances: ``[M]``, clamped to [-40, 40].
        nearest_squared: ``[M]``, the squared distance to the nearest of the rows fitted to.
    """

    def __init__(self, centres: torch.Tensor, fitted_to: torch.Tensor) -> None:
        """Fit to the rows ``[n, d]``, which Adam meets in the order given.

        Distances are kept for all epochs, ``n M`` numbers of the rows' dtype; above 4 GiB they
        are in an unnamed temporary file, mapped, so that memory stays bounded.
        """
        self._centres = centres
        squared = _all_squared_distances(fitted_to, centres)
        # By blocks of rows: the distances may be mapped from a file larger than memory.
        minima = torch.full_like(squared[0], torch.inf)
        for block in _row_blocks(len(squared), squared.shape[1], squared.element_size()):
            torch.minimum(minima, squared[block].amin(dim=0), out=minima)
        self.nearest_squared = minima.to(centres.device)
        self.log_variances = _fit_variances(
            squared,
            _ORIGIN_SHRINK**2 * _squared_from_mean(fitted_to),
            ((self.nearest_squared + 1e-3) / centres.shape[1]).log(),
            centres.shape[1],
        )

    def mean_nll(self, rows: torch.Tensor) -> float:
        """Mean negative log-likelihood per dimension of the rows ``[n, d]``, in nats."""
        d, m = self._centres.shape[1], len(self._centres)
        scale, constant = _density_coefficients(self.log_variances, d, m)
        total = 0.0
        for block in _row_blocks(len(rows), m, rows.element_size()):
            squared = _squared_block(rows[block], self._centres)
            total += float(squared.mul_(scale).add_(constant).logsumexp(dim=1).sum())
        return -total / (len(rows) * d)

    def memorisation_scores(self) -> NDArray[np.float64]:
        """Each component's largest log-density per dimension on a row fitted to, ``[M]``."""
        d = self._centres.shape[1]
        scale, constant = _density_coefficients(self.log_variances, d, 1)
        return ((self.nearest_squared * scale + constant) / d).double().cpu().numpy()


def _fit_variances(
    squared: torch.Tensor, origin_squared: torch.Tensor, initial: torch.Tensor, d: int
) -> torch.Tensor:
    """The log-variances after Adam; the last parameter is the origin component's."""
    s = torch.cat([initial, initial.new_zeros(1)])
    first, second = torch.zeros_like(s), torch.zeros_like(s)
    history: list[float] = []
    step = 0
    for epoch in range(_EPOCHS):
        losses = []
        for start in range(0, len(squared), _BATCH_ROWS):
            batch = slice(start, start + _BATCH_ROWS)
            loss, gradient = _loss_and_gradient(squared[batch], origin_squared[batch], s, d)
            losses.append(loss)
            step += 1
            first.lerp_(gradient, 1 - _BETA1)
            second.lerp_(gradient.square(), 1 - _BETA2)
            scale = (second / (1 - _BETA2**step)).sqrt_().add_(_EPSILON)
            s -= _LEARNING_RATE / (1 - _BETA1**step) * first / scale
            s[:-1].clamp_(-_LOG_VARIANCE_LIMIT, _LOG_VARIANCE_LIMIT)
        # The authors' rule: stop when the last epochs' losses are within a two-thousandth.
        history.append(sum(losses) / len(losses))
        recent = history[-_PATIENCE:]
        if epoch >= _FIRST_STOP and max(abs(recent[-1] - loss) for loss in recent) < _SETTLED:
            break
    return s[:-1]


def _loss_and_gradient(
    squared: torch.Tensor, origin_squared: torch.Tensor, s: torch.Tensor, d: int
) -> tuple[float, torch.Tensor]:
    """The batch's mean negative log-likelihood per dimension, and its gradient ``[M + 1]``."""
    m, n = squared.shape[1], len(squared)
    scale, constant = _density_coefficients(s[:-1], d, m)
    origin_scale, origin_constant = _density_coefficients(s[-1:], d, 1)
    mass, spread = torch.zeros_like(s), torch.zeros_like(s)
    log_likelihood = 0.0
    for block in _row_blocks(n, m, s.element_size()):
        near = squared[block].to(s.device)
        scores = torch.addcmul(constant, near, scale)
        origin = origin_squared[block] * origin_scale + origin_constant
        # The largest score is taken out first, so that no exponential overflows.
        top = torch.maximum(scores.amax(dim=1), origin)
        scores.sub_(top[:, None]).exp_()
        origin.sub_(top).exp_()
        total = scores.sum(dim=1) + origin
        log_likelihood += float((total.log() + top).sum())
        weight = total.reciprocal_()
        mass[:-1] += weight @ scores
        spread[:-1] += weight @ scores.mul_(near)
        mass[-1] += weight @ origin
        spread[-1] += weight @ (origin * origin_squared[block])
    gradient = (d / 2 * mass - (-s).exp() / 2 * spread) / (n * d)
    return -log_likelihood / (n * d), gradient


def _density_coefficients(s: torch.Tensor, d: int, m: int) -> tuple[torch.Tensor, torch.Tensor]:
    """a and c of ``a D + c``, the log of a component's density over the m of equal weight."""
    return -(-s).exp() / 2, -(d / 2) * s - (d / 2 * math.log(2 * math.pi) + math.log(m))


def _all_squared_distances(rows: torch.Tensor, centres: torch.Tensor) -> torch.Tensor:
    shape, size = (len(rows), len(centres)), rows.element_size()
    if shape[0] * shape[1] * size <= _CACHE_BYTES:
        squared = torch.empty(shape, dtype=rows.dtype, device=rows.device)
    else:
        number_type = np.float64 if rows.dtype == torch.float64 else np.float32
        squared = torch.from_numpy(_map_temporary(shape, np.dtype(number_type)))
    for block in _row_blocks(len(rows), len(centres), size):
        squared[block] = _squared_block(rows[block], centres)
    return squared


def _map_temporary(
    shape: tuple[int, int], number_type: np.dtype[np.floating]
) -> NDArray[np.floating]:
    """An array in an unnamed temporary file whose bytes are allocated already.

    A sparse file on a disk that fills up ends the process with SIGBUS, without a word.
    Raises `UserError` where the disk has too little room.
    """
    size = shape[0] * shape[1] * number_type.itemsize
    try:
        with tempfile.TemporaryFile() as file:
            os.posix_fallocate(file.fileno(), 0, size)
            return np.memmap(file, dtype=number_type, shape=shape)
    except OSError as error:
        half = ", or halve it with settings.fld_dtype=float32" if number_type.itemsize > 4 else ""
        raise UserError(
            f"FLD needs {size / 2**30:.1f} GiB of temporary disk in {tempfile.gettempdir()} "
            f"({error.strerror}); set TMPDIR to a folder with that much room{half}"
        ) from error


def _squared_from_mean(rows: torch.Tensor) -> torch.Tensor:
    """``|x - mean|^2`` of each row ``[n]``; in blocks, so that no second ``[n, d]`` is made."""
    mean, squared = rows.mean(dim=0), rows.new_empty(len(rows))
    for block in _row_blocks(len(rows), rows.shape[1], rows.element_size()):
        squared[block] = (rows[block] - mean).square_().sum(dim=1)
    return squared


def _squared_block(rows: torch.Tensor, centres: torch.Tensor) -> torch.Tensor:
    """``|x - c|^2`` by a matrix product; where that cancels, by the difference itself.

    So a copied row is at distance zero exactly, and small distances keep half their digits.
    """
    lengths = rows.square().sum(dim=1)[:, None] + centres.square().sum(dim=1)
    squared = torch.addmm(lengths, rows, centres.T, alpha=-2)
    # Where the product cancels more than half of the digits, the difference decides.
    doubtful = squared < math.sqrt(torch.finfo(rows.dtype).eps) * lengths
    i, j = (index.cpu().numpy() for index in doubtful.nonzero(as_tuple=True))
    if len(i):
        exact = exact_pairs(rows.cpu().numpy(), i, centres.cpu().numpy(), j)
        squared[i, j] = torch.from_numpy(exact).to(squared)
    return squared


def _row_blocks(n: int, width: int, element_size: int) -> Iterator[slice]:
    rows = max(1, _CHUNK_BYTES // (width * element_size))
    return (slice(start, min(start + rows, n)) for start in range(0, n, rows))
