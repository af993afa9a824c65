"""A tile whose features no encoder gives is named, wherever its features are read."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from door_data import train_room as room
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from common.errors import UserError
from evaluate.compare.inputs import TileRows, find_faults
from evaluate.compare.sides import FeatureSide
from evaluate.generate.condition_source import SelectionConditions
from pipeline.dataset import Dataset, Entry, Run, commit_file, software_versions
from pipeline.dataset.features import (
    MOST_FEATURE,
    FeatureShard,
    FeatureStore,
    are_in_range,
    cls_table,
    feature_scope,
    find_outside,
    token_table,
)
from pipeline.dataset.features.quantise import quantise_tokens
from pipeline.selection.scores import read_cls
from train.loop import train
from train.reader import SlotReader
from train.setup import open_data

BAD = [1e30, 1.01e4, -1e5, np.nan, np.inf, -np.inf]
RANK = 21


def _write(dataset: Dataset, path: Path, table: object) -> None:
    """Written and journalled as `cache` does it."""
    scope = feature_scope(room.TILE_PX, "h0-mini", "", path.parent.name)
    with Run(dataset, "cache", software_versions()) as run:
        file = commit_file(dataset, run.run_id, path, room._table_writer(table))
        run.append([Entry("S.0-x", "done", "f", scope=scope, start=0, stop=48, files=(file,))])


def _file_of(dataset: Dataset, kind: str) -> Path:
    return dataset.features_dir(room.TILE_PX, "h0-mini") / kind / "S.0-x.0-48.parquet"


def spoil(dataset: Dataset, kind: str, value: float) -> Path:
    """Rewrite a file of features, whole and with its checksums, with one value of one tile."""
    path = _file_of(dataset, kind)
    rows = [room.train_features(0, rank) for rank in range(48)]
    if kind == "cls":
        cls = np.stack([one for one, _ in rows])
        cls[RANK, 3] = value
        _write(dataset, path, cls_table(0, cls))
        return path
    tokens = np.stack([some for _, some in rows])
    if kind == "tokens-float16":
        with np.errstate(over="ignore"):
            tokens[RANK, 2, 5] = value
        _write(dataset, path, token_table(tokens))
        return path
    values, scale = quantise_tokens(tokens)
    with np.errstate(over="ignore"):
        scale[RANK, 2] = value
    _write(dataset, path, token_table(values, scale))
    return path


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("kind", ["cls", "tokens-float16", "tokens-int8"])
def test_a_store_names_slide_rank_encoder_and_file(own, kind, value):
    path = spoil(own, kind, value)
    store = FeatureStore(own, tile_px=room.TILE_PX, encoder="h0-mini", kind=kind)
    with pytest.raises(UserError, match=rf"{RANK}\b") as caught:
        store.read("S.0-x", range(10, 30))
    for words in ("S.0-x", str(path), "h0-mini", "10,000"):
        assert words in str(caught.value)
    # Other tiles of the slide are read as before; of float pages also those of the same block.
    assert len(store.read("S.0-x", range(16))) == 16
    if kind != "tokens-int8":
        assert len(store.read("S.0-x", [RANK - 1, RANK + 1])) == 2


def test_a_negative_scale_is_refused(own):
    path = spoil(own, "tokens-int8", -1.0)
    with pytest.raises(UserError, match=r"rank 21 of slide S\.0-x has tokens of scale -1"):
        FeatureShard(path).read_quantised(1)


@pytest.mark.parametrize("kind", ["cls", "tokens-float16"])
def test_training_stops_at_the_tile_with_its_name(own, tmp_path, kind):
    spoil(own, kind, 1e30)
    with pytest.raises(UserError, match=rf"slide S\.0-x, rank {RANK}: its {kind} features"):
        train(room.small_config(own, tmp_path / "run", "run.steps=40"))


def test_training_that_skips_names_it_and_takes_another(own, tmp_path):
    spoil(own, "cls", 1e30)
    data = open_data(room.small_config(own, tmp_path / "run"))
    named = []
    for slot in range(5):
        reader = SlotReader(data.stream, data.source, slot, "skip")
        for step in range(data.stream.steps_per_epoch):
            sample, damage = reader.read(step)
            assert are_in_range(sample.cls)
            named += [damage] if damage else []
    assert len(named) == 1
    assert f"slide S.0-x, rank {RANK}" in named[0]


@pytest.mark.parametrize("value", BAD)
def test_measuring_names_the_row_and_generating_refuses_it(own, value):
    spoil(own, "cls", value)
    side = FeatureSide.open_selection(own.root, "train", "h0-mini", like=None, tile_px=32)
    (fault,) = find_faults({"real": TileRows.of_side("real", side)})
    assert fault.kind == "not_finite"
    assert f"slide S.0-x, rank {RANK}" in fault.message
    conditions = SelectionConditions.open_selection(own, "train", "h0-mini")
    with pytest.raises(UserError, match=rf"slide S\.0-x, rank {RANK}"):
        conditions.read_features(np.arange(conditions.count))


def test_curate_refuses_it_and_ranks_of_another_slide(own):
    path = spoil(own, "cls", 1e30)
    with pytest.raises(UserError, match="features of rank 21 have the value 1e"):
        list(read_cls(path))
    table = pq.read_table(_file_of(own, "cls"))
    _write(own, path, cls_table(7, np.stack(table["cls"].to_pylist()).astype(np.float32)))
    with pytest.raises(UserError, match="other ranks than 0 to 47"):
        list(read_cls(path))


def test_files_with_other_rows_than_their_name_states(own):
    path = _file_of(own, "cls")
    rows = np.stack([room.train_features(0, rank)[0] for rank in range(40)])
    _write(own, path, cls_table(0, rows))
    with pytest.raises(UserError, match="8 rows, its name states 16"):
        FeatureShard(path).read_block(2)


@settings(max_examples=200, deadline=None)
@given(
    hnp.arrays(
        st.sampled_from([np.float32, np.float16]), hnp.array_shapes(min_dims=2, max_dims=3),
        elements=st.one_of(
            st.floats(-50, 50, width=16), st.sampled_from([1e4, -1e4, 10_008.0, -10_008.0]),
            st.sampled_from([np.nan, np.inf, -np.inf, -0.0, 6e-8]),
        ),
    ),
    st.booleans(),
)  # fmt: skip
def test_ranges_are_those_of_each_value_looked_at(values, is_sliced):
    values = values[..., ::-1] if is_sliced else values
    bad = [
        row for row, some in enumerate(values.reshape(len(values), -1).astype(float))
        if not all(abs(one) <= MOST_FEATURE for one in some)
    ]  # fmt: skip
    assert are_in_range(values) == (not bad)
    found = find_outside(values)
    assert (found is None) == (not bad)
    if found:
        assert found[0] == bad[0]
        assert not abs(found[1]) <= MOST_FEATURE


@pytest.mark.parametrize(
    "text", ["[]", "{", '{"dim": "x"}', '{"tile_px": -1}', "[" * 90_000, '{"encoder": 3}', "\0"]
)
def test_an_encoders_record_that_is_none_is_refused(own, text):
    path = own.features_dir(room.TILE_PX, "h0-mini") / "cls" / "encoder.json"
    path.write_text(text)
    with pytest.raises(UserError, match=r"encoder\.json"):
        FeatureStore(own, tile_px=room.TILE_PX, encoder="h0-mini")


def test_features_of_zeros_are_no_reason_to_refuse():
    assert are_in_range(np.zeros((3, 4), np.float16))
    assert are_in_range(np.zeros((0, 4), np.float32))
