"""Writing a synthetic dataset: tables first, then shards under the journal of stage `tile`."""

import itertools
from collections.abc import Callable, Sequence

import numpy as np
import pyarrow as pa

from common.errors import UserError
from evaluate.generate.condition_source import ConditionSource
from evaluate.generate.plan import IMAGES_PER_SLIDE, Span, Unit, pseudo_slide_id, slide_spans
from pipeline.dataset import (
    GENERATED_SCHEMA,
    Dataset,
    DatasetKind,
    Entry,
    FileRecord,
    HashingFile,
    Ledger,
    Run,
    Slide,
    commit_bytes,
    commit_file,
    fingerprint_of,
    make_selection,
    read_selection,
    software_versions,
    write_candidates,
    write_selection,
    write_slides,
    write_tar,
)
from pipeline.dataset.tiles.store import with_first_crc

SELECTION_NAME = "generated"
STAGE = "generate"
"""The journal that names the tables; shards are in that of stage `tile`, for every reader."""
TABLE_SCOPE, SELECTION_SCOPE, GUIDANCE_SCOPE = "table", "selection", "guidance"
GUIDANCE_DIR = "guidance"
_GRID_SIDE = 32
"""A pseudo-slide is laid out as 32 x 32 tiles, for readers that ask for a tile's place."""
assert IMAGES_PER_SLIDE == _GRID_SIDE**2


def count_planned_images(dataset: Dataset) -> int:
    """Images of the selection `generated` so far; 0 for a new dataset."""
    if not dataset.selection_file(SELECTION_NAME).exists():
        return 0
    return read_selection(dataset, SELECTION_NAME).rows


def count_tables(dataset: Dataset) -> int:
    """Pseudo-slides, from the first on, that have their table: all have, before any image is."""
    numbers = itertools.count()
    return next(n for n in numbers if not dataset.candidates_file(pseudo_slide_id(n)).exists())


def write_tables(
    dataset: Dataset,
    source: ConditionSource,
    *,
    selected: int,
    images: int,
    variations: int,
    tile_px: int,
    mpp: float | None,
    plan: dict[str, object],
) -> None:
    """Write candidates and slides.parquet for all images, of which the first are `selected`.

    The selection `generated` and its journal line come last: where they exist with this many
    rows, the rest exists too. Tables only grow: fewer images than before change nothing.
    """
    if count_planned_images(dataset) >= selected and _tables_are_valid(dataset):
        return
    table_fingerprint = fingerprint_of(stage=STAGE, plan=plan)

    def done_entry(name: str, scope: str, *files: FileRecord) -> Entry:
        return Entry(name, "done", table_fingerprint, scope=scope, files=files)

    entries = []
    with Run(dataset, STAGE, software_versions("numpy", "pyarrow")) as run:
        for number, (start, stop) in enumerate(slide_spans(images)):
            slide_id = pseudo_slide_id(number)
            table = candidates_table(source, start, stop, variations, tile_px)
            record = write_candidates(dataset, run.run_id, slide_id, table)
            entries.append(done_entry(slide_id, TABLE_SCOPE, record))
        # One entry covers all files of the condition source: they are valid together or not.
        attached = [
            commit_bytes(dataset, run.run_id, dataset.root / GUIDANCE_DIR / name, data)
            for name, data in source.guidance_files().items()
        ]
        if attached:
            entries.append(done_entry(GUIDANCE_DIR, GUIDANCE_SCOPE, *attached))
        record = write_slides(dataset, run.run_id, pseudo_slides(images, tile_px, mpp))
        run.append([*entries, done_entry(dataset.slides_file.name, TABLE_SCOPE, record)])
        # The selection is the last to appear: readers who find it find all that it names.
        ranks = {
            pseudo_slide_id(number): np.arange(stop - start, dtype=np.int32)
            for number, (start, stop) in enumerate(slide_spans(selected))
        }
        record = write_selection(dataset, run.run_id, make_selection(SELECTION_NAME, ranks, plan))
        run.append([done_entry(SELECTION_NAME, SELECTION_SCOPE, record)])


def _tables_are_valid(dataset: Dataset) -> bool:
    """Whether all journalled tables are on disk; tables older than their journal are trusted."""
    ledger = Ledger.read(dataset, STAGE)
    if not ledger.lines:
        return True
    scopes = [ledger[scope] for scope in (TABLE_SCOPE, SELECTION_SCOPE, GUIDANCE_SCOPE)]
    return len(ledger[SELECTION_SCOPE]) > 0 and all(
        len(scope.on_disk(slide_id)) == len(entries)
        for scope in scopes
        for slide_id, entries in scope.written.items()
    )


def pseudo_slides(images: int, tile_px: int, mpp: float | None) -> list[Slide]:
    """The rows of slides.parquet; `tile_px` in pixels, `mpp` in micrometres per pixel."""
    # Readers of real slides must find a level 0 that contains every place of the layout.
    side = _GRID_SIDE * tile_px
    return [
        Slide(
            pseudo_slide_id(number),
            path="",
            reader=DatasetKind.GENERATED.value,
            mpp=mpp,
            mpp_source="guidance" if mpp is not None else "",
            width=side,
            height=side,
            levels=((side, side, 1.0),),
        )
        for number in range(len(slide_spans(images)))
    ]


def candidates_table(
    source: ConditionSource, start: int, stop: int, variations: int, tile_px: int
) -> pa.Table:
    """Candidates of images [start, stop): rank, place in the layout, and source tile.

    Image i is variation i mod K of condition i // K.
    """
    sources = source.source_tiles(np.arange(start, stop) // variations)
    ranks = np.arange(stop - start, dtype=np.int32)
    # Generated tiles are all tissue, and pass every filter of a selection.
    full = np.ones(len(ranks), np.float32)
    columns = {
        "rank": ranks,
        "x_level0": (ranks % _GRID_SIDE * tile_px).astype(np.float64),
        "y_level0": (ranks // _GRID_SIDE * tile_px).astype(np.float64),
        "tissue_fraction": full,
        "artifact_fraction": np.zeros_like(full),
        "source_slide_id": sources.slide_ids,
        "source_rank": sources.ranks,
    }
    return pa.table(columns, schema=GENERATED_SCHEMA)


def committed_spans(dataset: Dataset, tile_px: int, unit_fingerprint: str) -> dict[str, list[Span]]:
    """Per pseudo-slide, the ranks that are committed with this fingerprint and still on disk."""
    ledger = Ledger.read(dataset, "tile")[str(tile_px)]
    return {
        slide_id: [
            (entry.start, entry.stop) for entry in ledger.on_disk(slide_id, unit_fingerprint)
        ]
        for slide_id in ledger.written
    }


GUIDANCE = "guidance"
"""In the values of an image shard's line: a sum of what its conditions were made from."""


def refuse_other_guidance(
    dataset: Dataset,
    tile_px: int,
    unit_fingerprint: str,
    images: int | None,
    made_from: Callable[[Unit], str],
) -> None:
    """Refuse to go on where images were guided by features that were made again since.

    `images` is how many there can be, None where they never end, and `made_from` gives the sum of a
    unit's conditions now. What older images do not state is not judged, nor are lines of images
    that cannot be.
    """
    ledger = Ledger.read(dataset, "tile")[str(tile_px)]
    for number in range(count_tables(dataset)):
        for line in ledger.written.get(pseudo_slide_id(number), ()):
            stated, unit = line.values.get(GUIDANCE), Unit(number, line.start, line.stop)
            last = unit.image_index(unit.stop - 1)
            can_be = unit.stop <= IMAGES_PER_SLIDE and (images is None or last < images)
            is_judged = can_be and stated is not None and line.fingerprint == unit_fingerprint
            if not is_judged or made_from(unit) == stated:
                continue
            raise UserError(
                f"images {line.start} to {line.stop - 1} of {line.slide_id} in {dataset.root} were "
                "guided by features that were made again since, from other tiles: use another "
                "--out, or remove that folder to make all images again"
            )


def commit_unit(
    run: Run,
    unit: Unit,
    pngs: Sequence[bytes],
    *,
    tile_px: int,
    unit_fingerprint: str,
    made_from: str,
    seconds: float,
) -> int:
    """Write a unit's shard and index, then journal them as done. Returns the bytes written."""
    dataset = run.dataset
    final = dataset.tiles_dir(tile_px) / f"{unit.slide_id}.{unit.start}-{unit.stop}.tar"
    index: list[bytes] = []

    def write_shard(file: HashingFile) -> None:
        index.append(write_tar(file, unit.slide_id, unit.start, pngs))

    # The index is a by-product of writing the tar, and only the journal line makes both valid.
    tar = commit_file(dataset, run.run_id, final, write_shard)
    idx = commit_bytes(dataset, run.run_id, final.with_suffix(".idx"), index[-1])
    entry = Entry(
        unit.slide_id,
        "done",
        unit_fingerprint,
        scope=str(tile_px),
        start=unit.start,
        stop=unit.stop,
        files=(tar, idx),
        counts={"tiles": unit.image_count},
        seconds=round(seconds, 3),
        values={GUIDANCE: made_from} if made_from else {},
    )
    run.append([with_first_crc(dataset, entry)])
    return tar.bytes + idx.bytes
