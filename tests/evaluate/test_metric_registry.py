"""A metric is one module: written once, it appears in results, report, warnings and tables."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from evaluate_data import make_synthetic
from protocol_data import record_of

import evaluate.metrics
from common.errors import UserError
from common.record import Record
from evaluate.compare.measure import measure
from evaluate.compare.results import read_results, write_results
from evaluate.compare.sides import FeatureSide
from evaluate.compare.warnings import metric_warnings
from evaluate.generate.condition_source import SelectionConditions
from evaluate.metrics.metric import FeaturePair, MetricSettings
from evaluate.metrics.registry import METRICS, compute_metrics, discover_metrics
from evaluate.protocols.config import load_protocol
from evaluate.protocols.tables import build_tables
from evaluate.report.command import write_report
from evaluate.report.numbers import metric_rows
from pipeline.dataset import Dataset
from pipeline.dataset.features.record import DECIDING, MADE, NETWORK, FeatureRecord

_TOY = '''
"""The distance of the two sets' means."""

import numpy as np

from evaluate.metrics.metric import (
    Metric, MetricPlot, MetricRow, TableQuantity, WarningKind, value_at,
)

FAR = WarningKind("far", "the means are {distance:.1f} apart")


def compute(pair, settings):
    distance = float(np.linalg.norm(pair.real.mean(0) - pair.generated.mean(0)))
    warnings = [FAR.format_sentence(distance=distance)] if distance > 1 else []
    return {"value": distance, "n_generated": len(pair.generated), "warnings": warnings}


def rows(result, halves):
    value, floor = (f"{one.number('value'):.3f}" for one in (result, halves))
    meaning = "How far the centres of the two clouds of features are apart."
    return [MetricRow("Distance of means", "lower", value, floor, "halves", meaning)]


def draw(axes, result):
    axes.bar([0], [result.number("value")])


METRIC = Metric(
    name="mean_distance",
    title="Distance of means",
    place=15,
    compute=compute,
    compute_floor=compute,
    rows=rows,
    quantities=(TableQuantity("means", "Distance of means", "lower", value_at("value")),),
    warnings=(FAR,),
    summary=lambda result: f"means {result.number('value'):.3f}",
    plot=MetricPlot(draw, "Bar of the distance of means", "One bar."),
)
'''


@pytest.fixture
def toy_metric(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module of one more metric, as if it were in the package; nothing else names it."""
    folder = tmp_path / "more_metrics"
    folder.mkdir()
    (folder / "mean_distance.py").write_text(_TOY)
    monkeypatch.setattr(evaluate.metrics, "__path__", [*evaluate.metrics.__path__, str(folder)])
    found = discover_metrics()
    assert list(found)[:3] == ["frechet_distance", "mean_distance", "precision_recall"]
    for name, metric in found.items():
        monkeypatch.setitem(METRICS, name, metric)
    return "mean_distance"


def test_a_new_module_is_in_results_report_warnings_and_tables(
    toy_metric: str, evaluate_real: Callable[..., Dataset], tmp_path: Path
) -> None:
    real = evaluate_real()
    guidance = SelectionConditions.open_selection(real, "train", "h0-mini")
    synthetic = make_synthetic(tmp_path / "syn", guidance, shift=2.0)
    first = FeatureSide.open_selection(real.root, "train", "h0-mini", like=None)
    second = FeatureSide.open_selection(synthetic.root, "generated", "h0-mini", like=first)
    results = measure(first, second, settings=MetricSettings(draws=0, kid_subsets=2))
    write_results(tmp_path / "results.json", results)

    record = read_results(tmp_path / "results.json")
    distance = record.part("metrics").part(toy_metric).number("value")
    floor = record.part("references").part("real_vs_real").part(toy_metric).number("value")
    assert distance > 1 > floor > 0
    codes = {one.text("code"): one.text("message") for one in record.parts("warnings")}
    assert codes[f"metric_{toy_metric}"] == f"Distance of means: the means are {distance:.1f} apart"
    (row,) = (row for row in metric_rows(record) if row.name == "Distance of means")
    assert (row.value, row.reference) == (f"{distance:.3f}", f"{floor:.3f}")

    write_report(
        results_file=tmp_path / "results.json", run_dir=None, real=real.root,
        generated=synthetic.root, out=tmp_path / "report.html",
    )  # fmt: skip
    html = (tmp_path / "report.html").read_text()
    assert html.count("Bar of the distance of means") == 1
    assert f"{distance:.3f}" in html


def test_a_new_module_is_in_a_protocols_rows_and_tables(toy_metric: str) -> None:
    row = f"rows=[{{label: Model, generated: val-in, metrics: [{toy_metric}]}}]"
    protocol = load_protocol("table2", None, [row, "tables=[means]", "encoders=[uni2-h]"])
    cell = {"label": "Model", "kind": "model", "control": "", "encoder": "uni2-h", "point": {},
            "column": "val-in", "note": "", "basis": {"n_generated": 4},
            "results": {toy_metric: {"value": 1.5, "n_generated": 4}}}  # fmt: skip
    (table,) = build_tables(protocol, [cell])
    assert (table["title"], table["better"]) == ("Distance of means", "lower")
    numbers = table["rows"][0]["cells"]["uni2-h/val-in"]
    assert numbers == {"value": 1.5, "spread": None, "n": {"n_generated": 4}}


def test_metrics_are_found_in_one_order_and_unknown_names_are_refused() -> None:
    assert list(discover_metrics()) == [
        "frechet_distance", "precision_recall", "feature_likelihood", "kernel_distance",
        "sliced_distance", "cosine_similarity",
    ]  # fmt: skip
    rows = [[0.0], [1.0]]
    with pytest.raises(UserError, match=r"'fid' is not known; expected one of frechet_distance, "):
        compute_metrics(FeaturePair(rows, rows), ["fid"], MetricSettings())


def test_every_sentence_that_a_metric_says_has_a_kind_with_a_code() -> None:
    """results.json keeps sentences alone: a sentence without a kind could not be recognised."""
    for metric in METRICS.values():
        codes = [kind.code for kind in metric.warnings]
        assert len(codes) == len(set(codes))
        for kind in metric.warnings:
            assert [
                other for other in metric.warnings if other.matches_sentence(kind.template)
            ] == [kind]
    (singular,) = (k for k in METRICS["frechet_distance"].warnings if k.covered_by)
    said = {
        "frechet_distance": {"warnings": [singular.format_sentence(rows=3, side="real", dim=9)]}
    }
    assert len(metric_warnings([("", said)], [])) == 1
    known = [{"code": singular.covered_by, "message": ""}]
    assert metric_warnings([("", said)], known) == []


def test_what_decides_whether_features_are_alike() -> None:
    """One record answers for measuring, protocols, guiding and caching."""
    plain = FeatureRecord.parse({**record_of("uni2-h"), "hub_id": "a", "weights": "hub"})
    assert plain.differs_from(FeatureRecord.parse({**record_of("uni2-h"), "hub_id": "b"})) == []
    for field, value in (
        ("weights_sha256", "f" * 64), ("compute_dtype", "bfloat16"), ("mean", [0.1] * 3),
        ("view", "jpeg70"), ("tile_px", 512),
    ):  # fmt: skip
        other = FeatureRecord.parse({**record_of("uni2-h"), field: value})
        (difference,) = plain.differs_from(other)
        assert (difference.field, difference.second) == (field, value)
        assert bool(plain.differs_from(other, MADE)) == (field in MADE)
        assert bool(plain.differs_from(other, NETWORK)) == (field in NETWORK)
    assert set(NETWORK) < set(MADE) < set(DECIDING)
    # A model of other software may not know which network it was trained on.
    assert plain.differs_from(FeatureRecord.parse({"encoder": "", "weights_sha256": None})) == []


def test_results_of_another_shape_are_one_line_that_names_the_key(tmp_path: Path) -> None:
    record = Record(json.loads('{"metrics": {"kid": {"value": "many"}}}'), "results.json")
    with pytest.raises(UserError, match=r"results.json.metrics.kid.value: expected a number, f"):
        record.part("metrics").part("kid").number("value")
    with pytest.raises(UserError, match=r"metrics.fld.value: expected a number, found nothing"):
        record.part("metrics").part("fld").number("value")
