"""`plan-cohort`: a small list with the traps of the real one, and the real one where it is."""

import hashlib
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from common.errors import UserError
from pipeline.__main__ import main
from pipeline.dataset import Dataset, read_selection, read_slides
from pipeline.dataset.grid import reserve_size
from pipeline.dataset.tables.selections import read_plan
from pipeline.selection.cohort_table import read_cohort_csv, simulated_candidates
from tests.pipeline.cohort_data import trap_rows, write_csv

ROOT = Path(__file__).resolve().parents[2]
SMALL = ("--train", "20_000", "--train", "50_000", "--hold-out", "20", "--val-tiles", "120",
         "--guidance", "500", "--candidates", "100_000")  # fmt: skip
# VmHWM and not ru_maxrss, which begins at what the parent of the process held.
MEASURED_PLAN = r"""
import re, sys, time
from pathlib import Path
from pipeline.__main__ import main
status = main(sys.argv[1:])
peak_kb = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text()).group(1)
print(time.process_time(), int(peak_kb) / 1024)
sys.exit(status)
"""


def plan(csv_file, out, *arguments):
    return main(["plan-cohort", str(csv_file), "--out", str(out), *arguments])


def digest(root):
    return {
        path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*")) if path.is_file()
    }  # fmt: skip


def test_the_same_bytes_whatever_the_row_order(tmp_path, capsys):
    rows = trap_rows()
    plan(write_csv(tmp_path / "list.csv", rows), tmp_path / "a", *SMALL)
    random.Random(3).shuffle(rows)
    plan(write_csv(tmp_path / "list.csv", rows), tmp_path / "b", *SMALL)
    first = digest(tmp_path / "a")
    assert first == digest(tmp_path / "b")
    assert set(first) == {
        "report.html", "excluded.csv", "slides.parquet", "selections/train-20k.parquet",
        "selections/train-50k.parquet", "selections/val-in.parquet", "selections/val-out.parquet",
        "selections/guidance.parquet",
    }  # fmt: skip
    assert "duplicate file" in capsys.readouterr().out


def test_the_page_states_model_checks_and_exclusions(tmp_path):
    plan(write_csv(tmp_path / "list.csv", trap_rows()), tmp_path / "a", *SMALL)
    page = (tmp_path / "a" / "report.html").read_text()
    for words in ("proportional to its file", "exactly 100,000 candidates", "duplicate file",
                  "frozen section", "held out", "val-out", "data:image/png;base64"):  # fmt: skip
        assert words in page, words
    assert page.count("<td>yes</td>") == 4
    assert ">NO<" not in page
    assert str(tmp_path) not in page


def test_codes_and_a_shared_file_survive_the_csv(tmp_path):
    table = read_cohort_csv(write_csv(tmp_path / "list.csv", trap_rows()), 100_000)
    assert {"NA", "02", "05", "2E", "3E"} <= {slide.site for slide in table.slides}
    assert {slide.preparation for slide in table.slides} == {"ffpe", "frozen"}
    assert "11" in {slide.sample_type for slide in table.slides}
    assert table.candidates.sum() == 100_000
    assert all(slide.md5 == slide.md5.lower() for slide in table.slides)


def test_simulated_candidates_follow_file_sizes():
    sizes = np.array([10**9, 2 * 10**9, 467_454], np.int64)
    assert simulated_candidates(sizes, 30_000).tolist() == [9998, 19997, 5]


def test_stated_candidates_are_taken_as_they_are(tmp_path):
    rows = [row | {"candidates": str(100 + i)} for i, row in enumerate(trap_rows())]
    table = read_cohort_csv(write_csv(tmp_path / "list.csv", rows), 5)
    assert sorted(table.candidates.tolist()) == list(range(100, 100 + len(rows)))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"size_bytes": "12.5"}, r"line 2: '12.5', expected a whole number"),
        ({"size_bytes": ""}, r"line 2: '', expected a whole number"),
        ({"slide_id": "../x"}, r"slide id '../x' is not usable"),
    ],
)
def test_bad_lines_are_named(tmp_path, change, words):
    rows = trap_rows()
    rows[0] |= change
    with pytest.raises(UserError, match=words):
        plan(write_csv(tmp_path / "list.csv", rows), tmp_path / "out")


def test_bad_lists_are_refused(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        plan(tmp_path / "no.csv", tmp_path / "out")
    (tmp_path / "x.csv").write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match="expected a slide_id or file_name column"):
        plan(tmp_path / "x.csv", tmp_path / "out")
    rows = trap_rows()
    with pytest.raises(UserError, match="comes twice"):
        plan(write_csv(tmp_path / "l.csv", [*rows, rows[0]]), tmp_path / "out", *SMALL)
    with pytest.raises(UserError, match="largest possible is"):
        plan(write_csv(tmp_path / "l.csv", rows), tmp_path / "out", *SMALL, "--train", "99_999")
    assert not (tmp_path / "out" / "selections").exists()


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """The real list, planned in a process of its own: dataset, CPU seconds, peak memory in MB."""
    table = ROOT.parent / "shared" / "data" / "cohort" / "tcga_slides.csv"
    if not table.is_file():
        pytest.skip(f"development data is not at {table}")
    out = tmp_path_factory.mktemp("real") / "out"
    done = subprocess.run(
        [sys.executable, "-c", MEASURED_PLAN, "plan-cohort", str(table), "--out", str(out)],
        cwd=ROOT, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    cpu_s, peak_mb = map(float, done.stdout.splitlines()[-1].split())
    return Dataset(out), cpu_s, peak_mb


@pytest.mark.full
def test_the_real_list_is_planned_in_little_time_and_memory(real):
    dataset, cpu_s, peak_mb = real
    assert dataset.selection_names() == [
        "guidance", "train-108m", "train-40m", "val-in", "val-out",
    ]  # fmt: skip
    # CPU time: wall time on shared machines is other people's. Measured 11 s and 0.8 GB.
    assert cpu_s < 60
    assert peak_mb < 4000
    page = (dataset.root / "report.html").read_text()
    assert page.count("<td>yes</td>") == 4


def test_the_real_hold_out_covers_what_the_paper_s_does(real):
    dataset = real[0]
    plan = read_plan(dataset, "val-out")
    assert plan["selected"]["slides"] == 1012
    assert plan["distribution"]["project"]["covered"] == 32
    assert plan["distribution"]["site"]["covered"] >= 359
    assert plan["distribution"]["project"]["jsd_bits_slides"] < 0.002
    held = set(plan["ties"]["patients"])
    assert len({"TCGA-12-0773", "TCGA-12-0776"} & held) in (0, 2)
    patient = {slide.slide_id: slide.patient for slide in read_slides(dataset)}
    for name in ("train-40m", "val-in", "guidance"):
        assert not held & {patient[s] for s in read_selection(dataset, name).slide_ids}


def test_the_real_shares_keep_their_quota(real):
    dataset = real[0]
    plan = read_plan(dataset, "train-40m")
    assert plan["selected"]["tiles"] == 40_000_000
    assert plan["largest_share_deviation"] < 0.001
    assert plan["strata_below_quota"] == 0
    assert max(abs(row["quota"] - row["selected"]) for row in plan["strata"]) < 1
    assert sum(row["candidates"] for row in plan["strata"]) < plan["cohort"]["candidates"]
    reasons = {row["reason"]: row["slides"] for row in plan["exclusions"]}
    assert reasons == {"duplicate file": 72, "held out": 1012}


def test_the_real_training_selections_are_prefixes_above_the_reserve(real):
    dataset = real[0]
    large = dict(read_selection(dataset, "train-108m").items())
    slides = {slide.slide_id: slide for slide in read_slides(dataset)}
    sizes = np.array([slides[name].bytes for name in sorted(slides)], np.int64)
    counts = dict(zip(sorted(slides), simulated_candidates(sizes, 125_000_000), strict=True))
    for slide_id, ranks in read_selection(dataset, "train-40m").items():
        reserve = reserve_size(int(counts[slide_id]))
        assert ranks[0] == reserve
        assert ranks[-1] - ranks[0] == len(ranks) - 1
        assert len(ranks) <= len(large[slide_id])
        assert large[slide_id][0] == reserve
        assert large[slide_id][-1] < counts[slide_id]
    for slide_id, ranks in read_selection(dataset, "val-in").items():
        assert ranks[-1] < reserve_size(int(counts[slide_id]))
