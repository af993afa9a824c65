"""Checks the planning model (docs/scaling.md): rates, tables and scheduler at 100,000 slides.

    python bench/scaling.py [--slides 100000] [--candidates 10000] [--tasks 4000] [--keep]

Three parts. Rates: CPU seconds of scan and tissue on slides of two sizes, so that a slide of any
size can be reckoned. Tables: a dataset of so many slides (journals, slides.parquet, candidates as
hard links to a few real files), on which the real commands run: `scan` with nothing to do,
`select` of 40 and 108 million tiles, `status`, with their seconds and peak memory. Scheduler: CPU
seconds of the coordinator a slide, from tasks that do nothing. JSON and a table go to bench/out/.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # before bench/, with its model.py

from bench.bench_slide import make_slide
from bench.cohort_costs import CohortSize, Rates, cohort_costs, total
from bench.common import OUT, ROOT, SLIDE, candidates_table, markdown, new_dataset
from common.console import Meter
from common.text import format_bytes, format_seconds
from pipeline.dataset import (
    Dataset,
    Entry,
    FileRecord,
    Slide,
    claim_identity,
    commit_bytes,
    new_run_id,
    write_candidates,
)
from pipeline.dataset.journal import encode_line
from pipeline.run.drain import run_tasks
from pipeline.run.stage import stage_versions
from pipeline.run.tasks import SlideTask
from pipeline.run.workers import EngineConfig
from pipeline.slides.config import ScanConfig
from pipeline.slides.entries import find_slides
from pipeline.slides.scan import (
    _slide_before_opening,
    _source_fingerprint,
    scan_slide,
)
from pipeline.tiles.stage import tile_fingerprint
from pipeline.tissue.config import TissueConfig
from pipeline.tissue.stage import tissue_fingerprint, tissue_slide

SIDES = (8_000, 16_000)
AVERAGE_SLIDE_MPX = 6_300.0
"""A TCGA slide of 10,500 candidate tiles at 0.25 µm/px, a third of whose grid is tissue."""
PROTOTYPES = 16


def rates() -> dict[str, float]:
    """CPU seconds of scan and tissue, fixed and a megapixel of level 0; bytes of pictures."""
    seen = []
    for side in SIDES:
        path = make_slide(OUT / f"slide-{side}.svs", SLIDE, side)
        dataset, config = new_dataset(root := OUT / "scaling-rates"), ScanConfig((str(path),))
        claim_identity(dataset, config.identity(), stage="scan", versions={})
        claim_identity(dataset, TissueConfig().identity(), stage="tissue", versions={})
        (source,) = find_slides([str(path)])
        began = time.process_time()
        (scanned,) = scan_slide(source, config, "", str(root))
        scan_s = time.process_time() - began
        values = dict(scanned.values) | {"levels": tuple(map(tuple, scanned.values["levels"]))}
        began = time.process_time()
        (found,) = tissue_slide(str(root), new_run_id(), Slide(**values), TissueConfig(), "")
        tissue_s = time.process_time() - began
        sizes = {record.path.split(".")[-1]: record.bytes for record in found.files}
        tiles = found.counts["candidate tiles"]
        seen.append((side * side / 1e6, scan_s, tissue_s, sizes["png"] + sizes["jpg"],
                     sizes["parquet"] / tiles))  # fmt: skip
        shutil.rmtree(root)
    return _fitted(seen)


def _fitted(seen: list[tuple[float, ...]]) -> dict[str, float]:
    """The line through both sizes, and what it says of an average slide."""
    (area0, *small), (area1, *large) = seen
    fitted: dict[str, float] = {}
    for name, low, high in zip(("scan_s", "tissue_s", "picture_bytes"), small, large, strict=False):
        slope = max(0.0, (high - low) / (area1 - area0))
        fitted[f"{name}_fixed"], fitted[f"{name}_per_mpx"] = low - slope * area0, slope
        fitted[f"{name}_average_slide"] = low + slope * (AVERAGE_SLIDE_MPX - area0)
        fitted[f"{name}_16000px"] = high
    fitted["candidate_bytes"] = large[3]
    return fitted


def make_tables(root: Path, slides: int, candidates: int) -> dict[str, float]:
    """A dataset of that many slides with about that many candidates each, all stages journalled."""
    dataset = Dataset(root)
    table = root / "cohort.csv"
    root.mkdir(parents=True)
    with table.open("w") as file:
        file.write("path,slide_id,patient,site,project,mpp,bytes\n")
        for number in range(slides):
            file.write(f"s3://b/{number}.svs,S-{number:06d},P-{number // 2:06d},"
                       f"{number % 681:03d},{number % 32:02d},0.25,1100000000\n")  # fmt: skip
    config, tissue = ScanConfig((str(table),)), TissueConfig()
    claim_identity(dataset, config.identity(), stage="scan", versions=stage_versions())
    identity = claim_identity(dataset, tissue.identity(), stage="tissue", versions=stage_versions())
    codec = {"resampler": "area", "icc": "ignore", "codec": "png"}
    identity = claim_identity(dataset, codec, stage="tile", versions=stage_versions())
    prototypes = [_prototype(dataset, candidates + 61 * k) for k in range(PROTOTYPES)]
    # Written at one go: a commit and a sync per slide would take hours.
    journals = {stage: _journal(dataset, stage) for stage in ("scan", "tissue", "tile")}
    versions = stage_versions("tifffile", "imagecodecs")
    total = 0
    for number, source in enumerate(find_slides([str(table)])):
        slide = _scanned(source)
        mark = _source_fingerprint(source, config)
        values = {**slide.__dict__}
        entry = Entry(slide.slide_id, "done", mark, values=values, seconds=0.7)
        journals["scan"].write(encode_line(entry, versions))
        tiles, records = _linked(dataset, slide.slide_id, prototypes, number)
        total += tiles
        counts = {"grid tiles": 3 * tiles, "candidate tiles": tiles}
        parent = tissue_fingerprint(slide, identity)
        done = Entry(slide.slide_id, "done", parent, files=records, counts=counts, seconds=8.0,
                     values={"glass": [243, 243, 242], "um_per_px": 8.0,
                             "class_mm2": {"tissue": 130.1}, "tiles": counts})  # fmt: skip
        journals["tissue"].write(encode_line(done, versions))
        shard = f"tiles/224/{slide.slide_id}.0-{tiles}"
        files = tuple(FileRecord(f"{shard}.{kind}", 10**9, "0" * 64) for kind in ("tar", "idx"))
        mark = tile_fingerprint(slide, identity)
        cut = Entry(slide.slide_id, "done", mark, scope="224", start=0, stop=tiles, files=files,
                    counts={"tiles": tiles}, seconds=80.0)  # fmt: skip
        journals["tile"].write(encode_line(cut, versions))
    for file in journals.values():
        file.close()
    return {"slides": slides, "candidates": total}


def _journal(dataset: Dataset, stage: str) -> Any:
    folder = dataset.status_dir(stage)
    folder.mkdir(parents=True)
    return (folder / f"{new_run_id()}.jsonl").open("w")


def _scanned(source: Any) -> Slide:
    levels = ((90_000, 70_000, 1.0), (22_500, 17_500, 4.0), (5_625, 4_375, 16.0))
    known = _slide_before_opening(source).__dict__
    return Slide(**{**known, "reader": "native", "vendor": "aperio", "mpp": 0.25,
                    "mpp_source": "table", "width": 90_000, "height": 70_000, "levels": levels,
                    "codec": "jpeg"})  # fmt: skip


def _prototype(dataset: Dataset, tiles: int) -> tuple[int, list[Path]]:
    """Mask, overlay and candidates that many slides share."""
    run, name = new_run_id(), f"prototype-{tiles}"
    x = np.arange(tiles, dtype=np.float64) % 200 * 448
    y = np.arange(tiles, dtype=np.float64) // 200 * 448
    order = np.random.default_rng(tiles).permutation(tiles)
    share = np.random.default_rng(0).random(tiles).astype(np.float32)
    write_candidates(dataset, run, name, candidates_table(x[order], y[order], share))
    paths = [dataset.mask_file(name), dataset.overlay_file(name)]
    for path in paths:
        commit_bytes(dataset, run, path, b"x" * 1000)
    return tiles, [*paths, dataset.candidates_file(name)]


def _linked(
    dataset: Dataset, slide_id: str, prototypes: list[tuple[int, list[Path]]], number: int
) -> tuple[int, tuple[FileRecord, ...]]:
    tiles, sources = prototypes[number % len(prototypes)]
    records = []
    targets = (dataset.mask_file, dataset.overlay_file, dataset.candidates_file)
    for source, target in zip(sources, targets, strict=True):
        path = target(slide_id)
        os.link(source, path)
        records.append(FileRecord(dataset.relative_path(path), path.stat().st_size, "0" * 64))
    return tiles, tuple(records)


def measured(name: str, *arguments: str) -> dict[str, Any]:
    """Seconds and peak memory of a command, in a process of its own."""
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom pipeline.__main__ import main\n"
        "began = time.monotonic()\nstatus = main(sys.argv[1:])\n"
        # Not getrusage's maximum: a child inherits its parent's.
        "peak = Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0]\n"
        "print('MEASURED', status, time.monotonic() - began, time.process_time(), "
        "int(peak) * 1024)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONSAFEPATH": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], env=environment, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    line = next((x for x in done.stdout.splitlines() if x.startswith("MEASURED")), "")
    if not line or line.split()[1] != "0":
        raise SystemExit(f"{name} failed: {done.stdout[-1500:]}{done.stderr[-1500:]}")
    _, _, wall, cpu, peak = line.split()
    row = {"what": name, "wall_s": float(wall), "cpu_s": float(cpu), "peak_bytes": float(peak)}
    print(f"{name}: {format_seconds(float(wall))}, CPU {format_seconds(float(cpu))}, "
          f"peak {format_bytes(float(peak))}", flush=True)  # fmt: skip
    return row


def tables(slides: int, candidates: int, budgets: list[int], *, keep: bool) -> dict[str, Any]:
    """The commands that read or write tables of the whole dataset."""
    root = OUT / "scaling-dataset"
    shutil.rmtree(root, ignore_errors=True)
    began = time.monotonic()
    made = make_tables(root, slides, candidates)
    print(f"made {made} in {format_seconds(time.monotonic() - began)}", flush=True)
    at = ["--dataset", str(root)]
    rows = [measured("scan, nothing to do", "scan", str(root / "cohort.csv"), *at)]
    rows.append(measured("scan again", "scan", str(root / "cohort.csv"), *at))
    for tiles in budgets:
        name = f"train-{tiles // 10**6}m"
        rows.append(
            measured(f"select {tiles:,}", "select", *at, "--name", name, "--tiles", str(tiles))
        )
    rows.append(measured("status", "status", *at, "--json"))
    sizes = {
        path.relative_to(root).as_posix(): path.stat().st_size
        for path in [*root.glob("selections/*"), root / "slides.parquet", *root.glob("status/*/*")]
    }
    if not keep:
        shutil.rmtree(root)
    return {**made, "commands": rows, "bytes": sizes}


def nothing(slide_id: str) -> list[Entry]:
    """A slide that takes no time."""
    return [Entry(slide_id, "done", "f", seconds=1e-6)]


def scheduler(tasks: int, workers: int) -> dict[str, float]:
    """CPU seconds of coordinator and scheduler a slide; workers are threads of this process."""
    import dask
    from distributed import LocalCluster

    names = [f"S-{number:06d}" for number in range(tasks)]
    work = [SlideTask(name, "f", (name,)) for name in names]
    done: list[str] = []
    # As the stages start theirs: a slide that kills its worker is not begun again.
    with dask.config.set({"distributed.scheduler.allowed-failures": 0}), LocalCluster(
        n_workers=workers, threads_per_worker=1, processes=False, dashboard_address=None,
        silence_logs=50,
    ) as cluster:  # fmt: skip
        config = EngineConfig(scheduler=cluster.scheduler_address)
        cpu, wall = time.process_time(), time.monotonic()
        run_tasks(nothing, work, config, lambda e: done.append(e[0].slide_id),
                  Meter("bench", tasks, "slides"))  # fmt: skip
        cpu, wall = time.process_time() - cpu, time.monotonic() - wall
    if sorted(done) != names:
        raise SystemExit("slides were lost")
    print(f"scheduler: {tasks} slides on {workers} workers: {tasks / wall:.0f} slides/s, "
          f"CPU {1000 * cpu / tasks:.2f} ms a slide", flush=True)  # fmt: skip
    return {"tasks": tasks, "workers": workers, "cpu_ms_per_slide": 1000 * cpu / tasks,
            "slides_per_s": tasks / wall}  # fmt: skip


def format_table(result: dict[str, Any]) -> str:
    """The table of bench/out/scaling.md."""
    commands = [
        (row["what"], format_seconds(row["wall_s"]), format_seconds(row["cpu_s"]),
         format_bytes(row["peak_bytes"]))
        for row in result.get("tables", {}).get("commands", ())
    ]  # fmt: skip
    empty = [
        (f"{row['tasks']:,} empty slides on {row['workers']} workers",
         f"{row['slides_per_s']:.0f} slides/s", f"{row['cpu_ms_per_slide']:.2f} ms a slide", "")
        for row in result.get("scheduler", ())
    ]  # fmt: skip
    return markdown("what | wall | CPU | peak memory", [*commands, *empty])


COHORTS = (
    (10_000, 105_000_000, 40_000_000),
    (10_000, 105_000_000, 100_000_000),
    (100_000, 1_050_000_000, 100_000_000),
    (100_000, 1_050_000_000, 1_000_000_000),
)
"""Slides, candidates and stored tiles of the tables of docs/scaling.md."""
H0_MINI = {"cls": (768, (196, 768)), "tokens-float16": (768, (196, 768))}


def plan_lines() -> Iterator[str]:
    """The planning model's tables: a row a stage, a cohort a column."""
    costs = [cohort_costs(CohortSize(*counts, H0_MINI, 1.0), Rates()) for counts in COHORTS]
    heads = [f"{slides:,} slides, {tiles // 10**6:,}M tiles" for slides, _, tiles in COHORTS]
    for title, show in (
        ("bytes", lambda c: format_bytes(c.bytes) if c.bytes else ""),
        ("inodes", lambda c: f"{c.files:,}" if c.files else ""),
        ("core-hours", lambda c: f"{(c.core_s or 0) / 3600:,.0f}" if c.core_s else ""),
        ("GPU-hours", lambda c: f"{(c.gpu_s or 0) / 3600:,.0f}" if c.gpu_s else ""),
    ):
        rows = zip(*([*stages, total(stages)] for stages in costs), strict=True)
        cells = [(row[0].stage, *map(show, row)) for row in rows if any(map(show, row))]
        yield markdown(" | ".join((title, *heads)), cells)


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--slides", type=int, default=100_000)
    parser.add_argument("--candidates", type=int, default=10_000, help="a slide, about")
    parser.add_argument("--tasks", type=int, default=4_000)
    parser.add_argument("--parts", default="rates,tables,scheduler,plan")
    parser.add_argument("--select", default="40000000,108000000", help="budgets in tiles")
    parser.add_argument("--keep", action="store_true", help="leave the made dataset there")
    options = parser.parse_args()
    OUT.mkdir(exist_ok=True)
    path = OUT / "scaling.json"
    result = json.loads(path.read_text()) if path.exists() else {}
    parts = options.parts.split(",")
    if "plan" in parts:
        print("\n".join(plan_lines()))
    if "rates" in parts:
        result["rates"] = rates()
        print(json.dumps(result["rates"], indent=1), flush=True)
    if "scheduler" in parts:
        result["scheduler"] = [scheduler(options.tasks, workers) for workers in (8, 64)]
    if "tables" in parts:
        budgets = [int(text) for text in options.select.split(",") if text]
        result["tables"] = tables(options.slides, options.candidates, budgets, keep=options.keep)
    path.write_text(json.dumps(result, indent=1) + "\n")
    (OUT / "scaling.md").write_text(text := format_table(result))
    print(text)


if __name__ == "__main__":
    main()
