"""`curate` on features that the test makes: separable classes, noise, patients kept apart."""

import csv
import json
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
from sklearn.metrics import roc_auc_score

from common.errors import UserError
from pipeline.__main__ import main
from pipeline.dataset import (
    Dataset,
    Entry,
    Run,
    Slide,
    commit_file,
    commit_json,
    read_journal,
    read_selection,
)
from pipeline.dataset.features import cls_table, feature_scope, open_writer, write_blocks
from pipeline.dataset.tables.selections import read_plan, read_rows
from pipeline.selection.classifier import (
    grouped_folds,
    recall_threshold,
    train_classifier,
)
from pipeline.selection.denied import deny_file
from tests.pipeline.cohort_data import tissue_dataset

DIM, SLIDES, TILES = 12, 24, 80


def features_of(slide: int) -> tuple[np.ndarray, np.ndarray]:
    """Features float32 [n, d] and truth: artifacts lie one way, each patient adds its own shift."""
    rng = np.random.default_rng(slide)
    is_artifact = rng.random(TILES) < 0.25
    shift = np.random.default_rng(1000 + slide // 2).normal(0, 0.5, DIM)
    shift[0] = 0
    cls = rng.normal(0, 1, (TILES, DIM)) + shift
    cls[:, 0] += 6 * is_artifact
    return cls.astype(np.float32), is_artifact


def write_features(dataset: Dataset, slides: list[str]) -> None:
    """CLS features as the cache stage leaves them, in two files a slide."""
    scope = feature_scope(224, "enc", "", "cls")
    folder = dataset.features_dir(224, "enc") / "cls"
    with Run(dataset, "cache", {}) as run:
        record = {"encoder": "enc", "weights_sha256": "w", "random_weights": False}
        commit_json(dataset, run.run_id, folder / "encoder.json", record)
        for number, slide_id in enumerate(slides):
            cls = features_of(number)[0]
            for start, stop in ((0, 48), (48, TILES)):
                table = cls_table(start, cls[start:stop])

                def write(file, table=table):
                    with open_writer(file, table.schema) as writer:
                        write_blocks(writer, table)

                path = folder / f"{slide_id}.{start}-{stop}.parquet"
                files = (commit_file(dataset, run.run_id, path, write),)
                run.append([Entry(slide_id, "done", "f", scope=scope, start=start, stop=stop,
                                  files=files)])  # fmt: skip


@pytest.fixture(scope="module")
def cached(tmp_path_factory):
    """Selections with features; curated by nobody yet. Do not write to it."""
    slides = [
        Slide(f"s{i:02d}", f"s{i}.svs", mpp=0.5, bytes=1, mtime_ns=1, patient=f"p{i // 2:02d}",
              site=f"T{i % 3}", project="P", md5=f"{i}")
        for i in range(SLIDES)
    ]  # fmt: skip
    made = tissue_dataset(tmp_path_factory.mktemp("cached") / "d", slides, [TILES] * SLIDES)
    write_features(made, [slide.slide_id for slide in slides])
    main(["select", "--dataset", str(made.root), "--name", "val-out", "--hold-out", "4"])
    main(["select", "--dataset", str(made.root), "--name", "train", "--tiles", "1_000"])
    return made


@pytest.fixture(scope="module")
def curated(cached, tmp_path_factory):
    """The same after `curate --name clean`. Do not write to it."""
    folder = tmp_path_factory.mktemp("curated")
    shutil.copytree(cached.root, folder / "d")
    labels = write_labels(folder / "labels.csv", true_labels())
    assert curate(Dataset(folder / "d"), labels, "--name", "clean") == 0
    return Dataset(folder / "d")


@pytest.fixture
def dataset(cached, tmp_path):
    shutil.copytree(cached.root, tmp_path / "d")
    return Dataset(tmp_path / "d")


@pytest.fixture
def own_curated(curated, tmp_path):
    shutil.copytree(curated.root, tmp_path / "d")
    return Dataset(tmp_path / "d")


def write_labels(path, rows):
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["slide_id", "rank", "label"])
        writer.writerows(rows)
    return path


def true_labels(count=12, slides=range(SLIDES)):
    return [
        (f"s{i:02d}", rank, "artifact" if features_of(i)[1][rank] else "usable")
        for i in slides for rank in range(count)
    ]  # fmt: skip


def curate(dataset, labels, *arguments):
    return main(["curate", "--dataset", str(dataset.root), "--labels", str(labels),
                 "--features", "enc", "--workers", "1", *arguments])  # fmt: skip


def tiles_of(dataset, name):
    return {(s, int(r)) for s, ranks in read_selection(dataset, name).items() for r in ranks}


def test_artifacts_are_found_denied_and_removed(curated):
    dataset = curated
    truth = {
        (f"s{i:02d}", int(r)) for i in range(SLIDES) for r in np.flatnonzero(features_of(i)[1])
    }
    denied = {
        (s, int(r))
        for s, ranks in read_rows(deny_file(dataset, "clean"), "x").items()
        for r in ranks
    }
    train = tiles_of(dataset, "train")
    on_train = {s for s, _ in train} | {s for s, _ in tiles_of(dataset, "val-out")}
    expected = {tile for tile in truth if tile[0] in on_train}
    assert len(denied & expected) > 0.95 * len(expected)
    assert len(denied - expected) < 0.03 * SLIDES * TILES
    for name in ("train", "val-out"):
        assert tiles_of(dataset, f"{name}-clean") == tiles_of(dataset, name) - denied
        assert read_plan(dataset, f"{name}-clean")["role"] == name
    report = json.loads((dataset.root / "curation" / "clean" / "report.json").read_text())
    assert len(report["folds"]) == 5
    assert all(fold["roc_auc"] > 0.97 for fold in report["folds"])
    assert report["usable_recall"] >= 0.99
    table = report["removed_by_site"]["train"]
    assert sum(row["removed"] for row in table.values()) == len(train & denied)
    assert sum(row["tiles"] for row in table.values()) == len(train)
    assert set(table) == {"T0", "T1", "T2"}
    names = [r.path for e in read_journal(dataset, "curate") for r in e.files]
    assert "curation/clean/deny.parquet" in names
    assert "curation/clean/scores/s00.parquet" in names or "s00" not in on_train


def test_scores_are_the_mean_of_the_folds(curated):
    dataset = curated
    folder = dataset.root / "curation" / "clean"
    saved = json.loads((folder / "classifier.json").read_text())
    slide = read_selection(dataset, "train").slide_ids[0]
    table = pq.read_table(folder / "scores" / f"{slide}.parquet")
    assert table["rank"].to_pylist() == list(range(TILES)), "all that is cached, block by block"
    logits = features_of(int(slide[1:]))[0] @ np.array(saved["weights"]).T + saved["offsets"]
    slow = (1 / (1 + np.exp(-logits))).mean(1)
    assert np.allclose(table["score"].to_numpy(), slow, atol=1e-6)


def test_a_second_run_does_nothing_whatever_the_labels_order(own_curated, tmp_path, capsys):
    files = sorted(p for p in (own_curated.root / "curation").rglob("*") if p.is_file())
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in files}
    curate(own_curated, write_labels(tmp_path / "m.csv", true_labels()[::-1]), "--name", "clean")
    out = capsys.readouterr().out
    assert "already done, nothing to redo" in out
    assert "deny-list 'clean'" in out
    assert "ROC-AUC" in out
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in files} == before


def test_a_deny_list_in_use_does_not_change(own_curated, tmp_path, capsys):
    root = str(own_curated.root)
    again = ("--name", "clean", "--recall", "0.8")
    labels = write_labels(tmp_path / "l.csv", true_labels())
    main(["select", "--dataset", root, "--name", "more", "--deny", "clean"])
    with pytest.raises(UserError, match=r"more were drawn with it"):
        curate(own_curated, labels, *again)
    main(["select", "--dataset", root, "--remove", "more"])
    before = own_curated.selection_file("train-clean").read_bytes()
    assert curate(own_curated, labels, *again) == 0
    assert own_curated.selection_file("train-clean").read_bytes() != before
    assert "tiles removed by site" in capsys.readouterr().out


def test_missing_features_are_named_before_anything_is_written(dataset, tmp_path):
    slide = read_selection(dataset, "train").slide_ids[0]
    for path in (dataset.features_dir(224, "enc") / "cls").glob(f"{slide}.48-*"):
        path.unlink()
    labels = write_labels(tmp_path / "l.csv", true_labels())
    with pytest.raises(UserError, match=rf"slide {slide}: no features of enc.*pipeline cache"):
        curate(dataset, labels)
    assert not deny_file(dataset, "curated").exists()


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([("s99", 0, "usable")], "line 2: slide 's99' has no candidate tiles"),
        ([("s00", TILES, "usable")], f"line 2: no tile of rank '{TILES}' on s00"),
        ([("s00", -1, "usable")], "no tile of rank '-1'"),
        ([("s00", 0, "blurry")], "label 'blurry', expected usable or artifact"),
        ([("s00", 0, "usable"), ("s00", 0, "artifact")], "line 3: tile 0 of s00 is labelled twice"),
        ([("s00", 0, "usable"), ("s01", 0, "artifact")], "2 labelled tiles are fewer than 5 folds"),
        ([(f"s{i:02d}", 0, "usable") for i in range(20)], "no tile is labelled artifact"),
        ([(f"s{i:02d}", 0, "artifact") for i in range(20)], "no tile is labelled usable"),
        ([(f"s{i % 8:02d}", i, "usable" if i % 3 else "artifact") for i in range(24)],
         "of 4 patients, fewer than 5 folds"),
        ([(f"s{i:02d}", 0, "usable" if i else "artifact") for i in range(20)],
         "all artifact tiles are of one patient"),
        ([], "has no label"),
    ],
)  # fmt: skip
def test_bad_labels_are_refused(dataset, tmp_path, rows, words):
    with pytest.raises(UserError, match=words):
        curate(dataset, write_labels(tmp_path / "l.csv", rows))
    assert not (dataset.root / "curation").exists()


def labelled():
    parts = [features_of(i) for i in range(SLIDES)]
    groups = np.repeat([f"p{i // 2:02d}" for i in range(SLIDES)], TILES)
    return np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts]), groups


def test_no_patient_is_in_two_folds():
    _, truth, groups = labelled()
    folds = grouped_folds(truth, groups, 5, 0)
    assert set(folds) == set(range(5))
    assert all(len(set(folds[groups == patient])) == 1 for patient in set(groups))
    order = np.random.default_rng(0).permutation(len(groups))
    again = grouped_folds(truth[order], groups[order], 5, 0)
    assert np.array_equal(again, folds[order]), "row order plays no part"


def test_held_out_patients_are_judged_by_the_fold_that_never_saw_them():
    """A feature that gives away the patient helps only those who saw the patient."""
    rng = np.random.default_rng(0)
    groups = np.repeat([f"p{i:02d}" for i in range(20)], 30)
    truth = np.repeat(rng.random(20) < 0.5, 30)
    identity = np.repeat(rng.normal(0, 1, (20, 40)), 30, axis=0)
    features = (identity + rng.normal(0, 0.1, identity.shape)).astype(np.float32)
    trained = train_classifier(features, truth, groups)
    seen = roc_auc_score(truth, trained.model.scores(features))
    assert seen > 0.95
    assert trained.roc_auc < 0.8
    for number, fold in enumerate(trained.folds):
        mine = trained.fold_of == number
        assert fold.tiles == mine.sum()
        removed = trained.out_of_fold[mine] > trained.threshold
        assert fold.artifact_removed == (removed & truth[mine]).sum()
        assert fold.usable_kept == (~removed & ~truth[mine]).sum()


@pytest.mark.parametrize("recall", [0.5, 0.9, 0.99, 1.0])
def test_the_threshold_keeps_what_was_asked_for_and_no_more(recall):
    scores = np.random.default_rng(1).random(997)
    threshold = recall_threshold(scores, recall)
    assert (scores <= threshold).mean() >= recall
    lower = scores[scores < threshold].max()
    assert (scores <= lower).mean() < recall
