"""Trains the tiny preset on real tiles and judges it on tiles of patients it never saw.

    python bench/bench_heldout.py WORK [--tiles ../shared/data/tiles_224] [--seeds 3] [--steps 600]

Makes WORK/dataset of the folder of tiles (named by their TCGA barcode) with features of H0-mini
(`--weights`, random:0 unless told otherwise), then trains each seed with and without alignment
into WORK/<name>-<seed>, and writes WORK/curves.csv, curves.png and summary.md. A patient in five
is held out (selection val-out); of the others the first tile of each region is kept from training
(val-in). What stands is not done again. Each training run is a process of its own, on one thread
a core that is free.

Losses are those of the averaged SiT on fixed noise; both predictors that are blind to a tile are
given the judged tiles' own moments, which is more than they could know.
"""

import argparse
import csv
import statistics
import subprocess
import sys
import zlib
from collections import defaultdict
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # before bench/, with its model.py

from bench.common import ROOT, markdown
from pipeline.dataset import (
    Dataset,
    Run,
    make_selection,
    open_dataset,
    read_slides,
    software_versions,
    write_selection,
)
from train.metrics_log import read_metrics

HELD_OUT_SHARE = 5  # a patient in so many
ARMS: dict[str, tuple[str, ...]] = {
    "aligned": (),
    "unaligned": ("loss.vae_align=0", "loss.sit_align=0"),
}
CURVES = ("psnr", "denoise", "denoise_gaussian", "align", "align_mean_token")


def main() -> int:
    """Make the dataset, train what is missing, and write the curves."""
    options = _options()
    options.work.mkdir(parents=True, exist_ok=True)
    if not options.collect:
        dataset = make_dataset(options.work, options.tiles, options.weights)
        if options.only_dataset:
            return 0
        for seed in range(options.seeds):
            for arm in options.arms:
                train(options, dataset, arm, seed)
    rows = curves(options.work, options.arms, options.seeds)
    write_csv(options.work / "curves.csv", rows)
    plot(options.work / "curves.png", rows)
    report = summary(rows, options)
    (options.work / "summary.md").write_text(report)
    print(report)
    return 0


def make_dataset(work: Path, tiles: Path, weights: str) -> Dataset:
    """Import the tiles, a region a slide, select by patient, and cache features."""
    root = work / "dataset"
    table = work / "tiles.csv"
    with table.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("path", "slide"))
        for path in sorted(tiles.glob("*.png")):
            writer.writerow((path.resolve(), "_".join(path.stem.split("_")[:-2])))
    _run("pipeline", "import", "tiles", str(table), "--dataset", str(root), "--mpp", "0.5")
    dataset = open_dataset(root)
    select(dataset)
    _run("pipeline", "cache", "--dataset", str(root), "--weights", weights, "--workers", "1")
    return dataset


def select(dataset: Dataset) -> None:
    """Selections train, val-in and val-out, as the module's docstring says."""
    chosen: dict[str, dict[str, np.ndarray]] = defaultdict(dict)
    patients = sorted({str(s.patient) for s in read_slides(dataset)}, key=_key)
    held_out = set(patients[::HELD_OUT_SHARE])
    for slide in read_slides(dataset):
        ranks = np.arange(4, dtype=np.int32)
        if str(slide.patient) in held_out:
            chosen["val-out"][slide.slide_id] = ranks
        else:
            chosen["val-in"][slide.slide_id] = ranks[:1]
            chosen["train"][slide.slide_id] = ranks[1:]
    plan = {"held_out_patients": sorted(held_out)}
    with Run(dataset, "select", software_versions()) as run:
        for name, ranks_by_slide in chosen.items():
            write_selection(dataset, run.run_id, make_selection(name, ranks_by_slide, plan))
    print(f"{len(held_out)} of {len(patients)} patients held out")


def _key(patient: str) -> int:
    """An order that follows no barcode."""
    return zlib.crc32(patient.encode())


def train(options: argparse.Namespace, dataset: Dataset, arm: str, seed: int) -> None:
    """One run, in a separate process; continues where it was stopped."""
    run_dir = options.work / f"{arm}-{seed}"
    _run(
        "train",
        "--config",
        options.config,
        f"data.dataset={dataset.root}",
        f"run.dir={run_dir}",
        f"run.seed={seed}",
        f"run.steps={options.steps}",
        "log.validation=[val-in, val-out]",
        f"log.validation_every={options.every}",
        f"log.every={options.every}",
        "log.samples_every=0",
        *ARMS[arm],
        *options.set,
    )


def curves(work: Path, arms: list[str], seeds: int) -> list[dict[str, float | str]]:
    """Every validation of every run, a row each."""
    rows: list[dict[str, float | str]] = []
    for arm in arms:
        for seed in range(seeds):
            for line in read_metrics(work / f"{arm}-{seed}"):
                for selection in ("val-in", "val-out"):
                    head = {"arm": arm, "seed": seed, "step": line["step"], "on": selection}
                    values = {c: line[k] for c in CURVES if (k := f"{selection}/{c}") in line}
                    if values:
                        rows.append(head | values)
    return rows


def write_csv(path: Path, rows: list[dict[str, float | str]]) -> None:
    """The rows as CSV, six digits."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ("arm", "seed", "step", "on", *CURVES))
        writer.writeheader()
        for row in rows:
            writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})


def plot(path: Path, rows: list[dict[str, float | str]]) -> None:
    """Losses on held-out patients over steps, a thin line a seed, with the blind predictors."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    panels = (
        ("denoise", "denoise_gaussian", "denoising loss"),
        ("align", "align_mean_token", "alignment cosine"),
        ("psnr", None, "reconstruction PSNR (dB)"),
    )
    figure, axes = pyplot.subplots(1, 3, figsize=(13, 3.6), layout="constrained")
    for axis, (name, blind, title) in zip(axes, panels, strict=True):
        for arm, colour in (("aligned", "tab:blue"), ("unaligned", "tab:orange")):
            for place, seed in enumerate(sorted({r["seed"] for r in rows if r["arm"] == arm})):
                mine = [r for r in rows if (r["arm"], r["seed"], r["on"]) == (arm, seed, "val-out")]
                for key, style in ((name, "-"), (blind, ":")):
                    points = [(r["step"], r[key]) for r in mine if key is not None and key in r]
                    label = f"{arm}{', blind predictor' if key == blind else ''}"
                    if points:
                        axis.plot(
                            *zip(*points, strict=True),
                            style,
                            color=colour,
                            lw=1,
                            label=label if place == 0 else None,
                        )
        axis.set(title=f"{title}, held-out patients", xlabel="step")
        axis.legend(fontsize=7)
    figure.savefig(path, dpi=110)


def summary(rows: list[dict[str, float | str]], options: argparse.Namespace) -> str:
    """A table of the judged step: mean over seeds and their range, and the gain in PSNR (dB)."""
    head = (
        f"{options.config}, {options.steps} steps, encoder weights {options.weights}; mean over "
        "seeds (least to largest)\n\n"
    )
    table = []
    for arm in options.arms:
        for selection in ("val-in", "val-out"):
            mine = {
                step: {
                    row["seed"]: row
                    for row in rows
                    if (row["arm"], row["step"], row["on"]) == (arm, step, selection)
                }
                for step in (0, options.steps)
            }
            last = mine[options.steps]
            cells = [_cell([float(row[c]) for row in last.values() if c in row]) for c in CURVES]
            gains = [
                float(row["psnr"]) - float(mine[0][seed]["psnr"]) for seed, row in last.items()
            ]
            table.append((arm, len(last), selection, *cells, _cell(gains)))
    titles = " | ".join(("arm", "seeds", "on", *CURVES, "PSNR gained, dB"))
    return head + markdown(titles, table)


def _cell(values: list[float]) -> str:
    if not values:
        return "-"
    return f"{statistics.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def _run(room: str, *arguments: str) -> None:
    command = [sys.executable, "-m", room, *arguments]
    subprocess.run(command, cwd=ROOT, check=True)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="The tiny preset on patients it never saw.")
    parser.add_argument("work", type=lambda text: Path(text).resolve())
    tiles = ROOT.parent / "shared" / "data" / "tiles_224"
    parser.add_argument("--tiles", type=Path, default=tiles)
    parser.add_argument("--weights", default="random:0", help="H0-mini's, as for `cache`")
    parser.add_argument("--config", default="tiny")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--every", type=int, default=50, help="steps between validations")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--set", nargs="*", default=[], metavar="key=value", help="for `train`")
    parser.add_argument("--only-dataset", action="store_true")
    parser.add_argument("--collect", action="store_true", help="train nothing: what stands")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
