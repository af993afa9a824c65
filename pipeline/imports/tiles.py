"""`import tiles`: folders of pictures become a dataset of their own.

A folder is a slide, one Dask task and one shard. Its pictures, candidates and row of
slides.parquet are journalled under the stages whose work they are, last the row: a folder with
a picture that cannot be read leaves nothing but that row and its reason.
"""

import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from common.console import meter
from common.errors import UserError
from pipeline.dataset import (
    Dataset,
    Entry,
    FileRecord,
    Run,
    Slide,
    claim_identity,
    commit_bytes,
    commit_file,
    encode_png,
    fingerprint,
    read_journal,
    standing,
    write_candidates,
    write_tar,
)
from pipeline.dataset.commit import HashingFile
from pipeline.dataset.layout import ShardName
from pipeline.imports.candidates import candidates_table
from pipeline.imports.config import TilesConfig
from pipeline.imports.picture import read_picture
from pipeline.imports.tile_folder import (
    TileFolder,
    find_tile_folders,
    list_files,
    tile_order,
    tile_positions,
)
from pipeline.run.engine import EngineConfig, SlideTask, report_progress, run_tasks
from pipeline.run.stage import Summary, report_summary, stage_versions, stands
from pipeline.slides.scan import STAGE as SCAN
from pipeline.slides.scan import record_slides, slide_values
from pipeline.tiles.stage import IMPORTED_TILES, tile_fingerprint
from pipeline.tiles.stage import STAGE as TILE
from pipeline.tissue.stage import STAGE as TISSUE
from pipeline.tissue.stage import tissue_fingerprint

VERSION = 1
_PROGRESS_TILES = 64
_READER = "tiles"


@dataclass(frozen=True)
class _Marks:
    """Fingerprints of a folder's row, candidates and tiles, and of its list of files."""

    row: str
    candidates: str
    tiles: str
    source: str


def import_tiles(dataset: Dataset, config: TilesConfig, engine: EngineConfig) -> int:
    """Write shards, candidates and slides.parquet of the folders; returns the exit status."""
    folders = find_tile_folders(config.source)
    versions = stage_versions("pillow")
    identity = claim_identity(dataset, config.identity(), stage=SCAN, versions=versions)
    summary = Summary("import")
    with ExitStack() as stack:
        runs = {name: stack.enter_context(Run(dataset, name, versions)) for name in _STAGES}
        journals = _Journals(dataset, runs, summary, str(config.tile_px))
        tasks = []
        for folder in folders:
            try:
                slide, marks = _describe(folder, config, identity)
            except UserError as error:
                slide = replace(_row(folder, config), status="failed", reason=str(error))
                journals.fail(slide, fingerprint(stage=IMPORTED_TILES, reason=str(error)))
                continue
            if journals.stand(slide.slide_id, marks):
                summary.skipped += 1
                continue
            arguments = (str(dataset.root), runs[TILE].run_id, folder, slide, marks, config)
            units = len(folder.files)
            tasks.append(SlideTask(slide.slide_id, marks.row, arguments, slide.bytes, units))
            journals.slides[slide.slide_id] = slide
        with meter("import", sum(task.units for task in tasks), "tiles") as progress:
            run_tasks(import_folder, tasks, engine, journals.append, progress)
            summary.seconds = progress.seconds
        record_slides(dataset, runs[SCAN], Summary(SCAN))
    return report_summary(summary, dataset.tiles_dir(config.tile_px), "tiles")


_STAGES = (TILE, TISSUE, SCAN)
"""In the order of journalling: a row of slides.parquet stands on what was before it."""


def _row(folder: TileFolder, config: TilesConfig) -> Slide:
    return Slide(
        folder.slide_id, str(folder.root), reader=_READER, mpp=config.mpp, tile_mpp=config.mpp,
        mpp_source="given", patient=folder.patient, site=folder.site, project=folder.project,
        sample_type=folder.sample_type,
    )  # fmt: skip


def _describe(
    folder: TileFolder, config: TilesConfig, identity: dict[str, Any]
) -> tuple[Slide, _Marks]:
    """The folder's row before any picture is read, and what its results are made from."""
    if folder.taken_by:
        raise UserError(
            f"{folder.root} bears the name of {folder.taken_by}; rename one, or give a CSV"
        )
    listing = list_files(folder)
    slide = replace(_row(folder, config), bytes=listing.bytes, mtime_ns=listing.mtime_ns)
    candidates = tissue_fingerprint(slide, identity, listing.sha256)
    tiles = tile_fingerprint(slide, identity, config.tile_px, listing.sha256)
    row = fingerprint(stage=IMPORTED_TILES, row=asdict(slide), candidates=candidates, tiles=tiles)
    return slide, _Marks(row, candidates, tiles, listing.sha256)


class _Journals:
    """Writes what became of a folder to the journals of the stages whose work it is."""

    def __init__(
        self, dataset: Dataset, runs: dict[str, Run], summary: Summary, scope: str
    ) -> None:
        self.dataset, self.runs, self.summary, self.scope = dataset, runs, summary, scope
        self.slides: dict[str, Slide] = {}
        self.known = {
            TILE: standing(read_journal(dataset, TILE), scope),
            TISSUE: standing(read_journal(dataset, TISSUE)),
            SCAN: standing(read_journal(dataset, SCAN)),
        }

    def stand(self, slide_id: str, marks: _Marks) -> bool:
        """Whether row, candidates and tiles of a folder stand."""
        pairs = ((TILE, marks.tiles), (TISSUE, marks.candidates), (SCAN, marks.row))
        return all(
            stands(self.dataset, self.known[stage].get(slide_id, []), mark) is not None
            for stage, mark in pairs
        )

    def append(self, entries: list[Entry]) -> None:
        """Journal what a task gave: one entry a stage, or one failure."""
        for entry in entries:
            if entry.outcome == "failed":
                slide = self.slides[entry.slide_id]
                self.fail(replace(slide, status="failed", reason=entry.reason), entry.fingerprint)
        done = [entry for entry in entries if entry.outcome == "done"]
        for stage, entry in zip(_STAGES, done, strict=False):
            self.runs[stage].append([entry])
            self.summary.add(entry)

    def fail(self, slide: Slide, mark: str) -> None:
        """Journal a folder that could not be taken as a slide that `scan` would refuse."""
        entry = Entry(slide.slide_id, "failed", mark, slide.reason, values=slide_values(slide))
        self.runs[SCAN].append([entry])
        self.summary.add(entry)


def import_folder(
    root: str, run_id: str, folder: TileFolder, slide: Slide, marks: _Marks, config: TilesConfig
) -> list[Entry]:
    """Write one folder's shard and candidates; entries of tile, tissue and scan, in this order."""
    job = _Job(Dataset(Path(root)), run_id, folder, config)
    began = time.monotonic()
    try:
        positions = tile_positions(folder, config.names, config.tile_px)
        order = tile_order(config.seed, folder, positions)
        shard, codec = job.write_shard(order)
        candidates = job.write_candidates(order, positions)
    except UserError as error:
        return [Entry(slide.slide_id, "failed", marks.row, str(error))]
    count = len(order)
    row = slide_values(replace(slide, codec=codec))
    return [
        Entry(
            slide.slide_id, "done", marks.tiles, scope=str(config.tile_px), start=0, stop=count,
            files=shard, counts={"tiles": count}, seconds=time.monotonic() - began,
        ),
        Entry(
            slide.slide_id, "done", marks.candidates, files=(candidates,),
            counts={"candidate tiles": count}, values={"source": marks.source},
        ),
        Entry(slide.slide_id, "done", marks.row, values=row),
    ]  # fmt: skip


@dataclass(frozen=True)
class _Job:
    """One folder's pictures with what writing them needs."""

    dataset: Dataset
    run_id: str
    folder: TileFolder
    config: TilesConfig

    def write_shard(self, order: npt.NDArray[np.int64]) -> tuple[tuple[FileRecord, ...], str]:
        """The pictures in rank order as one tar; its files, and the codecs they came in."""
        name = ShardName(self.folder.slide_id, 0, len(order), "tar")
        tar = self.dataset.tiles_dir(self.config.tile_px) / str(name)
        index = bytearray()
        codecs: set[str] = set()

        def write(file: HashingFile) -> None:
            pngs = self._pngs(order, codecs)
            index.extend(write_tar(file, self.folder.slide_id, 0, pngs))

        shard = commit_file(self.dataset, self.run_id, tar, write)
        idx = commit_bytes(self.dataset, self.run_id, tar.with_suffix(".idx"), bytes(index))
        return (shard, idx), "+".join(sorted(codecs))

    def _pngs(self, order: npt.NDArray[np.int64], codecs: set[str]) -> Iterator[bytes]:
        config = self.config
        for done, index in enumerate(order.tolist(), 1):
            path = self.folder.root / self.folder.files[index]
            picture = read_picture(path, config.tile_px, crop=config.crop, icc=config.icc)
            codecs.add(picture.codec)
            if done % _PROGRESS_TILES == 0:
                report_progress(self.folder.slide_id, _PROGRESS_TILES)
            yield encode_png(picture.rgb, config.png)

    def write_candidates(
        self,
        order: npt.NDArray[np.int64],
        positions: tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]] | None,
    ) -> FileRecord:
        """Candidates with the name of each picture; positions are null where none are known.

        The pictures may be another model's samples, to be measured as generated ones: what
        guided them is not known either.
        """
        if positions is None:
            x = y = pa.nulls(len(order), pa.float64())
        else:
            x, y = positions[0][order], positions[1][order]
        names = pa.array([self.folder.files[i] for i in order.tolist()], pa.string())
        table = (
            candidates_table(x, y)
            .append_column("source_name", names)
            .append_column("source_slide_id", pa.nulls(len(order), pa.string()))
            .append_column("source_rank", pa.array(np.full(len(order), -1, np.int32)))
        )
        return write_candidates(self.dataset, self.run_id, self.folder.slide_id, table)
