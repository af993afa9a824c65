"""Counter-based random numbers: a value is a pure function of its seed and its address.

Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) in int64
tensor arithmetic. CPU and CUDA draw the same bits, and no state is kept: a sample's noise does
not depend on the batch, the rank or the restart in which it is drawn.

Layout. The key is the 64-bit seed, low word first. The counter's four 32-bit words are
(block, step, slot, stream): `block` numbers the groups of four values within one sample, row
major; `step` is a step of training or sampling; `slot` is a sample of a batch; `stream` is
the use (`RandomStream`). Golden values in the tests fix this layout, since changing
it changes every result. A sampler gives each image a seed; a trainer gives all samples one seed,
and (step, slot) tells them apart.

Why not `numpy.random.Philox`: for 64 images of 4x28x28 it takes 8 ms per step on one CPU core where
this takes 12 (over 250 steps 2 s and 3 s, both nothing next to the network), but it needs a
generator per image and a copy to the device every step, and does not promise the same normals in
its next version. On a GPU this is some 150 short kernels per step, queued without waiting.
"""

import math
from collections.abc import Sequence
from enum import IntEnum

import torch
from torch import Tensor

from common.errors import UserError

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)

Integers = int | Sequence[int] | Tensor


class RandomStream(IntEnum):
    """The uses of randomness; each is a separate stream, so that no two share a value."""

    TIME = 0  # training: diffusion time t of a sample
    NOISE = 1  # training: eps of the interpolant
    POSTERIOR = 2  # training: the VAE's posterior sample
    DROPOUT = 3  # training: whether the condition is dropped
    SAMPLE_START = 4  # sampling: the latent at t = 1
    SAMPLE_STEP = 5  # sampling: the SDE's noise, one a step
    SEED = 6  # seeds derived from a seed


def philox(counter: Sequence[Tensor], key: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Philox4x32-10 of four counter words under two key words.

    All are int64 tensors of values in [0, 2^32) that broadcast against each other; so are the
    four words returned. An int64 product wraps, but its 64 bits are those of the unsigned one.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        high0, high1 = (p0 >> 32) & _WORD, (p1 >> 32) & _WORD
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, p1 & _WORD, high0 ^ c3 ^ k1, p0 & _WORD
        k0, k1 = (k0 + _WEYL[0]) & _WORD, (k1 + _WEYL[1]) & _WORD
    return c0, c1, c2, c3


def uniform(
    seed: Integers,
    shape: Sequence[int],
    *,
    stream: RandomStream | int,
    step: Integers = 0,
    slot: Integers = 0,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Uniform values [n, *shape] in the open interval (0, 1), multiples of 2^-24 exact in float32.

    `seed` in [0, 2^64), `step` and `slot` in [0, 2^32) are single numbers or n of them (list or
    int64 tensor, whose bits count as unsigned) and broadcast to n; n is 1 for single numbers.
    Raises UserError for a number outside its range.

    Example:
        >>> uniform(42, (2,), stream=RandomStream.TIME, step=1, slot=2)
        tensor([[0.2183, 0.1606]])
    """
    words = _words(seed, shape, stream, step, slot, device)
    return (((words >> 9).double() + 0.5) * 2.0**-23).to(dtype)


def normal(
    seed: Integers,
    shape: Sequence[int],
    *,
    stream: RandomStream | int,
    step: Integers = 0,
    slot: Integers = 0,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Standard normal values [n, *shape], addressed as in `uniform`.

    Box-Muller in float64 on pairs of 32-bit words, so |value| < 6.77; CPU and CUDA agree to the
    rounding of float64.
    """
    padded = math.prod(shape) + math.prod(shape) % 2
    words = _words(seed, (padded,), stream, step, slot, device)
    u = (words.double() + 0.5) * 2.0**-32
    radius = torch.sqrt(-2 * torch.log(u[:, 0::2]))
    angle = 2 * math.pi * u[:, 1::2]
    values = torch.stack([radius * angle.cos(), radius * angle.sin()], dim=2).flatten(1)
    return values[:, : math.prod(shape)].reshape(-1, *shape).to(dtype)


def derive_seeds(seed: int, indices: Integers) -> Tensor:
    """Seeds [n] (int64, the bits of 64-bit seeds) of the images `indices` of a run under `seed`.

    Runs under neighbouring seeds share no image, which seed + index would not give.
    """
    low, high = _words(seed, (2,), RandomStream.SEED, 0, indices, "cpu").unbind(1)
    return low | (high << 32)


def seed_tensor(seeds: Integers, device: torch.device | str = "cpu") -> Tensor:
    """Seeds in [0, 2^64) as the int64 tensor [n] with their bits."""
    return _integers(seeds, "seed", 64, device)


def _words(
    seed: Integers,
    shape: Sequence[int],
    stream: RandomStream | int,
    step: Integers,
    slot: Integers,
    device: torch.device | str,
) -> Tensor:
    """Random 32-bit words [n, *shape] (int64); a sample's words fill its shape row by row."""
    size = math.prod(shape)
    key = _integers(seed, "seed", 64, device)[:, None]
    step_word = _integers(step, "step", 32, device)[:, None]
    slot_word = _integers(slot, "slot", 32, device)[:, None]
    stream_word = torch.full((), int(stream), dtype=torch.int64, device=device)
    block = torch.arange(-(-size // 4), device=device)
    words = philox((block, step_word, slot_word, stream_word), (key & _WORD, (key >> 32) & _WORD))
    return torch.stack(words, dim=2).flatten(1)[:, :size].reshape(-1, *shape)


def _integers(values: Integers, name: str, bits: int, device: torch.device | str) -> Tensor:
    """Numbers below 2^bits as an int64 tensor [n]; a tensor is taken as it is, without a sync.

    A single number is filled in on the device: to copy it there would wait for all queued work.
    """
    if isinstance(values, Tensor):
        return values.to(device=device, dtype=torch.int64).reshape(-1)
    numbers = [values] if isinstance(values, int) else [int(value) for value in values]
    for number in numbers:
        if not 0 <= number < 2**bits:
            raise UserError(f"{name} is {number}; expected an integer in [0, 2^{bits})")
    signed = [number - 2**64 if number >= 2**63 else number for number in numbers]
    if len(signed) == 1:
        return torch.full((1,), signed[0], dtype=torch.int64, device=device)
    return torch.tensor(signed, dtype=torch.int64, device=device)
