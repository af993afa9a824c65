"""Clocks that lie: what supersedes what does not depend on them."""

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.dataset import (
    Dataset,
    Entry,
    Ledger,
    Run,
    read_journal,
    read_selection,
    read_slides,
)
from tests.pipeline.faults import ROOT, contents

DAY = 86_400
Shift = Callable[[int], dict[str, str]]


def write_slide(path: Path, seed: int, mtime: int) -> None:
    """A slide that OpenSlide takes for Aperio's: stained noise with a rim of glass, 0.5 mpp."""
    rng = np.random.default_rng(seed)
    rgb = rng.normal(244, 1.5, (1536, 1536, 3))
    rgb[200:1300, 200:1300] = rng.normal((190, 90, 160), 25, (1100, 1100, 3))
    said = "Aperio Image Library v1\n1x1 [0,0 1x1] (256x256) JPEG/RGB Q=70|AppMag = 20|MPP = 0.5"
    tifffile.imwrite(
        path, rgb.clip(0, 255).astype(np.uint8), tile=(256, 256), compression="jpeg",
        photometric="rgb", description=said, compressionargs={"level": 70}, metadata=None,
    )  # fmt: skip
    os.utime(path, (mtime, mtime))


def call(clock: dict[str, str], *arguments: str) -> str:
    """`python -m pipeline ...` under a clock; returns what it printed."""
    here = {"PYTHONSAFEPATH": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "pipeline", *arguments], cwd=ROOT, capture_output=True, text=True,
        timeout=300, check=False, env=os.environ | here | clock,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def make_dataset(root: Path, clock: dict[str, str]) -> None:
    """Every stage up to the tiles."""
    data = ("--dataset", str(root))
    call(clock, "scan", str(root.parent / "slides"), "--replace", *data, "--workers", "1")
    call(clock, "tissue", *data, "--workers", "1")
    call(clock, "select", "--name", "all", *data)
    call(clock, "tile", *data, "--workers", "1")


def make_replaced(folder: Path, first: dict[str, str], second: dict[str, str]) -> Path:
    """A dataset made under one clock, and again under another of a slide that was replaced.

    The new slide is the older file, as `cp -p` leaves it.
    """
    root, slide = folder / "dataset", folder / "slides" / "s.svs"
    slide.parent.mkdir(parents=True)
    write_slide(slide, seed=1, mtime=1_700_000_000)
    make_dataset(root, first)
    write_slide(slide, seed=2, mtime=1_600_000_000)
    make_dataset(root, second)
    return root


def without_paths(root: Path) -> dict[str, object]:
    """Contents but for the tables that say where the slides are; of selections the ranks."""
    files: dict[str, object] = {
        name: digest
        for name, digest in contents(root).items()
        if not name.startswith(("slides.", "selections/"))
    }
    dataset = Dataset(root)
    ranks = {name: read_selection(dataset, name).items() for name in dataset.selection_names()}
    selected = {name: [(s, r.tolist()) for s, r in rows] for name, rows in ranks.items()}
    return files | {"selected": selected, "slide": read_slides(dataset)[0].sampled_sha256}


@pytest.mark.full
@pytest.mark.parametrize(("first", "second"), [(0, -DAY), (365 * DAY, 0), (DAY, -DAY)])
def test_a_replaced_slide_is_made_again_under_any_clock(
    tmp_path: Path, shift_clock: Shift, right: Path, first: int, second: int
) -> None:
    root = make_replaced(tmp_path / "wrong", shift_clock(first), shift_clock(second))
    wanted = without_paths(right)
    assert without_paths(root) == wanted
    clock, data = shift_clock(365 * DAY), ("--dataset", str(root))
    for stage in ("tissue", "tile"):
        assert "1 already done" in call(clock, stage, *data, "--workers", "1")
    assert "nothing to remove" in call(clock, "prune", *data)
    assert "all as written" in call(clock, "verify", *data)
    status = json.loads(call(clock, "status", "--json", *data))
    assert status["running"] == []
    rows = [(row["stage"], row["done"], row["failed"]) for row in status["stages"]]
    assert rows == [(row["stage"], row["done"], row["failed"]) for row in counts(right)["stages"]]
    assert without_paths(root) == wanted


@pytest.fixture(scope="module")
def right(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same dataset under a right clock."""
    return make_replaced(tmp_path_factory.mktemp("right"), {}, {})


def counts(root: Path) -> dict[str, Any]:
    """What `status --json` says."""
    return json.loads(call({}, "status", "--json", "--dataset", str(root)))


def append(dataset: Dataset, *lines: Entry, stage: str = "tile") -> None:
    """A run that reads, as all do, and writes the lines."""
    Ledger.read(dataset, stage)
    with Run(dataset, stage, {}) as run:
        run.append(lines)


def line_of(slide: str, mark: str, start: int = 0) -> Entry:
    return Entry(slide, "done", mark, scope="224", start=start, stop=start + 16)


CLOCKS = st.integers(0, 4_000_000_000)
RUNS = st.lists(
    st.tuples(
        CLOCKS,
        st.lists(
            st.tuples(st.sampled_from("ab"), st.sampled_from("fgh"), st.sampled_from([0, 16])),
            min_size=1, max_size=3,
        ),
    ),
    max_size=8,
)  # fmt: skip


@given(RUNS)
@settings(max_examples=40, deadline=None)
def test_runs_under_any_clocks_are_in_the_order_in_which_they_ran(
    tmp_path_factory: pytest.TempPathFactory, runs: list[Any]
) -> None:
    dataset = Dataset(tmp_path_factory.mktemp("order"))
    wanted = []
    for clock, lines in runs:
        entries = [line_of(*line) for line in lines]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("time.time_ns", lambda clock=clock: clock * 10**9)
            append(dataset, *entries)
        wanted += entries
    assert read_journal(dataset, "tile") == wanted


@pytest.mark.parametrize("stamp", ["20200101T000000", "20990101T000000"])
def test_a_run_is_later_than_those_of_older_releases(tmp_path: Path, stamp: str) -> None:
    dataset = Dataset(tmp_path)
    append(dataset, line_of("a", "old"))
    folder = dataset.status_dir("tile")
    (journal,) = folder.glob("*.jsonl")
    journal.rename(folder / f"{stamp}-000000000-node-1-abcdef.jsonl")
    (folder / "zzz.jsonl").write_bytes(b"")
    for path in folder.glob("*.log"):
        path.unlink()
    append(dataset, line_of("a", "new"))
    append(dataset, line_of("a", "newest"))
    assert [one.fingerprint for one in read_journal(dataset, "tile")] == ["old", "new", "newest"]
    # An older release sorts by name.
    assert [path.read_text().count('"new') for path in sorted(folder.glob("*.jsonl"))][:3] == [
        0, 1, 1,
    ]  # fmt: skip


def test_a_run_is_later_than_what_was_there_when_it_had_read(tmp_path: Path) -> None:
    dataset = Dataset(tmp_path)
    early = Run(dataset, "tile", {})
    append(dataset, line_of("a", "theirs"))
    append(dataset, line_of("a", "theirs"))
    with early:
        assert [one.fingerprint for one in Ledger.read(dataset, "tile").lines] == ["theirs"] * 2
        early.append([line_of("a", "mine")])
    assert read_journal(dataset, "tile")[-1].fingerprint == "mine"


def test_of_two_at_once_the_one_that_began_later_counts(tmp_path: Path) -> None:
    """Both have read, and neither knows of the other's lines."""
    dataset = Dataset(tmp_path)
    with Run(dataset, "tile", {}) as first, Run(dataset, "tile", {}) as second:
        assert first.run_id
        second.append([line_of("a", "second")])
        first.append([line_of("a", "first")])
    assert [one.fingerprint for one in read_journal(dataset, "tile")] == ["first", "second"]


def test_what_is_decided_after_reading_again_counts_over_what_was_read(tmp_path: Path) -> None:
    dataset = Dataset(tmp_path)
    with Run(dataset, "scan", {}) as run:
        run.append([line_of("a", "one")])
        run.take_precedence()
        assert len(list(dataset.status_dir("scan").glob("*.jsonl"))) == 1, "there is no other run"
        append(dataset, line_of("a", "two"), stage="scan")
        run.take_precedence()
        run.append([line_of("a", "three")])
        run.append([line_of("a", "four")])
    marks = [one.fingerprint for one in read_journal(dataset, "scan")]
    assert marks == ["one", "two", "three", "four"]


@pytest.mark.parametrize(
    "name",
    ["r999999999999-forged", "r-1", "r1e30-x", "r" + "9" * 200, "r00000000000५-x", "rTrue-", "~"],
)
def test_a_forged_name_breaks_nothing(tmp_path: Path, name: str) -> None:
    dataset = Dataset(tmp_path)
    append(dataset, line_of("a", "one"))
    folder = dataset.status_dir("tile")
    (journal,) = folder.glob("*.jsonl")
    (folder / f"{name}.jsonl").write_bytes(journal.read_bytes())
    append(dataset, line_of("b", "two"))
    append(dataset, line_of("b", "three"))
    lines = Ledger.read(dataset, "tile")["224"]
    assert [lines.latest(slide).fingerprint for slide in "ab"] == ["one", "three"]  # type: ignore[union-attr]


def test_the_number_of_a_claim_costs_one_listing(tmp_path: Path) -> None:
    """Not a read of all journals: a cohort's are hundreds of megabytes."""
    dataset = Dataset(tmp_path)
    folder = dataset.status_dir("tile")
    folder.mkdir(parents=True)
    names = [f"r{number:012d}-{random.random()}.jsonl" for number in range(1000)]
    for name in names:
        os.mkfifo(folder / name)
    assert Run(dataset, "tile", {}).run_id.startswith("r000000001000-")
