"""`select` on datasets: plans, hold-outs that cannot be undone silently, parts, sets, denial."""

import csv
import json
import shutil
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from common.errors import UserError
from pipeline.__main__ import main
from pipeline.dataset import (
    Dataset,
    Slide,
    commit_file,
    make_selection,
    new_run_id,
    read_selection,
    read_slides,
    write_slides,
)
from pipeline.dataset.grid import reserve_size
from pipeline.dataset.hold_outs import check_held_out, find_leaks, honoured
from pipeline.dataset.tables.selections import read_plan, read_rows, write_rows, write_selection
from pipeline.selection.denied import deny_file
from tests.pipeline.cohort_data import slides_of, tissue_dataset, trap_rows


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    slides = slides_of(trap_rows())
    slides += [
        Slide("unreadable", "u.svs", status="failed", reason="the file is empty"),
        Slide("glass", "g.svs", mpp=0.5, bytes=1, mtime_ns=1),
    ]
    counts = [max(3, slide.bytes // 2_000_000) for slide in slides[:-1]] + [0]
    return tissue_dataset(tmp_path_factory.mktemp("cohort") / "d", slides, counts)


@pytest.fixture
def dataset(made, tmp_path):
    shutil.copytree(made.root, tmp_path / "d")
    return Dataset(tmp_path / "d")


def select(dataset, *arguments):
    return main(["select", "--dataset", str(dataset.root), *arguments])


def patients_of(dataset, name):
    patient = {slide.slide_id: slide.patient for slide in read_slides(dataset)}
    return {patient[slide_id] for slide_id in read_selection(dataset, name).slide_ids}


def tiles_of(dataset, name):
    return {(s, int(r)) for s, ranks in read_selection(dataset, name).items() for r in ranks}


def test_the_paper_s_selections_in_order(dataset, capsys):
    assert select(dataset, "--name", "val-out", "--hold-out", "20", "--cover", "project,site",
                  "--tiles", "500") == 0  # fmt: skip
    assert select(dataset, "--name", "train-10k", "--tiles", "10_000") == 0
    assert select(dataset, "--name", "train-4k", "--tiles", "4_000") == 0
    assert select(dataset, "--name", "val-in", "--pool", "reserve", "--tiles", "100") == 0
    assert select(dataset, "--name", "guidance", "--from", "train-4k", "--tiles", "300") == 0
    held = patients_of(dataset, "val-out")
    for name in ("train-10k", "train-4k", "val-in", "guidance"):
        assert not held & patients_of(dataset, name), name
    assert len(read_plan(dataset, "val-out")["ties"]["patients"]) >= len(held)
    plan = read_plan(dataset, "train-4k")
    assert plan["cohort"]["slides"] - 20 == sum(row["slides"] for row in plan["strata"])
    assert {"NA", "02", "2E"} <= {row["name"] for row in plan["strata"]}
    assert sum(row["selected"] for row in plan["strata"]) == 4000
    assert tiles_of(dataset, "guidance") <= tiles_of(dataset, "train-4k")
    assert tiles_of(dataset, "train-4k") < tiles_of(dataset, "train-10k")
    assert not tiles_of(dataset, "val-in") & tiles_of(dataset, "train-10k")
    large = dict(read_selection(dataset, "train-10k").items())
    for slide_id, ranks in read_selection(dataset, "train-4k").items():
        assert np.array_equal(ranks, large[slide_id][: len(ranks)])
    roles = {n: read_plan(dataset, n)["role"] for n in dataset.selection_names()}
    assert roles == {
        "val-out": "val-out", "train-10k": "train", "train-4k": "train", "val-in": "val-in",
        "guidance": "train",
    }  # fmt: skip
    assert "Jensen-Shannon divergence" in capsys.readouterr().out


def test_every_exclusion_is_counted_and_listed(dataset, capsys):
    assert select(dataset, "--name", "t", "--tiles", "100", "--sample-types", "01",
                  "--min-candidates", "5") == 0  # fmt: skip
    counted = {row["reason"]: row["slides"] for row in read_plan(dataset, "t")["exclusions"]}
    assert counted == {
        "duplicate file": 2, "frozen section": 1, "sample type": 1, "few candidates": 1,
        "failed by scan": 1, "rejected by tissue": 1,
    }  # fmt: skip
    with (dataset.root / "selections" / "t.excluded.csv").open() as file:
        rows = {row["slide_id"]: row for row in csv.DictReader(file)}
    assert len(rows) == 7
    assert rows["unreadable"]["detail"] == "the file is empty"
    assert not set(rows) & set(read_selection(dataset, "t").slide_ids)
    assert "duplicate file" in capsys.readouterr().out


def test_a_second_run_does_nothing_and_other_bytes_never_come(dataset, capsys):
    run = ("--name", "val-out", "--hold-out", "15", "--cover", "project", "--tiles", "200")
    select(dataset, *run)
    first = dataset.selection_file("val-out").read_bytes()
    capsys.readouterr()
    select(dataset, *run)
    assert "already done, nothing to redo" in capsys.readouterr().out
    dataset.selection_file("val-out").unlink()
    select(dataset, *run)
    assert dataset.selection_file("val-out").read_bytes() == first


def test_a_hold_out_is_honoured_though_its_file_is_gone(dataset):
    select(dataset, "--name", "val-out", "--hold-out", "20", "--tiles", "200")
    held = patients_of(dataset, "val-out")
    dataset.selection_file("val-out").unlink()
    select(dataset, "--name", "train")
    assert not held & patients_of(dataset, "train")
    assert list(read_plan(dataset, "train")["ties"]["honours"]) == ["val-out"]


def test_a_hold_out_without_any_trace_is_missed(dataset):
    select(dataset, "--name", "val-out", "--hold-out", "20", "--tiles", "200")
    select(dataset, "--name", "train", "--tiles", "500")
    dataset.selection_file("val-out").unlink()
    for path in dataset.status_dir("select").glob("*.jsonl"):
        path.unlink()
    with pytest.raises(UserError, match="'train' leaves the patients of hold-out 'val-out' alone"):
        select(dataset, "--name", "more")


def test_a_hold_out_that_others_honour_cannot_change_or_go(dataset):
    select(dataset, "--name", "val-out", "--hold-out", "20", "--tiles", "200")
    select(dataset, "--name", "train", "--tiles", "500")
    # More tiles of the same patients harm nobody.
    more = ["--name", "val-out", "--hold-out", "20", "--tiles", "300"]
    with pytest.raises(UserError, match="300 tiles of 20 slides in place of 200 tiles of 20 sl"):
        select(dataset, *more)
    assert select(dataset, *more, "--replace") == 0
    with pytest.raises(UserError, match="another choice would put them into training"):
        select(dataset, "--name", "val-out", "--hold-out", "12", "--tiles", "200")
    with pytest.raises(UserError, match="another choice would put them into training"):
        select(dataset, "--name", "val-out", "--tiles", "200")
    with pytest.raises(UserError, match="'train' leave its patients alone"):
        select(dataset, "--remove", "val-out")
    assert select(dataset, "--remove", "train", "--remove", "val-out") == 0  # in this order
    assert dataset.selection_names() == []
    assert not list((dataset.root / "selections").iterdir())
    select(dataset, "--name", "all")
    assert read_plan(dataset, "all")["ties"]["honours"] == {}


def test_a_hold_out_comes_before_what_it_must_be_kept_from(dataset):
    select(dataset, "--name", "train", "--tiles", "500")
    with pytest.raises(UserError, match=r"patients of 'train': a hold-out comes before"):
        select(dataset, "--name", "val-out", "--hold-out", "20")
    select(dataset, "--remove", "train")
    assert select(dataset, "--name", "val-out", "--hold-out", "20") == 0


def two_slides_a_patient(root, **second):
    """Six patients with a slide of 40 candidates each, and one of 4 that `second` describes."""
    slides = []
    for number in range(6):
        first = {"mpp": 0.5, "bytes": 1, "mtime_ns": 1, "patient": f"p{number}", "site": "02"}
        first |= {"sample_type": "01", "project": "X" if number else "Y"}
        slides.append(Slide(f"p{number}-a", "a.svs", **first))
        slides.append(Slide(f"p{number}-b", "b.svs", **(first | second)))
    slides[0], slides[2] = (replace(slides[i], md5="f" * 32) for i in (0, 2))
    return tissue_dataset(root, slides, [40, 4] * 6)


@pytest.mark.parametrize(
    ("second", "rules"),
    [
        ({"sample_type": "11"}, ["--sample-types", "01"]),
        ({"preparation": "frozen"}, []),
        ({}, ["--min-candidates", "5"]),
    ],
)
@pytest.mark.parametrize("number", [0, 1])
def test_a_hold_out_is_refused_over_a_patient_s_other_slide(tmp_path, second, rules, number):
    """The cover takes p0; p1 shares a file with it. Both train by slides that the rules leave."""
    dataset = two_slides_a_patient(tmp_path / "d", **second)
    rows = make_selection("train", {f"p{number}-b": np.arange(1, 4, dtype=np.int32)}, {})
    write_selection(dataset, "run", rows)
    with pytest.raises(UserError, match=r"patients of 'train': a hold-out comes before"):
        select(dataset, "--name", "val-out", "--hold-out", "2", "--cover", "project", *rules)
    assert dataset.selection_names() == ["train"]


def test_a_hold_out_is_refused_over_what_other_rules_drew(tmp_path):
    dataset = two_slides_a_patient(tmp_path / "d", sample_type="11")
    assert select(dataset, "--name", "train-normal", "--sample-types", "11") == 0
    with pytest.raises(UserError, match=r"patients of 'train-normal': a hold-out comes before"):
        select(dataset, "--name", "val-out", "--hold-out", "2", "--sample-types", "01")


def test_a_selection_is_replaced_only_where_that_was_said(dataset, capsys):
    assert select(dataset, "--name", "train", "--tiles", "500") == 0
    file = dataset.selection_file("train")
    before = file.read_bytes()
    for other in (["--tiles", "400"], ["--tiles", "500", "--stratify", "none"], [],
                  ["--pool", "reserve", "--tiles", "50"], ["--hold-out", "20"]):  # fmt: skip
        with pytest.raises(UserError, match=r"'train' is there already.*--replace.*another --na"):
            select(dataset, "--name", "train", *other)
        assert file.read_bytes() == before
    capsys.readouterr()
    assert select(dataset, "--name", "train", "--tiles", "500") == 0
    assert "already done, nothing to redo" in capsys.readouterr().out
    assert select(dataset, "--name", "train", "--tiles", "400", "--replace") == 0
    assert "selection 'train' is replaced: 400 tiles of" in capsys.readouterr().out
    assert read_selection(dataset, "train").rows == 400
    assert select(dataset, "--name", "train", "--tiles", "400") == 0
    # The same tiles by other words replace nothing: 400 with any share of slides' rules the same.
    sample = ["--min-candidates", "1", "--tiles", "400"]
    assert select(dataset, "--name", "train", *sample) == 0


def test_a_selection_follows_the_dataset_aloud(dataset, capsys):
    """`make tile` and recipes repeat `select` as it was: slides that came since are taken."""
    select(dataset, "--name", "train")
    before = read_selection(dataset, "train")
    slides = read_slides(dataset)
    gone = next(s for s in slides if s.slide_id == before.slide_ids[0])
    write_slides(dataset, "run", [s for s in slides if s is not gone])
    capsys.readouterr()
    assert select(dataset, "--name", "train") == 0
    after = read_selection(dataset, "train")
    change = f"{after.rows:,} tiles of {len(after.slide_ids):,} slides in place of {before.rows:,}"
    said = capsys.readouterr().out
    assert f"selection 'train' is made again, as the dataset has changed: {change}" in said
    write_slides(dataset, "run", slides)
    assert select(dataset, "--name", "train") == 0
    assert read_selection(dataset, "train").content_hash == before.content_hash


def test_a_file_that_select_did_not_make_is_not_replaced(dataset):
    mine = make_selection("train", {"x": np.arange(3, dtype=np.int32)}, {})
    write_selection(dataset, "run", mine)
    with pytest.raises(UserError, match="in place of 3 tiles of 1 slide:"):
        select(dataset, "--name", "train")
    assert select(dataset, "--name", "train", "--replace") == 0


def test_frozen_sections_are_refused_with_their_option(tmp_path, capsys):
    dataset = two_slides_a_patient(tmp_path / "d", preparation="frozen")
    assert select(dataset, "--name", "some") == 0
    assert "frozen section (--frozen takes them)" in " ".join(capsys.readouterr().out.split())
    slides = [replace(slide, preparation="frozen") for slide in read_slides(dataset)]
    write_slides(dataset, "run", slides)
    with pytest.raises(UserError, match=r"11 frozen section \(--frozen takes them\)"):
        select(dataset, "--name", "none")
    assert select(dataset, "--name", "all", "--frozen") == 0


def test_two_hold_outs_do_not_meet(dataset):
    select(dataset, "--name", "val-out", "--hold-out", "20")
    select(dataset, "--name", "test-out", "--hold-out", "20")
    assert not patients_of(dataset, "val-out") & patients_of(dataset, "test-out")
    select(dataset, "--name", "train")
    both = patients_of(dataset, "val-out") | patients_of(dataset, "test-out")
    assert not both & patients_of(dataset, "train")


def test_what_was_drawn_from_a_selection_binds_it(dataset):
    select(dataset, "--name", "train", "--tiles", "500")
    select(dataset, "--name", "guidance", "--from", "train", "--tiles", "50")
    with pytest.raises(UserError, match="'guidance' was drawn from it"):
        select(dataset, "--name", "train", "--tiles", "400")
    with pytest.raises(UserError, match="'guidance' was drawn from it"):
        select(dataset, "--remove", "train")


def test_disjoint_sets_in_one_call(dataset):
    select(dataset, "--name", "ood", "--split", "conditioning,reference", "--tiles", "2_000",
           "--pool", "all")  # fmt: skip
    one, two = tiles_of(dataset, "ood-conditioning"), tiles_of(dataset, "ood-reference")
    assert len(one) == len(two) == 2000
    assert not one & two
    plans = [read_plan(dataset, f"ood-{part}") for part in ("conditioning", "reference")]
    for a, b in zip(*(plan["strata"] for plan in plans), strict=True):
        assert abs(a["selected"] - b["selected"]) <= 1
        assert a["selected"] == pytest.approx(a["quota"], abs=1.5)
    with pytest.raises(UserError, match="largest possible is"):
        select(dataset, "--name", "x", "--split", "a,b", "--tiles", "1_000_000")


def deny(dataset, name, ranks):
    rows = make_selection(name, ranks, {})
    commit_file(dataset, new_run_id(), deny_file(dataset, name), lambda f: write_rows(f, rows))


def test_a_deny_list_is_filled_up_or_subtracted(dataset):
    select(dataset, "--name", "train", "--tiles", "3_000")
    before = dict(read_selection(dataset, "train").items())
    denied = {slide: ranks[::3] for slide, ranks in before.items()}
    deny(dataset, "bad", denied)
    gone = {(s, int(r)) for s, ranks in denied.items() for r in ranks}
    select(dataset, "--name", "minus", "--from", "train", "--deny", "bad")
    assert tiles_of(dataset, "minus") == tiles_of(dataset, "train") - gone
    select(dataset, "--name", "filled", "--tiles", "3_000", "--deny", "bad")
    filled = tiles_of(dataset, "filled")
    assert len(filled) == 3000
    assert not filled & gone
    for slide, ranks in read_selection(dataset, "filled").items():
        count = pq.read_metadata(dataset.candidates_file(slide)).num_rows
        free = [r for r in range(reserve_size(count), count) if (slide, r) not in gone]
        assert ranks.tolist() == free[: len(ranks)]
    with pytest.raises(UserError, match=r"no deny-list 'good'.*there: bad"):
        select(dataset, "--name", "x", "--deny", "good")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--name", "x", "--tiles", "100_000_000"], "largest possible is"),
        (["--name", "x", "--cover", "site"], "--cover is for --hold-out"),
        (["--name", "x", "--hold-out", "9", "--cover", "tss"], "expected project, site"),
        (["--name", "x", "--hold-out", "9_999"], "fewer than the cohort's eligible slides"),
        (["--name", "x", "--hold-out", "9", "--pool", "reserve"], "leave --from and --pool out"),
        (["--name", "x", "--from", "y"], "no selection 'y'"),
        (["--name", "x", "--from", "x"], "drawn from itself"),
        (["--name", "x", "--split", "a,a"], "two or more different names"),
        (["--name", "x", "--min-candidates", "9_999_999"], "no slide is left; left out"),
        (["--tiles", "9"], "needs --name"),
        (["--remove", "x"], "no selection 'x'"),
    ],
)
def test_mistakes_say_what_to_do(made, arguments, words):
    with pytest.raises(UserError, match=words):
        select(made, *arguments)
    assert not made.selection_names()


def test_a_selection_file_round_trips_in_little_space(tmp_path):
    rng = np.random.default_rng(0)
    ranks = {f"slide-{i:03d}": np.arange(7, 7 + rng.integers(1, 9000), dtype=np.int32)
             for i in range(600)}  # fmt: skip
    selection = make_selection("x", ranks, {"a": "NA"})
    assert selection.rows > 2 * (1 << 20), "several row groups"
    write_selection(Dataset(tmp_path), "run", selection)
    path = tmp_path / "selections" / "x.parquet"
    assert path.stat().st_size < selection.rows / 20
    back = read_rows(path, "x")
    assert back.content_hash == selection.content_hash
    assert back.plan == {"a": "NA"}
    # Any tool's file: plain strings, any order.
    table = pq.read_table(path)
    order = rng.permutation(table.num_rows)[:5000]
    plain = table.take(order).cast(
        table.schema.set(0, table.schema.field(0).with_type(pa.string()))
    )
    pq.write_table(plain, tmp_path / "other.parquet")
    rows = sorted(zip(plain["slide_id"].to_pylist(), plain["rank"].to_pylist(), strict=True))
    other = read_rows(tmp_path / "other.parquet", "o")
    assert [(s, int(r)) for s, some in other.items() for r in some] == rows
    assert json.loads(pq.read_schema(path).metadata[b"plan"]) == {"a": "NA"}


def test_a_slide_that_came_to_a_held_out_patient_is_not_trained_on(dataset):
    """The table of slides was corrected: a held-out slide is of a patient with other slides."""
    select(dataset, "--name", "val-out", "--hold-out", "20", "--tiles", "500")
    select(dataset, "--name", "train", "--tiles", "2_000")
    assert list(find_leaks(dataset, "train")) == list(find_leaks(dataset, "val-out")) == []
    moved, seen = (read_selection(dataset, name).slide_ids[0] for name in ("val-out", "train"))
    slides = {slide.slide_id: slide for slide in read_slides(dataset)}
    # The other way round: a slide in training is of a held-out patient, by name alone.
    named, renamed = read_plan(dataset, "val-out")["ties"]["patients"][-1], seen
    for changes in (
        {moved: replace(slides[moved], patient=slides[seen].patient.lower())},
        {renamed: replace(slides[renamed], patient=named)},
    ):
        write_slides(dataset, "test", (slides | changes).values())
        (leak,) = find_leaks(dataset, "train")
        assert leak == next(find_leaks(dataset, "val-out"))
        assert "selection 'train' has slides of patients that 'val-out' holds out" in leak
        assert f"(slide {seen}; held out: " in leak
        honours = honoured(dataset, "train")
        slide_ids = read_selection(dataset, "train").slide_ids
        with pytest.raises(UserError, match=f"{seen}.*make both again, the hold-out first"):
            check_held_out(dataset, "train", slide_ids, honours)
    # As `scan` leaves it, `select` draws by the new table, and hold-outs are of the former one.
    write_slides(dataset, "test", (slides | {
        moved: replace(slides[moved], patient=slides[seen].patient)}).values())  # fmt: skip
    before = dataset.selection_file("train").read_bytes()
    for arguments in (["train", "--tiles", "2_000"], ["more", "--tiles", "1_000"]):
        with pytest.raises(UserError, match="has slides of patients that 'val-out' holds out"):
            select(dataset, "--name", *arguments)
    assert dataset.selection_file("train").read_bytes() == before
    assert not dataset.selection_file("more").exists()
