"""A Zarr shard holds the same tiles as a tar, for this project and for stock zarr."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from common.errors import UserError
from pipeline.__main__ import main
from pipeline.dataset import Dataset, TileStore, new_run_id, read_journal
from pipeline.dataset.tiles.zarr_shard import (
    ZarrShard,
    commit_zarr,
    decode_chunk,
    encode_chunk,
)

SLIDE = "CMU-1-Small-Region"


@pytest.fixture
def zarred(tiled, tmp_path) -> Dataset:
    """The tiled dataset's slide, mask and selection, with its tiles as Zarr."""
    root = tmp_path / "z"
    slides = str(Path(__file__).resolve().parents[1] / "data" / "slides")
    for stage in (
        ["scan", slides, "--workers", "1"],
        ["tissue", "--workers", "1"],
        ["select", "--name", "train"],
        ["tile", "--workers", "1", "--format", "zarr"],
    ):
        assert main([stage[0], "--dataset", str(root), *stage[1:]]) == 0
    return Dataset(root)


@given(hnp.arrays(np.uint8, st.integers(1, 9).map(lambda n: (n, n, 3))))
@settings(max_examples=60, deadline=None)
def test_a_chunk_gives_its_tile_back(tile):
    assert np.array_equal(decode_chunk(encode_chunk(tile), tile.shape[0]), tile)


def test_any_flipped_byte_of_a_chunk_is_noticed():
    rng = np.random.default_rng(0)
    data = encode_chunk(rng.integers(0, 40, (8, 8, 3)).astype(np.uint8))
    for at in range(len(data)):
        bad = bytearray(data)
        bad[at] ^= 16
        with pytest.raises(ValueError, match="CRC-32"):
            decode_chunk(bytes(bad), 8)
    with pytest.raises(ValueError, match="CRC-32"):
        decode_chunk(b"", 8)


@pytest.mark.filterwarnings("ignore:.*Zarr")
def test_the_stage_writes_what_stock_zarr_and_the_store_read(zarred, tiled):
    (path,) = zarred.tiles_dir(224).glob("*.zarr")
    store, tars = TileStore(zarred, 224), TileStore(tiled, 224)
    array = zarr.open_array(path, mode="r")
    ranks = range(array.shape[0])
    assert array.attrs["slide_id"] == SLIDE
    expected = np.stack(tars.read(SLIDE, ranks))
    assert np.array_equal(array[:], expected)
    assert np.array_equal(array[5], expected[5])
    assert np.array_equal(np.stack(store.read(SLIDE, ranks)), expected)
    assert store.read_block(SLIDE, 1).keys() == tars.read_block(SLIDE, 1).keys()
    (entry,) = read_journal(zarred, "tile")
    named = {zarred.root / record.path for record in entry.files}
    assert named == {file for file in path.rglob("*") if file.is_file()}
    assert json.loads((zarred.root / "dataset.json").read_text())["identity"]["codec"] == (
        "zarr-delta-zstd"
    )


@pytest.mark.full
def test_again_does_nothing_and_a_damaged_array_is_replaced(zarred, capsys):
    run = ["tile", "--dataset", str(zarred.root), "--workers", "1", "--format", "zarr"]
    capsys.readouterr()
    assert main(run) == 0
    assert "already done, nothing to redo" in capsys.readouterr().out
    (path,) = zarred.tiles_dir(224).glob("*.zarr")
    file = path / "c" / "0" / "0" / "0" / "0"
    whole = file.read_bytes()
    file.write_bytes(whole[:999])
    (path / "stray").write_text("x")
    assert main(run) == 0
    assert file.read_bytes() == whole
    assert not (path / "stray").exists()
    with pytest.raises(UserError, match="codec is 'zarr-delta-zstd' in this dataset, 'png'"):
        main([*run[:-1], "png"])


def random_chunks(count: int, px: int = 8) -> tuple[np.ndarray, list[bytes]]:
    tiles = np.random.default_rng(1).integers(0, 256, (count, px, px, 3)).astype(np.uint8)
    return tiles, [encode_chunk(tile) for tile in tiles]


@pytest.mark.filterwarnings("ignore:.*Zarr")
def test_shards_of_any_length_and_start(tmp_path):
    dataset = Dataset(tmp_path)
    for start, stop in ((0, 1), (16, 49), (32, 64)):
        tiles, chunks = random_chunks(stop - start)
        final = dataset.tiles_dir(8) / f"s.1.{start}-{stop}.zarr"
        commit_zarr(dataset, new_run_id(), final, 8, chunks)
        assert np.array_equal(zarr.open_array(final, mode="r")[:], tiles)
        shard = ZarrShard.open(final)
        found = {}
        for block in range(start // 16, -(-stop // 16)):
            found |= shard.read_block(block)
        assert list(found) == list(range(start, stop))
        assert list(found.values()) == chunks


def test_a_chunk_too_few_leaves_nothing_behind(tmp_path):
    dataset = Dataset(tmp_path)
    final = dataset.tiles_dir(8) / "s.0-16.zarr"
    with pytest.raises(ValueError, match="15 chunks for 16 ranks"):
        commit_zarr(dataset, "run", final, 8, random_chunks(15)[1])
    assert not final.exists()
    assert not list(dataset.staging_dir("run").iterdir())


def test_a_folder_that_cannot_be_made_is_a_user_error(tmp_path):
    (tmp_path / "tiles").write_text("in the way")
    dataset = Dataset(tmp_path)
    with pytest.raises(UserError, match=r"cannot write .*s\.0-16\.zarr"):
        commit_zarr(dataset, "run", dataset.tiles_dir(8) / "s.0-16.zarr", 8, random_chunks(16)[1])


def test_a_missing_or_short_index_says_what_to_run(tmp_path):
    dataset = Dataset(tmp_path)
    final = dataset.tiles_dir(8) / "s.0-16.zarr"
    commit_zarr(dataset, "run", final, 8, random_chunks(16)[1])
    file = final / "c" / "0" / "0" / "0" / "0"
    os.truncate(file, 40)
    with pytest.raises(UserError, match="`tile` again"):
        ZarrShard.open(final)
    file.unlink()
    with pytest.raises(UserError, match="`tile` again"):
        ZarrShard.open(final)


def test_threads_decode_at_the_same_time(tmp_path):
    tiles, chunks = random_chunks(64, 64)
    wrong: list[int] = []

    def decode(first: int) -> None:
        for _ in range(5):
            wrong.extend(
                i for i in range(first, 64, 4) if (decode_chunk(chunks[i], 64) != tiles[i]).any()
            )

    threads = [threading.Thread(target=decode, args=(first,)) for first in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_reading_needs_no_zarr():
    code = (
        "import sys; sys.modules['zarr'] = None; sys.modules['numcodecs'] = None\n"
        "import numpy as np\n"
        "from pipeline.dataset.tiles.zarr_shard import decode_chunk, encode_chunk\n"
        "import pipeline.dataset.tiles.store\n"
        "t = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)\n"
        "assert (decode_chunk(encode_chunk(t), 4) == t).all()\n"
    )
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
