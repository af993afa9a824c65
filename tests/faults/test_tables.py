"""Tables from elsewhere are refused at the door in one line, or mean what they say."""

import os
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from door_data import COUNTS, candidates_of, forge_selection
from door_data import train_room as room
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common.errors import UserError
from evaluate.compare.sides import FeatureSide
from evaluate.generate.condition_source import SelectionConditions
from pipeline.__main__ import main as pipeline
from pipeline.dataset import read_candidates, read_selection, read_slides
from pipeline.dataset.tables.parquet_table import Column, read_table
from pipeline.dataset.tables.selections import read_plan, read_rows
from pipeline.selection.labels import read_labels
from train.setup import open_data

BAD_ROWS = {
    "negative": (["S.0-x"] * 2, pa.array([-16, 3]), "rank.*row 0: -16"),
    "beyond": (["S.0-x"], pa.array([48]), "rank 48 of slide S.0-x, which has 48 candidates"),
    "unknown slide": (["nobody"], pa.array([0]), "nobody"),
    "twice": (["S.0-x"] * 2, pa.array([3, 3]), "rank 3 of slide S.0-x comes twice"),
    "null rank": (["S.0-x"] * 2, pa.array([3, None]), "rank.*row 1: None"),
    "null slide": (["S.0-x", None], pa.array([3, 4]), "slide_id.*row 1"),
    "fractions": (["S.0-x"], pa.array([1.5]), "rank.*1.5"),
    "not a number": (["S.0-x"], pa.array([float("nan")]), "rank.*nan"),
    "text": (["S.0-x"], pa.array(["3"]), "rank.*string"),
    "lists": (["S.0-x"], pa.array([[3]]), "rank.*list"),
    "too large": (["S.0-x"], pa.array([2**40]), "rank.*1099511627776"),
    "ten megabytes": (["x" * 10_000_000], pa.array([0]), "slide id"),
    "path": (["../../etc"], pa.array([0]), "slide id"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD_ROWS)
def test_a_forged_selection_is_refused_by_all_that_read_it(own, kind, tmp_path):
    slides, ranks, words = BAD_ROWS[kind]
    path = forge_selection(own, "train", slides, ranks)
    with pytest.raises(UserError, match=words) as caught:
        read_selection(own, "train")
    assert str(path) in str(caught.value)
    with pytest.raises(UserError, match=words):
        open_data(room.small_config(own, tmp_path / "run"))
    for command in (
        ["cache", "--encoder", "h0-mini", "--dry-run"],
        ["prune"],
        ["report"],
    ):
        with pytest.raises(UserError, match=words):
            pipeline([command[0], "--dataset", str(own.root), *command[1:]])


@pytest.mark.parametrize("kind", ["negative", "text", "lists", "twice"])
def test_no_shard_is_written_of_a_forged_selection(own, kind):
    slides, ranks, words = BAD_ROWS[kind]
    forge_selection(own, "train", slides, ranks)
    before = sorted(own.root.rglob("*.tar"))
    with pytest.raises(UserError, match=words):
        pipeline(["tile", "--dataset", str(own.root), "--workers", "1"])
    assert sorted(own.root.rglob("*.tar")) == before


def test_measure_and_generate_refuse_it_too(own):
    forge_selection(own, "bad", ["S.0-x"], pa.array([48]))
    words = r"rank 48 of slide S\.0-x"
    with pytest.raises(UserError, match=words):
        FeatureSide.open_selection(own.root, "bad", "h0-mini", like=None)
    with pytest.raises(UserError, match=words):
        SelectionConditions.open_selection(own, "bad", "h0-mini")


@pytest.mark.parametrize(
    "ranks",
    [
        pa.array([5, 3], pa.int64()), pa.array([5, 3], pa.uint64()), pa.array([5, 3], pa.uint8()),
        pa.array([5.0, 3.0]), pa.array([5, 3]).dictionary_encode(), pa.array([5, 3], pa.int16()),
    ],
)  # fmt: skip
def test_ranks_of_other_types_mean_the_same(own, ranks):
    forge_selection(own, "mine", ["S.0-x", "S.0-x"], ranks)
    assert read_selection(own, "mine").ranks.tolist() == [3, 5]


def test_the_selections_of_the_stages_pass_and_other_columns_are_passed_over(own):
    assert read_selection(own, "train").rows == 80
    path = own.selection_file("more")
    pq.write_table(pa.table({"slide_id": ["S.1-x"], "rank": [36], "score": [0.5]}), path)
    assert read_selection(own, "more").ranks.tolist() == [36]


def test_old_journals_without_counts_are_made_up_for_by_footers(own):
    for path in own.status_dir("tissue").glob("*"):
        path.unlink()
    forge_selection(own, "edge", ["S.1-x"], [36])
    assert read_selection(own, "edge").rows == 1
    forge_selection(own, "edge", ["S.1-x"], [37])
    with pytest.raises(UserError, match="has 37 candidates"):
        read_selection(own, "edge")


@pytest.mark.parametrize(
    "plan", [b"[]", b"{", b'"x"', b"\xff", b'{"parameters": []}', b"[" * 100_000]
)
def test_a_plan_that_is_none_is_refused(own, plan):
    table = pa.table({"slide_id": ["S.0-x"], "rank": [0]}).replace_schema_metadata({"plan": plan})
    pq.write_table(table, own.selection_file("train"))
    for read in (read_plan, read_selection):
        with pytest.raises(UserError, match=r"train\.parquet.*plan"):
            read(own, "train")


def _slow_rows(slides: list[object], ranks: list[object]) -> list[tuple[str, int]] | None:
    """The rows, sorted, if a person would accept them."""
    rows = []
    for slide, rank in zip(slides, ranks, strict=True):
        if not isinstance(slide, str) or slide not in COUNTS:
            return None
        if isinstance(rank, bool) or not isinstance(rank, int | float) or rank != rank:
            return None
        if rank in (float("inf"), float("-inf")) or rank != int(rank):
            return None
        if not 0 <= rank < COUNTS[slide]:
            return None
        rows.append((slide, int(rank)))
    return sorted(rows) if len(set(rows)) == len(rows) else None


_TYPES = st.sampled_from(
    [pa.int8(), pa.int32(), pa.int64(), pa.uint64(), pa.float32(), pa.float64(), pa.string(),
     pa.list_(pa.int32()), pa.bool_(), pa.null(), pa.struct([("a", pa.int32())]), pa.date32()]
)  # fmt: skip
_SLIDES = st.sampled_from(["S.0-x", "S.1-x", "S.0-X", "", "..", None, "no\0thing"])


def _values(kind: pa.DataType) -> st.SearchStrategy[object]:
    if pa.types.is_floating(kind):
        return st.one_of(st.integers(-2, 60).map(float), st.floats(width=32), st.none())
    if pa.types.is_integer(kind):
        low = 0 if pa.types.is_unsigned_integer(kind) else -3
        return st.one_of(st.integers(low, 60), st.integers(0, 47), st.none())
    other = {
        pa.string(): st.sampled_from(["1", "x", None]), pa.list_(pa.int32()): st.just([1]),
        pa.bool_(): st.booleans(), pa.null(): st.none(),
        pa.struct([("a", pa.int32())]): st.just({"a": 1}), pa.date32(): st.just(3),
    }  # fmt: skip
    return other[kind]


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data(), count=st.integers(0, 8), kind=_TYPES, name=st.booleans())
def test_any_table_is_a_selection_or_refused_by_name(made, tmp_path, data, count, kind, name):
    slides = data.draw(st.lists(_SLIDES, min_size=count, max_size=count))
    ranks = data.draw(st.lists(_values(kind), min_size=count, max_size=count))
    column = pa.array(ranks, kind)
    arrays = {"slide_id": pa.array(slides, pa.string()), "rank": column}
    if name:
        arrays["slide_id"] = arrays["slide_id"].dictionary_encode()
    path = made.selection_file("fuzzed")
    pq.write_table(pa.table(arrays), path, row_group_size=3)
    try:
        wanted = _slow_rows(slides, column.to_pylist())
        if not count and not (pa.types.is_integer(kind) or pa.types.is_floating(kind)):
            wanted = [] if pa.types.is_null(kind) else None  # no rank, but of a type that is none
        if pa.types.is_date(kind):
            wanted = None
        try:
            selection = read_selection(made, "fuzzed")
        except UserError as error:
            refusal = str(error)
        else:
            refusal = ""
        assert bool(refusal) == (wanted is None), (refusal, wanted)
        if refusal:
            assert str(path) in refusal
        else:
            found = [(slide, int(r)) for slide, some in selection.items() for r in some]
            assert found == wanted
    finally:
        path.unlink()


BAD_CANDIDATES = {
    "unsorted": ("rank", lambda n: pa.array(np.arange(n)[::-1].copy()), "not the ranks 0, 1, 2"),
    "from one": ("rank", lambda n: pa.array(np.arange(1, n + 1)), "not the ranks 0, 1, 2"),
    "nan": ("x_level0", lambda n: pa.array(np.full(n, np.nan)), "row 0: nan"),
    "infinite": ("y_level0", lambda n: pa.array(np.full(n, np.inf)), "row 0: inf"),
    "far away": ("x_level0", lambda n: pa.array(np.full(n, 1e300)), r"1e\+300"),
    "text": ("x_level0", lambda n: pa.array(["0"] * n), "string"),
    "nested": ("rank", lambda n: pa.array([[r] for r in range(n)]), "list"),
    "share": ("tissue_fraction", lambda n: pa.array([2.0] * n), "from 0 to 1"),
}


@pytest.mark.parametrize("kind", BAD_CANDIDATES)
def test_candidates_that_are_none_are_refused(own, kind):
    name, values, words = BAD_CANDIDATES[kind]
    path = own.candidates_file("S.0-x")
    table = candidates_of(48)
    place = table.schema.get_field_index(name)
    pq.write_table(table.set_column(place, name, values(48)), path)
    with pytest.raises(UserError, match=words) as caught:
        read_candidates(own, "S.0-x")
    assert str(path) in str(caught.value)
    assert name in str(caught.value)


def _bad_slides(table: pa.Table) -> dict[str, pa.Table]:
    def with_column(name: str, values: object, kind: pa.DataType | None = None) -> pa.Table:
        place = table.schema.get_field_index(name)
        return table.set_column(place, name, pa.array(values, kind))

    return {
        "twice": with_column("slide_id", ["S.0-x"] * 2),
        "no id": with_column("slide_id", ["S.0-x", None]),
        "id that leaves": with_column("slide_id", ["../x", "S.1-x"]),
        "numbers": with_column("slide_id", [1, 2]),
        "mpp text": with_column("mpp", ["0.5", "0.5"]),
        "mpp nan": with_column("mpp", [float("nan"), 0.5]),
        "mpp below": with_column("mpp", [-0.5, 0.5]),
        "mpp list": with_column("mpp", [[0.5], [0.5]]),
        "status": with_column("status", ["fine", "ok"]),
        "status null": with_column("status", [None, "ok"]),
        "width": with_column("width", [2**40, 1]),
        "levels": with_column("levels", [[[1, 2, 3]], [[1, 2, 3]]]),
        "levels of text": with_column("levels", ["a", "b"]),
        "levels below": with_column(
            "levels", [[{"width": 0, "height": 1, "downsample": 1.0}], []],
            table.schema.field("levels").type,
        ),
        "text of megabytes": with_column("patient", ["x" * 10_000_000, ""]),
        "nul": with_column("path", ["a\0b", "c"]),
        "not UTF-8": with_column(
            "patient", pa.array([b"\xff\xfe", b"a"], pa.binary()).view(pa.string())
        ),
        "no path": table.drop_columns(["path"]),
        "no columns": pa.table({}),
    }  # fmt: skip


@pytest.mark.parametrize("kind", [
    "twice", "no id", "id that leaves", "numbers", "mpp text", "mpp nan", "mpp below", "mpp list",
    "status", "status null", "width", "levels", "levels of text", "levels below",
    "text of megabytes", "nul", "not UTF-8", "no path", "no columns",
])  # fmt: skip
def test_a_table_of_slides_that_is_none_is_refused(own, kind):
    table = _bad_slides(pq.read_table(own.slides_file))[kind]
    pq.write_table(table, own.slides_file)
    with pytest.raises(UserError, match=r"slides\.parquet"):
        read_slides(own)


def test_slides_of_other_tools_are_read(own):
    """Columns of newer releases, nulls for what is not known, and dictionaries for text."""
    table = pq.read_table(own.slides_file)
    before = read_slides(own)
    table = table.append_column("new", pa.array([1, 2]))
    table = table.set_column(
        table.schema.get_field_index("site"), "site", pa.array([None, None], pa.string())
    )
    table = table.set_column(
        table.schema.get_field_index("vendor"), "vendor", table["vendor"].dictionary_encode()
    )
    pq.write_table(table.drop_columns(["md5", "bounds"]), own.slides_file)
    assert read_slides(own) == before


def test_footers_that_lie_and_files_that_are_none(own, tmp_path):
    path = own.selection_file("train")
    for damage in (b"", b"PAR1", b"PAR1" + os.urandom(64) + b"PAR1", path.read_bytes()[:-9]):
        path.write_bytes(damage)
        with pytest.raises(UserError, match=r"train\.parquet"):
            read_selection(own, "train")
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(UserError, match="it is a pipe"):
        read_rows(path, "train")
    with pytest.raises(UserError, match="it is a pipe"):
        read_table(path, [Column("a", pa.int32())], "")


def test_a_column_that_is_there_twice_is_refused(tmp_path):
    table = pa.Table.from_arrays([pa.array([1]), pa.array([2])], names=["rank", "rank"])
    pq.write_table(table, tmp_path / "t.parquet")
    with pytest.raises(UserError, match="'rank' is there twice"):
        read_table(tmp_path / "t.parquet", [Column("rank", pa.int32())], "hint")


def test_a_number_of_5000_digits_in_a_csv_is_one_line(tmp_path):
    path = tmp_path / "labels.csv"
    path.write_text(f"slide_id,rank,label\nS,{'9' * 5000},usable\n")
    with pytest.raises(UserError, match="no tile of rank"):
        read_labels(path, {"S": 3})


@pytest.mark.full
@pytest.mark.parametrize("kind", ["negative", "beyond", "unknown slide", "lists", "null slide"])
def test_no_command_ends_in_a_traceback(own, kind, tmp_path, clean_environment):
    slides, ranks, _ = BAD_ROWS[kind]
    forge_selection(own, "train", slides, ranks)
    for command in (
        ["pipeline", "tile", "--workers", "1"], ["pipeline", "status"], ["pipeline", "verify"],
        ["pipeline", "cache", "--encoder", "h0-mini", "--weights", "random", "--workers", "1"],
        ["pipeline", "select", "--name", "other", "--from", "train"], ["pipeline", "prune"],
    ):  # fmt: skip
        done = subprocess.run(
            [sys.executable, "-m", *command, "--dataset", str(own.root)], capture_output=True,
            text=True, env=clean_environment, timeout=120, check=False,
        )  # fmt: skip
        assert "Traceback" not in done.stderr + done.stdout, (command, done.stderr)
        if command[1] != "status":
            assert done.returncode != 0, (command, done.stdout)
