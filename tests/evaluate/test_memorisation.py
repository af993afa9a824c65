"""The search for copies: exact neighbours in blocks, the tests on known cases, the panel."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from evaluate_data import random_features
from protocol_data import make_all, make_model, make_world, toy
from scipy.stats import mannwhitneyu
from test_report import Page

from common.errors import UserError
from common.record import Record
from evaluate.protocols.nearest import (
    copying_test,
    distance_ratios,
    mann_whitney_z,
    nearest_in_blocks,
)
from evaluate.protocols.run import run_protocol
from evaluate.report.protocol_files import render_protocol
from evaluate.report.protocol_text import tables_as_latex


def naive(queries: np.ndarray, base: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    squares = ((queries[:, None].astype(float) - base[None]) ** 2).sum(axis=2)
    order = np.argsort(squares, axis=1, kind="stable")[:, :k]
    return order, np.sqrt(np.take_along_axis(squares, order, axis=1))


def test_neighbours_over_blocks_are_those_of_a_double_loop() -> None:
    queries, base = random_features("q", 70), random_features("b", 301)
    base[200] = base[3]  # a duplicate: the lower index wins
    queries[0] = base[200]
    blocks = [base[:1], base[1:1], base[1:120], base[120:]]
    found = nearest_in_blocks(queries, iter(blocks))
    order, distances = naive(queries, base, 2)
    assert (found.indices == order).all()
    np.testing.assert_allclose(found.distances, distances, rtol=1e-12)
    assert found.indices[0].tolist() == [3, 200]
    assert distance_ratios(found)[0] == 0
    with pytest.raises(UserError, match="1 training tiles"):
        nearest_in_blocks(queries, [base[:1]])


def test_z_is_scipys() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(0, 1, 50), rng.normal(0.5, 1, 80)
    expected = mannwhitneyu(a, b, use_continuity=False, method="asymptotic")
    assert 2 * _tail(abs(mann_whitney_z(a, b))) == pytest.approx(expected.pvalue, rel=1e-9)
    assert mann_whitney_z(a, b) < 0 < mann_whitney_z(b, a)


def _tail(z: float) -> float:
    from scipy.stats import norm

    return float(norm.sf(z))


def test_copies_are_told_from_new_tiles() -> None:
    train, held_out = random_features("t", 400), random_features("h", 200)
    copies = train[:200] + 0.01 * random_features("noise", 200)
    fresh = random_features("fresh", 200)
    distances = {
        name: nearest_in_blocks(rows, [train]).distances[:, 0]
        for name, rows in (("copies", copies), ("fresh", fresh), ("held", held_out))
    }
    held = (held_out, distances["held"])
    copied = copying_test(train, (copies, distances["copies"]), held)
    new = copying_test(train, (fresh, distances["fresh"]), held)
    assert copied is not None
    assert new is not None
    assert copied["value"] < -5 < -3 < new["value"] < 3
    assert copying_test(train, (copies[:5], distances["copies"][:5]), held) is None


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root: Path = tmp_path_factory.mktemp("world")
    make_world(root, ("uni2-h",))
    make_model(root)
    protocol = toy(root, "memorisation", "encoders=[uni2-h]")
    make_all(protocol)
    return json.loads(json.dumps(run_protocol(protocol)))


def test_images_near_their_training_tiles_stand_out(results: dict[str, Any]) -> None:
    # The toy's features of an image are those of the training tile that guided it, nearly.
    (found,) = results["memorisation"]
    assert found["train"]["rows"] == 128
    assert found["sets"]["generated"]["ratio"]["median"] < 0.7
    assert found["sets"]["val_in"]["ratio"]["median"] > 0.8
    assert found["suspicious_share"]["val_out"] > 0.5
    assert found["authenticity"] < 0.1
    assert found["copying_test"]["val_out"]["value"] < -3
    generated, held = found["sets"]["generated"], found["sets"]["val_out"]
    assert generated["score"]["median"] > held["score"]["median"]
    top = found["top"]["ratio"]
    assert len(top) == 6
    assert [one["ratio"] for one in top] == sorted(one["ratio"] for one in top)
    assert all(one["nearest"] == one["guide"] for one in top)
    for one in top:
        assert one["same_slide"][0] == one["nearest"][0]
        assert one["same_slide"][1] != one["nearest"][1]


def test_the_set_that_gaps_are_tested_on_has_no_gap_of_its_own(results: dict[str, Any]) -> None:
    (found,) = results["memorisation"]
    assert found["sets"]["val_out"]["gap"] is None
    assert found["sets"]["generated"]["gap"] < found["sets"]["val_in"]["gap"]
    lines = render_protocol(results).splitlines()
    line = next(x for x in lines if 'scope="row">val-out</th>' in x and "</td></tr>" in x)
    assert line.endswith('<td class="number">–</td></tr>')


def test_the_panel_shows_the_tiles_side_by_side(results: dict[str, Any]) -> None:
    page = Page(render_protocol(results))
    alts = page.attributes("alt")
    assert sum(alt.startswith("nearest training tile:") for alt in alts) == 12
    assert any("Histogram of distance ratios" in alt for alt in alts)


def test_the_numbers_stand_in_tables(results: dict[str, Any]) -> None:
    tables = {table["name"]: table for table in results["tables"]}
    rows = {row["label"]: row["cells"]["uni2-h/train"] for row in tables["ratio_median"]["rows"]}
    assert list(rows) == ["from-guidance", "val-in", "val-out"]
    assert rows["from-guidance"]["n"] == {"n": 64, "training": 128}
    (found,) = results["memorisation"]
    against = {row["label"]: row["cells"]["uni2-h/train"] for row in tables["copying_test"]["rows"]}
    value = against["from-guidance against val-out"]["value"]
    assert value == found["copying_test"]["val_out"]["value"]
    assert "C\\_T" in tables_as_latex(Record(results))
