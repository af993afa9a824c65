"""The generation loop: sample, encode and write concurrently, commit unit by unit."""

import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from common.console import open_meter, print_line
from common.terms import merge_terms
from common.text import format_bytes, format_seconds
from common.torch_processes import Processes
from evaluate.generate.condition_source import GUIDING_FINGERPRINT, ConditionSource
from evaluate.generate.plan import (
    Unit,
    end_of_spans,
    micro_batches,
    missing_units,
    plan_units,
    units_of_rows,
    whole_blocks,
)
from evaluate.generate.write import (
    SELECTION_NAME,
    commit_unit,
    committed_spans,
    count_planned_images,
    count_tables,
    refuse_other_guidance,
    write_tables,
)
from evaluate.generators import Generator
from model.noise import derive_seeds
from pipeline.dataset import (
    BLOCK_ROWS,
    Dataset,
    DatasetKind,
    Run,
    claim_identity,
    encode_png,
    fingerprint_of,
    read_identity,
    software_versions,
)
from pipeline.dataset.card import write_dataset_card
from pipeline.dataset.claim import GENERATED, hold_claim

_STAGE_VERSION = 1
_ENCODE_THREADS = 4


@dataclass(frozen=True)
class Request:
    """What a synthetic dataset is to contain.

    `conditions` limits the source to its first conditions (None: all); every condition guides
    `variations` images; `micro_batch` is the fixed number of images per call of the generator.
    `mpp` is the nominal resolution of the tiles in micrometres per pixel, None if unknown;
    `forced` is what did not fit where `--force` let it pass.
    """

    out: Path
    seed: int = 0
    conditions: int | None = None
    variations: int = 1
    micro_batch: int = 16
    mpp: float | None = None
    forced: str | None = None


@dataclass(frozen=True)
class GenerationOutcome:
    """What one run of generation made, over all processes: images, bytes written, seconds."""

    made: int
    selected: int
    bytes: int
    seconds: float


def generate(
    generator: Generator, source: ConditionSource, request: Request, processes: Processes
) -> GenerationOutcome:
    """Make the images of a synthetic dataset that are missing, and commit them in units.

    The images are a function of the generator's identity, the conditions, the seed and the
    micro-batch: not of the number of processes, of restarts or of their number. Raises
    `UserError` where the dataset at `request.out` was made with other values.
    """
    dataset = Dataset(request.out)
    claims = identity_claims(generator, source, request)
    # Datasets from before the guiding dataset was recorded go on as they are: nothing in them
    # says which dataset guided.
    if dataset.identity_file.exists() and GUIDING_FINGERPRINT not in read_identity(dataset):
        claims.pop(GUIDING_FINGERPRINT, None)
    unit_fingerprint = fingerprint_of(stage="generate", version=_STAGE_VERSION, **claims)

    def made_from(unit: Unit) -> str:
        images = np.array([unit.image_index(rank) for rank in range(unit.start, unit.stop)])
        return source.made_from(images // request.variations)

    def claim_and_plan() -> list[tuple[int, ...]]:
        claim_identity(
            dataset, claims, stage="generate", versions=_software_versions(),
            kind=DatasetKind.GENERATED, terms=merge_terms(generator.terms, source.terms()) or None,
        )  # fmt: skip
        # Tables only grow: two runs with other numbers of images must see each other's.
        with hold_claim(dataset, GENERATED, "generate"):
            end = _most_images(source, request)
            refuse_other_guidance(dataset, generator.tile_px, unit_fingerprint, end, made_from)
            units = _plan_missing(dataset, generator, source, request, claims, unit_fingerprint)
        return [(unit.slide, unit.start, unit.stop) for unit in units]

    # Rank 0 alone writes the tables; every process then takes each size-th unit, which balances
    # them without any exchange while they work.
    units = units_of_rows(processes.on_main(claim_and_plan))[processes.rank :: processes.size]
    started = time.monotonic()
    written = 0
    with _show_progress(processes, sum(unit.image_count for unit in units)) as advance:
        if units:
            with (
                Run(dataset, "tile", _software_versions()) as run,
                _UnitWriter(run, generator.tile_px, unit_fingerprint) as writer,
            ):
                for unit in units:
                    tiles = _sample_unit(generator, source, request, unit, advance)
                    writer.write_unit(unit, tiles, made_from(unit))
            written = writer.bytes
    processes.on_main(lambda: str(write_dataset_card(dataset)))
    made = sum(unit.image_count for unit in units)
    made, written = processes.sum_values(torch.tensor([made, written])).tolist()
    seconds = time.monotonic() - started
    return GenerationOutcome(made, count_planned_images(dataset), written, seconds)


def identity_claims(
    generator: Generator, source: ConditionSource, request: Request
) -> dict[str, object]:
    """The identity of a synthetic dataset: everything that fixes its images but their number."""
    # The key is absent unless forced, so that ordinary datasets have one form of identity.
    forced = {"forced_guidance": request.forced} if request.forced else {}
    return {
        "kind": DatasetKind.GENERATED.value,
        "tile_px": generator.tile_px,
        "mpp": request.mpp,
        "codec": "png",
        "rounding": "nearest",
        "seed": request.seed,
        "variations": request.variations,
        "micro_batch": request.micro_batch,
        **source.identity(),
        **generator.identity(),
        **forced,
    }


def _most_images(source: ConditionSource, request: Request) -> int | None:
    """How many images there can be; None where the conditions never end."""
    return None if source.end is None else source.end * request.variations


def _plan_missing(
    dataset: Dataset,
    generator: Generator,
    source: ConditionSource,
    request: Request,
    claims: dict[str, object],
    unit_fingerprint: str,
) -> list[Unit]:
    """Write the tables for all images, and report and return the units that are missing."""
    conditions = min(request.conditions or source.count, source.count)
    asked, planned = conditions * request.variations, count_planned_images(dataset)
    # Whole blocks are made even where fewer images are selected: a larger --limit adds to them.
    end = _most_images(source, request)
    done = committed_spans(dataset, generator.tile_px, unit_fingerprint)
    # Without the selection's file, the images say what it had, to a block.
    there = planned or end_of_spans(done, count_tables(dataset))
    selected = asked if asked >= planned and whole_blocks(asked, end) >= there else there
    if selected > asked:
        print_line(f"generate: {describe_excess(asked, selected)}")
    images = whole_blocks(selected, end)
    write_tables(
        dataset,
        source,
        selected=selected,
        images=images,
        variations=request.variations,
        tile_px=generator.tile_px,
        mpp=request.mpp,
        plan={**claims, "guidance_selection": source.name},
    )
    units = missing_units(plan_units(images, request.micro_batch), done)
    missing = sum(unit.image_count for unit in units)
    if missing and images > selected:
        print_line(f"generate: {describe_rounding(selected, images)}")
    if missing < images:
        rest = f"making the other {missing:,}" if missing else "nothing to make"
        print_line(f"generate: {images - missing:,} of {images:,} images are done; {rest}")
    return units


def describe_excess(asked: int, there: int) -> str:
    """Why a dataset has more images than were asked for, in one clause.

    >>> describe_excess(16, 32).partition(":")[0]
    '32 images are there already or were begun, 16 were asked for'
    """
    return (
        f"{there:,} images are there already or were begun, {asked:,} were asked for: all are "
        "kept; fewer need another --out"
    )


def describe_rounding(selected: int, images: int) -> str:
    """Why more images are made than are selected, in one clause.

    >>> describe_rounding(2, 16)
    '16 images for 2 selected: whole blocks of 16 are made, which a larger --limit or --count uses'
    """
    return (
        f"{images:,} images for {selected:,} selected: whole blocks of {BLOCK_ROWS} are made, "
        "which a larger --limit or --count uses"
    )


def _software_versions() -> dict[str, str]:
    return software_versions("torch", "numpy", "opencv-python-headless")


class _Advance(Protocol):
    """Called with images made and a note.

    `under_way` is what the steps done are of the images of a micro-batch, in images.
    """

    def __call__(self, count: int, note: str, *, under_way: float = 0.0) -> None: ...


@contextmanager
def _show_progress(processes: Processes, total: int) -> Iterator[_Advance]:
    """Progress of the first process, on behalf of the others: they have as much to do."""
    if not processes.is_main or not total:
        yield lambda count, note, under_way=0.0: None
        return
    label = "generate" if processes.size == 1 else f"generate (1 of {processes.size} processes)"
    with open_meter(label, total, "images") as shown:
        yield shown.advance


def _sample_unit(
    generator: Generator,
    source: ConditionSource,
    request: Request,
    unit: Unit,
    advance: _Advance,
) -> Iterator[npt.NDArray[np.uint8]]:
    """The tiles of a unit, in rank order, sampled a micro-batch at a time."""
    for batch in micro_batches(unit, request.micro_batch):
        features = source.read_features(batch.images // request.variations)
        # A seed derives from the image's index alone, so any process may make any image.
        seeds = derive_seeds(request.seed, batch.images.tolist()).numpy()
        images = batch.end - batch.begin

        # The first micro-batch may take minutes: its steps make a rate and an ETA already.
        def show_step(done: int, steps: int, images: int = images) -> None:
            advance(0, f"step {done}/{steps}", under_way=images * done / steps)

        tiles = generator.generate_tiles(features, seeds, show_step)
        kept = tiles[batch.begin : batch.end]
        advance(len(kept), "")
        yield from kept


class _UnitWriter:
    """Encodes tiles as they come and commits whole units, in threads next to the sampling.

    One unit may wait to be committed while the next is sampled; an error in a thread is raised
    by the next call.
    """

    def __init__(self, run: Run, tile_px: int, unit_fingerprint: str) -> None:
        self._run, self._tile_px, self._fingerprint = run, tile_px, unit_fingerprint
        self._encoders = ThreadPoolExecutor(_ENCODE_THREADS, "encode")
        self._committer = ThreadPoolExecutor(1, "commit")
        self._pending: Future[int] | None = None
        self.bytes = 0

    def __enter__(self) -> "_UnitWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Wait for the last commit, also after Ctrl-C: what was sampled whole is kept."""
        try:
            self._wait_for_commit()
        finally:
            self._committer.shutdown()
            self._encoders.shutdown(cancel_futures=True)

    def write_unit(
        self, unit: Unit, tiles: Iterator[npt.NDArray[np.uint8]], made_from: str
    ) -> None:
        """Encode the tiles of a unit as they are sampled, then submit the unit for commit.

        `made_from` is the sum of its conditions, which its line states.
        """
        started = time.monotonic()
        pngs = [self._encoders.submit(encode_png, tile) for tile in tiles]

        def commit_images() -> int:
            return commit_unit(
                self._run,
                unit,
                [png.result() for png in pngs],
                tile_px=self._tile_px,
                unit_fingerprint=self._fingerprint,
                made_from=made_from,
                seconds=time.monotonic() - started,
            )

        # At most one unit's PNGs wait in memory while the next unit is sampled.
        self._wait_for_commit()
        self._pending = self._committer.submit(commit_images)

    def _wait_for_commit(self) -> None:
        pending, self._pending = self._pending, None
        if pending is not None:
            self.bytes += pending.result()


def final_line(outcome: GenerationOutcome, out: Path) -> str:
    """How many images were made, where, in how many seconds, at what rate."""
    selection = f"selection '{SELECTION_NAME}' of {out} has {outcome.selected:,} images"
    if not outcome.made:
        return f"generate: nothing to redo; {selection}"
    rate = outcome.made / max(outcome.seconds, 1e-9)
    return (
        f"generate: made {outcome.made:,} images, {format_bytes(outcome.bytes)}, in "
        f"{format_seconds(outcome.seconds)} ({rate:.3g} images/s); {selection}"
    )
