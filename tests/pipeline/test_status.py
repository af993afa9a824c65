"""`pipeline status` says what the files say."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.__main__ import main
from pipeline.dataset import Dataset, Entry, FileRecord, Run
from pipeline.run.summary import Summary
from pipeline.upkeep.status import count_covered, read_status

SPANS = st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50)), max_size=6)


@given(st.sets(st.integers(0, 60)), SPANS)
def test_covered_ranks_are_those_in_any_span(ranks: set[int], spans: list[tuple[int, int]]) -> None:
    covered = {rank for rank in ranks if any(start <= rank < stop for start, stop in spans)}
    ascending = np.array(sorted(ranks), np.int32)
    assert count_covered(ascending, [(a, b) for a, b in spans if a <= b]) == len(covered)


def test_a_tiled_slide_in_numbers(tiled: Dataset, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", "--dataset", str(tiled.root), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    stages = {(one["stage"], one["scope"]): one for one in said["stages"]}
    assert stages["scan", ""]["done"] == 1
    tar = next(tiled.tiles_dir(224).glob("*.tar"))
    expected = tar.stat().st_size + tar.with_suffix(".idx").stat().st_size
    assert stages["tile", "224"]["bytes"] == expected
    assert stages["tile", "224"]["tiles_per_s"] > 0
    (row,) = said["selections"]
    assert (row["selection"], row["tiles"], row["stored"]) == ("train", 48, 48)


def test_failures_pruned_ranges_and_features_by_selection(own_tiled: Dataset) -> None:
    slide, scope = "CMU-1-Small-Region", "224/h0-mini+jpeg70/cls"

    def line(start: int, stop: int, outcome: str = "done", seconds: float = 4.0) -> Entry:
        record = FileRecord(f"features/{scope}/{slide}.{start}-{stop}.parquet", 100, "0")
        return Entry(slide, outcome, "f", scope=scope, start=start, stop=stop,  # type: ignore[arg-type]
                     files=(record,) if outcome == "done" else (), seconds=seconds)  # fmt: skip

    with Run(own_tiled, "cache", {}) as run:
        run.append([line(0, 16), line(16, 32), line(32, 48, "pruned", 0)])
        run.append([Entry("encoder.json", "done", "f", scope=f"{scope}/encoder.json")])
        run.append([Entry("other", "failed", "f", "disk full", scope=scope)])
    status = read_status(own_tiled)
    cached = next(one for one in status.stages if one.stage == "cache")
    assert (cached.scope, cached.done, cached.failed, cached.bytes) == (scope, 1, 1, 200)
    row = next(one for one in status.selections if one.stage == "cache")
    assert (row.tiles, row.stored) == (48, 31), "rank 0 is the reserve"
    assert row.seconds_left == pytest.approx((48 - 31) / 4)


def _tile_rows(dataset: Dataset) -> list[tuple[str, int, int]]:
    stages = read_status(dataset).stages
    return [(one.scope, one.done, one.failed) for one in stages if one.stage == "tile"]


def test_a_slide_that_failed_and_then_succeeded_is_done(
    own_tiled: Dataset, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in own_tiled.tiles_dir(224).iterdir():
        path.unlink()
    line = ["tile", "--dataset", str(own_tiled.root), "--workers", "1"]
    assert main([*line, "--stage-in", "false {dest}", "--stage-in-retries", "0"]) == 1
    assert _tile_rows(own_tiled) == [("224", 0, 1)]
    assert [one.stage for one in read_status(own_tiled).failures] == ["tile"]
    assert main(line) == 0
    assert _tile_rows(own_tiled) == [("224", 1, 0)]
    assert read_status(own_tiled).failures == []
    capsys.readouterr()
    assert main(line) == 0
    assert "1 already done" in capsys.readouterr().out


def test_failures_that_older_releases_wrote_without_a_scope_end_too(own_tiled: Dataset) -> None:
    scope = "224/h0-mini/cls"
    for stage, done in (("cache", scope), ("tile", "224")):
        with Run(own_tiled, stage, {}) as run:
            run.append([Entry("one", "failed", "f", "killed its worker 3 times")])
            run.append([Entry("two", "failed", "f", "killed its worker 3 times")])
        with Run(own_tiled, stage, {}) as run:
            run.append([Entry("one", "done", "f", scope=done, start=0, stop=16)])
    assert {(one.stage, one.scope, one.slide) for one in read_status(own_tiled).failures} == {
        ("cache", "", "two"), ("tile", "", "two"),
    }  # fmt: skip
    with Run(own_tiled, "cache", {}) as run:
        run.append([Entry("two", "done", "f", scope=scope, start=0, stop=16)])
    rows = [one for one in read_status(own_tiled).stages if one.stage == "cache"]
    assert [(one.scope, one.done, one.failed) for one in rows] == [(scope, 2, 0)]


def test_a_slide_that_fails_in_two_scopes_is_one_slide(
    own_tiled: Dataset, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [
        Entry("s", "failed", "f", "disk full", scope=f"224/h0-mini/{kind}")
        for kind in ("cls", "tokens-float16")
    ]
    with Run(own_tiled, "cache", {}) as run:
        run.append(lines)
    assert main(["status", "--dataset", str(own_tiled.root)]) == 0
    assert "failed in cache: s: disk full" in capsys.readouterr().out
    summary = Summary("cache")
    for line in lines:
        summary.add_entry(line)
    assert summary.failed == [("s", "disk full")]


def test_an_empty_dataset_says_what_to_do(
    tmp_path: Path, tiled: Dataset, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "dataset.json").write_bytes(tiled.identity_file.read_bytes())
    assert main(["status", "--dataset", str(tmp_path)]) == 0
    assert "pipeline scan" in capsys.readouterr().out
