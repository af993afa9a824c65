"""Measures the tile stage against a bare floor and against the loop everyone writes.

    python bench/tiling.py [--rounds 3] [--tiles 600]

Everything is a ratio within one run: contenders take turns on the same tiles, and each is
judged by its best round. Ratios are of CPU time, which a busy machine disturbs least; wall time
stands beside. The table goes to the terminal and to bench/out/tiling.md, the numbers to
bench/out/tiling.json.
"""

import argparse
import io
import json
import multiprocessing
import platform
import resource
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import openslide
import pyarrow as pa
from PIL import Image

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from bench_slide import make_slide  # noqa: E402

from pipeline.dataset import (  # noqa: E402
    CANDIDATES_SCHEMA,
    Dataset,
    Slide,
    claim_identity,
    encode_png,
    new_run_id,
    write_candidates,
)
from pipeline.grid import grid_positions, rank_order  # noqa: E402
from pipeline.slides.native_reader import NativeReader  # noqa: E402
from pipeline.slides.open import best_reader  # noqa: E402
from pipeline.tile import TileConfig, tile_slide  # noqa: E402

OUT = HERE / "out"
SOURCE = HERE.parent / "tests" / "data" / "slides" / "CMU-1-Small-Region.svs"
TILE_PX, WINDOW = 224, 448
GOALS = {
    "stage over floor, small PNG": 0.7,
    "stage over floor, fast PNG": 0.7,
    "stage over plain loop, small PNG": 2.3,
    "stage over plain loop, fast PNG": 6.0,
    "two workers over one": 1.8,
}


@dataclass(frozen=True)
class Times:
    """Seconds of one round."""

    cpu: float
    wall: float


def clocked(function: Callable[[], object]) -> Times:
    """CPU and wall seconds of a call."""
    cpu, wall = time.process_time(), time.perf_counter()
    function()
    return Times(time.process_time() - cpu, time.perf_counter() - wall)


@dataclass(frozen=True)
class Bench:
    """A dataset with one large slide and its first tiles as candidates."""

    dataset: Dataset
    slide: Slide
    x: np.ndarray
    y: np.ndarray

    @classmethod
    def prepare(cls, tiles: int) -> "Bench":
        """Make slide and dataset under bench/out."""
        OUT.mkdir(exist_ok=True)
        path = make_slide(OUT / "slide-16000.svs", SOURCE)
        reader, why = best_reader(path)
        with reader:
            if reader.name != "native":
                raise SystemExit(f"the bench slide is read by {reader.name}: {why}")
            base, codec = reader.levels[0], reader.codec
        x, y = grid_positions(base.width, base.height, WINDOW, WINDOW)
        x, y = x[:tiles], y[:tiles]
        order = rank_order(0, "bench", x, y)
        dataset = Dataset(OUT / "dataset")
        shutil.rmtree(dataset.root, ignore_errors=True)
        grid = {"mpp": 0.5, "mpp_tolerance": 0.02, "tile_px": TILE_PX, "grid": "adjacent"}
        claim_identity(dataset, grid | {"seed": 0}, stage="bench", versions={})
        fractions = np.ones(len(x), np.float32)
        columns = [np.arange(len(x), dtype=np.int32), x[order], y[order], fractions, 0 * fractions]
        table = pa.table([pa.array(c) for c in columns], schema=CANDIDATES_SCHEMA)
        write_candidates(dataset, new_run_id(), "bench", table)
        slide = Slide(
            "bench", str(path), reader="native", mpp=0.25, width=base.width, height=base.height,
            codec=codec,
        )  # fmt: skip
        return cls(dataset, slide, x, y)

    def stage(self, png: str) -> None:
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
                        strip[:, column * side :][:, :side] = reader.decode(0, row, column)
                rows = {last - 1: canvas[-side:]}
                for left in self.x[self.y == top].astype(int):
                    inside = canvas[top - first * side :, left:][:WINDOW, :WINDOW]
                    small = cv2.resize(inside, (TILE_PX, TILE_PX), interpolation=cv2.INTER_AREA)
                    file.write(encode_png(small, png))

    def plain(self, tiles: int) -> None:
        """read_region, convert, Pillow's Lanczos, Pillow's PNG."""
        with openslide.OpenSlide(self.slide.path) as slide, (OUT / "plain.bin").open("wb") as file:
            for x, y in zip(self.x[:tiles], self.y[:tiles], strict=True):
                region = slide.read_region((int(x), int(y)), 0, (WINDOW, WINDOW)).convert("RGB")
                small = region.resize((TILE_PX, TILE_PX), Image.Resampling.LANCZOS)
                png = io.BytesIO()
                small.save(png, "PNG")
                file.write(png.getvalue())


def contenders(bench: Bench, plain_tiles: int) -> dict[str, tuple[int, Callable[[], None]]]:
    """Name to (tiles, what to run)."""
    tiles = len(bench.x)
    found: dict[str, tuple[int, Callable[[], None]]] = {}
    for png in ("small", "fast"):
        found[f"stage {png}"] = (tiles, lambda png=png: bench.stage(png))  # type: ignore[misc]
        found[f"floor {png}"] = (tiles, lambda png=png: bench.floor(png))  # type: ignore[misc]
    found["plain loop"] = (plain_tiles, lambda: bench.plain(plain_tiles))
    return found


def single_worker(bench: Bench, rounds: int, plain_tiles: int) -> dict[str, dict[str, float]]:
    """Tiles a second of each contender: its best round."""
    runs = contenders(bench, plain_tiles)
    times: dict[str, list[Times]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, (_, function) in runs.items():
            times[name].append(clocked(function))
    return {
        name: {
            "tiles_per_cpu_s": tiles / min(t.cpu for t in times[name]),
            "tiles_per_s": tiles / min(t.wall for t in times[name]),
        }
        for name, (tiles, _) in runs.items()
    }


def _worker(bench: Bench, number: int, barrier: Any, results: Any) -> None:
    slide = Slide(**{**bench.slide.__dict__})
    own = Bench(Dataset(OUT / f"dataset-{number}"), slide, bench.x, bench.y)
    shutil.rmtree(own.dataset.root, ignore_errors=True)
    shutil.copytree(bench.dataset.root, own.dataset.root)
    barrier.wait()
    times = clocked(lambda: own.stage("fast"))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    shutil.rmtree(own.dataset.root)
    results.put((times.cpu, times.wall, peak))


def _workers(bench: Bench, count: int) -> list[tuple[float, float, int]]:
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(count), context.Queue()
    processes = [
        context.Process(target=_worker, args=(bench, number, barrier, results))
        for number in range(count)
    ]
    for process in processes:
        process.start()
    found = [results.get(timeout=300) for _ in processes]
    for process in processes:
        process.join()
    return found


def two_workers(bench: Bench, rounds: int) -> dict[str, float]:
    """Throughput of two processes over one: by CPU time (what sharing costs) and by wall time."""
    one, two = [], []
    for _ in range(rounds):
        one.append(_workers(bench, 1)[0])
        two.append(_workers(bench, 2))
    cpu = min(t[0] for t in one) / min(max(t[0] for t in pair) for pair in two)
    wall = min(t[1] for t in one) / min(max(t[1] for t in pair) for pair in two)
    peak = max(t[2] for pair in two for t in pair)
    return {"by_cpu": 2 * cpu, "by_wall": 2 * wall, "worker_peak_mib": peak / 1024}


def _open_many(path: str, opens: int, results: Any) -> None:
    seen = []
    for number in range(1, opens + 1):
        with NativeReader(Path(path)) as reader:
            for at in (0, 4000, 9000):
                reader.read(0, at, at, WINDOW, WINDOW)
        if number % 50 == 0:
            status = Path("/proc/self/status").read_text()
            seen.append(int(status.split("VmRSS:")[1].split()[0]) / 1024)
    results.put(seen)


def memory_over_opens(bench: Bench, opens: int) -> dict[str, Any]:
    """Resident MiB of a process that opens and reads a slide so many times, each 50 opens."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    process = context.Process(target=_open_many, args=(bench.slide.path, opens, results))
    process.start()
    seen = results.get(timeout=300)
    process.join()
    return {"opens": opens, "rss_mib": seen, "growth": max(seen[1:]) / seen[0] - 1}


def ratios(rates: dict[str, dict[str, float]], pair: dict[str, float]) -> dict[str, float]:
    """What the goals are about."""
    per_cpu = {name: rate["tiles_per_cpu_s"] for name, rate in rates.items()}
    found = {}
    for png in ("small", "fast"):
        stage = per_cpu[f"stage {png}"]
        found[f"stage over floor, {png} PNG"] = stage / per_cpu[f"floor {png}"]
        found[f"stage over plain loop, {png} PNG"] = stage / per_cpu["plain loop"]
    found["two workers over one"] = pair["by_cpu"]
    return found


def table(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    lines = ["| ratio (CPU time) | measured | goal |", "|---|---|---|"]
    lines += [
        f"| {name} | {value:.2f} | {GOALS[name]} |" for name, value in result["ratios"].items()
    ]
    pair, memory = result["two_workers"], result["memory"]
    lines.append(f"| two workers over one, wall time | {pair['by_wall']:.2f} | |")
    lines.append(f"| peak of a worker, MiB | {pair['worker_peak_mib']:.0f} | < 1024 |")
    lines.append(f"| growth over {memory['opens']} opens | {memory['growth']:.1%} | < 10% |")
    lines += ["", "| loop | tiles per CPU second | tiles per second |", "|---|---|---|"]
    lines += [
        f"| {name} | {rate['tiles_per_cpu_s']:.0f} | {rate['tiles_per_s']:.0f} |"
        for name, rate in result["rates"].items()
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Measure, print, write; exit status 1 where a goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tiles", type=int, default=595, help="tiles of the slide to cut")
    parser.add_argument("--plain-tiles", type=int, default=140, help="tiles for the plain loop")
    parser.add_argument("--opens", type=int, default=500)
    options = parser.parse_args()
    cv2.setNumThreads(1)
    bench = Bench.prepare(options.tiles)
    rates = single_worker(bench, options.rounds, options.plain_tiles)
    pair = two_workers(bench, options.rounds)
    result = {
        "machine": {"platform": platform.platform(), "cores": multiprocessing.cpu_count()},
        "tiles": options.tiles,
        "rounds": options.rounds,
        "ratios": ratios(rates, pair),
        "rates": rates,
        "two_workers": pair,
        "memory": memory_over_opens(bench, options.opens),
    }
    text = table(result)
    (OUT / "tiling.json").write_text(json.dumps(result, indent=2) + "\n")
    (OUT / "tiling.md").write_text(text)
    print(text)
    missed = [name for name, value in result["ratios"].items() if value < GOALS[name]]
    print(f"missed: {', '.join(missed)}" if missed else "all goals are met")
    return 1 if missed else 0


if __name__ == "__main__":
    raise SystemExit(main())
