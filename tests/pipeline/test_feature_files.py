"""Feature files as other tools and our own pages see them; eight-bit tokens; views."""

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from common.errors import UserError
from pipeline.dataset.features import (
    FeatureShard,
    cls_table,
    open_writer,
    token_table,
    write_blocks,
)
from pipeline.dataset.features.quantise import dequantise_tokens, quantise_tokens
from pipeline.features.compute import quantise_tensor
from pipeline.features.views import view_function, view_software

ROWS, START = 37, 32
TOKENS = np.random.default_rng(3).standard_normal((ROWS, 49, 24)).astype(np.float16)


def write(folder: Path, dtype: str) -> Path:
    path = folder / f"s.{START}-{START + ROWS}.parquet"
    table = token_table(TOKENS) if dtype == "float16" else token_table(*quantise_tokens(TOKENS))
    with path.open("wb") as file, open_writer(file, table.schema) as writer:  # type: ignore[arg-type]
        write_blocks(writer, table)
    return path


def test_a_block_is_a_view_of_the_file_and_equals_what_pyarrow_reads(tmp_path: Path) -> None:
    path = write(tmp_path, "float16")
    shard = FeatureShard(path)
    for block in (2, 3, 4):
        rows = shard.read_block(block)
        assert not rows.flags.owndata
        assert not rows.flags.writeable
        first = 16 * block - START
        assert np.array_equal(rows, TOKENS[first : first + 16])
    column = pq.read_table(path)["tokens"].combine_chunks()
    stored = np.frombuffer(column.buffers()[1], "<f2").reshape(ROWS, 49, 24)
    assert np.array_equal(stored, TOKENS)
    assert torch.from_numpy(shard.read_block(2).copy()).shape == (16, 49, 24)


def write_table(folder: Path, table: pa.Table) -> Path:
    path = folder / f"s.{START}-{START + ROWS}.parquet"
    with path.open("wb") as file, open_writer(file, table.schema) as writer:  # type: ignore[arg-type]
        write_blocks(writer, table)
    return path


def test_a_block_of_cls_tokens_is_a_view_and_equals_what_pyarrow_reads(tmp_path: Path) -> None:
    cls = np.random.default_rng(4).standard_normal((ROWS, 768)).astype(np.float32)
    path = write_table(tmp_path, cls_table(START, cls))
    shard = FeatureShard(path)
    for block in (2, 3, 4):
        rows = shard.read_block(block)
        assert not rows.flags.owndata
        assert np.array_equal(rows, cls[16 * block - START :][:16])
    assert np.array_equal(np.stack(pq.read_table(path)["cls"].to_pylist()).astype("f4"), cls)


def test_cls_lists_with_nulls_are_refused_not_misread(tmp_path: Path) -> None:
    """Their page has fewer values than its count says, which would shift all that follow."""
    table = cls_table(START, np.ones((ROWS, 8), np.float32))
    values = [None if row == 5 else [float(row)] * 8 for row in range(ROWS)]
    holed = table.set_column(1, table.schema.field(1), pa.array(values, pa.list_(pa.float32(), 8)))
    shard = FeatureShard(write_table(tmp_path, holed))
    with pytest.raises(UserError, match=r"block 2 is damaged.*nulls"):
        shard.read_block(2)


def test_the_file_opens_in_polars(tmp_path: Path) -> None:
    polars = pytest.importorskip("polars")
    frame = polars.read_parquet(write(tmp_path, "int8"))
    assert frame.columns == ["tokens", "scale"]
    first = np.frombuffer(frame["tokens"][0], np.int8).reshape(49, 24)
    assert np.array_equal(first, quantise_tokens(TOKENS)[0][0])


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_every_flipped_byte_of_the_values_is_noticed(tmp_path: Path, dtype: str) -> None:
    path = write(tmp_path, dtype)
    whole = bytearray(path.read_bytes())
    values = (
        TOKENS[:16].tobytes() if dtype == "float16" else quantise_tokens(TOKENS[:16])[0].tobytes()
    )
    at = bytes(whole).index(values)
    for offset in np.random.default_rng(0).integers(0, len(values), 20):
        damaged = bytearray(whole)
        damaged[at + offset] ^= 1 << int(offset % 8)
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="block 2 is damaged"):
            FeatureShard(path).read_block(2)
        assert FeatureShard(path).read_block(3).shape[0] == 16


def test_a_file_of_another_layout_is_refused_and_never_misread(tmp_path: Path) -> None:
    path = tmp_path / "s.0-37.parquet"
    pq.write_table(token_table(TOKENS), path, compression="zstd")
    with pytest.raises(UserError, match="damaged"):
        FeatureShard(path).read_block(0)
    with pytest.raises(UserError, match="int8 was requested"):
        FeatureShard(write(tmp_path, "float16")).read_quantised(2)


TOKEN_ARRAYS = hnp.arrays(
    np.float32, st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 9)),
    elements=st.floats(-60000, 60000, width=32),
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(TOKEN_ARRAYS)
def test_eight_bits_are_within_half_a_step_and_never_clipped(tokens: np.ndarray) -> None:
    values, scale = quantise_tokens(tokens)
    largest = np.abs(tokens).max(-1)
    assert (scale.astype(np.float64) >= largest).all()
    assert (scale.astype(np.float64) <= np.maximum(largest * (1 + 2**-9), 2**-14)).all()
    step = scale.astype(np.float64)[..., None] / 127
    assert (np.abs(values * step - tokens) <= step * 0.5001 + 1e-30).all()
    on_device, device_scale = quantise_tensor(torch.from_numpy(tokens))
    assert np.array_equal(device_scale.numpy(), scale)
    assert np.abs(on_device.numpy().astype(int) - values).max() <= 1


def test_eight_bits_keep_the_direction_of_tokens() -> None:
    tokens = np.random.default_rng(0).standard_normal((64, 196, 768)).astype(np.float32)
    back = dequantise_tokens(*quantise_tokens(tokens)).astype(np.float32)
    cosine = (
        (tokens * back).sum(-1) / np.linalg.norm(tokens, axis=-1) / np.linalg.norm(back, axis=-1)
    )
    assert cosine.mean() > 0.9999
    assert cosine.min() > 0.9998


def test_numbers_that_float16_does_not_hold_are_refused() -> None:
    with pytest.raises(ValueError, match="float16"):
        quantise_tokens(np.array([[1e6]], np.float32))
    with pytest.raises(ValueError, match="finite"):
        quantise_tokens(np.array([[np.nan]], np.float32))


TILE = np.random.default_rng(5).integers(0, 255, (256, 256, 3), np.uint8)


def test_views_are_what_pillow_does() -> None:
    assert np.array_equal(view_function("")(TILE), TILE)
    assert np.array_equal(view_function("crop224")(TILE), TILE[16:240, 16:240])
    buffer = io.BytesIO()
    Image.fromarray(TILE).save(buffer, "JPEG", quality=70, subsampling="4:2:0")
    seen = np.array(Image.open(buffer))
    assert np.array_equal(view_function("jpeg70")(TILE), seen)
    assert np.array_equal(view_function("jpeg70+crop224")(TILE), seen[16:240, 16:240])
    small = np.array(Image.fromarray(TILE).resize((224, 224), Image.Resampling.BILINEAR))
    assert np.array_equal(view_function("resize224")(TILE), small)
    assert set(view_software("jpeg70")) == {"pillow", "libjpeg"}


def test_a_crop_on_the_jpeg_grid_commutes_inside_the_border() -> None:
    """The grid of 16 px is kept by a crop of 16 px: only the outer blocks see other neighbours."""
    smooth = np.asarray(
        Image.fromarray(TILE[:16, :16]).resize((256, 256), Image.Resampling.BICUBIC)
    )
    one = view_function("jpeg70+crop224")(smooth).astype(int)
    other = view_function("crop224+jpeg70")(smooth).astype(int)
    assert np.abs(one - other)[16:-16, 16:-16].max() == 0


@pytest.mark.parametrize("view", ["crop", "jpeg0", "jpeg99", "jpeg70bicubic", "blur3", "crop224+"])
def test_an_unknown_view_is_one_line(view: str) -> None:
    with pytest.raises(UserError, match="view step"):
        view_function(view)


def test_a_crop_larger_than_the_tile_is_refused() -> None:
    with pytest.raises(UserError, match="--tile-px"):
        view_function("crop224")(TILE[:200])
