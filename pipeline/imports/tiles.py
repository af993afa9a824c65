"""`import tiles`: folders of pictures become a dataset of their own.

A folder is a slide, one Dask task and one shard. Its pictures, candidates and row of
slides.parquet are journalled under the stages whose work they are, last the row: a folder with
a picture that cannot be read leaves nothing but that row and its reason.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from common.console import print_line
from common.errors import UserError
from common.terms import Terms
from common.text import list_some
from pipeline.dataset import (
    Dataset,
    DatasetKind,
    Entry,
    FileRecord,
    Ledger,
    Missing,
    Run,
    Slide,
    commit_bytes,
    commit_file,
    encode_png,
    fingerprint_of,
    read_slides,
    safe_slide_id,
    write_candidates,
    write_tar,
)
from pipeline.dataset.card import write_dataset_card
from pipeline.dataset.commit import HashingFile
from pipeline.dataset.journal import Outcome
from pipeline.dataset.layout import ShardName
from pipeline.dataset.tiles.store import with_first_crc
from pipeline.imports.candidates import candidates_table
from pipeline.imports.config import TilesConfig
from pipeline.imports.picture import read_picture
from pipeline.imports.tile_folder import (
    TileFolder,
    describe_folders,
    doubtful_folders,
    find_tile_folders,
    list_files,
    tile_order,
    tile_positions,
)
from pipeline.run.stage import Stage, run_stage
from pipeline.run.summary import Summary
from pipeline.run.tasks import SlideTask, report_progress
from pipeline.run.workers import EngineConfig
from pipeline.slides.scan import STAGE as SCAN
from pipeline.slides.scan import record_slides, slide_values
from pipeline.slides.slide_terms import read_slide_terms, stated_terms
from pipeline.tiles.stage import STAGE as TILE
from pipeline.tiles.stage import tile_fingerprint
from pipeline.tissue.stage import STAGE as TISSUE
from pipeline.tissue.stage import tissue_fingerprint

VERSION = 1
_PROGRESS_TILES = 64
_READER = "tiles"
_LATER_COLUMNS = frozenset({"series", "levels_left_out", "notes", "bounds", "sampled_sha256"})


@dataclass(frozen=True)
class _Fingerprints:
    """Of a folder's row, candidates and tiles, and the hash of its list of files."""

    row: str
    candidates: str
    tiles: str
    source: str


_JOURNALS = (TILE, TISSUE, SCAN)
"""In the order of journalling: a row of slides.parquet relies on what was before it."""


def _slide_row(folder: TileFolder, config: TilesConfig) -> Slide:
    return Slide(
        folder.slide_id, str(folder.root), reader=_READER, mpp=config.mpp, tile_mpp=config.mpp,
        mpp_source="given", patient=folder.patient, site=folder.site, project=folder.project,
        sample_type=folder.sample_type, preparation=folder.preparation,
    )  # fmt: skip


@dataclass(frozen=True)
class _ListedFolder:
    """A folder with its row before any picture is read; `refusal` says why it cannot be taken."""

    folder: TileFolder
    slide: Slide
    fingerprints: _Fingerprints
    refusal: str = ""

    @property
    def slide_id(self) -> str:
        return self.slide.slide_id


def _list_folder(
    folder: TileFolder, config: TilesConfig, identity: dict[str, Any]
) -> _ListedFolder:
    """The folder's row, and the fingerprints of what is made from it."""
    try:
        if folder.taken_by:
            raise UserError(
                f"{folder.root} has the name of {folder.taken_by}; rename one, or give a CSV"
            )
        listing = list_files(folder)
    except UserError as error:
        reason = str(error)
        slide = replace(_slide_row(folder, config), status="failed", reason=reason)
        failed = _Fingerprints(
            fingerprint_of(stage=DatasetKind.IMPORTED_TILES, reason=reason), "", "", ""
        )
        return _ListedFolder(folder, slide, failed, reason)
    slide = replace(_slide_row(folder, config), bytes=listing.bytes, mtime_ns=listing.mtime_ns)
    candidates = tissue_fingerprint(slide, identity, listing.sha256)
    tiles = tile_fingerprint(slide, identity, config.tile_px, listing.sha256)
    # As earlier releases wrote rows, where that says the same: their tiles stay valid. They did not
    # record how a section was prepared, which decides on frozen ones only.
    values = {key: v for key, v in asdict(slide).items() if v or key not in _LATER_COLUMNS}
    if slide.preparation != "frozen":
        values["preparation"] = ""
    row = fingerprint_of(
        stage=DatasetKind.IMPORTED_TILES, row=values, candidates=candidates, tiles=tiles
    )
    return _ListedFolder(folder, slide, _Fingerprints(row, candidates, tiles, listing.sha256))


def import_folder(
    root: str, run_id: str, listed: _ListedFolder, config: TilesConfig
) -> list[Entry]:
    """Write one folder's shard and candidates; entries of tile, tissue and scan, in this order."""
    folder, slide, fingerprints = listed.folder, listed.slide, listed.fingerprints
    job = _FolderJob(Dataset(Path(root)), run_id, folder, config)
    began = time.monotonic()
    try:
        positions = tile_positions(folder, config.names, config.tile_px)
        order = tile_order(config.seed, folder, positions)
        shard, codec = job.write_shard(order)
        candidates = job.write_candidates(order, positions)
    except UserError as error:
        return [Entry(slide.slide_id, "failed", fingerprints.row, str(error))]
    count = len(order)
    row = slide_values(replace(slide, codec=codec))
    tiles = Entry(
        slide.slide_id, "done", fingerprints.tiles, scope=str(config.tile_px),
        start=0, stop=count, files=shard, counts={"tiles": count},
        seconds=time.monotonic() - began,
    )  # fmt: skip
    return [
        with_first_crc(Dataset(Path(root)), tiles),
        Entry(
            slide.slide_id, "done", fingerprints.candidates, files=(candidates,),
            counts={"candidate tiles": count}, values={"source": fingerprints.source},
        ),
        Entry(slide.slide_id, "done", fingerprints.row, values=row),
    ]  # fmt: skip


@dataclass(frozen=True)
class _FolderJob:
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
            pngs = self._encode_pngs(order, codecs)
            index.extend(write_tar(file, self.folder.slide_id, 0, pngs))

        shard = commit_file(self.dataset, self.run_id, tar, write)
        idx = commit_bytes(self.dataset, self.run_id, tar.with_suffix(".idx"), bytes(index))
        return (shard, idx), "+".join(sorted(codecs))

    def _encode_pngs(self, order: npt.NDArray[np.int64], codecs: set[str]) -> Iterator[bytes]:
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


def _imported_slides(dataset: Dataset) -> dict[str, str]:
    """Ids and paths of the slides whose tiles the dataset has already."""
    if not dataset.slides_file.exists():
        return {}
    return {s.slide_id: s.path for s in read_slides(dataset) if s.status == "ok"}


def _refuse_other_grouping(folders: Sequence[TileFolder], taken: Mapping[str, str]) -> None:
    """Refuse to import a folder's pictures a second time, as other slides."""
    for folder in folders:
        root = str(folder.root)
        if folder.rule == "folder":
            others = [s for s, path in taken.items() if path == root and s != folder.slide_id]
        else:
            name = safe_slide_id(folder.root.name)
            others = [name] if taken.get(name) == root and name != folder.slide_id else []
        if others:
            raise UserError(
                f"the dataset has the pictures of {root} already, as slide {list_some(others)} and "
                f"not {folder.slide_id}: give the same --slide-from, or another --dataset"
            )


def _report_folders(folders: Sequence[TileFolder]) -> None:
    """Print how many slides and tiles the source has, and what names them."""
    print_line(f"import: {describe_folders(folders)}")
    if doubtful := doubtful_folders(folders):
        print_line(
            f"import: {len(doubtful):,} folders are taken for one slide each, but their pictures' "
            f"names begin in several ways: {list_some(doubtful)}. If they are several slides: "
            "--slide-from name, a regular expression, or a CSV"
        )
    if frozen := sum(folder.preparation == "frozen" for folder in folders):
        print_line(
            f"import: {frozen:,} of {len(folders):,} slides are frozen sections, which `select` "
            "leaves out without --frozen"
        )


class ImportTilesStage(Stage[_ListedFolder]):
    """Folders of pictures as shards, candidates and slides.parquet."""

    name, label = SCAN, "import"
    kind = DatasetKind.IMPORTED_TILES
    journals = _JOURNALS
    unit = rate_of = "tiles"
    packages = ("pillow",)
    work = staticmethod(import_folder)

    def __init__(self, dataset: Dataset, config: TilesConfig) -> None:
        super().__init__(dataset)
        self.config = config
        taken = _imported_slides(dataset)
        self.folders = find_tile_folders(config.source, config.slide_from, taken)
        _refuse_other_grouping(self.folders, taken)
        _report_folders(self.folders)
        self.slides: dict[str, Slide] = {}
        others = taken.keys() - {folder.slide_id for folder in self.folders}
        terms = read_slide_terms(config.terms)
        self.terms = stated_terms(dataset, SCAN, terms, others_stay=bool(others))

    def stated_terms(self) -> tuple[Terms, ...] | None:
        """Those of --terms, beside those of pictures that stay; None where it states none."""
        return self.terms

    def identity_claims(self) -> dict[str, object]:
        """All values of the identity: no other stage has any to add."""
        return self.config.identity()

    def list_items(self) -> Iterator[_ListedFolder]:
        """The folders, listed."""
        self.ledgers = {
            TILE: Ledger.read(self.dataset, TILE)[str(self.config.tile_px)],
            TISSUE: Ledger.read(self.dataset, TISSUE)[""],
        }
        for folder in self.folders:
            listed = _list_folder(folder, self.config, self.identity)
            self.slides[listed.slide_id] = listed.slide
            yield listed

    def item_fingerprint(self, item: _ListedFolder) -> str:
        """Of the folder's row in slides.parquet, and with it of all that is made from it."""
        return item.fingerprints.row

    def reason_to_refuse(
        self, item: _ListedFolder, fingerprint: str, ledger: Ledger
    ) -> tuple[Outcome, str] | None:
        """A folder whose name or files cannot be used."""
        return ("failed", item.refusal) if item.refusal else None

    def find_missing(self, item: _ListedFolder, fingerprint: str, ledger: Ledger) -> Missing:
        """Everything, unless row, candidates and tiles of the folder are done."""
        done = (
            self.ledgers[TILE].done(item.slide_id, item.fingerprints.tiles)
            and self.ledgers[TISSUE].done(item.slide_id, item.fingerprints.candidates)
            and ledger[""].done(item.slide_id, fingerprint)
        )
        return Missing.of_slide(done)

    def make_task(
        self, item: _ListedFolder, fingerprint: str, missing: Missing, run_id: str
    ) -> SlideTask:
        """Read and write one folder's pictures."""
        arguments = (str(self.dataset.root), run_id, item, self.config)
        units = len(item.folder.files)
        return SlideTask(item.slide_id, fingerprint, arguments, item.slide.bytes, units)

    def journal_entries(self, runs: Sequence[Run], entries: list[Entry]) -> None:
        """Journal a folder under the stages whose work was done, or as a slide that scan refuses.

        A folder gives one entry per journal, in their order, or one failure.
        """
        failed = [entry for entry in entries if entry.outcome == "failed"]
        for entry in failed:
            slide = replace(self.slides[entry.slide_id], status="failed", reason=entry.reason)
            runs[-1].append([replace(entry, values=slide_values(slide))])
        done = [entry for entry in entries if entry.outcome == "done"]
        for run, entry in zip(runs, done, strict=False):
            run.append([entry])

    def after_tasks(self, runs: Sequence[Run], summary: Summary, engine: EngineConfig) -> None:
        """Write slides.parquet and the dataset's card."""
        record_slides(self.dataset, runs[-1], Summary(SCAN))
        write_dataset_card(self.dataset)

    @property
    def output_path(self) -> Path:
        """The folder of the tile shards."""
        return self.dataset.tiles_dir(self.config.tile_px)


def import_tiles(dataset: Dataset, config: TilesConfig, engine: EngineConfig) -> int:
    """Write shards, candidates and slides.parquet of the folders; returns the exit status."""
    return run_stage(ImportTilesStage(dataset, config), engine)
