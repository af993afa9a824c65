"""The `tile` stage: the tile shards that the named selections need, as PNG tars or Zarr arrays."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from common.console import EXIT_OK, print_line
from common.errors import UserError
from common.files import hash_file
from pipeline.dataset import (
    BLOCK_ROWS,
    Dataset,
    DatasetKind,
    Entry,
    FileRecord,
    Ledger,
    Missing,
    Run,
    Selection,
    Slide,
    commit_bytes,
    commit_file,
    fingerprint_of,
    kind_of,
    read_identity,
    read_selection,
    read_selection_rows,
    read_slides,
    write_tar,
)
from pipeline.dataset.card import write_dataset_card
from pipeline.dataset.commit import HashingFile
from pipeline.dataset.journal import Outcome
from pipeline.dataset.layout import ShardName, ranks_of_blocks
from pipeline.dataset.lineage import CANDIDATES, SLIDE
from pipeline.dataset.tables.candidates import read_positions
from pipeline.dataset.tiles.store import with_first_crc
from pipeline.dataset.tiles.zarr_shard import commit_zarr
from pipeline.run.stage import Stage, run_stage
from pipeline.run.summary import Summary
from pipeline.run.tasks import SlideTask, collect_entries, report_progress
from pipeline.run.withdraw import LostResultError
from pipeline.run.workers import EngineConfig
from pipeline.slides.colour import to_srgb
from pipeline.slides.cost import tile_cost
from pipeline.slides.identity import recorded_state
from pipeline.slides.open import open_scanned
from pipeline.slides.reader import Level, SlideReader
from pipeline.slides.region import cut_tiles
from pipeline.slides.resolution import ReadPlan, plan_read
from pipeline.slides.staging import local_slide
from pipeline.tiles.config import TileConfig
from pipeline.tiles.spool import Spool
from pipeline.tissue.stage import STAGE as TISSUE
from pipeline.tissue.stage import (
    candidates_origin,
    candidates_sha256,
    count_candidates,
    imported_source,
    is_lost,
    is_same_origin,
    tissue_fingerprint,
)

STAGE, VERSION = "tile", 2
_PROGRESS_TILES = 256

Tile = npt.NDArray[np.uint8]


def _nothing_to_cut(dataset: Dataset, config: TileConfig) -> int:
    """Imported tiles are there from the start, and no larger ones can be cut."""
    if config.tile_px not in (None, read_identity(dataset)["tile_px"]):
        raise UserError(
            f"--tile-px {config.tile_px}: {dataset.root} contains imported tiles, no slides"
        )
    print_line(
        f"tile: {dataset.root} contains imported tiles: nothing to cut (lost ones: `import tiles`)"
    )
    return EXIT_OK


def _output_px(dataset: Dataset, config: TileConfig) -> int:
    dataset_px = int(read_identity(dataset)["tile_px"])
    tile_px = config.tile_px or dataset_px
    if tile_px < dataset_px or (tile_px - dataset_px) % 2:
        raise UserError(
            f"--tile-px {tile_px}: expected {dataset_px}, the dataset's tile size, or more by an "
            f"even number of pixels (such as {dataset_px + 32}), so that the centres coincide"
        )
    return tile_px


@dataclass
class _Need:
    """What selections need of a slide; `selection` is the one that names its last rank.

    `drawn_from` is what selections were drawn from (see `candidates_origin`), by selection.
    """

    blocks: set[int] = field(default_factory=set)
    last: int = -1
    selection: str = ""
    drawn_from: dict[str, str] = field(default_factory=dict)


def _needs_by_slide(
    dataset: Dataset,
    selections: tuple[str, ...],
    read: Callable[[Dataset, str], Selection] = read_selection,
) -> dict[str, _Need]:
    names = selections or tuple(dataset.selection_names())
    if not names:
        raise UserError(f"{dataset.root} has no selection; run `python -m pipeline select` first")
    needs: dict[str, _Need] = {}
    for name in names:
        for slide_id, ranks in read(dataset, name).items():
            need = needs.setdefault(slide_id, _Need())
            need.blocks.update(np.unique(ranks // BLOCK_ROWS).tolist())
            if ranks[-1] > need.last:
                need.last, need.selection = int(ranks[-1]), name
    # In one order, whatever the order of the selections.
    return {slide_id: needs[slide_id] for slide_id in sorted(needs)}


def _note_candidates(
    dataset: Dataset, selections: tuple[str, ...], needs: dict[str, _Need]
) -> None:
    """Add to the needs which candidates `select` drew from, of each selection that it wrote."""
    for name, origins in drawn_from(dataset, selections or tuple(dataset.selection_names())):
        for slide_id, origin in origins.items():
            if slide_id in needs:
                needs[slide_id].drawn_from[name] = origin


def drawn_from(dataset: Dataset, selections: Iterable[str]) -> Iterator[tuple[str, dict[str, str]]]:
    """What the ranks of each slide count in (see `candidates_origin`), of each selection.

    Selections that `select` did not write, or before it recorded this, are left out.
    """
    ledger = Ledger.read(dataset, "select")[""]
    for name in selections:
        entry = ledger.latest(name)
        # An import may have written a selection of this name since.
        if entry is None or not entry.files or not entry.values.get("candidates"):
            continue
        if hash_file(dataset.selection_file(name)) == entry.files[0].sha256:
            yield name, {slide: str(one) for slide, one in entry.values["candidates"].items()}


def _count_selected(
    dataset: Dataset, selections: tuple[str, ...], spans: Mapping[str, Sequence[range]]
) -> int:
    """How many selected ranks are in these spans of blocks, by slide."""
    inside: dict[str, list[npt.NDArray[np.int32]]] = {}
    for name in selections or tuple(dataset.selection_names()) if spans else ():
        for slide_id, ranks in read_selection_rows(dataset, name).items():
            for span in spans.get(slide_id, ()):
                edges = np.searchsorted(ranks, [span.start * BLOCK_ROWS, span.stop * BLOCK_ROWS])
                inside.setdefault(slide_id, []).append(ranks[edges[0] : edges[1]])
    # Selections may share ranks.
    return sum(len(np.unique(np.concatenate(parts))) for parts in inside.values())


def needed_blocks(dataset: Dataset, selections: tuple[str, ...]) -> dict[str, set[int]]:
    """Per slide, the blocks (of 16 ranks, from 0 up) that contain a selected rank.

    Raises `UserError` for a selection of slides or ranks that the dataset does not have.
    """
    return {
        slide_id: need.blocks for slide_id, need in _needs_by_slide(dataset, selections).items()
    }


def _reason_to_refuse(dataset: Dataset, slide: Slide, parent: Entry | None, need: _Need) -> str:
    """Why a slide's candidates must not be cut from, "" where they may.

    `parent` is the current line of `tissue` for the slide as it is now. Without one the
    candidates on disk are of a former slide or resolution, and the fingerprint would hide that.
    """
    if slide.status != "ok":
        return f"{slide.status} by scan ({slide.reason}): fix that and scan, or `select` again"
    if parent is None:
        return (
            f"{dataset.candidates_file(slide.slide_id)} is not of the slide as it is now: "
            "run `tissue` (or the `import` that made it), then `select` again"
        )
    if parent.outcome != "done":
        return f"{parent.outcome} by tissue ({parent.reason}): `select` again, without this slide"
    for selection, origin in need.drawn_from.items():
        if not is_same_origin(origin, candidates_origin(slide, parent)):
            return (
                f"selection '{selection}' was drawn from another file or other candidates than the "
                "slide's as they are now: `select` again"
            )
    try:
        rows = count_candidates(dataset, slide.slide_id, parent)
    except UserError as error:
        return str(error)
    if need.last >= rows:
        return (
            f"selection '{need.selection}' names rank {need.last} of {rows} candidates: it was "
            "made from former ones, `select` again"
        )
    return ""


def tile_fingerprint(
    slide: Slide, identity: dict[str, Any], tile_px: int | None = None, source: str = ""
) -> str:
    """Fingerprint of a slide's tile shards; the rank range is not part of it.

    `tile_px` is the tile side in px, by default the dataset's; `source` is what the slide's
    candidates were imported from, if they were.
    """
    values = {key: identity[key] for key in ("resampler", "icc", "codec")}
    if tile_px not in (None, identity["tile_px"]):
        values["around"] = tile_px
    if _was_interpolated(slide, identity):
        values["interpolated"] = False
    parent = tissue_fingerprint(slide, identity, source)
    return fingerprint_of(stage=STAGE, version=VERSION, parent=parent, **values)


def _was_interpolated(slide: Slide, identity: dict[str, Any]) -> bool:
    """Whether former versions cut the slide's tiles from a level that OpenSlide interpolates.

    Its downsample is not whole. Such tiles are made again; all others stay.
    """
    if slide.reader != "openslide" or slide.status != "ok" or not slide.mpp:
        return False
    kept = [
        Level(*level)
        for number, level in enumerate(slide.levels)
        if number == 0 or number not in slide.levels_left_out
    ]
    plan = plan_read(
        kept, slide.mpp, identity["mpp"], identity["mpp_tolerance"], int(identity["tile_px"])
    )
    return bool(kept[plan.level].downsample % 1)


def tile_slide(
    root: str, run_id: str, slide: Slide, spans: list[range], fingerprint: str, config: TileConfig,
    candidates_sha256: str = "", candidates: str = "",
) -> list[Entry]:  # fmt: skip
    """Write one slide's missing shards, on a worker; `spans` are ranges [start, stop) of blocks.

    A read error fails the slide with its coordinates. `candidates_sha256` is the sum that the
    slide's candidates had when they were written, '' where it is not known; `candidates` is their
    fingerprint, which the shards' lines state.
    """
    cv2.setNumThreads(1)
    dataset = Dataset(Path(root))
    shards = _write_shards(
        dataset, run_id, slide, spans, fingerprint, config, candidates_sha256, candidates
    )
    return collect_entries(shards, slide.slide_id, fingerprint, str(config.tile_px or ""))


def _write_shards(
    dataset: Dataset, run_id: str, slide: Slide, spans: list[range], fingerprint: str,
    config: TileConfig, candidates_sha256: str, candidates: str,
) -> Iterator[Entry]:  # fmt: skip
    """One entry per shard: those written before a later one fails are journalled."""
    job = _TileJob(
        dataset, run_id, slide, fingerprint, config, _output_px(dataset, config),
        candidates_sha256, candidates,
    )  # fmt: skip
    folder = Path(config.spool) if config.spool else dataset.staging_dir(run_id)
    with Spool(folder) as spool:
        began = time.monotonic()
        rank_spans = job.fill_spool(spool, spans)
        # All tiles are read in one pass, whose time counts for the first shard.
        read_seconds = time.monotonic() - began
        for span in rank_spans:
            entry = job.write_shard(spool, span)
            yield replace(entry, seconds=entry.seconds + read_seconds)
            read_seconds = 0.0


@dataclass(frozen=True)
class _TileJob:
    """One slide's tiles with everything that making them needs."""

    dataset: Dataset
    run_id: str
    slide: Slide
    fingerprint: str
    config: TileConfig
    tile_px: int
    candidates_sha256: str
    candidates: str

    def fill_spool(self, spool: Spool, block_spans: list[range]) -> list[range]:
        """Encode the tiles of all spans of blocks, in one pass; returns the spans of ranks."""
        # Spans may share native tiles of the slide, which one pass decodes once.
        all_x, all_y = self._read_positions()
        rows = len(all_x)
        spans = [ranks_of_blocks(blocks, rows) for blocks in block_spans]
        ranks = np.concatenate([np.arange(span.start, span.stop) for span in spans])
        x, y = all_x[ranks], all_y[ranks]
        encode = self.config.make_encoder()
        folder = self.dataset.staging_dir(self.run_id)
        with (
            local_slide(self.slide, self.config.stage_in, folder) as path,
            open_scanned(self.slide, path) as reader,
        ):
            done = 0
            for done, (index, image) in enumerate(self._cut_tiles(reader, x, y), 1):
                spool.put_bytes(int(ranks[index]), encode(image))
                if done % _PROGRESS_TILES == 0:
                    report_progress(self.slide.slide_id, _PROGRESS_TILES)
        return spans

    def _read_positions(self) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        path = self.dataset.candidates_file(self.slide.slide_id)
        try:
            # A page's checksum says that it is whole, not that it is the one that was written.
            is_same = not self.candidates_sha256 or hash_file(path) == self.candidates_sha256
            reason = "" if is_same else "its sha256 is another than when it was written"
            if is_same:
                return read_positions(self.dataset, self.slide.slide_id)
        except UserError as error:
            reason = str(error)
        except OSError as error:
            reason = str(error.strerror)
        raise LostResultError(
            f"{path} is damaged ({reason}): run `tissue` (or the `import` that made it), then "
            "`tile` again", TISSUE,
        )  # fmt: skip

    def _cut_tiles(
        self, reader: SlideReader, x: npt.NDArray[np.float64], y: npt.NDArray[np.float64]
    ) -> Iterator[tuple[int, Tile]]:
        plan, border = self._plan_with_border(reader)
        tiles = cut_tiles(reader, plan, x - border, y - border, self.tile_px, self.config.resampler)
        if self.config.icc == "ignore":
            yield from tiles
            return
        recolour = to_srgb(reader.icc_profile)
        for index, image in tiles:
            yield index, recolour(image)

    def _plan_with_border(self, reader: SlideReader) -> tuple[ReadPlan, float]:
        """How to read, and how far, in level-0 pixels, a tile reaches beyond its grid cell."""
        identity = read_identity(self.dataset)
        dataset_px = int(identity["tile_px"])
        plan = plan_read(
            reader.levels, float(self.slide.mpp or 0), identity["mpp"],
            identity["mpp_tolerance"], dataset_px,
        )  # fmt: skip
        # The grid is the dataset's at any size, so that a rank is one place on the slide.
        border = (self.tile_px - dataset_px) / 2 * plan.factor * plan.downsample
        return replace(plan, window=self.tile_px * plan.factor), border

    def write_shard(self, spool: Spool, span: range) -> Entry:
        """Write the tiles of a span of ranks as one shard, in rank order."""
        began = time.monotonic()
        made_from: dict[str, object] = {SLIDE: recorded_state(self.slide)}
        if self.candidates:
            made_from[CANDIDATES] = self.candidates
        encoded = (spool.take_bytes(rank) for rank in span)
        write = self._write_zarr if self.config.format == "zarr" else self._write_tar
        entry = Entry(
            self.slide.slide_id, "done", self.fingerprint, scope=str(self.tile_px),
            start=span.start, stop=span.stop, files=write(span, encoded),
            counts={"tiles": len(span)}, values=made_from,
            seconds=time.monotonic() - began,
        )  # fmt: skip
        return with_first_crc(self.dataset, entry)

    def _write_tar(self, span: range, pngs: Iterator[bytes]) -> tuple[FileRecord, ...]:
        tar = self._shard_path(span, "tar")
        index = bytearray()

        def write(file: HashingFile) -> None:
            index.extend(write_tar(file, self.slide.slide_id, span.start, pngs))

        shard = commit_file(self.dataset, self.run_id, tar, write)
        idx = commit_bytes(self.dataset, self.run_id, tar.with_suffix(".idx"), bytes(index))
        return shard, idx

    def _write_zarr(self, span: range, chunks: Iterator[bytes]) -> tuple[FileRecord, ...]:
        final = self._shard_path(span, "zarr")
        return commit_zarr(self.dataset, self.run_id, final, self.tile_px, chunks)

    def _shard_path(self, span: range, kind: str) -> Path:
        name = ShardName(self.slide.slide_id, span.start, span.stop, kind)
        return self.dataset.tiles_dir(self.tile_px) / str(name)


@dataclass(frozen=True)
class _SlideNeed:
    """A slide and what selections need of it."""

    slide: Slide
    need: _Need

    @property
    def slide_id(self) -> str:
        return self.slide.slide_id


class TileStage(Stage[_SlideNeed]):
    """Write the tile shards, uint8 [px, px, 3] per tile, that the named selections need."""

    name = label = STAGE
    kind = DatasetKind.SLIDES
    unit = rate_of = "tiles"
    packages = ("imagecodecs", "isal")
    work = staticmethod(tile_slide)

    def __init__(self, dataset: Dataset, config: TileConfig) -> None:
        super().__init__(dataset)
        # A rank beyond its slide's candidates fails that slide alone, unknown slides the stage.
        self.needs = _needs_by_slide(dataset, config.selections, read_selection_rows)
        _note_candidates(dataset, config.selections, self.needs)
        # Workers get the size: their lines have its scope even where they can read no identity.
        self.tile_px = _output_px(dataset, config)
        self.config = replace(config, tile_px=self.tile_px)
        self.scopes = (str(self.tile_px),)
        self.written_spans: dict[str, list[range]] = {}
        self.parent_of: dict[str, Entry] = {}

    def identity_claims(self) -> dict[str, object]:
        """Resampler, colour handling and codec."""
        return self.config.identity()

    def list_items(self) -> Iterator[_SlideNeed]:
        """The slides of the selections."""
        slides = {slide.slide_id: slide for slide in read_slides(self.dataset)}
        self.parents = Ledger.read(self.dataset, "tissue")[""]
        for slide_id, need in self.needs.items():
            if slide_id not in slides:
                raise UserError(
                    f"slide {slide_id} of a selection is not in {self.dataset.slides_file}: run "
                    "`scan` with it, or `select` again"
                )
            yield _SlideNeed(slides[slide_id], need)

    def _imported_source(self, slide_id: str) -> str:
        return imported_source(self.parents.entries(slide_id))

    def item_fingerprint(self, item: _SlideNeed) -> str:
        """Of the candidates and of how tiles are cut from them."""
        source = self._imported_source(item.slide_id)
        return tile_fingerprint(item.slide, self.identity, self.tile_px, source)

    def reason_to_refuse(
        self, item: _SlideNeed, fingerprint: str, ledger: Ledger
    ) -> tuple[Outcome, str] | None:
        """Where the candidates are not those of the slide or selection as they are now."""
        source = self._imported_source(item.slide_id)
        current = tissue_fingerprint(item.slide, self.identity, source)
        parent = self.parents.done(item.slide_id, current)
        if parent is not None:
            self.parent_of[item.slide_id] = parent
        if parent is None and is_lost(self.parents.entries(item.slide_id), current):
            return "failed", (
                f"its tissue result ({self.dataset.candidates_file(item.slide_id)} or the mask) is "
                "missing or damaged: run `tissue` (or the `import` that made it), then `tile` again"
            )
        reason = _reason_to_refuse(self.dataset, item.slide, parent, item.need)
        return ("failed", reason) if reason else None

    def find_missing(self, item: _SlideNeed, fingerprint: str, ledger: Ledger) -> Missing:
        """The blocks to cut; where there are none, a slide's failures are taken back.

        It may have failed for its selection or tissue alone: no tile will be cut that settles it.
        """
        missing = ledger.missing(item.slide_id, item.need.blocks, fingerprint, self.scopes)
        if missing:
            return missing
        settled = ledger[self.scopes[0]].settled_failures(item.slide_id)
        return replace(missing, withdrawn=(*missing.withdrawn, *settled))

    def make_task(
        self, item: _SlideNeed, fingerprint: str, missing: Missing, run_id: str
    ) -> SlideTask:
        """Cut the missing tiles of one slide."""
        parent = self.parent_of[item.slide_id]
        rows = count_candidates(self.dataset, item.slide_id, parent)
        tiles = sum(len(ranks_of_blocks(span, rows)) for span in missing.spans)
        self.written_spans[item.slide_id] = list(missing.spans)
        arguments = (
            str(self.dataset.root), run_id, item.slide, list(missing.spans), fingerprint,
            self.config, candidates_sha256(parent), parent.fingerprint,
        )  # fmt: skip
        # Slides differ in codec and in how much of them a tile covers.
        cost = tiles * tile_cost(item.slide, self.identity["mpp"], self.tile_px)
        return SlideTask(item.slide_id, fingerprint, arguments, cost, tiles, scopes=self.scopes)

    def after_tasks(self, runs: Sequence[Run], summary: Summary, engine: EngineConfig) -> None:
        """Write the dataset's card; say so where more tiles were written than are selected."""
        write_dataset_card(self.dataset)
        written = summary.counts.get("tiles", 0)
        spans = {s: self.written_spans.get(s, []) for s in summary.done_slides}
        selected = _count_selected(self.dataset, self.config.selections, spans)
        if written > selected:
            print_line(
                f"tile: {written:,} tiles for {selected:,} selected: whole blocks of {BLOCK_ROWS} "
                "ranks are written"
            )

    @property
    def output_path(self) -> Path:
        """The folder of the tile shards."""
        return self.dataset.tiles_dir(self.tile_px)


def tile(dataset: Dataset, config: TileConfig, engine: EngineConfig) -> int:
    """Write the tile shards that are missing; returns the exit status (1 if any slide failed)."""
    if kind_of(read_identity(dataset)) == DatasetKind.IMPORTED_TILES:
        return _nothing_to_cut(dataset, config)
    return run_stage(TileStage(dataset, config), engine)
