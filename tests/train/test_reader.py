"""Reading: the stream's tiles with their own features, whatever the threads and processes."""

import errno
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TILE_PX, add_shard, make_dataset, train_features, train_tile

from common.errors import UserError
from pipeline.dataset import (
    Dataset,
    Entry,
    Run,
    claim_identity,
    make_selection,
    new_run_id,
    read_selection,
    software_versions,
    write_selection,
)
from pipeline.dataset.features import store as store_module
from pipeline.dataset.tiles import store as tiles_module
from pipeline.dataset.tiles.zarr_shard import commit_zarr, encode_chunk
from train.reader import Batch, BatchReader, OnError
from train.source import BlockSource, OpenBlock, check_coverage
from train.stream import Stream, compile_blocks, slots_of_rank

B, K = 6, 2


def make_stream(dataset: Dataset) -> Stream:
    table = compile_blocks(read_selection(dataset, "train"))
    return Stream(table, seed=5, batch_size=B, cursors=K)


def make_source(dataset: Dataset) -> BlockSource:
    return BlockSource(dataset, tile_px=TILE_PX, encoder="h0-mini")


def read(
    dataset: Dataset, slots: range = range(B), first: int = 0, stop: int = 20, **options: object
) -> list[Batch]:
    stream = make_stream(dataset)
    with BatchReader(
        stream, make_source(dataset), slots, first_step=first, stop_step=stop, **options
    ) as reader:
        return list(reader)


def test_tiles_come_with_their_own_features(train_dataset: Dataset) -> None:
    stream = make_stream(train_dataset)
    for batch in read(train_dataset):
        assert batch.cls is not None
        assert batch.tokens is not None
        for place, row in enumerate(stream.find_batch(batch.step)):
            slide = int(row.slide_id[2])
            cls, tokens = train_features(slide, row.rank)
            assert np.array_equal(batch.tiles[place].numpy(), train_tile(slide, row.rank))
            assert np.array_equal(batch.cls[place].numpy(), cls)
            assert np.array_equal(batch.tokens[place].numpy(), tokens)


def test_int8_tokens_read_as_float16(train_dataset: Dataset) -> None:
    source = BlockSource(
        train_dataset, tile_px=TILE_PX, encoder="h0-mini", tokens_kind="tokens-int8"
    )
    with BatchReader(
        make_stream(train_dataset), source, range(B), first_step=0, stop_step=1
    ) as reader:
        batch = next(iter(reader))
    assert batch.tokens is not None
    assert batch.tokens.dtype == torch.float16
    for place, row in enumerate(make_stream(train_dataset).find_batch(0)):
        _, tokens = train_features(int(row.slide_id[2]), row.rank)
        difference = np.abs(batch.tokens[place].numpy() - tokens)
        assert 0 < difference.max() <= np.abs(tokens).max() / 127


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("threads", [1, 3])
def test_ranks_and_threads_change_nothing(
    train_dataset: Dataset, num_ranks: int, threads: int
) -> None:
    whole = read(train_dataset, stop=8)
    parts = [
        read(train_dataset, slots_of_rank(rank, num_ranks, B), stop=8, threads=threads, prefetch=1)
        for rank in range(num_ranks)
    ]
    for step, batch in enumerate(whole):
        joined = np.concatenate([part[step].tiles.numpy() for part in parts])
        assert np.array_equal(joined, batch.tiles.numpy())


@pytest.mark.parametrize(("before", "after"), [(1, 3), (4, 2)])
def test_resume_with_another_number_of_processes(
    train_dataset: Dataset, before: int, after: int
) -> None:
    whole, stopped = read(train_dataset, stop=12), 7
    parts = [
        read(train_dataset, slots_of_rank(rank, ranks, B), first=first, stop=stop)
        for ranks, first, stop in ((before, 0, stopped), (after, stopped, 12))
        for rank in range(ranks)
    ]
    for step, batch in enumerate(whole):
        mine = [
            part[step - part[0].step] for part in parts if part[0].step <= step <= part[-1].step
        ]
        assert np.concatenate([part.tiles.numpy() for part in mine]).tobytes() == (
            batch.tiles.numpy().tobytes()
        )


@pytest.mark.parametrize("step", [1, 7, 13, 14])
def test_resume_from_any_step(train_dataset: Dataset, step: int) -> None:
    whole = read(train_dataset, stop=16)
    for late, batch in zip(read(train_dataset, first=step, stop=16), whole[step:], strict=True):
        assert late.step == batch.step
        assert late.tiles.equal(batch.tiles)
        assert late.tokens is not None
        assert batch.tokens is not None
        assert late.tokens.equal(batch.tokens)


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE])
def test_what_the_disk_refuses_is_skipped_like_a_damaged_tile(
    train_dataset: Dataset, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    real, calls = os.pread, []

    def pread(fd: int, count: int, at: int) -> bytes:
        calls.append(at)
        if len(calls) == 9:
            raise OSError(number, os.strerror(number))
        return real(fd, count, at)

    monkeypatch.setattr(os, "pread", pread)
    says = rf"\.tar cannot be read: {os.strerror(number)}"
    with pytest.raises(UserError, match=says):
        read(train_dataset)
    calls.clear()
    batches = read(train_dataset, on_error="skip")
    assert len(batches) == 20
    assert [os.strerror(number) in line for batch in batches for line in batch.damaged] == [True]


def test_more_shards_change_nothing(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path)
    before = read(dataset, stop=6)
    add_shard(dataset, 1, 32, 64)
    add_shard(dataset, 2, 0, 16)
    for a, b in zip(before, read(dataset, stop=6), strict=True):
        assert a.tiles.equal(b.tiles)


def test_each_block_is_read_once_a_cursor_visit(
    train_dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: Counter[tuple[str, int]] = Counter()
    original = BlockSource.open_block

    def count(self: BlockSource, slide_id: str, block: int) -> OpenBlock:
        opened[slide_id, block] += 1
        return original(self, slide_id, block)

    monkeypatch.setattr(BlockSource, "open_block", count)
    stream = make_stream(train_dataset)
    stop = stream.steps_per_epoch
    read(train_dataset, stop=stop, threads=2)
    visits = Counter(
        block
        for slot in range(B)
        for cursor in range(K)
        for block in {
            (row.slide_id, row.block)
            for t in range(cursor, stop, K)
            for row in [stream.find_row(t, slot)]
        }
    )
    assert opened == visits


def test_zarr_shards_give_the_same_stream(tmp_path: Path) -> None:
    """Slide 1 as Zarr beside slide 0 as tar: one dataset may hold both."""
    dataset = make_dataset(tmp_path / "dataset")
    before = read(dataset, stop=8)
    for tar in dataset.tiles_dir(TILE_PX).glob("S.1-x.*"):
        tar.unlink()
    tiles = [train_tile(1, rank) for rank in range(37)]
    path = dataset.tiles_dir(TILE_PX) / "S.1-x.0-37.zarr"
    with Run(dataset, "tile", software_versions()) as run:
        files = commit_zarr(dataset, new_run_id(), path, TILE_PX, map(encode_chunk, tiles))
        entry = Entry("S.1-x", "done", "f", scope=str(TILE_PX), start=0, stop=37, files=files)
        run.append([entry])
    for a, b in zip(before, read(dataset, stop=8), strict=True):
        assert a.tiles.equal(b.tiles)
        assert a.tokens is not None
        assert b.tokens is not None
        assert a.tokens.equal(b.tokens)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts open files in /proc")
def test_open_files_do_not_grow_with_slides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiles_module, "_OPEN_FILES", 3)
    monkeypatch.setattr(store_module, "_OPEN_FILES", 3)
    dataset = Dataset(tmp_path)
    claim_identity(dataset, {"tile_px": TILE_PX, "mpp": 0.5}, stage="scan", versions={})
    for slide in range(12):
        add_shard(dataset, slide, 0, 16)
    chosen = {f"S.{slide}-x": np.arange(16, dtype=np.int32) for slide in range(12)}
    write_selection(dataset, "test", make_selection("train", chosen, {}))

    def open_files() -> int:
        found = [os.readlink(fd) for fd in Path("/proc/self/fd").iterdir() if fd.is_symlink()]
        return sum(str(tmp_path) in name for name in found)

    stream, most = make_stream(dataset), 0
    with BatchReader(
        stream, make_source(dataset), range(B), first_step=0, stop_step=2 * stream.steps_per_epoch
    ) as reader:
        for _ in reader:
            most = max(most, open_files())
    # Three stores' open files; blocks that cursors hold are views of two files each.
    assert 0 < most <= 3 * 4 + 2 * B * K


def damage(dataset: Dataset, rank: int) -> None:
    """Overwrite the middle of one PNG of slide 0."""
    path = next(dataset.tiles_dir(TILE_PX).glob("S.0-x.0-48.tar"))
    data = bytearray(path.read_bytes())
    at = data.index(f"S.0-x/{rank:08d}.png".encode()) + 512
    data[at + 40 : at + 200] = bytes(160)
    path.write_bytes(bytes(data))


def first_step_of(dataset: Dataset, rank: int, *, after: int = 0) -> tuple[int, int]:
    stream = make_stream(dataset)
    return next(
        (t, slot)
        for t in range(after, 3 * stream.steps_per_epoch)
        for slot, row in enumerate(stream.find_batch(t))
        if (row.slide_id, row.rank) == ("S.0-x", rank)
    )


def test_a_damaged_tile_stops_with_its_name_at_its_own_step(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path)
    damage(dataset, 21)
    step, _ = first_step_of(dataset, 21)
    stream = make_stream(dataset)
    seen = []
    with (
        pytest.raises(UserError, match=r"S\.0-x\.0-48\.tar: tile 21 of slide S\.0-x"),
        BatchReader(
            stream, make_source(dataset), range(B), first_step=0, stop_step=step + 5
        ) as reader,
    ):
        seen.extend(batch.step for batch in reader)
    assert seen == list(range(step))


def test_skipping_takes_the_cursors_previous_row_and_counts(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path)
    stream = make_stream(dataset)
    ranks = (r for r in range(1, 48) if first_step_of(dataset, r)[0] >= K)
    rank = next(ranks)
    damage(dataset, rank)
    step, slot = first_step_of(dataset, rank)
    batches = read(dataset, stop=step + 1, on_error="skip")
    assert [len(batch.damaged) for batch in batches] == [0] * step + [1]
    assert f"tile {rank} of slide S.0-x" in batches[step].damaged[0]
    stand_in = stream.find_row(step - K, slot)
    expected = train_tile(int(stand_in.slide_id[2]), stand_in.rank)
    assert np.array_equal(batches[step].tiles[slot].numpy(), expected)
    resumed = read(dataset, first=step, stop=step + 1, on_error="skip")
    assert resumed[0].tiles.equal(batches[step].tiles)


def test_skipping_at_a_stretchs_start_takes_a_later_row(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path)
    stream = make_stream(dataset)
    slot, row = next((s, r) for s, r in enumerate(stream.find_batch(0)) if r.slide_id == "S.0-x")
    damage(dataset, row.rank)
    batch = read(dataset, stop=1, on_error="skip")[0]
    later = stream.find_row(K, slot)
    expected = train_tile(int(later.slide_id[2]), later.rank)
    assert np.array_equal(batch.tiles[slot].numpy(), expected)


def test_damaged_tokens_stop_or_are_skipped_with_their_file(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path)
    folder = dataset.features_dir(TILE_PX, "h0-mini") / "tokens-float16"
    path = folder / "S.0-x.0-48.parquet"
    data = bytearray(path.read_bytes())
    at = data.index(train_features(0, 20)[1].tobytes())  # rank 20, in block 1
    data[at] ^= 255
    path.write_bytes(bytes(data))
    table = compile_blocks(read_selection(dataset, "train"))
    stream = Stream(table, seed=5, batch_size=2, cursors=1)  # stretches longer than a block

    def batches(on_error: OnError) -> list[Batch]:
        with BatchReader(
            stream, make_source(dataset), range(2), first_step=0, stop_step=30, on_error=on_error
        ) as reader:
            return list(reader)

    named = r"slide S\.0-x, rank (1[6-9]|2\d|3[01]): .*S\.0-x\.0-48\.parquet: block 1 is damaged"
    with pytest.raises(UserError, match=named):
        batches("stop")
    skipped = 0
    for batch in batches("skip"):
        rows = stream.find_batch(batch.step)
        hit = [row for row in rows if (row.slide_id, row.block) == ("S.0-x", 1)]
        assert len(batch.damaged) == len(hit)
        assert all("S.0-x.0-48.parquet" in text for text in batch.damaged)
        skipped += len(hit)
    assert skipped > 0


def test_runs_without_features_open_no_features(train_dataset: Dataset) -> None:
    source = BlockSource(
        train_dataset, tile_px=TILE_PX, encoder="absent", with_cls=False, with_tokens=False
    )
    assert source.encoder_record == {}
    with BatchReader(
        make_stream(train_dataset), source, range(B), first_step=0, stop_step=1
    ) as reader:
        batch = next(iter(reader))
    assert batch.cls is None
    assert batch.tokens is None


def test_missing_tiles_and_features_name_the_command(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path)
    table = compile_blocks(read_selection(dataset, "train"))
    known = {"encoder": "h0-mini", "view": ""}
    check_coverage(dataset, table, tile_px=TILE_PX, kinds=["cls", "tokens-float16"], **known)
    with pytest.raises(UserError, match="python -m pipeline tile"):
        check_coverage(dataset, table, tile_px=99, kinds=[], **known)
    with pytest.raises(UserError, match=r"python -m pipeline cache .* --encoder uni2-h"):
        check_coverage(dataset, table, tile_px=TILE_PX, encoder="uni2-h", view="", kinds=["cls"])
