"""Measures how well the training stream mixes slides and sites, against ideal sampling.

    python bench/bench_mixing.py COHORT.csv [--selection train-40m] [--batch 640] [--work DIR]

Plans the selections of a slide list (`pipeline plan-cohort`; candidates simulated from the files'
sizes), then follows the stream for some hundred steps. Ideal sampling draws each batch's rows at
random from the whole selection. The table goes to the terminal and to bench/out/mixing.md.

Autocorrelation at a lag is that of the batches' counts a slide, summed over slides: 0 for ideal
sampling, 1 if a batch held the same slides as the one so many steps before.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import numpy.typing as npt

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # before bench/, with its model.py

from bench.common import OUT, ROOT, markdown
from pipeline.dataset import Dataset, read_selection, read_slides
from train.stream import BlockTable, compile_blocks, epoch_order

WINDOW = 64  # steps over which distinct slides are counted
Counts = npt.NDArray[np.int64]


def slides_of_steps(
    table: BlockTable, batch: int, cursors: int, steps: range, seed: int = 0
) -> Counts:
    """Slide index of every slot at every step [steps, batch] in the first epoch."""
    order = epoch_order(len(table.blocks), seed, 0)
    ends = np.cumsum(table.row_counts[order])
    stretch = table.num_rows // (batch * cursors)
    t, slot = np.array(steps)[:, None], np.arange(batch)[None, :]
    position = (slot * cursors + t % cursors) * stretch + t // cursors
    entry = np.searchsorted(ends, position, side="right")
    return np.asarray(table.blocks["slide"][order[entry]], np.int64)


def autocorrelation(slides: Counts, num_slides: int, lags: list[int]) -> list[float]:
    """Autocorrelation, from -1 to 1, of the batches' counts per slide, at each lag in steps."""
    counts = np.stack([np.bincount(row, minlength=num_slides) for row in slides]).astype(np.float32)
    centred = counts - counts.mean(axis=0)
    variance = float((centred**2).sum()) / len(centred)
    return [
        float((centred[lag:] * centred[:-lag]).sum()) / (len(centred) - lag) / variance
        for lag in lags
    ]


def ideal_slides(shares: npt.NDArray[np.float64], draws: int) -> float:
    """Expected number of distinct groups, of `shares` in [0, 1], among `draws` random rows."""
    return float((1 - (1 - shares) ** draws).sum())


def measure(table: BlockTable, sites: Counts, batch: int, cursors: int, steps: int) -> list[str]:
    """A row of the table: what a batch, and what 64 of them, hold."""
    first = table.num_rows // batch // 2  # the middle of an epoch
    slides = slides_of_steps(table, batch, cursors, range(first, first + steps))
    distinct = np.mean([len(np.unique(row)) for row in slides])
    distinct_sites = np.mean([len(np.unique(sites[row])) for row in slides])
    seen = len(np.unique(slides[:WINDOW]))
    lags = [1, cursors, 4 * cursors, 16 * cursors]
    found = autocorrelation(slides, len(table.slide_ids), lags)
    return [
        str(cursors), f"{distinct:.1f}", f"{distinct_sites:.1f}", f"{seen:,}",
        *(f"{value:.2f}" for value in found),
    ]  # fmt: skip


def main() -> int:
    """Plan, follow, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cohort", type=Path)
    parser.add_argument("--selection", default="train-40m")
    parser.add_argument("--batch", type=int, default=640)
    parser.add_argument("--steps", type=int, default=512)
    parser.add_argument("--cursors", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--work", type=Path, help="keep the planned selections there")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = (options.work or Path(scratch)).resolve()
        if not (folder / "slides.parquet").exists():
            plan = [sys.executable, "-m", "pipeline", "plan-cohort", str(options.cohort.resolve())]
            subprocess.run([*plan, "--out", str(folder)], cwd=ROOT, check=True)
        dataset = Dataset(folder)
        table = compile_blocks(read_selection(dataset, options.selection))
        site_of = {slide.slide_id: str(slide.site) for slide in read_slides(dataset)}
    names = [site_of[slide] for slide in table.slide_ids]
    sites = np.unique(names, return_inverse=True)[1]
    rows = np.bincount(table.blocks["slide"], weights=table.row_counts)
    shares = rows / rows.sum()
    site_shares = np.bincount(sites, weights=shares)
    ideal = [
        "ideal", f"{ideal_slides(shares, options.batch):.1f}",
        f"{ideal_slides(site_shares, options.batch):.1f}",
        f"{ideal_slides(shares, WINDOW * options.batch):,.0f}", *["0"] * 4,
    ]  # fmt: skip
    head = (
        f"cursors K | slides a batch | sites a batch | slides in {WINDOW} steps "
        "| autocorrelation at lag 1 | at lag K | at lag 4 K | at lag 16 K"
    )
    lines = [ideal] + [
        measure(table, sites, options.batch, cursors, options.steps) for cursors in options.cursors
    ]
    text = (
        f"{options.selection}: {table.num_rows:,} rows of {len(table.slide_ids):,} slides and "
        f"{len(site_shares)} sites, batch {options.batch}; "
        f"{table.read_amplification:.3f} tiles are read for each trained on\n\n"
        + markdown(head, lines)
    )
    OUT.mkdir(exist_ok=True)
    (OUT / "mixing.md").write_text(text)
    print(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
