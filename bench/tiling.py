"""Measures the tile stage against a bare floor and against the loop everyone writes.

    python bench/tiling.py [--rounds 3] [--tiles 600]

Everything is a ratio within one run: contenders take turns on the same tiles, and each is
judged by its best round. Ratios are of CPU time, which a busy machine disturbs least; wall time
stands beside. The table goes to the terminal and to bench/out/tiling.md, the numbers to
bench/out/tiling.json.
"""

import argparse
import io
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import dask
import numpy as np
import openslide
import psutil
from distributed import Client
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # before bench/, with its model.py

from bench.bench_slide import make_slide
from bench.common import (
    MACHINE,
    OUT,
    SLIDE,
    Times,
    candidates_table,
    clock_call,
    markdown,
    missed_goals,
    new_dataset,
    print_verdict,
    ratio_rows,
    write_result,
)
from pipeline.dataset import (
    Dataset,
    Entry,
    Run,
    Slide,
    claim_identity,
    encode_png,
    make_selection,
    new_run_id,
    read_candidates,
    read_identity,
    write_candidates,
    write_selection,
    write_slides,
)
from pipeline.dataset.grid import grid_positions, rank_order
from pipeline.run.workers import EngineConfig, dask_client
from pipeline.slides.native_reader import NativeReader
from pipeline.slides.open import best_reader
from pipeline.tiles.config import TileConfig
from pipeline.tiles.stage import tile, tile_slide
from pipeline.tissue.stage import tissue_fingerprint

TILE_PX, WINDOW = 224, 448
GRID = {"mpp": 0.5, "mpp_tolerance": 0.02, "tile_px": TILE_PX, "grid": "adjacent"}
SLIDES = 4
"""Slides that the whole stage is run on."""
GOALS = {
    "stage, one worker, over floor, small PNG": 0.7,
    "stage, one worker, over floor, fast PNG": 0.7,
    "stage, one worker, over plain loop, small PNG": 2.3,
    "stage, one worker, over plain loop, fast PNG": 6.0,
    "two workers over one": 1.8,
}


@dataclass(frozen=True)
class TilingBench:
    """A dataset with one large slide and its first tiles as candidates."""

    dataset: Dataset
    slide: Slide
    x: np.ndarray
    y: np.ndarray

    @classmethod
    def prepare(cls, tiles: int) -> "TilingBench":
        """Make slide and dataset under bench/out."""
        OUT.mkdir(exist_ok=True)
        path = make_slide(OUT / "slide-16000.svs", SLIDE)
        reader, why = best_reader(path)
        with reader:
            if reader.name != "native":
                raise SystemExit(f"the bench slide is read by {reader.name}: {why}")
            base, codec = reader.levels[0], reader.codec
        x, y = grid_positions(base.width, base.height, WINDOW, WINDOW)
        x, y = x[:tiles], y[:tiles]
        order = rank_order(0, "bench", x, y)
        dataset = new_dataset(OUT / "dataset")
        claim_identity(dataset, GRID | {"seed": 0}, stage="bench", versions={})
        candidates = candidates_table(x[order], y[order])
        write_candidates(dataset, new_run_id(), "bench", candidates)
        slide = Slide(
            "bench", str(path), reader="native", mpp=0.25, width=base.width, height=base.height,
            codec=codec,
        )  # fmt: skip
        return cls(dataset, slide, x, y)

    def cohort(self, slides: int) -> Dataset:
        """A new dataset of so many slides, all the same file, everything selected."""
        dataset = new_dataset(OUT / "cohort")
        claim_identity(dataset, GRID | {"seed": 0}, stage="bench", versions={})
        names = [f"bench-{number}" for number in range(slides)]
        run_id, candidates = new_run_id(), read_candidates(self.dataset, "bench")
        slides = [replace(self.slide, slide_id=name) for name in names]
        write_slides(dataset, run_id, slides)
        with Run(dataset, "tissue", {}) as run:
            for slide in slides:
                record = write_candidates(dataset, run_id, slide.slide_id, candidates)
                mark = tissue_fingerprint(slide, read_identity(dataset))
                run.append([Entry(slide.slide_id, "done", mark, files=(record,))])
        ranks = np.arange(candidates.num_rows, dtype=np.int32)
        selection = make_selection("all", dict.fromkeys(names, ranks), {})
        write_selection(dataset, run_id, selection)
        return dataset

    def task(self, png: str) -> None:
        """What a worker does for the slide: read, cut, encode, spool, write, sync."""
        blocks = [range(0, -(-len(self.x) // 16))]
        config = TileConfig(png=png)
        root = str(self.dataset.root)
        (entry,) = tile_slide(root, new_run_id(), self.slide, blocks, "bench", config)
        if entry.outcome != "done":
            raise SystemExit(entry.reason)

    def floor(self, png: str) -> None:
        """Decode every needed native tile once, area resize, encode, write: nothing else."""
        with NativeReader(Path(self.slide.path)) as reader, (OUT / "floor.bin").open("wb") as file:
            side = reader.native[0].tile_width
            columns = -(-int(self.x.max() + WINDOW) // side)
            rows: dict[int, np.ndarray] = {}
            for top in np.unique(self.y).astype(int):
                first, last = top // side, -(-(top + WINDOW) // side)
                canvas = np.empty(((last - first) * side, columns * side, 3), np.uint8)
                for row in range(first, last):
                    strip = canvas[(row - first) * side :][:side]
                    if row in rows:
                        strip[:] = rows[row]
                        continue
                    for column in range(columns):
                        strip[:, column * side :][:, :side] = reader.decode_native(0, row, column)
                rows = {last - 1: canvas[-side:]}
                for left in self.x[self.y == top].astype(int):
                    inside = canvas[top - first * side :, left:][:WINDOW, :WINDOW]
                    small = cv2.resize(inside, (TILE_PX, TILE_PX), interpolation=cv2.INTER_AREA)
                    file.write(encode_png(small, png))

    def plain(self, tiles: int) -> None:
        """The usual loop: regions of 448 px, Pillow's Lanczos to 224 px, Pillow's PNG."""
        with openslide.OpenSlide(self.slide.path) as slide, (OUT / "plain.bin").open("wb") as file:
            for x, y in zip(self.x[:tiles], self.y[:tiles], strict=True):
                region = slide.read_region((int(x), int(y)), 0, (WINDOW, WINDOW)).convert("RGB")
                small = region.resize((TILE_PX, TILE_PX), Image.Resampling.LANCZOS)
                png = io.BytesIO()
                small.save(png, "PNG")
                file.write(png.getvalue())


def contenders(bench: TilingBench, plain_tiles: int) -> dict[str, tuple[int, Callable[[], None]]]:
    """Name to (tiles, what to run)."""
    tiles = len(bench.x)
    found: dict[str, tuple[int, Callable[[], None]]] = {}
    for png in ("small", "fast"):
        found[f"task {png}"] = (tiles, lambda png=png: bench.task(png))  # type: ignore[misc]
        found[f"floor {png}"] = (tiles, lambda png=png: bench.floor(png))  # type: ignore[misc]
    found["plain loop"] = (plain_tiles, lambda: bench.plain(plain_tiles))
    return found


def single_process(
    bench: TilingBench, rounds: int, plain_tiles: int
) -> dict[str, dict[str, float]]:
    """Tiles a second of each contender: its best round."""
    runs = contenders(bench, plain_tiles)
    times: dict[str, list[Times]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, (_, function) in runs.items():
            times[name].append(clock_call(function))
    return {name: best_rates(tiles, times[name]) for name, (tiles, _) in runs.items()}


def best_rates(tiles: int, rounds: list[Times]) -> dict[str, float]:
    """Tiles a second of CPU time, and of wall time, in the best round by each."""
    return {
        "tiles_per_cpu_s": tiles / min(times.cpu for times in rounds),
        "tiles_per_s": tiles / min(times.wall for times in rounds),
    }


def _cpu_seconds(pids: list[int]) -> float:
    """CPU seconds so far of this process, which coordinates, and of the workers."""
    times = [psutil.Process(pid).cpu_times() for pid in pids]
    return time.process_time() + sum(one.user + one.system for one in times)


def _peak_mib() -> float:
    """Called in a worker: its peak; ru_maxrss would be what its parent held at the fork."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


@contextmanager
def dask_cluster(workers: int) -> Iterator[tuple[Client, EngineConfig, list[int]]]:
    """A cluster that is up, how the stage finds it, and its workers' process ids."""
    with dask_client(EngineConfig(workers=workers), workers) as client:
        pids = list(client.run(os.getpid).values())
        # The stage finds the cluster by its address, and shows this client's certificate.
        security = client.security
        certificate = {
            "distributed.comm.tls.ca-file": security.tls_ca_file,
            "distributed.comm.tls.client.cert": security.tls_client_cert,
            "distributed.comm.tls.client.key": security.tls_client_key,
        }
        with dask.config.set(certificate):
            yield client, EngineConfig(scheduler=client.scheduler.address), pids


def stage_once(bench: TilingBench, png: str, engine: EngineConfig, pids: list[int]) -> Times:
    """The stage on a new dataset: CPU seconds of coordinator and workers together."""
    dataset = bench.cohort(SLIDES)
    before, wall = _cpu_seconds(pids), time.perf_counter()
    if tile(dataset, TileConfig(png=png), engine):
        raise SystemExit("the stage failed")
    wall = time.perf_counter() - wall
    times = Times(_cpu_seconds(pids) - before, wall)
    shutil.rmtree(dataset.root)
    return times


def whole_stage(bench: TilingBench, rounds: int) -> tuple[dict[str, dict[str, float]], float]:
    """The stage as a user runs it (plan, Dask, journal) with one worker and with two, in turns.

    Several slides, so that every worker has its share. The best round of each by CPU time, and
    the largest peak of a worker in MiB; a first round, which pays for imports, is left out.
    """
    times: dict[str, list[Times]] = {}
    with dask_cluster(1) as one, dask_cluster(2) as two:
        for turn in range(1 + rounds):
            runs = [("fast, one worker", one), ("fast, two workers", two)]
            if turn == rounds:
                runs.append(("small, one worker", one))
            for name, (_, engine, pids) in runs:
                found = stage_once(bench, name.partition(",")[0], engine, pids)
                if turn:
                    times.setdefault(f"stage {name}", []).append(found)
        peaks = [*one[0].run(_peak_mib).values(), *two[0].run(_peak_mib).values()]
    tiles = SLIDES * len(bench.x)
    rates = {name: best_rates(tiles, rounds_of) for name, rounds_of in times.items()}
    return rates, max(peaks)


def ratios(rates: dict[str, dict[str, float]]) -> dict[str, float]:
    """What the goals are about."""
    per_cpu = {name: rate["tiles_per_cpu_s"] for name, rate in rates.items()}
    found = {}
    for png in ("small", "fast"):
        stage, floor = per_cpu[f"stage {png}, one worker"], per_cpu[f"floor {png}"]
        found[f"stage, one worker, over floor, {png} PNG"] = stage / floor
        found[f"stage, one worker, over plain loop, {png} PNG"] = stage / per_cpu["plain loop"]
        found[f"a slide's task over floor, {png} PNG"] = per_cpu[f"task {png}"] / floor
    share = per_cpu["stage fast, two workers"] / per_cpu["stage fast, one worker"]
    found["two workers over one"] = 2 * share
    return found


def format_tables(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    two_over_one = f"{result['two_over_one_wall']:.2f}"
    ratios = [
        *ratio_rows(result["ratios"], GOALS),
        ("two workers over one, wall time", two_over_one, ""),
        ("peak of a worker, MiB", f"{result['worker_peak_mib']:.0f}", "< 1024"),
    ]
    rates = [
        (name, f"{rate['tiles_per_cpu_s']:.0f}", f"{rate['tiles_per_s']:.0f}")
        for name, rate in result["rates"].items()
    ]
    head = "loop | tiles per CPU second | tiles per second"
    return markdown("ratio (CPU time) | measured | goal", ratios) + "\n" + markdown(head, rates)


def main() -> int:
    """Measure, print, write; exit status 1 where a goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tiles", type=int, default=595, help="tiles of the slide to cut")
    parser.add_argument("--plain-tiles", type=int, default=140, help="tiles for the plain loop")
    options = parser.parse_args()
    cv2.setNumThreads(1)
    bench = TilingBench.prepare(options.tiles)
    rates = single_process(bench, options.rounds, options.plain_tiles)
    stage_rates, peak_mib = whole_stage(bench, options.rounds)
    rates |= stage_rates
    wall = {name: rate["tiles_per_s"] for name, rate in rates.items()}
    result = {
        "machine": MACHINE,
        "tiles": options.tiles,
        "rounds": options.rounds,
        "ratios": ratios(rates),
        "rates": rates,
        "two_over_one_wall": wall["stage fast, two workers"] / wall["stage fast, one worker"],
        "worker_peak_mib": peak_mib,
    }
    write_result("tiling", result, format_tables(result))
    return print_verdict(missed_goals(result["ratios"], GOALS))


if __name__ == "__main__":
    raise SystemExit(main())
