"""The stream against a slow oracle, and its promises as properties."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import UserError
from pipeline.dataset import Selection, make_selection
from train.stream import (
    BLOCK_DTYPE,
    Stream,
    compile_blocks,
    epoch_order,
    map_blocks,
    slots_of_rank,
    write_blocks,
)


@st.composite
def selections(draw: st.DrawFn) -> Selection:
    counts = draw(st.lists(st.integers(0, 70), min_size=1, max_size=4))
    ranks = {}
    for index, count in enumerate(counts):
        rng = np.random.default_rng(index)
        ranks[f"slide-{index}"] = rng.permutation(100)[:count].astype(np.int32)
    return make_selection("s", ranks, {})


def oracle(selection: Selection, seed: int, B: int, K: int, t: int) -> list[tuple[str, int]]:
    """Batch t by the letter of architecture.md, with lists."""
    pairs = sorted({(slide, int(r) // 16) for slide, ranks in selection.items() for r in ranks})
    selected = {(slide, int(r)) for slide, ranks in selection.items() for r in ranks}
    N = len(selected)
    L = N // (B * K)
    e, i = divmod(t, L * K)
    words = np.random.Philox(key=np.array([seed, e], np.uint64)).random_raw(len(pairs))
    shuffled = [pairs[k] for k in sorted(range(len(pairs)), key=lambda k: int(words[k]))]
    rows = [
        (slide, rank)
        for slide, block in shuffled
        for rank in range(16 * block, 16 * block + 16)
        if (slide, rank) in selected
    ]
    return [rows[(j * K + i % K) * L + i // K] for j in range(B)]


@settings(max_examples=60, deadline=None)
@given(selections(), st.integers(0, 2**63), st.integers(1, 7), st.integers(1, 5), st.data())
def test_batches_equal_the_oracle(
    selection: Selection, seed: int, B: int, K: int, data: st.DataObject
) -> None:
    table = compile_blocks(selection)
    assert table.num_rows == selection.rows
    if selection.rows < B * K:
        with pytest.raises(UserError, match=r"lower|select"):
            Stream(table, seed=seed, batch_size=B, cursors=K)
        return
    stream = Stream(table, seed=seed, batch_size=B, cursors=K)
    t = data.draw(st.integers(0, 3 * stream.steps_per_epoch))
    rows = [(row.slide_id, row.rank) for row in stream.find_batch(t)]
    assert rows == oracle(selection, seed, B, K, t)


@settings(max_examples=30, deadline=None)
@given(selections(), st.integers(1, 6), st.integers(1, 4))
def test_no_row_twice_in_an_epoch_and_few_left_out(selection: Selection, B: int, K: int) -> None:
    if selection.rows < B * K:
        return
    stream = Stream(compile_blocks(selection), seed=3, batch_size=B, cursors=K)
    for epoch in range(2):
        first = epoch * stream.steps_per_epoch
        seen = [
            (row.slide_id, row.rank)
            for t in range(first, first + stream.steps_per_epoch)
            for row in stream.find_batch(t)
        ]
        assert len(seen) == len(set(seen))
        assert 0 <= selection.rows - len(seen) < B * K


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
def test_ranks_cut_the_batch_without_gap_or_overlap(num_ranks: int) -> None:
    slots = [slot for rank in range(num_ranks) for slot in slots_of_rank(rank, num_ranks, 10)]
    assert slots == list(range(10))


def test_a_cursor_reads_a_block_from_end_to_end() -> None:
    selection = make_selection("s", {"a": np.arange(640, dtype=np.int32)}, {})
    stream = Stream(compile_blocks(selection), seed=0, batch_size=2, cursors=2)
    rows = [stream.find_row(t, 1) for t in range(0, stream.steps_per_epoch, 2)]
    blocks = [row.block for row in rows]
    visits = [b for k, b in enumerate(blocks) if k == 0 or blocks[k - 1] != b]
    assert len(visits) == len(set(visits))
    assert {row.cursor for row in rows} == {0}


def test_neighbours_are_the_same_cursor_in_the_same_epoch() -> None:
    selection = make_selection("s", {"a": np.arange(64, dtype=np.int32)}, {})
    stream = Stream(compile_blocks(selection), seed=0, batch_size=4, cursors=2)
    step = stream.steps_per_epoch + 5
    found = list(stream.cursor_neighbours(step))
    assert found[:2] == [step - 2, step - 4]
    assert sorted([*found, step]) == list(range(step - 4, 2 * stream.steps_per_epoch, 2))
    assert {stream.find_row(t, 3).cursor for t in found} == {stream.find_row(step, 3).cursor}


def test_epochs_and_seeds_shuffle_differently() -> None:
    orders = [tuple(epoch_order(50, seed, epoch)) for seed in (0, 1) for epoch in (0, 1)]
    assert len(set(orders)) == 4
    assert all(sorted(order) == list(range(50)) for order in orders)


def test_the_order_is_pinned_for_ever() -> None:
    """A change here changes every run: Philox4x64-10 under the key (seed, epoch)."""
    assert epoch_order(8, 0, 0).tolist() == [0, 2, 1, 5, 4, 3, 6, 7]


def test_the_table_takes_ten_bytes_a_block_and_its_hash_depends_on_rows_alone() -> None:
    assert BLOCK_DTYPE.itemsize == 10
    ranks = {"a": np.array([3, 1, 17], np.int32)}
    one = compile_blocks(make_selection("x", ranks, {"plan": 1}))
    two = compile_blocks(make_selection("y", {"a": np.sort(ranks["a"])}, {}))
    other = compile_blocks(make_selection("x", {"a": np.array([3, 2, 17], np.int32)}, {}))
    assert one.content_hash == two.content_hash != other.content_hash
    assert one.blocks["mask"].tolist() == [0b1010, 0b10]


def test_a_mapped_table_is_the_table_and_is_not_in_memory(tmp_path: Path) -> None:
    ranks = {"a.b": np.arange(40, dtype=np.int32), "é": np.array([5, 700], np.int32)}
    table = compile_blocks(make_selection("s", ranks, {}))
    write_blocks(compile_blocks(make_selection("s", {"z": ranks["a.b"]}, {})), tmp_path)
    write_blocks(table, tmp_path)  # over another one, as after a new selection
    mapped = map_blocks(tmp_path)
    assert mapped.content_hash == table.content_hash
    assert isinstance(mapped.blocks, np.memmap)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["blocks.npy", "slides.json"]
    batches = [Stream(t, seed=1, batch_size=3, cursors=2).find_batch(5) for t in (table, mapped)]
    assert batches[0] == batches[1]


@settings(max_examples=30, deadline=None)
@given(selections(), st.integers(1, 40))
def test_spread_rows_are_selected_rows_at_even_distances(selection: Selection, count: int) -> None:
    table = compile_blocks(selection)
    rows = [(slide, int(rank)) for slide, ranks in selection.items() for rank in ranks]
    places = np.unique(np.linspace(0, len(rows) - 1, min(count, len(rows))).astype(int))
    assert table.spread_rows(count) == [rows[place] for place in places]


def test_read_amplification_counts_whole_blocks() -> None:
    whole = make_selection("s", {"a": np.arange(32, dtype=np.int32)}, {})
    thinned = make_selection("s", {"a": np.arange(0, 32, 4, dtype=np.int32)}, {})
    assert compile_blocks(whole).read_amplification == 1
    assert compile_blocks(thinned).read_amplification == 4


@pytest.mark.parametrize(
    ("B", "K", "says"),
    [(4, 4, "lower data.cursors to 2"), (20, 1, "lower data.batch_size to 10 or less")],
)
def test_too_small_a_selection_names_what_to_lower(B: int, K: int, says: str) -> None:
    selection = make_selection("s", {"a": np.arange(10, dtype=np.int32)}, {})
    with pytest.raises(UserError, match=says):
        Stream(compile_blocks(selection), seed=0, batch_size=B, cursors=K)
