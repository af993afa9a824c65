"""What training and validation share is found, and nothing else is called a leak."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import UserError
from pipeline.__main__ import main
from pipeline.dataset import (
    CANDIDATES_SCHEMA,
    Dataset,
    Slide,
    claim_identity,
    make_selection,
    new_run_id,
    write_candidates,
    write_selection,
    write_slides,
)
from pipeline.dataset.grid import grid_positions, rank_order, reserve_size
from pipeline.dataset.hold_outs import shared_patients
from pipeline.selection.leakage import (
    equal_files,
    find_overlaps,
    near_pairs,
)
from pipeline.upkeep.verify.leakage import TileSize, selection_roles, tile_size_level0

IDENTITY = {"mpp": 0.5, "mpp_tolerance": 0.02, "tile_px": 224, "seed": 0}
SIZE = 448.0
"""A tile's side at level 0 of a slide of 0.25 mpp."""

coordinates = st.lists(
    st.tuples(st.integers(-40, 40), st.integers(-40, 40)), min_size=0, max_size=25
)


def xy(points, step=0.25):
    array = np.array(points, np.float64).reshape(-1, 2) * step
    return array[:, 0], array[:, 1]


@settings(max_examples=150, deadline=None)
@given(coordinates, coordinates, st.sampled_from([1.0, 2.5, 3.7]), st.sampled_from([0.0, 0.5]))
def test_overlaps_are_those_of_all_pairs_tried(some, others, size, border):
    (x, y), (u, v) = xy(some), xy(others)
    found = find_overlaps(x, y, u, v, size, border)
    reach = size + 2 * border
    inside, rim = set(), set()
    for i in range(len(x)):
        for j in range(len(u)):
            apart = max(abs(x[i] - u[j]), abs(y[i] - v[j]))
            if apart < size - 1 / 128:
                inside.add((i, j))
            elif apart < reach - 1 / 128:
                rim.add((i, j))
    for pairs, expected in ((found.pixels, inside), (found.border, rim)):
        listed = list(zip(*(side.tolist() for side in pairs), strict=True))
        assert len(listed) == len(set(listed))
        assert set(listed) == expected


def test_a_grid_is_looked_up_not_multiplied_out():
    """100,000 tiles against 2,000: nine near each, not 2 * 10^8 pairs."""
    x, y = grid_positions(400 * 224, 250 * 224, 224, 224)
    some = np.arange(0, len(x), 50)
    i, _ = near_pairs(x[some], y[some], x, y, 224 + 32)
    assert len(i) <= 16 * len(some)
    found = find_overlaps(x[some], y[some], x, y, 224.0, 16.0)
    assert np.array_equal(some[found.pixels[0]], found.pixels[1]), "each only with itself"
    inner = (x[some] > 0) & (x[some] < x.max()) & (y[some] > 0) & (y[some] < y.max())
    assert np.all(np.bincount(found.border[0], minlength=len(some))[inner] == 8)


def test_neighbours_of_a_grid_with_a_broken_stride_do_not_overlap():
    """0.2325 mpp: a tile is 481.72 px wide and positions are rounded to 1/256."""
    size = 224 * 0.5 / 0.2325
    x, y = grid_positions(9000, 7000, size, size)
    found = find_overlaps(x[::2], y[::2], x[1::2], y[1::2], size)
    assert len(found.pixels[0]) == 0


def test_patients_and_files():
    patient_of = {"a": "P", "b": "P", "c": "Q", "d": "", "e": ""}
    assert shared_patients(["a", "d"], ["b", "c", "e"], patient_of) == {"P": ("a", "b")}
    assert shared_patients(["d"], ["d", "x"], patient_of) == {"d": ("d", "d")}
    assert shared_patients(["d"], ["e"], patient_of) == {}, "no patient is nobody's patient"
    sums = {"a": ("AA", ""), "b": ("aa", ""), "c": ("", "aa"), "d": ("", ""), "e": ("", "")}
    assert equal_files(["a", "d"], ["a", "b", "c", "e"], sums) == [("a", "b")]


def level(width, height):
    return ((width, height, 1.0), (width // 4, height // 4, 4.0))


def make_cohort(root, slides=6, **changes):
    """Slides of 20 x 15 tiles at 0.25 mpp; two slides a patient: (0, 1), (2, 3), ..."""
    dataset = Dataset(root)
    claim_identity(dataset, IDENTITY, stage="scan", versions={})
    width, height = int(20 * SIZE), int(15 * SIZE)
    rows = [
        Slide(
            f"S-{i}", path="", mpp=0.25, width=width, height=height,
            **({"patient": f"P-{i // 2}", "md5": f"{i:032x}", "levels": level(width, height)}
               | changes.get(f"s{i}", {})),
        )
        for i in range(slides)
    ]  # fmt: skip
    run_id = new_run_id()
    write_slides(dataset, run_id, rows)
    for slide in rows:
        x, y = grid_positions(width, height, SIZE, SIZE)
        order = rank_order(0, slide.slide_id, x, y)
        count = len(order)
        columns = [np.arange(count), x[order], y[order], np.ones(count), np.zeros(count)]
        arrays = [
            pa.array(column).cast(field.type)
            for column, field in zip(columns, CANDIDATES_SCHEMA, strict=True)
        ]
        write_candidates(dataset, run_id, slide.slide_id, pa.table(arrays, CANDIDATES_SCHEMA))
    return dataset


COUNT = 300
FIRST = reserve_size(COUNT) + 5


def put(dataset, name, ranks_by_slide, **plan):
    ranks = {f"S-{i}": np.asarray(r, np.int32) for i, r in ranks_by_slide.items()}
    write_selection(dataset, new_run_id(), make_selection(name, ranks, plan))


def put_clean(dataset):
    put(dataset, "train", {i: range(FIRST, COUNT) for i in range(4)})
    put(dataset, "val-in", {i: range(FIRST) for i in range(4)})
    put(dataset, "val-out", {i: range(COUNT) for i in (4, 5)})
    put(dataset, "guidance", {0: range(FIRST, FIRST + 20)})


def leakage(dataset, capsys, *more):
    capsys.readouterr()
    status = main(["verify", "--dataset", str(dataset.root), "--leakage", *more])
    return status, capsys.readouterr().out


def test_a_clean_cohort_has_no_leak_and_its_borders_are_counted(tmp_path, capsys):
    dataset = make_cohort(tmp_path)
    put_clean(dataset)
    status, out = leakage(dataset, capsys)
    assert status == 0, out
    assert "no leak" in out
    expected = 0
    for i in range(4):
        x, y = grid_positions(int(20 * SIZE), int(15 * SIZE), SIZE, SIZE)
        order = rank_order(0, f"S-{i}", x, y)
        x, y = x[order], y[order]
        held = slice(0, FIRST)
        apart = np.maximum(
            abs(x[held, None] - x[None, FIRST:]), abs(y[held, None] - y[None, FIRST:])
        )
        expected += int((apart < SIZE + 2 * 32).sum())
    assert f"{expected:,} pairs" in out
    assert expected > 0


def leak_same_tile(dataset):
    put(dataset, "val-in", {1: [0, FIRST + 7], 2: [1]})
    return "S-1 rank 13: in both", "1 leak"


def leak_pixels(dataset):
    """Val-in tiles that somebody shifted by half a tile: other ranks, the same pixels."""
    from pipeline.dataset import read_candidates

    table = read_candidates(dataset, "S-0")
    x = table["x_level0"].to_numpy().copy()
    y = table["y_level0"].to_numpy().copy()
    x[0], y[0] = x[50] + SIZE / 2, y[50]
    table = table.set_column(1, "x_level0", pa.array(x)).set_column(2, "y_level0", pa.array(y))
    write_candidates(dataset, new_run_id(), "S-0", table)
    return "share pixels", "S-0"


def leak_patient(dataset):
    put(dataset, "val-in", {i: range(FIRST) for i in range(3)})
    put(dataset, "val-out", {3: range(10), 4: range(10), 5: range(10)})
    put(dataset, "train", {i: range(FIRST, COUNT) for i in range(3)})
    return "patient P-1: slides S-2 and S-3", "1 leak"


def leak_guidance(dataset):
    put(dataset, "guidance", {0: range(FIRST - 1, FIRST + 20)})
    return "guidance and val-in", "rank 5: in both"


def leak_beyond(dataset):
    put(dataset, "val-in", {0: [COUNT + 3]})
    return "ranks that its candidates do not have", "S-0"


def leak_val_sides(dataset):
    put(dataset, "val-in", {0: range(FIRST), 4: [1, 2]})
    return "val-in and val-out", "S-4 rank 1"


@pytest.mark.parametrize(
    "plant",
    [leak_same_tile, leak_pixels, leak_patient, leak_guidance, leak_beyond, leak_val_sides],
)
def test_a_planted_leak_is_found(tmp_path, capsys, plant):
    dataset = make_cohort(tmp_path)
    put_clean(dataset)
    words = plant(dataset)
    status, out = leakage(dataset, capsys)
    assert status == 1, out
    for word in words:
        assert word in out, out


def test_one_file_under_two_names_is_a_leak(tmp_path, capsys):
    dataset = make_cohort(tmp_path, s5={"md5": "0" * 32, "patient": "somebody"})
    put_clean(dataset)
    status, out = leakage(dataset, capsys)
    assert status == 1
    assert "slides S-0 and S-5 are one file" in out


def test_slides_without_patient_or_sum_are_counted(tmp_path, capsys):
    none = {"patient": "", "md5": ""}
    dataset = make_cohort(tmp_path, s1=none, s4=none)
    put_clean(dataset)
    status, out = leakage(dataset, capsys)
    assert status == 0
    assert "2 of 6 slides have no patient" in out
    assert "2 of 6 slides have no md5" in out


def test_roles_by_option_plan_and_name(tmp_path, capsys):
    dataset = make_cohort(tmp_path)
    put_clean(dataset)
    put(dataset, "big", {0: range(50, 60)}, role="train")
    put(dataset, "held", {4: range(10)}, role="val-out")
    put(dataset, "val-x", {1: [0]}, role="train")
    put(dataset, "misc", {1: [0]})
    roles = selection_roles(dataset, [], [], [])
    assert roles == {
        "train": "train", "big": "train", "val-in": "val-in", "val-x": "val-in",
        "val-out": "val-out", "held": "val-out", "guidance": "guidance", "misc": "",
    }  # fmt: skip
    roles = selection_roles(dataset, ["misc"], ["held", "big"], [])
    assert {name for name, role in roles.items() if role} == {"misc", "held", "big", "guidance"}
    assert (roles["held"], roles["big"]) == ("val-out", "val-in")
    assert "not compared: misc" in leakage(dataset, capsys)[1]
    status, out = leakage(dataset, capsys, "--train", "misc", "--val", "val-x")
    assert status == 1
    assert "S-1 rank 0: in both" in out
    with pytest.raises(UserError, match="no selection 'nope'"):
        leakage(dataset, capsys, "--train", "nope")
    with pytest.raises(UserError, match="for training and for validation"):
        leakage(dataset, capsys, "--train", "misc", "--val", "misc")


def test_with_nothing_held_out_there_is_nothing_to_prove(tmp_path, capsys):
    dataset = make_cohort(tmp_path)
    put(dataset, "train", {0: range(10, 20)})
    with pytest.raises(UserError, match="no validation selection"):
        leakage(dataset, capsys)
    with pytest.raises(UserError, match="go with --leakage"):
        main(["verify", "--dataset", str(tmp_path), "--train", "train"])


def test_the_size_of_a_tile_is_that_of_the_tissue_stage():
    slide = Slide("s", "", mpp=0.2325, levels=level(4000, 4000))
    size, border = tile_size_level0(slide, TileSize(0.5, 0.02, 224))
    assert size == pytest.approx(224 * 0.5 / 0.2325)
    assert border == pytest.approx(16 * 0.5 / 0.2325)


def test_imported_pictures_are_compared_by_rank_and_said_to_have_no_place(tmp_path, capsys):
    dataset = make_cohort(tmp_path, s0={"levels": ()})
    put_clean(dataset)
    status, out = leakage(dataset, capsys)
    assert status == 0
    assert "1 slides on both sides are imported pictures" in out
    put(dataset, "val-in", {0: [FIRST]})
    assert leakage(dataset, capsys)[0] == 1
