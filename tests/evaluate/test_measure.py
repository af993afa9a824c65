import hashlib
import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from evaluate_data import PX, RECORD, make_synthetic, random_features, write_features
from PIL import Image

from common.errors import UserError
from common.record import Record
from evaluate.__main__ import main
from evaluate.compare.measure import measure, real_halves
from evaluate.compare.results import read_results, write_results
from evaluate.compare.sides import FeatureSide
from evaluate.compare.warnings import (
    blockiness_warnings,
    equality_warnings,
    hold_out_warnings,
    metric_warnings,
    seen_cohort_warnings,
)
from evaluate.generate.condition_source import SelectionConditions, Unconditional
from evaluate.metrics import (
    cosine_similarity,
    feature_likelihood_divergence,
    frechet_distance,
    likelihood,
    manifold,
    precision_recall,
)
from evaluate.metrics.blockiness import measure_blockiness
from evaluate.metrics.metric import MetricSettings
from evaluate.metrics.registry import METRICS
from evaluate.report.command import write_report
from evaluate.report.images import read_tile_pairs
from evaluate.report.page import all_warnings
from pipeline.dataset import (
    Dataset,
    Selection,
    Slide,
    TileStore,
    claim_identity,
    make_selection,
    new_run_id,
    read_candidates,
    read_selection,
    read_slides,
    write_selection,
    write_slides,
)
from pipeline.dataset.features import FeatureStore


@pytest.fixture
def real(evaluate_real: Callable[..., Dataset]) -> Dataset:
    return evaluate_real()


@pytest.fixture
def synthetic(real: Dataset, tmp_path: Path) -> Dataset:
    return make_synthetic(
        tmp_path / "syn", SelectionConditions.open_selection(real, "train", "h0-mini")
    )


@pytest.fixture
def trained(evaluate_real: Callable[..., Dataset]) -> FeatureSide:
    """150 training tiles, none of which is among the real ones."""
    dataset = evaluate_real({"T-1": 151}, name="trained")
    return FeatureSide.open_selection(dataset.root, "train", "h0-mini", like=None)


def sides(real: Dataset, synthetic: Dataset) -> tuple[FeatureSide, FeatureSide]:
    first = FeatureSide.open_selection(real.root, "train", "h0-mini", like=None)
    return first, FeatureSide.open_selection(synthetic.root, "generated", "h0-mini", like=first)


def test_the_numbers_are_those_of_the_metrics_on_the_cached_features(
    real: Dataset, synthetic: Dataset
) -> None:
    first, second = sides(real, synthetic)
    results = measure(first, second)
    expected = np.concatenate([random_features("A.b-1", 40)[1:], random_features("C-2", 24)[1:]])
    assert (first.features == expected).all()
    metrics = results["metrics"]
    distance = frechet_distance(expected, second.features)
    assert metrics["frechet_distance"]["value"] == distance.value
    assert metrics["frechet_distance"]["noise_floor"] == distance.noise_floor
    assert (
        metrics["precision_recall"]["recall"] == precision_recall(expected, second.features).recall
    )
    assert results["real"]["rows"] == results["generated"]["rows"] == 62


def test_the_cosine_pairs_each_image_with_its_own_source(real: Dataset, synthetic: Dataset) -> None:
    first, second = sides(real, synthetic)
    cosine = measure(first, second)["metrics"]["cosine_similarity"]
    # Generated features are the source's plus a tenth of noise: any other pairing would show.
    assert cosine["mean"] > 0.98 > 0.9 > cosine["null_mean"]
    assert cosine["retrieval_at_1"] == 1.0
    assert sum(cosine["histogram"]["counts"]) == 62
    guidance = SelectionConditions.open_selection(real, "train", "h0-mini")
    sources = guidance.read_features(np.arange(62))
    assert cosine["mean"] == pytest.approx(cosine_similarity(sources, second.features).mean)


def test_source_tiles_may_lie_in_another_dataset(
    evaluate_real: Callable[..., Dataset], real: Dataset, synthetic: Dataset
) -> None:
    other = evaluate_real({"Z": 60}, name="other")
    first, second = sides(other, synthetic)
    alone = measure(first, second)
    assert alone["metrics"]["cosine_similarity"] is None
    assert "no_cosine" in {one["code"] for one in alone["warnings"]}
    assert measure(first, second, real)["metrics"]["cosine_similarity"]["mean"] > 0.98


def test_tiles_of_another_dataset_are_not_taken_for_the_sources(
    evaluate_real: Callable[..., Dataset], real: Dataset, synthetic: Dataset
) -> None:
    other = evaluate_real(name="other")  # the same slides and ranks
    assert measure(*sides(other, synthetic))["metrics"]["cosine_similarity"] is not None
    claim_identity(other, {"seed": 1}, stage="scan", versions={})
    results = measure(*sides(other, synthetic))
    assert results["metrics"]["cosine_similarity"] is None
    (reason,) = (one["message"] for one in results["warnings"] if one["code"] == "no_cosine")
    assert "guided by tiles of another dataset" in reason
    pairs = read_tile_pairs(synthetic, sides(real, synthetic)[1].selection, other, 3)
    assert [pair.real for pair in pairs] == [None] * 3
    assert "of another dataset" in pairs[0].real_name


def test_unconditional_images_have_no_cosine(real: Dataset, tmp_path: Path) -> None:
    synthetic = make_synthetic(tmp_path / "syn", Unconditional(32))
    results = measure(*sides(real, synthetic))
    assert results["metrics"]["cosine_similarity"] is None
    assert results["sampler"]["guidance"] == "none"


def test_missing_features_name_the_very_command(real: Dataset, synthetic: Dataset) -> None:
    (synthetic.features_dir(PX, "h0-mini") / "cls" / "encoder.json").unlink()
    with pytest.raises(UserError) as error:
        sides(real, synthetic)
    assert (
        f"`python -m pipeline cache --dataset {synthetic.root} --selection generated "
        "--encoder h0-mini --weights random:0 --tokens none`" in str(error.value)
    )


@pytest.mark.parametrize(
    ("key", "value"),
    [("weights_sha256", "b" * 64), ("view", "jpeg70"), ("compute_dtype", "bfloat16"), ("dim", 768)],
)
def test_features_made_differently_are_refused(
    real: Dataset, synthetic: Dataset, key: str, value: object
) -> None:
    write_features(synthetic, {}, {**RECORD, key: value})
    with pytest.raises(UserError, match=f"{key} .*{value!r}"):
        sides(real, synthetic)


def test_warnings_name_random_weights_and_small_samples(real: Dataset, synthetic: Dataset) -> None:
    codes = {one["code"] for one in measure(*sides(real, synthetic))["warnings"]}
    assert codes == {
        "random_encoder_weights", "few_real_tiles", "few_generated_tiles", "metric_kernel_distance"
    }  # fmt: skip


def test_what_a_metric_says_against_itself_reaches_the_warnings(
    evaluate_real: Callable[..., Dataset], trained: FeatureSide, tmp_path: Path
) -> None:
    real = evaluate_real()
    synthetic = make_synthetic(
        tmp_path / "syn", SelectionConditions.open_selection(real, "train", "h0-mini")
    )
    first, second = sides(real, synthetic)
    first.features[:, 4] = 0.5
    settings = MetricSettings(draws=0, fld_seeds=(0,))
    results = measure(first, second, train=trained, settings=settings)
    found = {(one["code"], one["message"]) for one in results["warnings"]}
    for code, text in (
        ("frechet_distance", "Fréchet distance: 1 of 12 real feature dimensions are constant"),
        ("kernel_distance", "Kernel distance (KID): subsets of 62 rows in place of 1000, as no "
         "more are there"),
        ("feature_likelihood", "Feature likelihood divergence: 1 feature dimensions are constant "
         "in the test set and were dropped"),
    ):  # fmt: skip
        assert any(one == f"metric_{code}" and said.startswith(text) for one, said in found)


def test_warnings_name_a_model_that_means_nothing(real: Dataset, synthetic: Dataset) -> None:
    note = "untested on the gated weights"
    says = {"model_encoder_random": True, "generator_note": note}
    claim_identity(synthetic, says, stage="generate", versions={})
    results = measure(*sides(real, synthetic), settings=MetricSettings(draws=0))
    found = {one["code"]: one["message"] for one in results["warnings"]}
    assert "encoder with random weights" in found["random_training_encoder"]
    assert found["untested"] == note
    (shown,) = (
        one
        for one in all_warnings(Record(results), None)
        if one["code"] == "random_training_encoder"
    )
    assert shown["title"] == "This model means nothing"


def test_tiles_that_are_on_both_sides_are_counted(real: Dataset, synthetic: Dataset) -> None:
    first, second = sides(real, synthetic)
    assert first.count_equal(second) == 0
    # The generated tiles as real ones: all of them with features of another rounding, then a part.
    rounded = replace(second, features=second.features * np.float32(1 + 1e-6))
    results = measure(rounded, second, settings=MetricSettings(draws=0))
    assert results["equal_tiles"] == {"real": 62}
    found = {one["code"]: one["message"] for one in results["warnings"]}
    assert "all 62 generated tiles are real tiles: the same set" in found["equal_real_tiles"]
    slide_id = second.selection.slide_ids[0]
    some = make_selection("part", {slide_id: np.arange(3, 20, dtype=np.int32)}, {})
    write_selection(synthetic, new_run_id(), some)
    part = FeatureSide.open_selection(synthetic.root, "part", "h0-mini", like=first)
    (warning,) = equality_warnings({"real": part.count_equal(second)}, second.selection.rows)
    assert warning["message"] == "17 of 62 generated tiles are equal to real tiles"


def test_patients_on_both_sides_of_a_hold_out_are_warned_of(real: Dataset) -> None:
    honours = {"ties": {"role": "train", "honours": {"val-out": "hash"}}}
    held = {"ties": {"role": "val-out", "patients": ["P"]}}
    for name, slide, plan in (("mine", "A.b-1", honours), ("val-out", "C-2", held)):
        rows = {slide: np.arange(1, 20, dtype=np.int32)}
        write_selection(real, new_run_id(), make_selection(name, rows, plan))
    side = FeatureSide.open_selection(real.root, "val-out", "h0-mini", like=None)
    for patient, count in (("Q", 0), ("p ", 1)):
        slides = [Slide("A.b-1", path="", patient=patient), Slide("C-2", path="", patient="P")]
        write_slides(real, new_run_id(), slides)
        found = hold_out_warnings([side])
        assert [one["code"] for one in found] == ["hold_out_broken"] * count
    assert "selection 'mine' has slides of patients that 'val-out' holds" in found[0]["message"]


def test_held_out_slides_of_tcga_are_not_unseen_by_encoders_that_were_trained_on_it(
    evaluate_real: Callable[..., Dataset],
) -> None:
    def said(slide: str, plan: dict[str, Any], encoder: str) -> str:
        dataset = evaluate_real({slide: 8}, name=f"{slide}-{encoder}-{len(plan)}")
        selection = make_selection("val-out", {slide: np.arange(8, dtype=np.int32)}, plan)
        write_selection(dataset, new_run_id(), selection)
        held_out = [(dataset, read_selection(dataset, "val-out"))]
        warnings = seen_cohort_warnings({encoder: "guides the images"}, held_out)
        return " ".join(one["message"] for one in warnings)

    barcode, plan = "TCGA-02-0001-01Z-00-DX1", {"ties": {"patients": ["TCGA-02-0001"]}}
    assert "val-out holds out slides of TCGA" in said(barcode, plan, "h0-mini")
    assert "h0-mini, which guides the images" in said(barcode, plan, "h0-mini")
    assert said(barcode, plan, "uni2-h") == ""  # was not trained on TCGA
    assert said("case-1", plan, "h0-mini") == ""  # no slide of TCGA
    assert said(barcode, {}, "h0-mini") == ""  # holds nobody out


def test_fewer_tiles_than_dimensions_is_a_warning(
    evaluate_real: Callable[..., Dataset], tmp_path: Path
) -> None:
    real = evaluate_real({"A": 12}, name="small")
    synthetic = make_synthetic(
        tmp_path / "syn", SelectionConditions.open_selection(real, "train", "h0-mini")
    )
    codes = {one["code"] for one in measure(*sides(real, synthetic))["warnings"]}
    assert "fewer_tiles_than_dimensions" in codes


def test_halves_of_the_real_tiles_are_disjoint_and_close(real: Dataset) -> None:
    side = FeatureSide.open_selection(real.root, "train", "h0-mini", like=None)
    halves = real_halves(side)
    assert halves is not None
    assert halves["frechet_distance"]["n_real"] == halves["frechet_distance"]["n_generated"] == 31
    assert 0 < halves["frechet_distance"]["value"] < 3 * halves["frechet_distance"]["noise_floor"]
    assert halves["precision_recall"]["precision"] < 1.0  # equal halves would give 1


def test_the_floor_is_taken_by_the_settings_of_the_numbers_above_it(
    real: Dataset, synthetic: Dataset
) -> None:
    results = measure(*sides(real, synthetic), settings=MetricSettings(draws=0, k=5))
    assert results["metrics"]["precision_recall"]["k"] == 5
    assert results["references"]["real_vs_real"]["precision_recall"]["k"] == 5
    side = FeatureSide.open_selection(real.root, "train", "h0-mini", like=None)
    assert real_halves(side, MetricSettings(k=31)) is None  # a smaller k would be another number


def test_a_selection_too_small_to_measure_is_refused(real: Dataset, synthetic: Dataset) -> None:
    few: Selection = make_selection("few", {"C-2": np.arange(3, dtype=np.int32)}, {})
    write_selection(real, new_run_id(), few)
    first = FeatureSide.open_selection(real.root, "few", "h0-mini", like=None)
    second = FeatureSide.open_selection(synthetic.root, "generated", "h0-mini", like=first)
    with pytest.raises(UserError, match="few has 3 tiles, at least 8"):
        measure(first, second)


def test_results_survive_the_file_and_foreign_files_are_refused(
    real: Dataset, synthetic: Dataset, tmp_path: Path
) -> None:
    path = tmp_path / "deep" / "results.json"
    results = measure(*sides(real, synthetic))
    write_results(path, results)
    assert dict(read_results(path)) == json.loads(json.dumps(results))
    assert [p.name for p in path.parent.iterdir()] == ["results.json"]
    path.write_text('{"schema_version": 99}')
    with pytest.raises(UserError, match="schema_version 99"):
        read_results(path)
    path.write_text("[")
    with pytest.raises(UserError, match="not a results file"):
        read_results(path)
    with pytest.raises(UserError, match="measure"):
        read_results(tmp_path / "absent.json")


def test_the_battery_carries_n_seeds_and_widths(
    real: Dataset, synthetic: Dataset, trained: FeatureSide
) -> None:
    first, second = sides(real, synthetic)
    results = measure(
        first, second, train=trained, settings=MetricSettings(draws=4, fld_seeds=(0, 1))
    )
    metrics = results["metrics"]
    frechet = metrics["frechet_distance"]
    widths = frechet["widths"]
    assert set(widths) == {"subsample", "slide", "patient"}
    assert widths["subsample"]["size"] == 31
    assert widths["subsample"]["corrected_std"] == pytest.approx(
        widths["subsample"]["std"] * np.sqrt(2)
    )
    assert (widths["slide"]["n_clusters"], widths["slide"]["draws"]) == (2, 4)
    assert widths["slide"]["low"] <= frechet["value"] <= widths["slide"]["high"]
    assert metrics["feature_likelihood"]["seeds"] == [0, 1]
    assert metrics["kernel_distance"]["subset_size"] == 62
    for name in ("frechet_distance", "precision_recall", "kernel_distance"):
        assert metrics[name]["n_real"] == metrics[name]["n_generated"] == 62
    assert measure(first, second)["metrics"]["feature_likelihood"] is None


def test_sums_are_of_the_tiles_themselves(real: Dataset, synthetic: Dataset) -> None:
    first, second = sides(real, synthetic)
    tiles = first.describe_side()["tiles"]
    store = TileStore(real, PX)
    digest = hashlib.sha256()
    for slide_id, ranks in first.selection.items():
        for tile in store.read(slide_id, ranks):
            digest.update(tile.tobytes())
    assert tiles["pixels_sha256"] == digest.hexdigest()
    assert tiles["files_sha256"] != second.describe_side()["tiles"]["files_sha256"]
    next(real.tiles_dir(PX).glob("C-2*.tar")).unlink()
    gone = sides(real, synthetic)[0].describe_side()["tiles"]
    assert gone["pixels_sha256"] is None
    assert "C-2" in gone["missing"]


def test_a_jpeg_grid_on_one_side_is_warned_of() -> None:
    def described(real: float, generated: float, error: float = 0.002) -> dict[str, Any]:
        return {
            side: {"tiles": {"blockiness": {"mean": mean, "standard_error": error, "tiles": 100}}}
            for side, mean in (("real", real), ("generated", generated))
        }

    assert blockiness_warnings(described(1.0, 1.01)) == []
    assert blockiness_warnings(described(1.0, 1.11, error=0.1)) == []
    (one,) = blockiness_warnings(described(1.0, 1.11))
    assert one["code"] == "blockiness_mismatch"
    assert "1.110 of the generated" in one["message"]


def test_blockiness_sees_jpeg_and_nothing_else() -> None:
    rng = np.random.default_rng(0)
    smooth = rng.integers(60, 200, (16, 16, 3), np.uint8)
    large = np.array(Image.fromarray(smooth).resize((224, 224), Image.Resampling.BICUBIC))
    noise = rng.integers(0, 12, large.shape)
    tile = np.clip(large + noise, 0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(tile).save(buffer, "JPEG", quality=70)
    compressed = np.array(Image.open(buffer))
    assert abs(measure_blockiness(tile) - 1) < 0.03
    assert measure_blockiness(compressed) > 1.15
    assert abs(measure_blockiness(compressed[3:-5, 3:-5]) - 1) < 0.1  # another slide's grid
    assert measure_blockiness(np.full((64, 64, 3), 7, np.uint8)) == 1.0
    with pytest.raises(ValueError, match="32 px or more"):
        measure_blockiness(np.zeros((16, 16, 3), np.uint8))


def test_distances_are_computed_on_the_device_that_was_asked_for(
    real: Dataset,
    synthetic: Dataset,
    trained: FeatureSide,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = []

    def on_a_cpu(metric: Callable[..., Any]) -> Callable[..., Any]:
        def call(*rows: Any, device: str, **more: Any) -> Any:
            asked.append((metric.__name__, device))
            return metric(*rows, **more)

        return call

    for module, metric in (
        (manifold, precision_recall),
        (likelihood, feature_likelihood_divergence),
    ):
        monkeypatch.setattr(module, metric.__name__, on_a_cpu(metric))
    first, second = sides(real, synthetic)
    settings = MetricSettings(draws=0, fld_seeds=(0,))
    measure(first, second, train=trained, settings=settings, device="cuda")
    assert {device for _, device in asked} == {"cuda"}
    assert [name for name, _ in asked].count("feature_likelihood_divergence") == 1
    assert len(asked) == 1 + 1 + 8  # and both halves of eight floors


def test_a_metrics_sentence_is_said_once_with_its_places() -> None:
    line = {"infinity": {"warnings": ["not linear"]}}
    few = (
        "3 real images for 9 feature dimensions: the covariance is singular and the Fréchet "
        "distance mostly measures how few images there are"
    )
    found = [(f"row {i}", {"frechet_distance": {"warnings": [few], **line}}) for i in range(5)]
    said = metric_warnings(found, [])
    assert [one["code"] for one in said] == ["metric_frechet_distance", "metric_frechet_infinity"]
    assert said[1]["message"].endswith("images: not linear (row 0; row 1; row 2 and 2 more)")
    known = [{"code": "fewer_tiles_than_dimensions", "message": ""}]
    assert [one["code"] for one in metric_warnings(found, known)] == ["metric_frechet_infinity"]


def spoilt(dataset: Dataset, rows: dict[str, dict[int, float]]) -> None:
    """Cache the dataset's features again with some rows of one value: zero, NaN, infinity."""
    features = {}
    for slide in read_slides(dataset):
        store = FeatureStore(dataset, tile_px=PX, encoder="h0-mini")
        count = read_candidates(dataset, slide.slide_id).num_rows
        features[slide.slide_id] = store.read(slide.slide_id, range(count)).copy()
        for rank, value in rows.get(slide.slide_id, {}).items():
            features[slide.slide_id][rank] = value
    write_features(dataset, features)


def measure_by_door(real: Dataset, synthetic: Dataset, out: Path, *more: str) -> int:
    return main(
        ["measure", "--real", str(real.root), "--real-selection", "train", "--draws", "0",
         "--generated", str(synthetic.root), "--out", str(out), *more]
    )  # fmt: skip


def test_one_zero_row_costs_the_cosine_alone(
    real: Dataset, synthetic: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoilt(real, {"C-2": {5: 0.0}})
    out = tmp_path / "results.json"
    assert measure_by_door(real, synthetic, out) == 1
    said = capsys.readouterr().out
    place = f"slide C-2, rank 5 (features/{PX}/h0-mini/cls/C-2.0-24.parquet)"
    assert f"real features: only zeros in 1 of 62 rows: {place}" in said
    assert f"source features: only zeros in 1 of 62 rows: {place}" in said
    results = read_results(out)
    first, second = sides(real, synthetic)
    metrics = results.part("metrics")
    assert not metrics.part("cosine_similarity")
    assert place in results.part("failed").text("cosine_similarity")
    assert set(results["failed"]) == {"cosine_similarity"}
    distance = frechet_distance(first.features, second.features)
    assert metrics.part("frechet_distance").number("value") == distance.value
    recall = precision_recall(first.features, second.features).recall
    assert metrics.part("precision_recall").number("recall") == recall
    assert results.part("references").part("real_vs_real")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_rows_without_a_number_are_named_and_cost_what_reads_them(
    real: Dataset, synthetic: Dataset, trained: FeatureSide, tmp_path: Path, value: float
) -> None:
    spoilt(trained.dataset, {"T-1": {3: value, 9: value}})
    out, more = tmp_path / "results.json", ["--train-selection", "train"]
    more += ["--guidance", str(trained.dataset.root)]
    assert measure_by_door(real, synthetic, out, *more) == 1
    results = read_results(out)
    assert set(results["failed"]) == {"feature_likelihood"}
    reason = results.part("failed").text("feature_likelihood")
    assert "train features: NaN or infinity in 2 of 150 rows: slide T-1, rank 3 (feat" in reason
    assert "slide T-1, rank 9" in reason
    computed = [name for name, result in results.part("metrics").items() if result]
    assert computed == [
        "frechet_distance", "kernel_distance", "precision_recall", "sliced_distance"
    ]  # fmt: skip
    # Where a side itself is spoilt all metrics are, and the file says so all the same.
    spoilt(synthetic, {"gen-00000": {0: value}})
    assert measure_by_door(real, synthetic, out) == 1
    assert not any(read_results(out).part("metrics").values())
    assert "gen-00000, rank 0" in read_results(out).part("failed").text("frechet_distance")
    page = tmp_path / "report.html"
    write_report(results_file=out, run_dir=None, real=real.root, generated=synthetic.root, out=page)
    assert "Fréchet distance: not measured" in page.read_text()


@pytest.mark.parametrize("fault", [MemoryError("no room"), KeyError("bug"), float("nan")])
def test_no_metric_costs_another_whatever_happens_to_it(
    real: Dataset, synthetic: Dataset, monkeypatch: pytest.MonkeyPatch, fault: object
) -> None:
    def compute(*_: object) -> dict[str, object]:
        if isinstance(fault, Exception):
            raise fault
        return {"value": fault}

    broken = replace(METRICS["kernel_distance"], compute=compute)
    monkeypatch.setitem(METRICS, "kernel_distance", broken)
    results = measure(*sides(real, synthetic), settings=MetricSettings(draws=0))
    assert list(results["failed"]) == ["kernel_distance"]
    assert results["metrics"]["kernel_distance"] is None
    assert results["metrics"]["sliced_distance"]["value"] > 0
    (said,) = (one for one in results["warnings"] if one["code"] == "not_measured")
    assert said["message"].startswith("Kernel distance (KID): not measured: ")
    json.dumps(results, allow_nan=False)


def test_an_unusable_results_file_is_refused_before_anything_is_computed(
    real: Dataset, synthetic: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("evaluate.compare.command.measure", lambda *_, **__: pytest.fail("late"))
    (tmp_path / "file").write_text("")
    for out in (tmp_path, tmp_path / "file" / "results.json"):
        with pytest.raises(UserError, match=r"--out .*give another file"):
            measure_by_door(real, synthetic, out)


def test_training_tiles_are_no_test_set(
    evaluate_real: Callable[..., Dataset], real: Dataset, synthetic: Dataset
) -> None:
    first, second = sides(real, synthetic)
    copy = evaluate_real({"A.b-1": 40, "C-2": 24, "D": 20}, name="renamed")
    for train in (first, FeatureSide.open_selection(copy.root, "train", "h0-mini", like=first)):
        with pytest.raises(UserError, match=r"--train-selection 'train' .*\(62 tiles\), but FLD"):
            measure(first, second, train=train)
    part = make_selection("part", {"C-2": np.arange(1, 24, dtype=np.int32)}, {})
    write_selection(real, new_run_id(), part)
    train = FeatureSide.open_selection(real.root, "part", "h0-mini", like=first)
    results = measure(first, second, train=train, settings=MetricSettings(draws=0, fld_seeds=(0,)))
    assert results["metrics"]["feature_likelihood"]["n_shared"] == 23
    said = [one["message"] for one in results["warnings"] if "FLD" not in one["code"]]
    assert any("23 of 62 test rows (37.1%) are train rows too" in one for one in said)


def test_a_k_that_few_tiles_cannot_have_is_lowered_aloud(
    evaluate_real: Callable[..., Dataset], real: Dataset, synthetic: Dataset
) -> None:
    first, second = sides(evaluate_real({"A": 13}, name="few"), synthetic)
    for wanted, used in ((3, 3), (5, 5), (6, 5), (40, 5)):
        results = measure(first, second, settings=MetricSettings(draws=0, k=wanted))
        found = results["metrics"]["precision_recall"]
        assert found["k"] == used
        assert (
            found["precision"]
            == precision_recall(first.features, second.features, k=used).precision
        )
        said = [one["message"] for one in results["warnings"] if "k is" in one["message"]]
        assert len(said) == (wanted > used)
        assert all(f"k is {used} in place of {wanted}" in one for one in said)
