import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.dataset.grid import grid_positions, rank_keys, rank_order, reserve_size, window_means


@given(
    width=st.integers(1, 5000),
    height=st.integers(1, 5000),
    stride=st.floats(50, 900),
)
@settings(max_examples=60, deadline=None)
def test_tiles_lie_inside_and_neither_overlap_nor_gap(width, height, stride):
    x, y = grid_positions(width, height, stride, stride)
    assert len(x) == len(y) == (int(width / stride + 1e-9)) * (int(height / stride + 1e-9)) or (
        min(width % stride, stride - width % stride) < 0.01
        or min(height % stride, stride - height % stride) < 0.01
    )
    if len(x):
        assert x.max() + stride <= width + 0.01
        assert y.max() + stride <= height + 0.01
        columns = np.unique(x)
        assert np.all(np.abs(np.diff(columns) - stride) <= 1 / 256)
        assert columns[0] == 0


def test_positions_are_kept_in_256ths_of_a_pixel():
    x, _ = grid_positions(3000, 600, 481.7203, 481.7203)
    assert np.all(x * 256 == np.rint(x * 256))


def test_rank_keys_never_change():
    """Golden values: another order would make every existing dataset another one."""
    x = np.array([0.0, 224.0, 0.0, 481.71875])
    y = np.array([0.0, 0.0, 224.0, 963.4375])
    keys = rank_keys(0, "CMU-1-Small-Region", x, y)
    assert [hex(int(key)) for key in keys] == [
        "0xb94712c24735045f",
        "0xfdf2d4b5547c67d1",
        "0x82f460f8542da34a",
        "0x9ab3344afd0b46d",
    ]


def test_keys_differ_by_seed_and_slide_and_position():
    x, y = grid_positions(22400, 22400, 224, 224)
    base = rank_keys(0, "a", x, y)
    assert len(np.unique(base)) == len(base)
    assert not np.any(base == rank_keys(1, "a", x, y))
    assert not np.any(base == rank_keys(0, "b", x, y))


def test_rank_order_does_not_depend_on_the_order_of_the_grid():
    x, y = grid_positions(4480, 4480, 224, 224)
    order = rank_order(3, "slide", x, y)
    shuffle = np.random.default_rng(0).permutation(len(x))
    again = rank_order(3, "slide", x[shuffle], y[shuffle])
    assert np.array_equal(x[order], x[shuffle][again])
    assert np.array_equal(y[order], y[shuffle][again])


def test_ranks_are_spread_over_the_slide():
    """A prefix of the ranks is a uniform sample: its mean position is near the middle."""
    x, y = grid_positions(224 * 60, 224 * 60, 224, 224)
    order = rank_order(0, "slide", x, y)[:600]
    middle = (x.mean(), y.mean())
    deviation = x.std() / np.sqrt(600)
    assert abs(x[order].mean() - middle[0]) < 4 * deviation
    assert abs(y[order].mean() - middle[1]) < 4 * deviation


def test_reserve_is_the_ceiling_of_a_five_hundredth():
    assert [reserve_size(n) for n in (0, 1, 499, 500, 501, 10_000)] == [0, 1, 1, 1, 2, 20]


@given(seed=st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_window_means_equal_a_slow_oversampled_mean(seed):
    rng = np.random.default_rng(seed)
    mask = rng.integers(0, 2, (12, 17)).astype(np.float32)
    # Quarter pixels, so that an oversampling by 4 is exact.
    x = rng.integers(0, 4 * 10, 5) / 4
    y = rng.integers(0, 4 * 6, 5) / 4
    size = 4.25
    fine = np.kron(mask, np.ones((4, 4)))
    for i, mean in enumerate(window_means(mask, x, y, size)):
        left, top, side = int(x[i] * 4), int(y[i] * 4), int(size * 4)
        assert abs(mean - fine[top : top + side, left : left + side].mean()) < 1e-6
