"""The `cache` stage: an encoder's CLS and patch tokens for the named selections."""

import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.console import say
from common.errors import UserError
from pipeline.dataset import (
    BLOCK_ROWS,
    Dataset,
    Entry,
    Run,
    candidate_count,
    commit_json,
    committed_shards,
    covered_blocks,
    fingerprint,
    identity_value,
    read_journal,
    standing,
)
from pipeline.dataset.features.store import refuse_other_features
from pipeline.features.bundle import Work, cache_bundle, lacking_scopes, loaded
from pipeline.features.config import STAGE, VERSION, CacheConfig
from pipeline.features.device import gpu_count, stage_device
from pipeline.features.plan import print_plan
from pipeline.features.views import check_view, view_software
from pipeline.run.engine import EngineConfig, SlideTask, bundled, count_workers, dearest_first
from pipeline.run.stage import Summary, report_summary, run_bundled_stage, stage_versions, stands
from pipeline.tiles.stage import missing_runs, needed_blocks, on_disk, withdrawn

if TYPE_CHECKING:
    from model.encoders import Encoder

_TILES_A_BUNDLE = {"cpu": 256, "cuda": 100_000}
"""About two minutes' work, so that a GPU never waits for the scheduler between slides."""
_BUNDLES_A_WORKER = 4


_FIXED = frozenset(
    {"weights_sha256", "compute_dtype", "view", "dim", "tokens_shape", "resize", "mean", "std"}
)
"""What of encoder.json must stay as it is; hub id and software versions may differ."""


@dataclass(frozen=True)
class Missing:
    """A slide's missing features: its fingerprint, the runs of blocks, how many tiles.

    `lost` are the lines that take back files which are gone and whose blocks others hold.
    """

    slide_id: str
    mark: str
    work: Work
    tiles: int
    lost: tuple[Entry, ...] = ()


def cache(
    dataset: Dataset, config: CacheConfig, engine: EngineConfig, *, dry_run: bool = False
) -> int:
    """Compute and store the features that are missing; returns the exit status.

    `dry_run` computes nothing and prints what would be: files, bytes, hours.
    """
    config = config.resolved()
    check_view(config.view)
    tile_px = config.tile_px or int(identity_value(dataset, "tile_px"))
    needs = needed_blocks(dataset, config.selections)
    config = replace(config, device=stage_device(config.device, engine))
    engine = _on_devices(engine, config.device)
    config = replace(config, threads=_worker_threads(engine))
    shards = committed_shards(dataset, tile_px)
    if dry_run:
        return _plan(dataset, config, engine, tile_px, needs, shards)
    _require_tiles(dataset, tile_px, needs, shards)
    record = _encoder_record(dataset, tile_px, config)
    summary = Summary(STAGE)
    weights = record["weights_sha256"]
    versions = stage_versions("torch", "torchvision", "timm")
    with Run(dataset, STAGE, versions, device=config.device) as run:
        missing = _missing(dataset, config, tile_px, needs, shards, weights)
        missing = _withdraw(run, missing, engine)
        summary.skipped = len(needs) - len(missing)
        _claim_encoder(dataset, run, tile_px, config, record)
        mine = [one for one in missing if engine.takes(one.slide_id)]
        tasks = [_task(dataset, run, config, tile_px, one, weights) for one in mine]
        if tasks:
            say(f"cache: device: {config.device}, workers: {engine.workers}")
        bundles = bundled(dearest_first(tasks), _bundle_tiles(tasks, config, engine))
        run_bundled_stage(run, cache_bundle, bundles, engine, summary, "tiles")
    if record["random_weights"]:
        summary.stage += f" ({config.encoder} with RANDOM weights)"
    folder = dataset.features_dir(tile_px, config.encoder, config.view)
    return report_summary(summary, folder, "tiles")


def _plan(
    dataset: Dataset,
    config: CacheConfig,
    engine: EngineConfig,
    tile_px: int,
    needs: dict[str, set[int]],
    shards: dict[str, list[Entry]],
) -> int:
    """Print what the stage would write; nothing is written, weights need not be at hand."""
    stood = _standing_record(config.file(dataset, tile_px, "cls"))
    weights = str(stood["weights_sha256"]) if stood else ""
    missing = _missing(dataset, config, tile_px, needs, shards, weights)
    tiles = {kind: sum(_tiles_of(one, kind, dataset) for one in missing) for kind in config.kinds}
    files = {kind: sum(kind in k for one in missing for k in one.work.values())
             for kind in config.kinds}  # fmt: skip
    print_plan(dataset, config, tile_px, tiles, files, workers=engine.workers or 1)
    return 0


def _tiles_of(missing: Missing, kind: str, dataset: Dataset) -> int:
    rows = candidate_count(dataset, missing.slide_id)
    return sum(
        min(stop * BLOCK_ROWS, rows) - start * BLOCK_ROWS
        for (start, stop), kinds in missing.work.items()
        if kind in kinds
    )


def _on_devices(engine: EngineConfig, device: str) -> EngineConfig:
    """With its number of workers; here one a GPU, or one on all cores, where nothing is said."""
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


def _worker_threads(engine: EngineConfig) -> int | None:
    """A worker's share of its host's cores; None where others started the workers."""
    return None if engine.scheduler else engine.threads


def _bundle_tiles(tasks: list[SlideTask], config: CacheConfig, engine: EngineConfig) -> int:
    """Tiles a bundle: some minutes' work, but several bundles for every worker."""
    most = _TILES_A_BUNDLE["cuda" if config.device == "cuda" else "cpu"]
    share = sum(task.units for task in tasks) // (_BUNDLES_A_WORKER * (engine.workers or 1))
    return max(1, min(most, share))


def _require_tiles(
    dataset: Dataset,
    tile_px: int,
    needs: dict[str, set[int]],
    shards: dict[str, list[Entry]],
) -> None:
    for slide_id, blocks in needs.items():
        if not blocks <= covered_blocks(shards.get(slide_id, ())):
            raise UserError(
                f"slide {slide_id}: selected tiles are not in {dataset.tiles_dir(tile_px)}; "
                f"run `python -m pipeline tile --dataset {dataset.root} --tile-px {tile_px}` first"
            )


def _encoder_record(dataset: Dataset, tile_px: int, config: CacheConfig) -> dict[str, Any]:
    """encoder.json for these features; from the one that stands where that is certain."""
    for kind in config.kinds:
        path = config.file(dataset, tile_px, kind)
        stood = _standing_record(path)
        if stood is not None:
            refuse_other_features(path, stood, {"compute_dtype": config.dtype})
            if stood["weights"] == config.weights and not Path(config.weights).exists():
                return stood
    return _describe(loaded(config.encoder, config.weights, "cpu", "float32"), tile_px, config)


def _standing_record(path: Path) -> dict[str, Any] | None:
    """encoder.json as it stands, or None."""
    try:
        return dict(json.loads(path.read_text())) if path.exists() else None
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}): remove it and run `cache` again") from error


def _describe(encoder: "Encoder", tile_px: int, config: CacheConfig) -> dict[str, Any]:
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
    }


def _claim_encoder(
    dataset: Dataset, run: Run, tile_px: int, config: CacheConfig, record: dict[str, Any]
) -> None:
    """Write and journal encoder.json of each kind, or refuse features made otherwise."""
    journal = read_journal(dataset, STAGE)
    for kind in config.kinds:
        path = config.file(dataset, tile_px, kind)
        scope = f"{config.scope(tile_px, kind)}/{path.name}"
        mark = fingerprint(stage=STAGE, version=VERSION, record=record)
        named = stands(dataset, standing(journal, scope).get(path.name, []), mark)
        stood = _standing_record(path)
        # The same record with no line: a run was killed in between, or an older release wrote it.
        if stood is None or (stood == record and named is None):
            file = commit_json(dataset, run.run_id, path, record)
            run.append([Entry(path.name, "done", mark, scope=scope, files=(file,))])
        else:
            refuse_other_features(path, stood, {k: v for k, v in record.items() if k in _FIXED})


def _withdraw(run: Run, missing: list[Missing], engine: EngineConfig) -> list[Missing]:
    """Journal the lines that take back lost files; returns the slides that lack something."""
    lines = [line for one in missing if engine.takes(one.slide_id) for line in one.lost]
    if lines:
        run.append(lines)
    return [one for one in missing if one.work]


def _missing(
    dataset: Dataset,
    config: CacheConfig,
    tile_px: int,
    needs: dict[str, set[int]],
    shards: dict[str, list[Entry]],
    weights_sha256: str,
) -> list[Missing]:
    """What each slide lacks; slides that lack nothing and lost nothing are left out."""
    journal = read_journal(dataset, STAGE)
    scopes = {kind: standing(journal, config.scope(tile_px, kind)) for kind in config.kinds}
    found = []
    for slide_id, blocks in needs.items():
        parent = shards[slide_id][-1].fingerprint if slide_id in shards else ""
        mark = fingerprint(
            stage=STAGE, version=VERSION, parent=parent, weights=weights_sha256,
            compute_dtype=config.dtype, view=config.view,
        )  # fmt: skip
        work: Work = {}
        gone: list[Entry] = []
        for kind in config.kinds:
            stood, lost = on_disk(dataset, scopes[kind].get(slide_id, []), mark)
            runs = missing_runs(blocks, stood)
            gone += withdrawn(lost, stood | blocks, runs)
            for span in runs:
                work.setdefault((span.start, span.stop), []).append(kind)
        if work or gone:
            rows = candidate_count(dataset, slide_id)
            spans = [(start * BLOCK_ROWS, min(stop * BLOCK_ROWS, rows)) for start, stop in work]
            tiles = sum(b - a for a, b in spans)
            found.append(Missing(slide_id, mark, work, tiles, tuple(gone)))
    return found


def _task(
    dataset: Dataset, run: Run, config: CacheConfig, tile_px: int, missing: Missing, weights: str
) -> SlideTask:
    arguments = (
        str(dataset.root), run.run_id, missing.slide_id, config, tile_px, missing.work,
        missing.mark, weights,
    )  # fmt: skip
    return SlideTask(
        missing.slide_id, missing.mark, arguments, missing.tiles, missing.tiles,
        scopes=lacking_scopes(config, tile_px, missing.work.values()),
    )  # fmt: skip
