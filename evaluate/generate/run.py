"""The generation loop: sample, encode and write beside it, commit unit by unit."""

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from common.console import meter, say
from common.text import format_bytes, format_seconds
from common.torch_processes import Processes
from evaluate.generate.guidance import GUIDING_MARK, Guidance
from evaluate.generate.plan import (
    Unit,
    micro_batches,
    missing_units,
    plan_units,
    whole_blocks,
)
from evaluate.generate.write import (
    SELECTION_NAME,
    commit_unit,
    planned_images,
    standing_spans,
    write_tables,
)
from evaluate.generators import Generator
from model.noise import derive_seeds
from pipeline.dataset import (
    Dataset,
    Run,
    claim_identity,
    encode_png,
    fingerprint_of,
    read_identity,
    software_versions,
)

_STAGE_VERSION = 1
_ENCODE_THREADS = 4


@dataclass(frozen=True)
class Request:
    """What a synthetic dataset is asked to hold.

    `conditions` limits the guidance to its first conditions (None: all); every condition guides
    `variations` images; `micro_batch` is the fixed number of images a call of the generator.
    `mpp` is the resolution that the tiles stand for, in micrometres per pixel, None if unknown;
    `forced` says what was wrong with guidance that `--force` let through.
    """

    out: Path
    seed: int = 0
    conditions: int | None = None
    variations: int = 1
    micro_batch: int = 16
    mpp: float | None = None
    forced: str | None = None


@dataclass(frozen=True)
class Outcome:
    """What one run of generation made, over all processes, and how many images are selected."""

    made: int
    selected: int
    bytes: int
    seconds: float


def generate(
    generator: Generator, guidance: Guidance, request: Request, processes: Processes
) -> Outcome:
    """Make the images of a synthetic dataset that are missing, and commit them in units.

    The images are a function of the generator's identity, the guidance, the seed and the
    micro-batch: not of the number of processes, of restarts or of `conditions`. Raises
    `UserError` where the dataset at `request.out` was made with other values.
    """
    dataset = Dataset(request.out)
    claims = _as_begun(dataset, identity_claims(generator, guidance, request))
    mark = fingerprint_of(stage="generate", version=_STAGE_VERSION, **claims)

    def prepare() -> list[tuple[int, ...]]:
        units = _prepare(dataset, generator, guidance, request, claims, mark)
        return [(unit.slide, unit.start, unit.stop) for unit in units]

    units = [Unit(*row) for row in processes.on_main(prepare)]
    mine = units[processes.rank :: processes.size]
    started = time.monotonic()
    with _progress(processes, sum(unit.count for unit in mine)) as advance:
        made, written = _make(dataset, mark, generator, guidance, request, mine, advance)
    made, written = processes.total(torch.tensor([made, written])).tolist()
    return Outcome(made, planned_images(dataset), written, time.monotonic() - started)


def identity_claims(generator: Generator, guidance: Guidance, request: Request) -> dict[str, Any]:
    """The identity of a synthetic dataset: everything that fixes its images but their number."""
    forced = {"forced_guidance": request.forced} if request.forced else {}
    return {
        "kind": "generated",
        "tile_px": generator.tile_px,
        "mpp": request.mpp,
        "codec": "png",
        "rounding": "nearest",
        "seed": request.seed,
        "variations": request.variations,
        "micro_batch": request.micro_batch,
        **guidance.identity(),
        **generator.identity(),
        **forced,
    }


def _as_begun(dataset: Dataset, claims: dict[str, Any]) -> dict[str, Any]:
    """Without the guiding dataset's mark where the images were begun before it was recorded.

    They go on as they are: nothing says which dataset guided them.
    """
    if not dataset.identity_file.exists() or GUIDING_MARK in read_identity(dataset):
        return claims
    return {key: value for key, value in claims.items() if key != GUIDING_MARK}


def _prepare(
    dataset: Dataset,
    generator: Generator,
    guidance: Guidance,
    request: Request,
    claims: dict[str, Any],
    mark: str,
) -> list[Unit]:
    claim_identity(dataset, claims, stage="generate", versions=_versions())
    asked = min(request.conditions or guidance.count, guidance.count) * request.variations
    selected = max(asked, planned_images(dataset))
    end = None if guidance.end is None else guidance.end * request.variations
    images = whole_blocks(selected, end)
    write_tables(
        dataset,
        guidance,
        selected=selected,
        images=images,
        variations=request.variations,
        tile_px=generator.tile_px,
        mpp=request.mpp,
        plan={**claims, "guidance_selection": guidance.name},
    )
    spans = standing_spans(dataset, generator.tile_px, mark)
    units = missing_units(plan_units(images, request.micro_batch), spans)
    missing = sum(unit.count for unit in units)
    if missing < images:
        rest = f"making the other {missing:,}" if missing else "nothing to make"
        say(f"generate: {images - missing:,} of {images:,} images stand already; {rest}")
    return units


def _versions() -> dict[str, str]:
    return software_versions("torch", "numpy", "opencv-python-headless")


_Advance = Callable[[int, str], None]
"""Called with images made and a note; 0 images while a micro-batch is under way."""


@contextmanager
def _progress(processes: Processes, total: int) -> Iterator[_Advance]:
    """Progress of the first process, which stands for the others: they have as much to do."""
    if not processes.is_main or not total:
        yield lambda count, note: None
        return
    label = "generate" if processes.size == 1 else f"generate (1 of {processes.size} processes)"
    with meter(label, total, "images") as shown:
        yield shown.advance


def _make(
    dataset: Dataset,
    mark: str,
    generator: Generator,
    guidance: Guidance,
    request: Request,
    units: Sequence[Unit],
    advance: _Advance,
) -> tuple[int, int]:
    """Make the units; returns images and bytes. Encoding and writing overlap with sampling."""
    if not units:
        return 0, 0
    with (
        Run(dataset, "tile", _versions()) as run,
        _Writer(run, generator.tile_px, mark) as writer,
    ):
        for unit in units:
            writer.write(unit, _sample_unit(generator, guidance, request, unit, advance))
    return sum(unit.count for unit in units), writer.bytes


def _sample_unit(
    generator: Generator, guidance: Guidance, request: Request, unit: Unit, advance: _Advance
) -> Iterator[npt.NDArray[np.uint8]]:
    """The tiles of a unit, in rank order, a micro-batch at a time."""
    for batch in micro_batches(unit, request.micro_batch):
        features = guidance.features(batch.images // request.variations)
        seeds = derive_seeds(request.seed, batch.images.tolist()).numpy()
        tiles = generator.sample(
            features, seeds, lambda done, steps: advance(0, f"step {done}/{steps}")
        )
        kept = tiles[batch.begin : batch.end]
        advance(len(kept), "")
        yield from kept


class _Writer:
    """Encodes tiles as they come and commits whole units, in threads beside the sampling.

    One unit may wait to be committed while the next is sampled; an error in a thread is raised
    by the next call.
    """

    def __init__(self, run: Run, tile_px: int, mark: str) -> None:
        self._run, self._tile_px, self._mark = run, tile_px, mark
        self._encoders = ThreadPoolExecutor(_ENCODE_THREADS, "encode")
        self._committer = ThreadPoolExecutor(1, "commit")
        self._pending: Future[int] | None = None
        self.bytes = 0

    def __enter__(self) -> "_Writer":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Wait for the last commit, also after Ctrl-C: what was sampled whole is kept."""
        try:
            self._settle()
        finally:
            self._committer.shutdown()
            self._encoders.shutdown(cancel_futures=True)

    def write(self, unit: Unit, tiles: Iterator[npt.NDArray[np.uint8]]) -> None:
        """Encode the tiles of a unit as they are sampled, then hand the unit to be committed."""
        started = time.monotonic()
        pngs = [self._encoders.submit(encode_png, tile) for tile in tiles]
        self._settle()
        self._pending = self._committer.submit(self._commit, unit, pngs, started)

    def _commit(self, unit: Unit, pngs: list[Future[bytes]], started: float) -> int:
        return commit_unit(
            self._run,
            unit,
            [png.result() for png in pngs],
            tile_px=self._tile_px,
            fingerprint=self._mark,
            seconds=time.monotonic() - started,
        )

    def _settle(self) -> None:
        pending, self._pending = self._pending, None
        if pending is not None:
            self.bytes += pending.result()


def final_line(outcome: Outcome, out: Path) -> str:
    """What was made, where, how many, how long, at what rate."""
    selection = f"selection '{SELECTION_NAME}' of {out} has {outcome.selected:,} images"
    if not outcome.made:
        return f"generate: nothing to redo; {selection}"
    rate = outcome.made / max(outcome.seconds, 1e-9)
    return (
        f"generate: made {outcome.made:,} images, {format_bytes(outcome.bytes)}, in "
        f"{format_seconds(outcome.seconds)} ({rate:.3g} images/s); {selection}"
    )
