"""Cutting tiles: same pixels in any order, decoded once, in bounded memory."""

import io
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from PIL import Image, ImageCms

from common.errors import UserError
from pipeline.__main__ import main
from pipeline.dataset import Dataset, Slide, TileStore, read_candidates, read_journal
from pipeline.slides.colour import to_srgb
from pipeline.slides.config import Resampler
from pipeline.slides.cost import overview_cost, tile_cost
from pipeline.slides.native_reader import NativeReader
from pipeline.slides.open import open_slide
from pipeline.slides.region import cut_tiles, read_tile, reading_order, tile_windows
from pipeline.slides.resolution import plan_read
from pipeline.tiles.config import TileConfig
from pipeline.tiles.spool import Spool

SLIDE = "CMU-1-Small-Region"


def positions(plan, columns=4, rows=5):
    x = np.round(np.arange(columns) * plan.stride_level0 * 256) / 256
    y = np.round(np.arange(rows) * plan.stride_level0 * 256) / 256
    order = np.random.default_rng(0).permutation(columns * rows)
    return np.tile(x, rows)[order], np.repeat(y, columns)[order]


@pytest.mark.parametrize("resampler", get_args(Resampler))
@pytest.mark.parametrize("mpp", [0.499, 0.25, 0.2325])
def test_tiles_cut_together_equal_tiles_read_one_by_one(cmu_slide, mpp, resampler):
    with NativeReader(cmu_slide) as native, open_slide(cmu_slide, "openslide") as other:
        plan = plan_read(native.levels, mpp, 0.5, 0.02, 224)
        x, y = positions(plan)
        seen = set()
        for index, tile in cut_tiles(native, plan, x, y, 224, resampler):
            alone = read_tile(other, plan, float(x[index]), float(y[index]), 224, resampler)
            assert np.array_equal(tile, alone)
            seen.add(index)
        assert seen == set(range(len(x)))
        touched = native.native[0].rows * native.native[0].columns
        assert native.decoded <= touched


@pytest.mark.parametrize("resampler", get_args(Resampler))
def test_neighbours_are_parts_of_one_picture(cmu_slide, resampler):
    """No kernel stops at a tile's edge: two tiles are the halves of one twice as wide."""
    with NativeReader(cmu_slide) as slide:
        plan = plan_read(slide.levels, 0.25, 0.5, 0.02, 112)
        wide = replace(plan, window=2 * plan.window)
        both = read_tile(slide, wide, 448.0, 448.0, 224, resampler).astype(int)
        left = read_tile(slide, plan, 448.0, 448.0, 112, resampler)
        right = read_tile(slide, plan, 448.0 + 224, 448.0, 112, resampler)
    joined = np.concatenate([left, right], 1).astype(int)
    assert np.abs(joined - both[:112]).max() <= 1


def test_a_kernel_ends_at_the_slide_and_sees_no_white(cmu_slide):
    with NativeReader(cmu_slide) as slide:
        plan = plan_read(slide.levels, 0.25, 0.5, 0.02, 224)
        level = slide.levels[0]
        inside = tile_windows(level, plan, np.array([0.0]), np.array([0.0]), "lanczos")[0]
        beyond = tile_windows(level, plan, np.array([-32.0]), np.array([2700.0]), "lanczos")[0]
    assert inside.tolist() == [0, 0, 454, 454]
    assert beyond.tolist() == [-32, 2694, 454, 454]


def test_wide_slides_are_read_in_bands_that_fit_the_cache():
    x, y = np.meshgrid(np.arange(0, 100_000, 448), np.arange(0, 4_480, 448))
    windows = np.stack([x.ravel(), y.ravel(), *(np.full(x.size, 448),) * 2], 1)
    budget = 64 << 20
    order = reading_order(windows, (240, 240), budget)
    assert sorted(order) == list(range(len(windows)))
    live: dict[tuple[int, int], int] = {}
    touched = [
        [
            (r, c)
            for r in range(v // 240, -(-(v + 448) // 240))
            for c in range(u // 240, -(-(u + 448) // 240))
        ]
        for u, v in windows[:, :2].tolist()
    ]
    for tiles in touched:
        for tile in tiles:
            live[tile] = live.get(tile, 0) + 1
    cached: set[tuple[int, int]] = set()
    most = decoded = 0
    for index in order:
        for tile in touched[index]:
            decoded += tile not in cached
            cached.add(tile)
            live[tile] -= 1
            if live[tile] == 0:
                cached.discard(tile)
        most = max(most, len(cached))
    assert decoded == len(live)
    seams = 10 * 3 * 5
    assert (most - seams * 2) * 240 * 240 * 3 <= budget
    assert np.array_equal(reading_order(windows[:3], (240, 240), 1 << 40), [0, 1, 2])
    assert len(reading_order(windows[:0], (240, 240), 1)) == 0


def test_the_spool_gives_back_from_memory_and_from_its_file(tmp_path):
    folder = tmp_path / "spool"
    data = {key: bytes([key]) * (10 + key) for key in range(50)}
    with Spool(folder, memory_bytes=100) as spool:
        for key, value in data.items():
            spool.put_bytes(key, value)
        assert spool.file_bytes > 0
        assert list(folder.iterdir()) == [], "nothing is left if the process is killed"
        assert {key: spool.take_bytes(key) for key in reversed(data)} == data
        with pytest.raises(KeyError):
            spool.take_bytes(3)
    with Spool(tmp_path / "unused", memory_bytes=100) as spool:
        spool.put_bytes(1, b"x")
        assert spool.take_bytes(1) == b"x"
    assert not (tmp_path / "unused").exists()


def test_a_spool_that_cannot_be_written_names_the_option(tmp_path):
    (tmp_path / "file").write_text("")
    with Spool(tmp_path / "file" / "x", 0) as spool, pytest.raises(UserError, match="--spool"):
        spool.put_bytes(0, b"data")


def again(dataset: Dataset, *options: str) -> Dataset:
    """The dataset with no tile, then tiled with the options."""
    for path in [*dataset.tiles_dir(224).iterdir(), *dataset.status_dir("tile").iterdir()]:
        path.unlink()
    values = json.loads(dataset.identity_file.read_text())
    del values["crc"]  # edited on purpose
    for key in ("resampler", "icc", "codec"):
        del values["identity"][key]
    dataset.identity_file.write_text(json.dumps(values))
    root = ["--dataset", str(dataset.root), "--workers", "1"]
    assert main(["tile", *root, *options]) == 0
    return dataset


def test_memory_or_file_the_shard_is_the_same(own_tiled, monkeypatch, tmp_path):
    from pipeline.tiles import spool
    from pipeline.tiles import stage as tile

    (tar,) = own_tiled.tiles_dir(224).glob("*.tar")
    before = tar.read_bytes()
    slide = tile.read_slides(own_tiled)[0]
    monkeypatch.setattr(spool.Spool.__init__, "__defaults__", (3_000,))
    rows = read_candidates(own_tiled, SLIDE).num_rows
    blocks = [range(0, 1), range(2, -(-rows // 16))]
    config = TileConfig(spool=str(tmp_path / "spool"))
    entries = tile.tile_slide(str(own_tiled.root), "run", slide, blocks, "mark", config)
    assert [e.outcome for e in entries] == ["done", "done"]
    assert (tmp_path / "spool").is_dir()
    with own_tiled.tiles_dir(224).joinpath(f"{SLIDE}.0-16.tar").open("rb") as file:
        shard = file.read()
    assert before.startswith(shard[:-1024])


def test_fast_png_has_the_same_pixels_and_its_own_identity(own_tiled, tiled):
    fast = again(own_tiled, "--png", "fast")
    rows = range(read_candidates(tiled, SLIDE).num_rows)
    ours, theirs = TileStore(fast, 224), TileStore(tiled, 224)
    for one, other in zip(ours.read(SLIDE, rows), theirs.read(SLIDE, rows), strict=True):
        assert np.array_equal(one, other)
    with pytest.raises(UserError, match="codec is 'png-fast' in this dataset, 'png'"):
        main(["tile", "--dataset", str(fast.root)])


def test_larger_tiles_hold_the_tile_in_their_centre(own_tiled):
    run = ["tile", "--dataset", str(own_tiled.root), "--workers", "1", "--tile-px", "256"]
    assert main(run) == 0
    rows = range(read_candidates(own_tiled, SLIDE).num_rows)
    small, large = TileStore(own_tiled, 224), TileStore(own_tiled, 256)
    for one, other in zip(small.read(SLIDE, rows), large.read(SLIDE, rows), strict=True):
        assert other.shape == (256, 256, 3)
        assert np.array_equal(other[16:-16, 16:-16], one)
    scopes = {entry.scope for entry in read_journal(own_tiled, "tile")}
    assert scopes == {"224", "256"}


def test_beyond_the_slide_larger_tiles_are_white(cmu_slide):
    with NativeReader(cmu_slide) as slide:
        plan = plan_read(slide.levels, 0.25, 0.5, 0.02, 224)
        wide = replace(plan, window=256 * plan.factor)
        tile = read_tile(slide, wide, -32.0, -32.0, 256)
        assert (tile[:16] == 255).all()
        assert (tile[:, :16] == 255).all()
        assert np.array_equal(tile[16:-16, 16:-16], read_tile(slide, plan, 0.0, 0.0, 224))


@pytest.mark.parametrize("tile_px", ["225", "192"])
def test_larger_tiles_must_share_the_centre(own_tiled, tile_px):
    with pytest.raises(UserError, match="--tile-px"):
        main(["tile", "--dataset", str(own_tiled.root), "--tile-px", tile_px])


SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def swapped_profile() -> bytes:
    """A scanner whose red is sRGB's blue, and whose blue is sRGB's red."""
    return SRGB.replace(b"rXYZ", b"????").replace(b"bXYZ", b"rXYZ").replace(b"????", b"bXYZ")


def test_a_profile_takes_the_tile_to_srgb():
    tile = np.random.default_rng(0).integers(0, 256, (8, 8, 3)).astype(np.uint8)
    found = to_srgb(swapped_profile())(tile).astype(int)
    assert np.abs(found - tile[..., ::-1]).max() <= 1


def test_a_real_profile_is_applied_as_pillow_applies_it(shared_data):
    path = shared_data / "slides" / "TCGA-CR-7395-01A-01-TS1.svs"
    with NativeReader(path) as slide:
        tile = slide.read(0, 1500, 1200, 64, 64)
        profile = slide.icc_profile
    assert profile is not None
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    direct = ImageCms.profileToProfile(
        Image.fromarray(tile), source, ImageCms.createProfile("sRGB"),
        renderingIntent=ImageCms.getDefaultIntent(source),
    )  # fmt: skip
    assert np.array_equal(to_srgb(profile)(tile), np.asarray(direct))


def test_without_a_profile_nothing_changes_and_a_bad_one_is_named():
    tile = np.random.default_rng(0).integers(0, 256, (8, 8, 3)).astype(np.uint8)
    assert np.array_equal(to_srgb(None)(tile), tile)
    assert np.abs(to_srgb(SRGB)(tile).astype(int) - tile).max() <= 1
    with pytest.raises(UserError, match="--icc ignore"):
        to_srgb(b"no profile")


def test_longest_slides_first_by_codec_and_area():
    def cost(mpp: float, codec: str) -> float:
        return tile_cost(Slide("s", "/s", mpp=mpp, codec=codec), 0.5, 224)

    assert cost(0.25, "jpeg2000") > cost(0.25, "jpeg") > cost(0.5, "jpeg") > 0
    assert cost(0.25, "jpeg2000") > cost(0.25, "") > cost(0.25, "jpeg")


def test_overviews_cost_what_their_level_holds():
    def cost(levels: tuple[tuple[int, int, float], ...], codec: str = "jpeg") -> float:
        return overview_cost(Slide("s", "/s", mpp=0.25, codec=codec, levels=levels), 8.0)

    base, quarter, small = (80_000, 60_000, 1.0), (20_000, 15_000, 4.0), (5_000, 3_750, 16.0)
    assert cost((base,)) > 10 * cost((base, quarter)) > 20 * cost((base, quarter, small)) > 0
    assert cost((base, quarter), "jpeg2000") > 2 * cost((base, quarter))
    assert overview_cost(Slide("s", "/s", bytes=7), 8.0) == 7


def test_opening_many_slides_leaves_no_handle(cmu_slide: Path):
    def handles() -> int:
        return len(os.listdir("/proc/self/fd"))

    before = handles()
    for _ in range(50):
        with NativeReader(cmu_slide) as slide:
            slide.read(0, 0, 0, 10, 10)
    assert handles() == before
