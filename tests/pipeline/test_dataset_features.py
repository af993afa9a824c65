import numpy as np
import pyarrow.parquet as pq
import pytest

from common.errors import UserError
from pipeline.dataset import (
    Dataset,
    Entry,
    Run,
    commit_file,
    commit_json,
    make_selection,
)
from pipeline.dataset.features import (
    FeatureShard,
    FeatureStore,
    cls_table,
    feature_scope,
    open_writer,
    token_table,
    write_blocks,
)

ROWS, START = 37, 16


@pytest.fixture
def features():
    rng = np.random.default_rng(0)
    tokens = rng.standard_normal((ROWS, 49, 24)).astype(np.float16)
    return tokens[:, 0].astype(np.float32), tokens


@pytest.fixture
def cached(tmp_path, features):
    dataset = Dataset(tmp_path)
    cls, tokens = features
    tables = {"cls": cls_table(START, cls), "tokens-float16": token_table(tokens)}
    with Run(dataset, "cache", {}) as run:
        for kind, table in tables.items():
            path = dataset.features_dir(224, "enc") / kind / f"s.{START}-{START + ROWS}.parquet"

            def write(file, table=table):
                with open_writer(file, table.schema) as writer:
                    write_blocks(writer, table)

            record = commit_file(dataset, run.run_id, path, write)
            commit_json(dataset, run.run_id, path.parent / "encoder.json", {"encoder": "enc"})
            scope = feature_scope(224, "enc", "", kind)
            run.append(
                [
                    Entry(
                        "s",
                        "done",
                        "f",
                        scope=scope,
                        start=START,
                        stop=START + ROWS,
                        files=(record,),
                    )
                ]
            )
    return dataset


def test_features_come_back_in_the_order_asked_for(cached, features):
    cls, tokens = features
    ranks = [52, 16, 31, 32, 16]
    at = [rank - START for rank in ranks]
    store = FeatureStore(cached, tile_px=224, encoder="enc")
    assert np.array_equal(store.read("s", ranks), cls[at])
    store = FeatureStore(cached, tile_px=224, encoder="enc", kind="tokens-float16")
    assert np.array_equal(store.read("s", ranks), tokens[at])
    selection = make_selection("x", {"s": np.array([20, 40])}, {})
    assert np.array_equal(store.read_selection(selection), tokens[[4, 24]])


@pytest.mark.filterwarnings("error")
def test_a_block_is_a_tensor_of_the_same_memory(cached, features, monkeypatch):
    store = FeatureStore(cached, tile_px=224, encoder="enc", kind="tokens-float16")
    rows = store.read_block("s", 2)
    monkeypatch.setattr(store, "read_block", lambda *_: rows)
    tensor = store.block_tensor("s", 2)
    assert tensor.data_ptr() == rows.ctypes.data
    assert np.array_equal(tensor.numpy(), features[1][16:32])


def test_a_row_group_is_a_block_and_any_tool_reads_the_cls(cached, features):
    path = cached.features_dir(224, "enc") / "cls" / "s.16-53.parquet"
    file = pq.ParquetFile(path)
    assert [file.metadata.row_group(i).num_rows for i in range(3)] == [16, 16, 5]
    table = pq.read_table(path)
    assert table["rank"].to_pylist() == list(range(16, 53))
    assert np.allclose(np.array(table["cls"].to_pylist()), features[0])


def test_tokens_are_plain_and_uncompressed(cached):
    path = cached.features_dir(224, "enc") / "tokens-float16" / "s.16-53.parquet"
    column = pq.ParquetFile(path).metadata.row_group(0).column(0)
    assert column.compression == "UNCOMPRESSED"
    assert not column.has_dictionary_page
    assert path.stat().st_size < ROWS * 49 * 24 * 2 * 1.2 + 4096


def test_a_flipped_bit_is_seen_by_the_page_checksum(cached):
    path = cached.features_dir(224, "enc") / "tokens-float16" / "s.16-53.parquet"
    data = bytearray(path.read_bytes())
    data[3000] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match="damaged"):
        FeatureShard(path).read_block(1)


def test_what_is_missing_says_which_command_makes_it(cached):
    with pytest.raises(UserError, match="python -m pipeline cache"):
        FeatureStore(cached, tile_px=224, encoder="other")
    store = FeatureStore(cached, tile_px=224, encoder="enc")
    with pytest.raises(UserError, match=r"rank 64.*python -m pipeline cache"):
        store.read("s", [64])


def test_a_file_that_is_no_feature_file_is_named(tmp_path):
    path = tmp_path / "s.0-16.parquet"
    path.write_bytes(b"PAR1 not really")
    with pytest.raises(UserError, match=r"s\.0-16\.parquet is not a readable feature file"):
        FeatureShard(path)
