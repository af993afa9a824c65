"""The `tile` stage: the tile shards that the named selections need, as PNG tars or Zarr arrays."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from common.console import EXIT_OK, say
from common.errors import UserError
from pipeline.dataset import (
    BLOCK_ROWS,
    Dataset,
    Entry,
    FileRecord,
    Run,
    Slide,
    candidate_count,
    claim_identity,
    commit_bytes,
    commit_file,
    covered_blocks,
    covering_blocks,
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
from pipeline.dataset.tiles.zarr_shard import commit_zarr
from pipeline.run.engine import EngineConfig, SlideTask, report_progress
from pipeline.run.stage import Summary, report_summary, run_stage, stage_versions, stands
from pipeline.slides.colour import to_srgb
from pipeline.slides.cost import tile_cost
from pipeline.slides.open import open_slide
from pipeline.slides.reader import SlideReader
from pipeline.slides.region import cut_tiles
from pipeline.slides.resolution import ReadPlan, plan_read
from pipeline.slides.staging import local_slide
from pipeline.tiles.config import TileConfig
from pipeline.tiles.spool import Spool
from pipeline.tissue.stage import imported_source, tissue_fingerprint

STAGE, VERSION = "tile", 2
IMPORTED_TILES = "imported tiles"
"""Grid, in the identity, of a dataset whose slides are folders of pictures."""
_PROGRESS_TILES = 256

Tile = npt.NDArray[np.uint8]


def tile(dataset: Dataset, config: TileConfig, engine: EngineConfig) -> int:
    """Write the tile shards that are missing; returns the exit status."""
    if read_identity(dataset).get("grid") == IMPORTED_TILES:
        return _nothing_to_cut(dataset, config)
    versions = stage_versions("imagecodecs", "isal")
    needs = _needs(dataset, config.selections)
    tile_px = _output_px(dataset, config)
    identity = claim_identity(dataset, config.identity(), stage=STAGE, versions=versions)
    slides = {slide.slide_id: slide for slide in read_slides(dataset)}
    known = standing(read_journal(dataset, STAGE), str(tile_px))
    parents = standing(read_journal(dataset, "tissue"))
    # Workers are told the size, the scope of their lines even where they can read no identity.
    told = replace(config, tile_px=tile_px)
    summary = Summary(STAGE)
    tasks: list[SlideTask] = []
    lines: list[Entry] = []
    with Run(dataset, STAGE, versions) as run:
        for slide_id, need in needs.items():
            slide = _slide(dataset, slides, slide_id)
            entries = parents.get(slide_id, [])
            source = imported_source(entries)
            mark = tile_fingerprint(slide, identity, tile_px, source)
            parent = stands(dataset, entries, tissue_fingerprint(slide, identity, source))
            if reason := _unfit(dataset, slide, parent, need):
                lines.append(Entry(slide_id, "failed", mark, reason, scope=str(tile_px)))
                continue
            stood, lost = on_disk(dataset, known.get(slide_id, []), mark)
            runs = missing_runs(need.blocks, stood)
            lines += withdrawn(lost, stood | need.blocks, runs)
            if not runs:
                lines += _settled(known.get(slide_id, []))
                summary.skipped += 1
                continue
            arguments = (str(dataset.root), run.run_id, slide, runs, mark, told)
            rows = candidate_count(dataset, slide_id)
            units = sum(min(s.stop * BLOCK_ROWS, rows) - s.start * BLOCK_ROWS for s in runs)
            cost = units * tile_cost(slide, identity["mpp"], tile_px)
            scopes = (str(tile_px),)
            tasks.append(SlideTask(slide_id, mark, arguments, cost, units, scopes=scopes))
        _journal(run, [one for one in lines if engine.takes(one.slide_id)], summary)
        run_stage(run, tile_slide, tasks, engine, summary, "tiles")
    return report_summary(summary, dataset.tiles_dir(tile_px), "tiles")


def _nothing_to_cut(dataset: Dataset, config: TileConfig) -> int:
    """Imported tiles are there from the start, and no larger ones can be cut."""
    if config.tile_px not in (None, read_identity(dataset)["tile_px"]):
        raise UserError(
            f"--tile-px {config.tile_px}: {dataset.root} holds imported tiles, no slides"
        )
    say(f"tile: {dataset.root} holds imported tiles: nothing to cut (lost ones: `import tiles`)")
    return EXIT_OK


def _output_px(dataset: Dataset, config: TileConfig) -> int:
    own = int(read_identity(dataset)["tile_px"])
    tile_px = config.tile_px or own
    if tile_px < own or (tile_px - own) % 2:
        raise UserError(
            f"--tile-px {tile_px}: expected {own}, the dataset's tile size, or more by an even "
            f"number of pixels (such as {own + 32}), so that the centres coincide"
        )
    return tile_px


@dataclass
class _Need:
    """What selections need of a slide; `selection` is the one that names its last rank."""

    blocks: set[int] = field(default_factory=set)
    last: int = -1
    selection: str = ""


def _needs(dataset: Dataset, selections: tuple[str, ...]) -> dict[str, _Need]:
    names = selections or tuple(dataset.selection_names())
    if not names:
        raise UserError(f"{dataset.root} has no selection; run `python -m pipeline select` first")
    needs: dict[str, _Need] = {}
    for name in names:
        for slide_id, ranks in read_selection(dataset, name).items():
            need = needs.setdefault(slide_id, _Need())
            need.blocks.update(np.unique(ranks // BLOCK_ROWS).tolist())
            if ranks[-1] > need.last:
                need.last, need.selection = int(ranks[-1]), name
    return {slide_id: needs[slide_id] for slide_id in sorted(needs)}


def needed_blocks(dataset: Dataset, selections: tuple[str, ...]) -> dict[str, set[int]]:
    """Per slide, the blocks that hold a selected rank."""
    return {slide_id: need.blocks for slide_id, need in _needs(dataset, selections).items()}


def _slide(dataset: Dataset, slides: dict[str, Slide], slide_id: str) -> Slide:
    if slide_id not in slides:
        raise UserError(
            f"slide {slide_id} of a selection is not in {dataset.slides_file}: run `scan` with it, "
            "or `select` again"
        )
    return slides[slide_id]


def _unfit(dataset: Dataset, slide: Slide, parent: Entry | None, need: _Need) -> str:
    """Why a slide's candidates must not be cut from, "" where they may.

    `parent` is the standing line of `tissue` for the slide as it is now. Without one the
    candidates on disk are of a former slide or resolution, and the fingerprint would hide that.
    """
    if slide.status != "ok":
        return f"{slide.status} by scan ({slide.reason}): mend that and scan, or `select` again"
    if parent is None:
        return (
            f"{dataset.candidates_file(slide.slide_id)} is not of the slide as it is now: "
            "run `tissue` (or the `import` that made it), then `select` again"
        )
    if parent.outcome != "done":
        return f"{parent.outcome} by tissue ({parent.reason}): `select` again, without this slide"
    # The line that stands says it: the footers of 100,000 files take minutes.
    rows = parent.counts.get("candidate tiles") or candidate_count(dataset, slide.slide_id)
    if need.last >= rows:
        return (
            f"selection '{need.selection}' names rank {need.last} of {rows} candidates: it was "
            "made from former ones, `select` again"
        )
    return ""


def _settled(entries: list[Entry]) -> list[Entry]:
    """The lines that take back a slide's failures, where nothing is missing any more.

    It may have been refused for its selection or tissue alone; no tile will be cut that mends it.
    """
    failed = (entry for entry in entries if entry.outcome == "failed")
    return [replace(one, outcome="pruned", reason="nothing is missing") for one in failed]


def _journal(run: Run, lines: list[Entry], summary: Summary) -> None:
    """Journal, before any tile is cut, the slides that may not be and what is taken back."""
    if lines:
        run.append(lines)
    for entry in lines:
        if entry.outcome == "failed":
            summary.add(entry)


def on_disk(dataset: Dataset, entries: list[Entry], mark: str) -> tuple[set[int], list[Entry]]:
    """Blocks of a slide and scope on disk with that fingerprint, and the lines of lost shards."""
    there: list[Entry] = []
    lost: list[Entry] = []
    for entry in entries:
        if entry.outcome == "done" and entry.fingerprint == mark:
            (there if files_present(dataset, entry) else lost).append(entry)
    return covered_blocks(there), lost


def withdrawn(lost: list[Entry], held: set[int], runs: list[range]) -> list[Entry]:
    """The `pruned` lines of lost shards whose blocks others hold, or will once `runs` are written.

    Readers take the last shard by first rank: a lost one's line would hide the shard that holds
    its blocks now. None is due where a run writes the very same shard, nor where nothing else
    holds a block: that loss stays for `verify` to tell.
    """
    lines = []
    for entry in lost:
        own = covering_blocks(entry.start, entry.stop)
        if own not in runs and not held.isdisjoint(own):
            lines.append(
                Entry(entry.slide_id, "pruned", entry.fingerprint, "its files are lost",
                      scope=entry.scope, start=entry.start, stop=entry.stop)
            )  # fmt: skip
    return lines


def missing_runs(needed: set[int], stood: set[int]) -> list[range]:
    """The missing blocks as contiguous runs: each becomes one shard."""
    runs: list[range] = []
    for block in sorted(needed - stood):
        if runs and runs[-1].stop == block:
            runs[-1] = range(runs[-1].start, block + 1)
        else:
            runs.append(range(block, block + 1))
    return runs


def tile_fingerprint(
    slide: Slide, identity: dict[str, Any], tile_px: int | None = None, source: str = ""
) -> str:
    """Fingerprint of a slide's tile shards; the rank range is not part of it.

    `source` is what the slide's candidates were imported from, if they were.
    """
    values = {key: identity[key] for key in ("resampler", "icc", "codec")}
    if tile_px not in (None, identity["tile_px"]):
        values["around"] = tile_px
    parent = tissue_fingerprint(slide, identity, source)
    return fingerprint(stage=STAGE, version=VERSION, parent=parent, **values)


def tile_slide(
    root: str, run_id: str, slide: Slide, runs: list[range], mark: str, config: TileConfig
) -> list[Entry]:
    """Write one slide's missing shards; a read error fails the slide with its coordinates."""
    cv2.setNumThreads(1)
    dataset = Dataset(Path(root))
    scope = str(config.tile_px or "")
    entries: list[Entry] = []
    folder = Path(config.spool) if config.spool else dataset.staging_dir(run_id)
    try:
        job = _Job(dataset, run_id, slide, mark, config, _output_px(dataset, config))
        scope = str(job.tile_px)
        with Spool(folder) as spool:
            began = time.monotonic()
            spans = job.fill(spool, runs)
            read_seconds = time.monotonic() - began
            # A loop, not a list: shards that stand before a later one fails are journalled.
            for span in spans:
                entries += [job.write_shard(spool, span)]
            entries[0] = replace(entries[0], seconds=entries[0].seconds + read_seconds)
    except UserError as error:
        entries.append(Entry(slide.slide_id, "failed", mark, str(error), scope=scope))
    return entries


@dataclass(frozen=True)
class _Job:
    """One slide's tiles with everything that making them needs."""

    dataset: Dataset
    run_id: str
    slide: Slide
    mark: str
    config: TileConfig
    tile_px: int

    def fill(self, spool: Spool, runs: list[range]) -> list[range]:
        """Encode the tiles of all runs of blocks, in one pass; returns the runs of ranks."""
        candidates = read_candidates(self.dataset, self.slide.slide_id)
        rows = candidates.num_rows
        spans = [range(s.start * BLOCK_ROWS, min(s.stop * BLOCK_ROWS, rows)) for s in runs]
        ranks = np.concatenate([np.arange(span.start, span.stop) for span in spans])
        x = candidates["x_level0"].to_numpy()[ranks]
        y = candidates["y_level0"].to_numpy()[ranks]
        encode = self.config.encoder()
        folder = self.dataset.staging_dir(self.run_id)
        with (
            local_slide(self.slide, self.config.stage_in, folder) as path,
            open_slide(path, self.slide.reader) as reader,
        ):
            done = 0
            for done, (index, image) in enumerate(self._tiles(reader, x, y), 1):
                spool.put(int(ranks[index]), encode(image))
                if done % _PROGRESS_TILES == 0:
                    report_progress(self.slide.slide_id, _PROGRESS_TILES)
        return spans

    def _tiles(
        self, reader: SlideReader, x: npt.NDArray[np.float64], y: npt.NDArray[np.float64]
    ) -> Iterator[tuple[int, Tile]]:
        plan, border = self._plan(reader)
        tiles = cut_tiles(reader, plan, x - border, y - border, self.tile_px, self.config.resampler)
        if self.config.icc == "ignore":
            yield from tiles
            return
        recolour = to_srgb(reader.icc_profile)
        for index, image in tiles:
            yield index, recolour(image)

    def _plan(self, reader: SlideReader) -> tuple[ReadPlan, float]:
        """How to read, and how far, in level-0 pixels, a tile reaches beyond its grid cell."""
        identity = read_identity(self.dataset)
        own = int(identity["tile_px"])
        plan = plan_read(
            reader.levels, float(self.slide.mpp or 0), identity["mpp"],
            identity["mpp_tolerance"], own,
        )  # fmt: skip
        border = (self.tile_px - own) / 2 * plan.factor * plan.downsample
        return replace(plan, window=self.tile_px * plan.factor), border

    def write_shard(self, spool: Spool, span: range) -> Entry:
        """Write the tiles of a run of ranks as one shard, in rank order."""
        began = time.monotonic()
        encoded = (spool.take(rank) for rank in span)
        write = self._write_zarr if self.config.format == "zarr" else self._write_tar
        return Entry(
            self.slide.slide_id, "done", self.mark, scope=str(self.tile_px), start=span.start,
            stop=span.stop, files=write(span, encoded), counts={"tiles": len(span)},
            seconds=time.monotonic() - began,
        )  # fmt: skip

    def _write_tar(self, span: range, pngs: Iterator[bytes]) -> tuple[FileRecord, ...]:
        tar = self._path(span, "tar")
        index = bytearray()

        def write(file: HashingFile) -> None:
            index.extend(write_tar(file, self.slide.slide_id, span.start, pngs))

        shard = commit_file(self.dataset, self.run_id, tar, write)
        idx = commit_bytes(self.dataset, self.run_id, tar.with_suffix(".idx"), bytes(index))
        return shard, idx

    def _write_zarr(self, span: range, chunks: Iterator[bytes]) -> tuple[FileRecord, ...]:
        final = self._path(span, "zarr")
        return commit_zarr(self.dataset, self.run_id, final, self.tile_px, chunks)

    def _path(self, span: range, kind: str) -> Path:
        name = ShardName(self.slide.slide_id, span.start, span.stop, kind)
        return self.dataset.tiles_dir(self.tile_px) / str(name)
