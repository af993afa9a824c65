"""The `cache` stage: an encoder's CLS and patch tokens for the named selections."""

import os
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.console import print_line
from common.errors import UserError
from common.json_text import read_json
from common.terms import plain_terms
from pipeline.dataset import (
    Dataset,
    Entry,
    Ledger,
    Missing,
    Run,
    commit_json,
    fingerprint_of,
    identity_value,
)
from pipeline.dataset.claim import FEATURES, hold_claim
from pipeline.dataset.features.store import refuse_other_features
from pipeline.dataset.journal import Outcome
from pipeline.dataset.layout import ranks_of_blocks
from pipeline.dataset.lineage import Lineage, inherited_values
from pipeline.features.bundle import SlideWork, cache_bundle, load_encoder_once
from pipeline.features.config import STAGE, VERSION, CacheConfig
from pipeline.features.device import gpu_count, stage_device
from pipeline.features.plan import print_plan
from pipeline.features.views import check_view, view_software
from pipeline.run.stage import Stage, run_stage
from pipeline.run.summary import Summary
from pipeline.run.tasks import SlideTask, bundle_tasks, sort_dearest_first
from pipeline.run.workers import EngineConfig, count_workers
from pipeline.tiles.stage import needed_blocks

if TYPE_CHECKING:
    from model.encoders import Encoder

_TILES_PER_BUNDLE = {"cpu": 256, "cuda": 100_000}
"""About two minutes' work, so that a GPU never waits for the scheduler between slides."""
_BUNDLES_PER_WORKER = 4


def _on_devices(engine: EngineConfig, device: str) -> EngineConfig:
    """With its number of workers; by default one per local GPU, or one on all cores."""
    if engine.cluster:
        jobs = engine.cluster
        workers, threads = jobs.max_jobs * jobs.workers, jobs.cores // jobs.workers
    else:
        if engine.scheduler:
            workers = count_workers(engine)
        else:
            workers = engine.workers or (max(1, gpu_count()) if device == "cuda" else 1)
        threads = len(os.sched_getaffinity(0)) // workers
    return replace(engine, workers=workers, threads=max(1, threads))


def _tiles_per_bundle(tasks: Sequence[SlideTask], device: str, engine: EngineConfig) -> int:
    """Some minutes' work, but several bundles for every worker."""
    most = _TILES_PER_BUNDLE["cuda" if device == "cuda" else "cpu"]
    share = sum(task.units for task in tasks) // (_BUNDLES_PER_WORKER * (engine.workers or 1))
    return max(1, min(most, share))


def _encoder_record(dataset: Dataset, tile_px: int, config: CacheConfig) -> dict[str, Any]:
    """encoder.json for these features; from the one that was written where that is certain."""
    for kind in config.kinds:
        path = config.file(dataset, tile_px, kind)
        written = _written_record(path)
        if written is not None:
            refuse_other_features(
                path, written, {"compute_dtype": config.dtype}, remedy=_remedy(dataset, config)
            )
            # A file may have changed under the same name: its weights are read again.
            if written["weights"] == config.weights and not Path(config.weights).exists():
                return written
    return _describe_encoder(
        load_encoder_once(config.encoder, config.weights, "cpu", "float32"), tile_px, config
    )


def _remedy(dataset: Dataset, config: CacheConfig) -> str:
    """What to do where features are there that were made otherwise."""
    folder = dataset.features_dir(0, config.encoder, config.view).name
    return (
        "use the former, another --dataset, or remove them first: `python -m pipeline prune "
        f"--dataset {shlex.quote(str(dataset.root))} --features {folder}` lists them, and with "
        "--yes removes them"
    )


def _written_record(path: Path) -> dict[str, Any] | None:
    """encoder.json as it was written, or None."""
    try:
        return dict(read_json(path)) if path.exists() else None
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}): remove it and run `cache` again") from error


def _describe_encoder(encoder: "Encoder", tile_px: int, config: CacheConfig) -> dict[str, Any]:
    spec = encoder.spec
    return {
        "encoder": config.encoder,
        "hub_id": spec.hub_id,
        "weights": config.weights,
        "weights_sha256": encoder.weights_sha256,
        "random_weights": encoder.is_random,
        "dim": spec.dim,
        "tokens_shape": [spec.num_tokens, spec.token_dim],
        "input_px": spec.input_px,
        "resize": spec.resize or "",
        "mean": list(spec.mean),
        "std": list(spec.std),
        "tile_px": tile_px,
        "view": config.view,
        "view_software": view_software(config.view),
        "compute_dtype": config.dtype,
        **({"terms": plain_terms(encoder.terms)} if encoder.terms else {}),
    }


def claim_encoder(
    dataset: Dataset, run: Run, tile_px: int, config: CacheConfig, record: dict[str, Any]
) -> None:
    """Write and journal encoder.json of each kind, or refuse features made otherwise.

    `tile_px` is the tile side in px. Under a claim: of two runs with other weights one is refused.
    """
    with hold_claim(dataset, FEATURES, STAGE):
        _write_records(dataset, run, tile_px, config, record)


def _write_records(
    dataset: Dataset, run: Run, tile_px: int, config: CacheConfig, record: dict[str, Any]
) -> None:
    ledger = Ledger.read(dataset, STAGE)
    for kind in config.kinds:
        path = config.file(dataset, tile_px, kind)
        scope = f"{config.scope(tile_px, kind)}/{path.name}"
        fingerprint = fingerprint_of(stage=STAGE, version=VERSION, record=record)
        is_journalled = ledger[scope].done(path.name, fingerprint) is not None
        written = _written_record(path)
        # The same record with no line: a run was killed in between, or an older release wrote it.
        if written is None or (written == record and not is_journalled):
            file = commit_json(dataset, run.run_id, path, record)
            run.append([Entry(path.name, "done", fingerprint, scope=scope, files=(file,))])
        else:
            refuse_other_features(path, written, record, remedy=_remedy(dataset, config))


@dataclass(frozen=True)
class _SlideBlocks:
    """A slide and the blocks of it that selections need."""

    slide_id: str
    blocks: set[int]


class CacheStage(Stage[_SlideBlocks]):
    """Compute and store the features that are missing for the named selections.

    CLS float32 [d] and patch tokens [t, d] (float16 or int8) per tile.
    """

    name = label = STAGE
    unit = rate_of = "tiles"
    packages = ("torch", "torchvision", "timm")
    work = staticmethod(cache_bundle)

    def __init__(self, dataset: Dataset, config: CacheConfig, engine: EngineConfig) -> None:
        super().__init__(dataset)
        config = config.resolve_tokens()
        check_view(config.view)
        self.tile_px = config.tile_px or int(identity_value(dataset, "tile_px"))
        needs = needed_blocks(dataset, config.selections)
        self.slides = [_SlideBlocks(slide_id, blocks) for slide_id, blocks in needs.items()]
        self.device = stage_device(config.device, engine)
        self.engine = _on_devices(engine, self.device)
        # A worker's share of its host's cores; unknown where others started the workers.
        threads = None if engine.scheduler else self.engine.threads
        self.config = replace(config, device=self.device, threads=threads)
        self.kind_of_scope = {config.scope(self.tile_px, kind): kind for kind in config.kinds}
        self.scopes = tuple(self.kind_of_scope)
        self.tiles = Ledger.read(dataset, "tile")[str(self.tile_px)]
        self.lineage = Lineage(dataset, self.tile_px)
        written = _written_record(self.config.file(dataset, self.tile_px, "cls"))
        self.weights_sha256 = str(written["weights_sha256"]) if written else ""
        self.encoder_record: dict[str, Any] = {}

    def check_inputs(self) -> None:
        """Raise `UserError` where tiles are missing, or features were made otherwise."""
        # By the journals alone: looking at every file of a cohort takes minutes.
        for slide in self.slides:
            if not slide.blocks <= self.tiles.recorded_blocks(slide.slide_id):
                root = shlex.quote(str(self.dataset.root))
                raise UserError(
                    f"slide {slide.slide_id}: selected tiles are not in "
                    f"{self.dataset.tiles_dir(self.tile_px)}; run `python -m pipeline tile "
                    f"--dataset {root} --tile-px {self.tile_px}` first"
                )
        self.encoder_record = _encoder_record(self.dataset, self.tile_px, self.config)
        self.weights_sha256 = str(self.encoder_record["weights_sha256"])

    def list_items(self) -> list[_SlideBlocks]:
        """The slides of the selections."""
        return self.slides

    def item_fingerprint(self, item: _SlideBlocks) -> str:
        """Of the tiles, the encoder's weights, its arithmetic and the view."""
        shards = self.tiles.written.get(item.slide_id)
        return fingerprint_of(
            stage=STAGE, version=VERSION, parent=shards[-1].fingerprint if shards else "",
            weights=self.weights_sha256, compute_dtype=self.config.dtype, view=self.config.view,
        )  # fmt: skip

    def reason_to_refuse(
        self, item: _SlideBlocks, fingerprint: str, ledger: Ledger
    ) -> tuple[Outcome, str] | None:
        """Where the tiles are of former candidates or of a former slide."""
        try:
            self.lineage.check_tiles(item.slide_id, self.tiles.written.get(item.slide_id, ()))
        except UserError as error:
            return "failed", str(error)
        return None

    def find_missing(self, item: _SlideBlocks, fingerprint: str, ledger: Ledger) -> Missing:
        """The blocks that lack some kind of features."""
        return ledger.missing(item.slide_id, item.blocks, fingerprint, self.scopes)

    def count_tiles(self, slide_id: str, spans: Iterable[range]) -> int:
        """Tiles in spans [start, stop) of blocks of a slide, of 16 each but the slide's last."""
        rows = self._rows_of(slide_id)
        return sum(len(ranks_of_blocks(span, rows)) for span in spans)

    def _rows_of(self, slide_id: str) -> int:
        """One more than the slide's last written rank: only its last block may be short."""
        # By the journal: a damaged table of candidates must not stop what needs no positions.
        shards = self.tiles.written.get(slide_id, ())
        return max((shard.stop for shard in shards), default=0)

    def make_task(
        self, item: _SlideBlocks, fingerprint: str, missing: Missing, run_id: str
    ) -> SlideTask:
        """Compute the missing features of one slide."""
        spans = {
            span: tuple(self.kind_of_scope[scope] for scope in scopes)
            for span, scopes in missing.spans.items()
        }
        work = SlideWork(
            str(self.dataset.root), run_id, item.slide_id, self.config, self.tile_px, spans,
            fingerprint, self.weights_sha256, self._rows_of(item.slide_id),
            inherited_values(self.tiles.written[item.slide_id]),
        )  # fmt: skip
        tiles = self.count_tiles(item.slide_id, spans)
        scopes = tuple(scope for scope in self.scopes if scope in missing.scopes)
        return SlideTask(item.slide_id, fingerprint, (work,), tiles, tiles, scopes=scopes)

    def before_tasks(self, run: Run, tasks: Sequence[SlideTask]) -> None:
        """Write encoder.json, or refuse features made otherwise."""
        claim_encoder(self.dataset, run, self.tile_px, self.config, self.encoder_record)
        if tasks:
            print_line(f"cache: device: {self.config.device}, workers: {self.engine.workers}")

    def make_bundles(
        self, tasks: Sequence[SlideTask], engine: EngineConfig
    ) -> list[list[SlideTask]]:
        """See `_tiles_per_bundle`."""
        most_tiles = _tiles_per_bundle(tasks, self.device, engine)
        return bundle_tasks(sort_dearest_first(tasks), most_tiles)

    def after_tasks(self, runs: Sequence[Run], summary: Summary, engine: EngineConfig) -> None:
        """Say so where the weights are random."""
        if self.encoder_record["random_weights"]:
            summary.stage += f" ({self.config.encoder} with RANDOM weights)"

    @property
    def output_path(self) -> Path:
        """The folder of the encoder's features."""
        return self.dataset.features_dir(self.tile_px, self.config.encoder, self.config.view)


def cache(
    dataset: Dataset, config: CacheConfig, engine: EngineConfig, *, dry_run: bool = False
) -> int:
    """Compute and store the features that are missing; returns the exit status.

    `dry_run` computes nothing, needs no weights, and prints what would be: files, bytes, hours.
    """
    stage = CacheStage(dataset, config, engine)
    if dry_run:
        return _print_missing(stage)
    stage.check_inputs()
    return run_stage(stage, stage.engine)


def _print_missing(stage: CacheStage) -> int:
    """Print what the stage would write, by kind of features."""
    # By the same rule as a run's: what a dry run counts is what a run would write.
    ledger = Ledger.read(stage.dataset, STAGE)
    tiles, files = dict.fromkeys(stage.config.kinds, 0), dict.fromkeys(stage.config.kinds, 0)
    for slide in stage.slides:
        missing = stage.find_missing(slide, stage.item_fingerprint(slide), ledger)
        for span, scopes in missing.spans.items():
            for scope in scopes:
                kind = stage.kind_of_scope[scope]
                tiles[kind] += stage.count_tiles(slide.slide_id, [span])
                files[kind] += 1
    workers = stage.engine.workers or 1
    print_plan(stage.dataset, stage.config, stage.tile_px, tiles, files, workers=workers)
    return 0
