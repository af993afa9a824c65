import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import UserError
from model.noise import RandomStream, derive_seeds, normal, philox, seed_tensor, uniform

# The known answers published with Random123 for philox4x32-10: counter, key, output.
KNOWN_ANSWERS = [
    ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]

GOLDEN_NORMAL = [
    0.9200180192961206,
    1.3928605469316675,
    -0.40116861365868195,
    -0.31768488466269235,
    -1.3138571650399067,
    -0.13244888818454661,
    -1.700309969505158,
    0.17451533522057547,
]
GOLDEN_UNIFORM = [0.21827632188796997, 0.1605892777442932, 0.2382630705833435]
GOLDEN_SEEDS = [-2052008033084089507, 1929022939835789028]


def philox_by_hand(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x32-10 on Python's unbounded integers."""
    a, b, c, d = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = a * 0xD2511F53, c * 0xCD9E8D57
        a, b, c, d = (p1 >> 32) ^ b ^ k0, p1 % 2**32, (p0 >> 32) ^ d ^ k1, p0 % 2**32
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return [a, b, c, d]


def as_words(values: list[int]) -> list[torch.Tensor]:
    return [torch.tensor(value, dtype=torch.int64) for value in values]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_philox_gives_the_published_known_answers(
    counter: list[int], key: list[int], expected: list[int]
) -> None:
    assert [int(word) for word in philox(as_words(counter), as_words(key))] == expected


word = st.integers(0, 2**32 - 1)


@settings(max_examples=50, deadline=None)
@given(counter=st.lists(word, min_size=4, max_size=4), key=st.lists(word, min_size=2, max_size=2))
def test_philox_equals_unbounded_integers(counter: list[int], key: list[int]) -> None:
    fast = [int(word) for word in philox(as_words(counter), as_words(key))]
    assert fast == philox_by_hand(counter, key)


def test_layout_of_counter_and_key_is_the_documented_one() -> None:
    seed, step, slot = 2**63 + 5, 7, 11
    words = []
    for block in range(2):
        words += philox_by_hand(
            [block, step, slot, int(RandomStream.NOISE)], [seed % 2**32, seed >> 32]
        )
    drawn = uniform(
        seed, (2, 3), stream=RandomStream.NOISE, step=step, slot=slot, dtype=torch.float64
    ).flatten()
    expected = [((word >> 9) + 0.5) / 2**23 for word in words[:6]]
    assert drawn.tolist() == expected


def test_golden_values() -> None:
    drawn = normal([0, 1], (2, 2), stream=RandomStream.SAMPLE_STEP, step=3, dtype=torch.float64)
    assert torch.allclose(
        drawn.flatten(), torch.tensor(GOLDEN_NORMAL, dtype=torch.float64), atol=1e-12
    )
    assert uniform(42, (3,), stream=RandomStream.TIME, step=1, slot=2)[0].tolist() == GOLDEN_UNIFORM
    assert derive_seeds(0, [0, 1]).tolist() == GOLDEN_SEEDS


def test_a_sample_does_not_depend_on_its_batch() -> None:
    together = normal([3, 9, 4], (4, 5, 5), stream=RandomStream.SAMPLE_START)
    alone = normal(9, (4, 5, 5), stream=RandomStream.SAMPLE_START)
    assert torch.equal(together[1:2], alone)
    slots = normal(1, (7,), stream=RandomStream.NOISE, step=5, slot=torch.arange(6))
    assert torch.equal(slots[4:], normal(1, (7,), stream=RandomStream.NOISE, step=5, slot=[4, 5]))


def test_every_part_of_the_address_matters() -> None:
    base = {"seed": 1, "stream": RandomStream.NOISE, "step": 2, "slot": 3}
    first = uniform(shape=(8,), **base)
    for name, value in {
        "seed": 2**32 + 1,
        "stream": RandomStream.TIME,
        "step": 3,
        "slot": 2,
    }.items():
        other = uniform(shape=(8,), **{**base, name: value})
        assert not (first == other).any(), name


def test_a_shape_is_filled_from_the_same_words_whatever_its_size() -> None:
    long = normal(8, (4, 9), stream=0).flatten()
    assert torch.equal(normal(8, (7,), stream=0)[0], long[:7])
    assert normal([1, 2], (), stream=0).shape == (2,)


def test_normal_moments_and_tails() -> None:
    values = normal(torch.arange(50), (4, 28, 28), stream=RandomStream.NOISE, dtype=torch.float64)
    x = values.flatten().numpy()
    n = x.size
    assert abs(x.mean()) < 4 / n**0.5
    assert abs(x.var() - 1) < 4 * (2 / n) ** 0.5
    assert abs((x**4).mean() - 3) < 4 * (96 / n) ** 0.5
    assert abs((np.abs(x) < 1).mean() - 0.682689) < 4 * (0.2166 / n) ** 0.5
    pairs = np.corrcoef(x[0::2], x[1::2])[0, 1]
    assert abs(pairs) < 4 / (n / 2) ** 0.5


def test_uniform_is_open_flat_and_exact_in_float32() -> None:
    wide = uniform(range(20), (5000,), stream=RandomStream.TIME, dtype=torch.float64)
    assert wide.min() > 0
    assert wide.max() < 1
    counts = torch.histc(wide.flatten(), bins=20, min=0, max=1)
    chi_square = ((counts - 5000) ** 2 / 5000).sum()
    assert chi_square < 43.8  # the 0.1 % point for 19 degrees of freedom
    assert torch.equal(uniform(range(20), (5000,), stream=RandomStream.TIME).double(), wide)


def test_derived_seeds_do_not_overlap_between_neighbouring_runs() -> None:
    runs = torch.cat([derive_seeds(seed, range(1000)) for seed in (0, 1, 2)])
    assert runs.unique().numel() == 3000
    assert torch.equal(derive_seeds(1, [7, 2]), derive_seeds(1, range(8))[[7, 2]])


def test_seed_tensor_keeps_all_64_bits() -> None:
    assert seed_tensor([0, 2**63, 2**64 - 1]).tolist() == [0, -(2**63), -1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**64}, r"expected an integer in \[0, 2\^64\)"),
        ({"seed": 0, "step": 2**32}, "step is 4294967296"),
        ({"seed": 0, "slot": [0, -3]}, "slot is -3"),
    ],
)
def test_numbers_out_of_range_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        normal(shape=(2,), stream=0, **arguments)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_draws_what_the_cpu_draws() -> None:
    here = normal([1, 2**63], (4, 28, 28), stream=0, dtype=torch.float64)
    there = normal([1, 2**63], (4, 28, 28), stream=0, dtype=torch.float64, device="cuda")
    assert torch.allclose(here, there.cpu(), rtol=1e-12, atol=1e-12)
    drawn = uniform([1, 2**63], (999,), stream=0, device="cuda").cpu()
    assert torch.equal(drawn, uniform([1, 2**63], (999,), stream=0))
