"""The `cache` stage: an encoder's CLS and patch tokens for the named selections."""

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from model.errors import UserError
from pipeline.dataset import (
    BLOCK_ROWS,
    Dataset,
    Entry,
    FileRecord,
    Run,
    TileStore,
    commit_file,
    commit_json,
    committed_shards,
    covered_blocks,
    fingerprint,
    identity_value,
    read_journal,
    standing,
)
from pipeline.dataset.commit import HashingFile
from pipeline.dataset.layout import ShardName
from pipeline.engine import EngineConfig, SlideTask, report_progress
from pipeline.features.parquet import cls_table, open_writer, token_table, write_blocks
from pipeline.features.store import encoder_file, feature_scope
from pipeline.stage import Summary, report_summary, run_stage, stage_versions
from pipeline.tile import missing_runs, needed_blocks, standing_blocks

if TYPE_CHECKING:
    from model.encoders import Encoder

STAGE, VERSION = "cache", 1
TOKENS = ("none", "float16")
DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class CacheConfig:
    """Which encoder, with which weights, for which selections (all, where none is named).

    `weights` is "hub", "hub:ID", a local file, or explicitly "random:SEED"; `tokens` says
    whether patch tokens are stored; `dtype` is that of the forward pass.
    """

    encoder: str
    weights: str = "hub"
    selections: tuple[str, ...] = ()
    tokens: str = "float16"
    dtype: str = "float32"
    batch: int = 32
    device: str = "auto"

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of features to store."""
        return ("cls",) if self.tokens == "none" else ("cls", f"tokens-{self.tokens}")


def cache(dataset: Dataset, config: CacheConfig, engine: EngineConfig) -> int:
    """Compute and store the features that are missing; returns the exit status."""
    tile_px = int(identity_value(dataset, "tile_px"))
    needs = needed_blocks(dataset, config.selections)
    _require_tiles(dataset, tile_px, needs)
    record = _encoder_record(dataset, tile_px, config)
    summary = Summary(STAGE)
    with Run(dataset, STAGE, stage_versions("torch", "torchvision", "timm")) as run:
        tasks = _tasks(dataset, run, config, tile_px, needs, record, summary)
        if tasks:
            _claim_encoder(dataset, run, tile_px, config, record)
        engine = EngineConfig(engine.workers or _device_count(config.device), engine.scheduler)
        run_stage(run, cache_slide, tasks, engine, summary, "tiles")
    if record["random_weights"]:
        summary.stage += f" ({config.encoder} with RANDOM weights)"
    return report_summary(
        summary, dataset.features_dir(tile_px, config.encoder), "tiles"
    )  # fmt: skip


def _require_tiles(dataset: Dataset, tile_px: int, needs: dict[str, set[int]]) -> None:
    shards = committed_shards(dataset, tile_px)
    for slide_id, blocks in needs.items():
        if not blocks <= covered_blocks(shards.get(slide_id, ())):
            raise UserError(
                f"slide {slide_id}: selected tiles are not in {dataset.tiles_dir(tile_px)}; "
                f"run `python -m pipeline tile --dataset {dataset.root}` first"
            )


def _encoder_record(dataset: Dataset, tile_px: int, config: CacheConfig) -> dict[str, Any]:
    """encoder.json for these features; from the one that stands where that is certain."""
    for kind in config.kinds:
        path = encoder_file(dataset, tile_px, config.encoder, "", kind)
        stood = _standing_record(path)
        if stood is not None:
            _refuse_other(path, stood, {"compute_dtype": config.dtype})
            if stood["weights"] == config.weights and not Path(config.weights).exists():
                return stood
    return _describe(_load(config.encoder, config.weights, "cpu", "float32"), tile_px, config)


def _standing_record(path: Path) -> dict[str, Any] | None:
    """encoder.json as it stands, or None."""
    return dict(json.loads(path.read_text())) if path.exists() else None


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
        "mean": list(spec.mean),
        "std": list(spec.std),
        "tile_px": tile_px,
        "view": "",
        "compute_dtype": config.dtype,
    }


def _refuse_other(path: Path, stood: dict[str, Any], wanted: dict[str, Any]) -> None:
    for key, value in wanted.items():
        if stood.get(key) != value:
            raise UserError(
                f"{path}: these features were made with {key} {stood.get(key)!r}, "
                f"{value!r} was asked for; use the former or another --dataset"
            )


def _claim_encoder(
    dataset: Dataset, run: Run, tile_px: int, config: CacheConfig, record: dict[str, Any]
) -> None:
    for kind in config.kinds:
        path = encoder_file(dataset, tile_px, config.encoder, "", kind)
        stood = _standing_record(path)
        if stood is None:
            commit_json(dataset, run.run_id, path, record)
        else:
            keys = ("weights_sha256", "compute_dtype", "view", "dim", "tokens_shape", "mean", "std")
            _refuse_other(path, stood, {key: record[key] for key in keys})


def _tasks(
    dataset: Dataset,
    run: Run,
    config: CacheConfig,
    tile_px: int,
    needs: dict[str, set[int]],
    record: dict[str, Any],
    summary: Summary,
) -> list[SlideTask]:
    journal = read_journal(dataset, STAGE)
    scopes = {
        kind: standing(journal, feature_scope(tile_px, config.encoder, "", kind))
        for kind in config.kinds
    }
    shards = committed_shards(dataset, tile_px)
    tasks = []
    for slide_id, blocks in needs.items():
        mark = fingerprint(
            stage=STAGE, version=VERSION, parent=shards[slide_id][-1].fingerprint,
            weights=record["weights_sha256"], compute_dtype=config.dtype, view="",
        )  # fmt: skip
        work: dict[tuple[int, int], list[str]] = {}
        for kind in config.kinds:
            stood = standing_blocks(dataset, scopes[kind].get(slide_id, []), mark)
            for span in missing_runs(blocks, stood):
                work.setdefault((span.start, span.stop), []).append(kind)
        if not work:
            summary.skipped += 1
            continue
        expected = record["weights_sha256"]
        arguments = (str(dataset.root), run.run_id, slide_id, config, tile_px, work, mark, expected)
        rows = max(entry.stop for entry in shards[slide_id])
        units = sum(min(stop * BLOCK_ROWS, rows) - start * BLOCK_ROWS for start, stop in work)
        tasks.append(SlideTask(slide_id, mark, arguments, units, units))
    return tasks


def cache_slide(
    root: str,
    run_id: str,
    slide_id: str,
    config: CacheConfig,
    tile_px: int,
    work: dict[tuple[int, int], list[str]],
    mark: str,
    weights_sha256: str,
) -> list[Entry]:
    """Compute and write one slide's missing features."""
    dataset = Dataset(Path(root))
    entries: list[Entry] = []
    try:
        encoder = _load(config.encoder, config.weights, _worker_device(config.device), config.dtype)
        if encoder.weights_sha256 != weights_sha256:
            raise UserError(f"weights '{config.weights}' changed while the stage ran; run it again")
        tiles = TileStore(dataset, tile_px)
        for (first, last), kinds in sorted(work.items()):
            job = _Job(dataset, run_id, slide_id, config, tile_px, encoder, tiles, mark)
            entries += job.write(range(first, last), kinds)
    except UserError as error:
        entries.append(Entry(slide_id, "failed", mark, str(error)))
    return entries


@dataclass(frozen=True)
class _Job:
    """One slide's features with everything that making them needs."""

    dataset: Dataset
    run_id: str
    slide_id: str
    config: CacheConfig
    tile_px: int
    encoder: "Encoder"
    tiles: TileStore
    mark: str

    def write(self, span: range, kinds: list[str]) -> list[Entry]:
        """Write the files of a run of blocks; tokens stream to disk, CLS waits in memory."""
        began = time.monotonic()
        cls: list[npt.NDArray[np.float32]] = []
        files: dict[str, FileRecord] = {}
        token_kind = next((kind for kind in kinds if kind != "cls"), None)
        stop = self._stop(span)
        start = span.start * BLOCK_ROWS
        if token_kind is None:
            cls.extend(part for part, _ in self._features(span, tokens=False))
        else:
            spec = self.encoder.spec
            schema = token_table(np.zeros((0, spec.num_tokens, spec.token_dim), np.float16)).schema

            def write_tokens(file: HashingFile) -> None:
                with open_writer(file, schema) as writer:
                    for part, tokens in self._features(span, tokens=True):
                        cls.append(part)
                        write_blocks(writer, token_table(tokens))

            path = self._path(token_kind, start, stop)
            files[token_kind] = commit_file(self.dataset, self.run_id, path, write_tokens)
        if "cls" in kinds:
            table = cls_table(start, np.concatenate(cls))

            def write_cls(file: HashingFile) -> None:
                with open_writer(file, table.schema) as writer:
                    write_blocks(writer, table)

            path = self._path("cls", start, stop)
            files["cls"] = commit_file(self.dataset, self.run_id, path, write_cls)
        seconds = time.monotonic() - began
        return [
            Entry(
                self.slide_id, "done", self.mark,
                scope=feature_scope(self.tile_px, self.config.encoder, "", kind),
                start=start, stop=stop, files=(record,), seconds=seconds,
                counts={"tiles": stop - start} if kind == kinds[0] else {},
            )
            for kind, record in files.items()
        ]  # fmt: skip

    def _path(self, kind: str, start: int, stop: int) -> Path:
        folder = self.dataset.features_dir(self.tile_px, self.config.encoder) / kind
        return folder / str(ShardName(self.slide_id, start, stop, "parquet"))

    def _stop(self, span: range) -> int:
        """The rank after the last tile of the run: the slide's last block may be short."""
        last = self.tiles.read_block_bytes(self.slide_id, span.stop - 1)
        return max(last) + 1

    def _features(
        self, span: range, *, tokens: bool
    ) -> Iterator[tuple[npt.NDArray[np.float32], npt.NDArray[np.float16]]]:
        """CLS and float16 tokens of whole blocks; the next batch decodes during the forward."""
        size = max(1, self.config.batch // BLOCK_ROWS)
        groups = [span[i : i + size] for i in range(0, len(span), size)]
        with ThreadPoolExecutor(1) as reader:
            pending = reader.submit(self._decode, groups[0])
            for following in [*groups[1:], None]:
                images = pending.result()
                if following is not None:
                    pending = reader.submit(self._decode, following)
                output = self.encoder.encode(images, tokens=tokens)
                stored = output.tokens.half().cpu().numpy() if output.tokens is not None else None
                report_progress(self.slide_id, len(images))
                yield output.cls.float().cpu().numpy(), stored  # type: ignore[misc]

    def _decode(self, blocks: range) -> npt.NDArray[np.uint8]:
        tiles: list[npt.NDArray[np.uint8]] = []
        for block in blocks:
            by_rank = self.tiles.read_block(self.slide_id, block)
            tiles.extend(by_rank[rank] for rank in sorted(by_rank))
        return np.stack(tiles)


@lru_cache(maxsize=1)
def _load(name: str, weights: str, device: str, dtype: str) -> "Encoder":
    """The encoder, kept by its process from slide to slide."""
    import torch

    from model.encoders import load_encoder

    return load_encoder(name, weights, device=device, dtype=getattr(torch, dtype))


def _device_count(device: str) -> int:
    """Workers to start: one a GPU, or a single one that uses all CPU cores."""
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: no CUDA device here; use --device cpu, or a GPU node")
    return max(1, torch.cuda.device_count()) if device != "cpu" else 1


def _worker_device(device: str) -> str:
    import torch
    from distributed import get_worker

    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        return "cpu"
    name = str(get_worker().name)
    return f"cuda:{int(name) % torch.cuda.device_count() if name.isdigit() else 0}"
