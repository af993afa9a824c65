"""What the benches share: where they read and write, tables, rounds, and the verdict.

`make bench` does not run this file.
"""

import json
import math
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.__main__ import main as run_pipeline
from pipeline.dataset import (
    CANDIDATES_SCHEMA,
    Dataset,
    Entry,
    HashingFile,
    Run,
    commit_bytes,
    commit_file,
    write_tar,
)
from pipeline.dataset.features import open_writer, write_blocks

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "bench" / "out"
SLIDES = ROOT / "tests" / "data" / "slides"
SLIDE = SLIDES / "CMU-1-Small-Region.svs"
"""The committed slide: 2220 x 2967 px at 0.499 mpp."""
CORES = len(os.sched_getaffinity(0))
MACHINE = {"platform": platform.platform(), "cores": CORES}


def markdown(head: str, rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table; `head` is its first line without the outer bars."""
    lines = [f"| {head} |", "|" + "---|" * len(head.split("|"))]
    lines += ["| " + " | ".join(map(str, row)) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def ratio_rows(
    ratios: Mapping[str, float], goals: Mapping[str, object], digits: int = 2
) -> list[tuple[str, str, object]]:
    """Rows of name, measured ratio and goal, "" where there is none."""
    return [(name, f"{value:.{digits}f}", goals.get(name, "")) for name, value in ratios.items()]


def missed_goals(ratios: Mapping[str, float], goals: Mapping[str, float]) -> list[str]:
    """Names of the goals that the measured ratios are below."""
    return [name for name, value in ratios.items() if value < goals.get(name, -math.inf)]


def best_seconds(
    contenders: Mapping[str, Callable[[], object]],
    rounds: int,
    clock: Callable[[], float] = time.process_time,
    *,
    warm_up: bool = False,
) -> dict[str, float]:
    """Seconds of each contender's best round; they take turns.

    With `warm_up` a first round, which fills caches and compiles, is not counted.
    """
    best = dict.fromkeys(contenders, math.inf)
    # In turns: what else the machine does then slows all contenders alike.
    for number in range(rounds + warm_up):
        for name, run in contenders.items():
            start = clock()
            run()
            if number >= warm_up:
                best[name] = min(best[name], clock() - start)
    return best


@dataclass(frozen=True)
class Times:
    """Seconds of one call."""

    cpu: float
    wall: float


def clock_call(function: Callable[[], object]) -> Times:
    """CPU seconds of this process and wall seconds that a call takes."""
    cpu, wall = time.process_time(), time.perf_counter()
    function()
    return Times(time.process_time() - cpu, time.perf_counter() - wall)


def device_clock(device: Any) -> Callable[[], float]:
    """Wall seconds once a GPU has done all its work, else CPU seconds of this process."""
    if device.type != "cuda":
        return time.process_time

    def clock() -> float:
        import torch

        # Kernels run after the call that starts them has returned.
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return clock


def device_name(device: Any) -> str:
    """The GPU's name, else the processor's."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name()
    return platform.processor() or platform.machine()


def write_result(name: str, result: object, text: str) -> None:
    """Numbers and tables to bench/out/NAME.json and .md, tables to the terminal as well."""
    OUT.mkdir(exist_ok=True)
    (OUT / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n")
    (OUT / f"{name}.md").write_text(text)
    print(text)


def print_verdict(missed: Sequence[str], all_met: str = "all goals are met") -> int:
    """Say which goals are missed; exit status 1 where one is."""
    print(f"missed: {', '.join(missed)}" if missed else all_met)
    return 1 if missed else 0


def new_dataset(root: Path) -> Dataset:
    """A dataset in an empty place."""
    shutil.rmtree(root, ignore_errors=True)
    return Dataset(root)


def run_stages(root: Path, *stages: Sequence[str]) -> Dataset:
    """Run stages of the pipeline on a dataset; raises SystemExit where one fails."""
    for stage, *arguments in stages:
        if run_pipeline([stage, "--dataset", str(root), *arguments]):
            raise SystemExit(f"bench: {stage} failed")
    return Dataset(root)


def candidates_table(x: np.ndarray, y: np.ndarray, fractions: np.ndarray | None = None) -> pa.Table:
    """Candidates at level-0 positions [n], in rank order; all of them tissue unless given."""
    share = np.ones(len(x), np.float32) if fractions is None else fractions
    columns = [np.arange(len(x), dtype=np.int32), x, y, share, 0 * share]
    arrays = [
        pa.array(column).cast(field.type)
        for column, field in zip(columns, CANDIDATES_SCHEMA, strict=True)
    ]
    return pa.table(arrays, schema=CANDIDATES_SCHEMA)


def commit_tiles(dataset: Dataset, run: Run, slide_id: str, pngs: Sequence[bytes]) -> None:
    """One shard of 224 px tiles [0, n), journalled."""
    path, index = dataset.tiles_dir(224) / f"{slide_id}.0-{len(pngs)}.tar", bytearray()

    def write(file: HashingFile) -> None:
        index.extend(write_tar(file, slide_id, 0, pngs))

    tar = commit_file(dataset, run.run_id, path, write)
    files = (tar, commit_bytes(dataset, run.run_id, path.with_suffix(".idx"), bytes(index)))
    entry = Entry(slide_id, "done", "f", scope="224", start=0, stop=len(pngs), files=files)
    run.append([entry])


def write_features(file: HashingFile, tables: Iterable[pa.Table]) -> None:
    """Tables of one schema as a feature file."""
    tables = iter(tables)
    first = next(tables)
    with open_writer(file, first.schema) as writer:
        write_blocks(writer, first)
        for table in tables:
            write_blocks(writer, table)
