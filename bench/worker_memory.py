"""Measures a worker's memory while it opens hundreds of slides in a row, stage after stage.

    python bench/worker_memory.py [--slides 500]

One Dask worker scans, judges and tiles slides of several sizes; its resident memory is sampled
all the while. Peaks of the last tenth of the slides are compared with those of the second tenth
(the first warms up). The table goes to the terminal and to bench/out/worker_memory.md, the
numbers to bench/out/worker_memory.json.
"""

import argparse
import os
import shutil
import sys
import threading
import time
from pathlib import Path
from typing import Any, Self

import numpy as np
import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # before bench/, with its model.py

from bench.bench_slide import make_slide, make_wide_slide
from bench.common import (
    MACHINE,
    OUT,
    SLIDE,
    markdown,
    new_dataset,
    print_verdict,
    run_stages,
    write_result,
)
from pipeline.dataset import Dataset, read_journal
from pipeline.run.workers import EngineConfig, dask_client

WIDE_PX = (130_000, 5_000)
SIDES_PX = (1000, 1400, 1800, 2200, 2600)
MAX_PEAK_MIB, MAX_GROWTH = 1024, 0.10
_INTERVAL_S = 0.02


class Sampler(threading.Thread):
    """Resident MiB and open files of a process, as they come."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self._process = psutil.Process(pid)
        self._over = threading.Event()
        self.mib: list[float] = []
        self.handles: list[int] = []

    def run(self) -> None:
        """Sample until told to stop."""
        while not self._over.wait(_INTERVAL_S):
            self.mib.append(self._process.memory_info().rss / 2**20)
            self.handles.append(self._process.num_fds())

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self.join()


def make_slides(folder: Path, count: int) -> None:
    """Links to the committed slide and to made ones of several sizes, each under its own name."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    made = [make_slide(OUT / f"slide-{side}.svs", SLIDE, side) for side in SIDES_PX]
    for number in range(count):
        source = SLIDE if number % 10 == 9 else made[number % len(made)]
        (folder / f"slide-{number:04d}.svs").symlink_to(source)


def measure_stage(stage: list[str], dataset: Dataset, pid: int) -> dict[str, Any]:
    """Run a stage and say what became of its worker's memory."""
    began = time.perf_counter()
    with Sampler(pid) as sampler:
        run_stages(dataset.root, stage)
    parts = np.array_split(np.array(sampler.mib), 10)
    handles = [part if len(part) else np.array(sampler.handles[-1:])
               for part in np.array_split(np.array(sampler.handles), 10)]  # fmt: skip
    # One slide may be done before ten samples are taken: the last one then stands for the rest.
    tenths = [float(part.max()) if len(part) else float(sampler.mib[-1]) for part in parts]
    print(f"{stage[0]}: peaks by tenth of the time, MiB:", *map(round, tenths), flush=True)
    return {
        "slides": len({entry.slide_id for entry in read_journal(dataset, stage[0])}),
        "seconds": time.perf_counter() - began,
        "peak_mib": max(tenths),
        "peak_mib_by_tenth": tenths,
        "growth": tenths[-1] / tenths[1] - 1,
        "open_files": [int(handles[1].max()), int(handles[-1].max())],
    }


def stages(folder: Path, where: list[str], pid: int) -> dict[str, dict[str, Any]]:
    """All stages on the slides of a folder."""
    dataset = new_dataset(OUT / "many")
    measured = {
        "scan": measure_stage(["scan", str(folder), *where], dataset, pid),
        "tissue": measure_stage(["tissue", *where], dataset, pid),
    }
    run_stages(dataset.root, ["select", "--name", "train"])
    measured["tile"] = measure_stage(["tile", "--png", "fast", *where], dataset, pid)
    shutil.rmtree(dataset.root)
    shutil.rmtree(folder)
    return measured


def run(slides: int) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, Any]]]:
    """All stages on one worker, which lives through all of them: many slides, then a wide one."""
    folder = OUT / "many-slides"
    with dask_client(EngineConfig(workers=1), 1) as client:
        (pid,) = client.run(os.getpid).values()
        where = ["--scheduler", client.scheduler.address]
        make_slides(folder, slides)
        many = stages(folder, where, pid)
        folder.mkdir()
        wide = make_wide_slide(OUT / "slide-wide.svs", SLIDE, *WIDE_PX)
        (folder / wide.name).symlink_to(wide)
        return many, stages(folder, where, pid)


def format_tables(many: dict[str, dict[str, Any]], wide: dict[str, dict[str, Any]]) -> str:
    """The result as Markdown."""
    rows = []
    for name, stage in many.items():
        tenths, (first, last) = stage["peak_mib_by_tenth"], stage["open_files"]
        sizes = (f"{size:.0f}" for size in (stage["peak_mib"], tenths[1], tenths[-1]))
        growth = f"{stage['growth']:+.1%}"
        rows.append((name, stage["slides"], *sizes, growth, f"{first} to {last}"))
    head = "stage | slides | peak, MiB | second tenth | last tenth | growth | open files"
    peaks = ", ".join(f"{name} {stage['peak_mib']:.0f}" for name, stage in wide.items())
    wide_px = f"{WIDE_PX[0]:,} x {WIDE_PX[1]:,} px"
    return markdown(head, rows) + f"\nA slide of {wide_px}, peaks in MiB: {peaks}\n"


def main() -> int:
    """Measure, print, write; exit status 1 where a goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--slides", type=int, default=500)
    options = parser.parse_args()
    OUT.mkdir(exist_ok=True)
    many, wide = run(options.slides)
    result = {"machine": MACHINE["platform"], "stages": many, "wide": wide}
    write_result("worker_memory", result, format_tables(many, wide))
    return print_verdict(
        [
            name
            for name, stage in many.items()
            if max(stage["peak_mib"], wide[name]["peak_mib"]) >= MAX_PEAK_MIB
            or stage["growth"] > MAX_GROWTH
        ]
    )


if __name__ == "__main__":
    raise SystemExit(main())
