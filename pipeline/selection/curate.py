"""The `curate` stage: tiles with artifacts found by a linear classifier on cached features."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from rich.table import Table

from common.console import EXIT_OK, print_line, stdout
from common.errors import UserError
from pipeline.dataset import (
    Dataset,
    Entry,
    Ledger,
    Missing,
    Run,
    Selection,
    commit_file,
    commit_json,
    fingerprint_of,
    identity_value,
    make_selection,
    read_selection,
)
from pipeline.dataset.claim import SELECTIONS, hold_claim
from pipeline.dataset.features import FeatureStore, feature_scope
from pipeline.dataset.tables.selections import read_plan, write_rows
from pipeline.run.stage import Stage, run_stage, stage_versions
from pipeline.run.tasks import SlideTask
from pipeline.run.workers import EngineConfig
from pipeline.selection.classifier import Trained, train_classifier
from pipeline.selection.cohort import Cohort
from pipeline.selection.config import CurateConfig, SelectConfig
from pipeline.selection.denied import curation_dir, deny_file
from pipeline.selection.labels import Labels, read_labels
from pipeline.selection.scores import read_scores, score_slide, scores_scope
from pipeline.selection.select import select_claimed
from pipeline.selection.slides import read_tissue
from pipeline.selection.ties import check_may_change, read_ties

STAGE, VERSION = "curate", 1
_SITES_SHOWN = 20


@dataclass(frozen=True)
class _Curation:
    """What a run of the stage works on."""

    dataset: Dataset
    config: CurateConfig
    cohort: Cohort
    selections: tuple[str, ...]
    shards: Mapping[str, list[Entry]]
    trained: Trained
    fingerprint: str


def curate(dataset: Dataset, config: CurateConfig, engine: EngineConfig) -> int:
    """Train, score, write the deny-list and the selections without its tiles.

    Features are CLS float32 [n, d], scores probabilities of an artifact from 0 to 1. Returns the
    exit status.
    """
    _check_config(config)
    tissue = read_tissue(dataset)
    selections = _selections_to_clean(dataset, config)
    cleaned = [_configure_cleaned(dataset, config, name) for name in selections]
    _check_cleaned(dataset, cleaned)
    tile_px = int(identity_value(dataset, "tile_px"))
    store = FeatureStore(dataset, tile_px=tile_px, encoder=config.encoder, view=config.view)
    count_of = dict(
        zip(tissue.cohort.slide_id.tolist(), tissue.cohort.candidates.tolist(), strict=True)
    )
    labels = read_labels(config.labels, {s: n for s, n in count_of.items() if n})
    trained = _train_on_labels(
        config, labels, store, tissue.cohort, int(identity_value(dataset, "seed"))
    )
    print_trained(config, labels, trained, bool(store.record.get("random_weights")))
    scope = feature_scope(tile_px, config.encoder, config.view, "cls")
    # All cached tiles are scored, not only the selected: a later selection finds its scores.
    cached = Ledger.read(dataset, "cache")[scope]
    shards = {slide_id: cached.on_disk(slide_id) for slide_id in cached}
    fingerprint = fingerprint_of(
        stage=STAGE, version=VERSION, weights=trained.model.weights.tolist(),
        offsets=trained.model.offsets.tolist(), features=store.record.get("weights_sha256", ""),
    )  # fmt: skip
    work = _Curation(dataset, config, tissue.cohort, selections, shards, trained, fingerprint)
    status = run_stage(_ScoreStage(work), engine)
    if status != EXIT_OK:
        print_line(
            "curate: without all scores no deny-list is written; fix the slides and run again"
        )
        return status
    with hold_claim(dataset, SELECTIONS, STAGE):
        # Once more: while tiles were scored others may have made selections.
        _check_cleaned(dataset, cleaned)
        # The deny-list before the selections, which name its hash.
        _write_result(work, labels, store.record)
        for one in cleaned:
            select_claimed(dataset, one)
    return EXIT_OK


def _configure_cleaned(dataset: Dataset, config: CurateConfig, name: str) -> SelectConfig:
    """What `select` is to make of a selection, divided as that one was."""
    stratify = read_plan(dataset, name).get("parameters", {}).get("stratify", "site")
    return _cleaned_selection(config, name, stratify)


def _check_cleaned(dataset: Dataset, cleaned: Sequence[SelectConfig]) -> None:
    """Refuse, before anything is computed, names of selections that curate did not make."""
    there = dataset.selection_names()
    for one in cleaned:
        plan = read_plan(dataset, one.name) if one.name in there else {}
        made = plan.get("parameters", {})
        is_ours = made.get("parent") == one.parent and tuple(made.get("deny", ())) == one.deny
        if one.name in there and not is_ours:
            raise UserError(
                f"selection '{one.name}' is there already and was not made by this curation: "
                f"remove it first (`select --remove {one.name}`), or give another --name"
            )


def _check_config(config: CurateConfig) -> None:
    if config.folds < 2:
        raise UserError(f"--folds {config.folds}: expected 2 or more")
    if not 0 < config.usable_recall <= 1:
        raise UserError(f"--recall {config.usable_recall}: expected a number above 0, at most 1")


def _selections_to_clean(dataset: Dataset, config: CurateConfig) -> tuple[str, ...]:
    """The selections to clean: those named, or all that no deny-list was applied to."""
    known = read_ties(dataset)
    names = config.selections or tuple(
        name for name in dataset.selection_names() if not known[name].deny
    )
    if not names:
        raise UserError(f"no selection to clean in {dataset.root}; run `python -m pipeline select`")
    for name in names:
        if name not in dataset.selection_names():
            read_selection(dataset, name)
    return tuple(sorted(set(names)))


def _cleaned_selection(config: CurateConfig, name: str, stratify: str = "site") -> SelectConfig:
    return SelectConfig(f"{name}-{config.name}", None, stratify, parent=name, deny=(config.name,))


def _train_on_labels(
    config: CurateConfig, labels: Labels, store: FeatureStore, cohort: Cohort, seed: int
) -> Trained:
    # Folds by patient: tiles of one patient are alike, and would flatter the classifier.
    family = dict(zip(cohort.slide_id.tolist(), cohort.family.tolist(), strict=True))
    groups = np.array([family[slide_id] for slide_id in labels.slide_ids.tolist()])
    features = _labelled_features(labels, store)
    return train_classifier(
        features, labels.is_artifact, groups,
        folds=config.folds, usable_recall=config.usable_recall, seed=seed,
    )  # fmt: skip


def _labelled_features(labels: Labels, store: FeatureStore) -> npt.NDArray[np.floating]:
    slides, first = np.unique(labels.slide_ids, return_index=True)
    parts = np.split(labels.ranks, first[1:])
    return np.concatenate(
        [store.read(str(s), ranks.tolist()) for s, ranks in zip(slides, parts, strict=True)]
    )


@dataclass(frozen=True)
class _CachedSlide:
    """A slide and its CLS files, as (path, first rank, rank after the last), with their sums."""

    slide_id: str
    shards: list[tuple[str, int, int]]
    sums: list[str]


class _ScoreStage(Stage[_CachedSlide]):
    """Score every cached tile of the slides that the selections touch."""

    name = label = STAGE
    unit = rate_of = "tiles"
    packages = ("scikit-learn",)
    work = staticmethod(score_slide)

    def __init__(self, curation: _Curation) -> None:
        super().__init__(curation.dataset)
        self.curation, self.curation_name = curation, curation.config.name
        self.scopes = (scores_scope(self.curation_name),)

    def list_items(self) -> Iterator[_CachedSlide]:
        """The slides of the selections, each with all its selected tiles in the cache."""
        for slide_id in _require_features(self.curation):
            entries = self.curation.shards[slide_id]
            yield _CachedSlide(
                slide_id,
                [(entry.files[0].path, entry.start, entry.stop) for entry in entries],
                [entry.files[0].sha256 for entry in entries],
            )

    def item_fingerprint(self, item: _CachedSlide) -> str:
        """Of the classifier and the features."""
        classifier = self.curation.fingerprint
        return fingerprint_of(classifier=classifier, shards=item.shards, sums=item.sums)

    def make_task(
        self, item: _CachedSlide, fingerprint: str, missing: Missing, run_id: str
    ) -> SlideTask:
        """Score the tiles of one slide."""
        tiles = sum(stop - start for _, start, stop in item.shards)
        arguments = (
            str(self.dataset.root), run_id, self.curation_name, item.slide_id, item.shards,
            self.curation.trained.model, fingerprint,
        )  # fmt: skip
        return SlideTask(item.slide_id, fingerprint, arguments, tiles, tiles, scopes=self.scopes)

    @property
    def output_path(self) -> Path:
        """The folder of the scores."""
        return curation_dir(self.dataset, self.curation_name) / "scores"


def _require_features(work: _Curation) -> list[str]:
    """The slides of the selections, each with all its selected tiles in the cache."""
    slides: set[str] = set()
    for name in work.selections:
        for slide_id, ranks in read_selection(work.dataset, name).items():
            # By rank, not by file: shards of several runs may overlap.
            covered = np.zeros(int(ranks[-1]) + 1, bool)
            for entry in work.shards.get(slide_id, []):
                covered[entry.start : entry.stop] = True
            if not covered[ranks].all():
                raise UserError(
                    f"slide {slide_id}: no features of {work.config.encoder} for some tiles of "
                    f"'{name}'; run `python -m pipeline cache --encoder {work.config.encoder} "
                    f"--selection {name}` first, or name other selections"
                )
            slides.add(slide_id)
    return sorted(slides)


def _write_result(work: _Curation, labels: Labels, record: Mapping[str, object]) -> None:
    """Deny-list, classifier and report, unless they are done already."""
    dataset, config = work.dataset, work.config
    denied, scored = _denied_ranks(work)
    plan = {"deny_list": config.name, "threshold": work.trained.threshold, "scored": scored}
    rows = make_selection(config.name, denied, plan)
    fingerprint = fingerprint_of(
        classifier=work.fingerprint, threshold=plan["threshold"], rows=rows.content_hash,
        selections={
            name: read_selection(work.dataset, name).content_hash for name in work.selections
        },
    )  # fmt: skip
    scope = f"{config.name}/result"
    if Ledger.read(dataset, STAGE)[scope].done(config.name, fingerprint) is not None:
        print_line(f"curate: deny-list '{config.name}' ({rows.rows:,} tiles) already done")
        return
    # Before anything is written: a refusal must leave the old deny-list as it was.
    _check_dependents(dataset, config, work.selections, rows.content_hash)
    removed = {name: _removed_by_site(work, name, denied) for name in work.selections}
    folder = curation_dir(dataset, config.name)
    with Run(dataset, STAGE, stage_versions("scikit-learn")) as run:
        path = deny_file(dataset, config.name)
        files = (
            commit_file(dataset, run.run_id, path, lambda file: write_rows(file, rows)),
            commit_json(
                dataset, run.run_id, folder / "classifier.json", _classifier_record(work, record),
            ),
            commit_json(
                dataset, run.run_id, folder / "report.json",
                _curation_report(work, labels, rows, scored, removed),
            ),
        )  # fmt: skip
        counts = {"tiles denied": rows.rows}
        run.append(
            [Entry(config.name, "done", fingerprint, scope=scope, files=files, counts=counts)]
        )
    for name, table in removed.items():
        print_removed(name, table)
    share = rows.rows / max(1, scored)
    print_line(
        f"curate: {rows.rows:,} of {scored:,} scored tiles ({share:.2%}) denied, wrote {path}"
    )


def _denied_ranks(work: _Curation) -> tuple[dict[str, npt.NDArray[np.int32]], int]:
    """Ranks above the threshold by slide, and how many tiles were scored; a slide at a time."""
    scored, denied = 0, {}
    for slide_id in _require_features(work):
        ranks, scores = read_scores(work.dataset, work.config.name, slide_id)
        scored += len(ranks)
        denied[slide_id] = ranks[scores > np.float32(work.trained.threshold)]
    return denied, scored


def _check_dependents(
    dataset: Dataset, config: CurateConfig, selections: tuple[str, ...], content_hash: str
) -> None:
    """Refuse to change a deny-list under selections that this run does not make again."""
    known = read_ties(dataset)
    remade = {_cleaned_selection(config, name).name for name in selections}
    other = sorted(
        name for name, ties in known.items()
        if ties.deny.get(config.name, content_hash) != content_hash and name not in remade
    )  # fmt: skip
    if other:
        raise UserError(
            f"deny-list '{config.name}' would change, and {', '.join(other)} were drawn with it; "
            f"remove them first (`select --remove`), or use another --name"
        )
    for name in sorted(remade & set(known)):
        if known[name].deny.get(config.name) != content_hash:
            check_may_change(known, name, "curate")


def _removed_by_site(
    work: _Curation, name: str, denied: Mapping[str, npt.NDArray[np.int32]]
) -> dict[str, dict[str, int]]:
    """Tiles of a selection and how many of them are denied, by site."""
    site = dict(zip(work.cohort.slide_id.tolist(), work.cohort.site.tolist(), strict=True))
    table: dict[str, dict[str, int]] = {}
    for slide_id, ranks in read_selection(work.dataset, name).items():
        row = table.setdefault(site[slide_id], {"tiles": 0, "removed": 0})
        row["tiles"] += len(ranks)
        row["removed"] += int(np.isin(ranks, denied[slide_id], assume_unique=True).sum())
    return dict(sorted(table.items()))


def _classifier_record(work: _Curation, record: Mapping[str, object]) -> dict[str, object]:
    return {
        "kind": "logistic regression on CLS features, mean of the folds' probabilities",
        "encoder": work.config.encoder, "view": work.config.view,
        "weights_sha256": record.get("weights_sha256", ""),
        "random_weights": bool(record.get("random_weights")),
        "threshold": work.trained.threshold,
        "weights": work.trained.model.weights.tolist(),
        "offsets": work.trained.model.offsets.tolist(),
    }  # fmt: skip


def _curation_report(
    work: _Curation,
    labels: Labels,
    rows: Selection,
    scored: int,
    removed: Mapping[str, Mapping[str, Mapping[str, int]]],
) -> dict[str, object]:
    trained = work.trained
    return {
        "labels": {"usable": int((~labels.is_artifact).sum()),
                   "artifact": int(labels.is_artifact.sum())},
        "folds": [asdict(fold) for fold in trained.folds],
        "roc_auc": trained.roc_auc,
        "threshold": trained.threshold,
        "usable_recall_asked": work.config.usable_recall,
        "usable_recall": trained.usable_recall,
        "artifact_recall": trained.artifact_recall,
        "scored": scored,
        "denied": rows.rows,
        "removed_by_site": removed,
    }  # fmt: skip


def print_trained(config: CurateConfig, labels: Labels, trained: Trained, is_random: bool) -> None:
    """Print the folds' ROC-AUC and confusion, and the threshold: all from 0 to 1."""
    title = f"curate: {len(labels):,} labelled tiles, {config.folds} folds by patient"
    if is_random:
        title += f" ({config.encoder} with RANDOM weights)"
    table = Table("fold", "tiles", "patients", "ROC-AUC", "artifacts removed", "artifacts kept",
                  "usable removed", "usable kept", title=title)  # fmt: skip
    for number, fold in enumerate(trained.folds, 1):
        auc = "one class" if fold.roc_auc is None else f"{fold.roc_auc:.4f}"
        rest = (fold.artifact_removed, fold.artifact_kept, fold.usable_removed, fold.usable_kept)
        table.add_row(str(number), str(fold.tiles), str(fold.patients), auc, *map(str, rest))
    stdout.print(table)
    print_line(
        f"curate: threshold {trained.threshold:.4g} keeps {trained.usable_recall:.2%} of usable "
        f"tiles (at least {config.usable_recall:.2%} asked) and removes "
        f"{trained.artifact_recall:.2%} of artifacts; ROC-AUC {trained.roc_auc:.4f}, all on tiles "
        "of patients that their fold had not seen"
    )


def print_removed(name: str, table: Mapping[str, Mapping[str, int]]) -> None:
    """Print the sites that lose most of a selection, in tiles and per cent."""
    shown = Table("site", "tiles", "removed", "share", title=f"{name}: tiles removed by site")
    order = sorted(table, key=lambda site: (-table[site]["removed"], site))
    for site in order[:_SITES_SHOWN]:
        tiles, gone = table[site]["tiles"], table[site]["removed"]
        shown.add_row(site or "not stated", f"{tiles:,}", f"{gone:,}", f"{gone / tiles:.2%}")
    stdout.print(shown)
    if len(order) > _SITES_SHOWN:
        print_line(f"... and {len(order) - _SITES_SHOWN} sites more, in report.json")
