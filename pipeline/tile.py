"""The `tile` stage: the PNG shards that the named selections need."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from model.errors import UserError
from pipeline.dataset import (
    BLOCK_ROWS,
    Dataset,
    Entry,
    Run,
    Slide,
    candidate_count,
    claim_identity,
    commit_bytes,
    commit_file,
    covered_blocks,
    encode_png,
    files_present,
    fingerprint,
    read_candidates,
    read_identity,
    read_journal,
    read_selection,
    read_slides,
    standing,
    write_tar,
)
from pipeline.dataset.commit import HashingFile
from pipeline.dataset.layout import ShardName
from pipeline.engine import EngineConfig, SlideTask, report_progress
from pipeline.slides.open import open_slide
from pipeline.slides.region import read_tile
from pipeline.slides.resolution import plan_read
from pipeline.stage import Summary, report_summary, run_stage, stage_versions
from pipeline.tissue.stage import tissue_fingerprint

STAGE, VERSION = "tile", 1
_PROGRESS_TILES = 256


@dataclass(frozen=True)
class TileConfig:
    """Which selections to write tiles for (all that stand, where none is named)."""

    selections: tuple[str, ...] = ()

    def identity(self) -> dict[str, Any]:
        """The values that make it this dataset and no other."""
        return {"resampler": "area", "icc": "ignore", "codec": "png"}


def tile(dataset: Dataset, config: TileConfig, engine: EngineConfig) -> int:
    """Write the tile shards that are missing; returns the exit status."""
    versions = stage_versions()
    needs = needed_blocks(dataset, config.selections)
    identity = claim_identity(dataset, config.identity(), stage=STAGE, versions=versions)
    slides = {slide.slide_id: slide for slide in read_slides(dataset)}
    tile_px = int(identity["tile_px"])
    known = standing(read_journal(dataset, STAGE), str(tile_px))
    summary = Summary(STAGE)
    tasks = []
    with Run(dataset, STAGE, versions) as run:
        for slide_id, blocks in needs.items():
            slide = slides[slide_id]
            mark = tile_fingerprint(slide, identity)
            stood = standing_blocks(dataset, known.get(slide_id, []), mark)
            runs = missing_runs(blocks, stood)
            if not runs:
                summary.skipped += 1
                continue
            arguments = (str(dataset.root), run.run_id, slide, runs, mark)
            rows = candidate_count(dataset, slide_id)
            units = sum(min(s.stop * BLOCK_ROWS, rows) - s.start * BLOCK_ROWS for s in runs)
            tasks.append(SlideTask(slide_id, mark, arguments, units, units))
        run_stage(run, tile_slide, tasks, engine, summary, "tiles")
    return report_summary(summary, dataset.tiles_dir(tile_px), "tiles")


def needed_blocks(dataset: Dataset, selections: tuple[str, ...]) -> dict[str, set[int]]:
    """Per slide, the blocks that hold a selected rank."""
    names = selections or tuple(dataset.selection_names())
    if not names:
        raise UserError(f"{dataset.root} has no selection; run `python -m pipeline select` first")
    needs: dict[str, set[int]] = {}
    for name in names:
        for slide_id, ranks in read_selection(dataset, name).items():
            needs.setdefault(slide_id, set()).update(np.unique(ranks // BLOCK_ROWS).tolist())
    return {slide_id: needs[slide_id] for slide_id in sorted(needs)}


def standing_blocks(dataset: Dataset, entries: list[Entry], mark: str) -> set[int]:
    """Blocks of one slide and scope that are on disk with the right fingerprint."""
    done = [
        entry
        for entry in entries
        if entry.outcome == "done" and entry.fingerprint == mark and files_present(dataset, entry)
    ]
    return covered_blocks(done)


def missing_runs(needed: set[int], stood: set[int]) -> list[range]:
    """The missing blocks as contiguous runs: each becomes one shard."""
    runs: list[range] = []
    for block in sorted(needed - stood):
        if runs and runs[-1].stop == block:
            runs[-1] = range(runs[-1].start, block + 1)
        else:
            runs.append(range(block, block + 1))
    return runs


def tile_fingerprint(slide: Slide, identity: dict[str, Any]) -> str:
    """Fingerprint of a slide's tile shards; the rank range is not part of it."""
    values = {key: identity[key] for key in ("resampler", "icc", "codec")}
    return fingerprint(
        stage=STAGE, version=VERSION, parent=tissue_fingerprint(slide, identity), **values
    )


def tile_slide(root: str, run_id: str, slide: Slide, runs: list[range], mark: str) -> list[Entry]:
    """Write one slide's missing shards; a read error fails the slide with its coordinates."""
    dataset = Dataset(Path(root))
    tile_px = int(read_identity(dataset)["tile_px"])
    entries: list[Entry] = []
    try:
        # A loop, not a list: shards that stand before a later one fails are journalled.
        for span in runs:
            entries += [_write_shard(dataset, run_id, slide, span, tile_px, mark)]
    except UserError as error:
        entries.append(Entry(slide.slide_id, "failed", mark, str(error), scope=str(tile_px)))
    return entries


def _write_shard(
    dataset: Dataset, run_id: str, slide: Slide, span: range, tile_px: int, mark: str
) -> Entry:
    began = time.monotonic()
    candidates = read_candidates(dataset, slide.slide_id)
    start = span.start * BLOCK_ROWS
    stop = min(span.stop * BLOCK_ROWS, candidates.num_rows)
    xs = candidates["x_level0"].to_numpy()[start:stop]
    ys = candidates["y_level0"].to_numpy()[start:stop]
    pngs = _cut_tiles(dataset, slide, xs, ys, tile_px)
    name = ShardName(slide.slide_id, start, stop, "tar")
    tar = dataset.tiles_dir(tile_px) / str(name)
    index = bytearray()

    def write(file: HashingFile) -> None:
        index.extend(write_tar(file, slide.slide_id, start, pngs))

    shard = commit_file(dataset, run_id, tar, write)
    idx = commit_bytes(dataset, run_id, tar.with_suffix(".idx"), bytes(index))
    return Entry(
        slide.slide_id, "done", mark, scope=str(tile_px), start=start, stop=stop,
        files=(shard, idx), counts={"tiles": stop - start}, seconds=time.monotonic() - began,
    )  # fmt: skip


def _cut_tiles(
    dataset: Dataset, slide: Slide, xs: np.ndarray, ys: np.ndarray, tile_px: int
) -> list[bytes]:
    """Encoded tiles in rank order; read in the order they lie in the slide."""
    identity = read_identity(dataset)
    pngs = [b""] * len(xs)
    with open_slide(Path(slide.path), slide.reader) as reader:
        plan = plan_read(
            reader.levels, float(slide.mpp or 0), identity["mpp"], identity["mpp_tolerance"],
            tile_px,
        )  # fmt: skip
        for done, index in enumerate(np.lexsort((xs, ys)), 1):
            pngs[index] = encode_png(read_tile(reader, plan, xs[index], ys[index], tile_px))
            if done % _PROGRESS_TILES == 0:
                report_progress(slide.slide_id, _PROGRESS_TILES)
    return pngs
