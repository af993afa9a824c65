"""Measures training: reading the stream over a bare decode, and the step over a plain one.

    python bench/training.py [--device cuda] [--rounds 3] [--batches 8 16 32 64] [--part data|step]

Data: images a second of one core, through the reader with CLS and patch tokens, over decoding the
same PNG bytes from memory with the same decoder; CPU time, since other work disturbs it least.
From it follows how many cores feed one H200.

Step: the training step in its versions, and a plain one with the same maths written as the public
trainers write it (eager, NCHW, float16 with loss scaling on a GPU, averages and optimizers tensor
by tensor, a host sync a metric). Images/s, and MFU: counted operations over the rate of a large
matrix product in the same run. With a GPU it is CytoSyn's step (SiT-XL/2, VAE f8d4, LPIPS with
random weights, 224 px) at each batch that fits, and the goals are judged; on a CPU the tiny
preset's, in CPU time, which tells that the versions run and nothing about a GPU.
Table and numbers go to bench/out/training.md and .json.
"""

import argparse
import gc
import math
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import openslide
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # before bench/, with its model.py

from bench.bench_plain_step import PlainStep
from bench.common import (
    ROOT,
    SLIDE,
    best_seconds,
    commit_tiles,
    device_clock,
    device_name,
    markdown,
    print_verdict,
    ratio_rows,
    write_features,
    write_result,
)
from common.torch_processes import Processes, choose_device
from pipeline.dataset import (
    BLOCK_ROWS,
    Dataset,
    Entry,
    Run,
    TileStore,
    claim_identity,
    commit_file,
    commit_json,
    decode_png,
    encode_png,
    make_selection,
    software_versions,
    write_selection,
)
from pipeline.dataset.features import (
    cls_table,
    feature_scope,
    token_table,
)
from train.config import Config, load_config
from train.networks import build_parts
from train.processes import prepare_device
from train.reader import Batch, BatchReader
from train.setup import open_data
from train.speed import matrix_rate, peak_memory_gb, step_flop
from train.step import TrainingStep

CONFIGS = ROOT / "train" / "configs"
SLIDES, ROWS = 8, 96  # of the dataset that is read
SLOTS, CURSORS = 8, 1  # few: a cursor walks through whole blocks, as on a real selection
READ_GOAL = 0.8
STEP_GOALS = {"MFU": 0.35, "over the plain step": 2.5}
H200_BF16_TFLOP_S, STEP_GFLOP = 989.0, 2844.0  # dense peak; CytoSyn's step a tile


def make_dataset(root: Path) -> Dataset:
    """Tiles of the committed slide at random places, as slides of 48, with random features."""
    dataset, versions = Dataset(root), software_versions()
    claim_identity(dataset, {"tile_px": 224, "mpp": 0.5}, stage="scan", versions=versions)
    rng = np.random.default_rng(0)
    with openslide.OpenSlide(str(SLIDE)) as slide:
        image = np.asarray(slide.read_region((0, 0), 0, slide.dimensions).convert("RGB"))
    for index in range(SLIDES):
        places = rng.integers(0, np.array(image.shape[:2]) - 224, (ROWS, 2))
        tiles = [image[y : y + 224, x : x + 224] for y, x in places.tolist()]
        pngs = [encode_png(np.ascontiguousarray(tile)) for tile in tiles]
        with Run(dataset, "tile", versions) as run:
            commit_tiles(dataset, run, f"slide-{index}", pngs)
        _commit_features(dataset, f"slide-{index}", rng)
    chosen = {f"slide-{index}": np.arange(ROWS, dtype=np.int32) for index in range(SLIDES)}
    write_selection(dataset, "bench", make_selection("train", chosen, {}))
    return dataset


def _commit_features(dataset: Dataset, slide_id: str, rng: np.random.Generator) -> None:
    tables = {
        "cls": cls_table(0, rng.standard_normal((ROWS, 768)).astype(np.float32)),
        "tokens-float16": token_table(rng.standard_normal((ROWS, 196, 768)).astype(np.float16)),
    }
    record = {"encoder": "h0-mini", "weights": "random:0", "random_weights": True, "dim": 768}
    with Run(dataset, "cache", software_versions()) as run:
        for kind, table in tables.items():
            folder = dataset.features_dir(224, "h0-mini") / kind
            write = partial(write_features, tables=[table])
            done = commit_file(dataset, run.run_id, folder / f"{slide_id}.0-{ROWS}.parquet", write)
            commit_json(dataset, run.run_id, folder / "encoder.json", record)
            scope = feature_scope(224, "h0-mini", "", kind)
            entry = Entry(slide_id, "done", "f", scope=scope, start=0, stop=ROWS, files=(done,))
            run.append([entry])


def measure_reading(folder: Path, rounds: int) -> dict[str, float]:
    """Images a second of one core: the reader with tokens, without them, and the bare decode."""
    dataset = make_dataset(folder / "dataset")
    overrides = [f"data.dataset={dataset.root}", f"data.batch_size={SLOTS}"]
    overrides += [f"data.cursors={CURSORS}"]
    config = load_config(CONFIGS / "cytosyn-40m.yaml", [*overrides, "run.device=cpu"])
    inputs = open_data(config)
    steps = inputs.stream.steps_per_epoch
    store = TileStore(dataset, 224)
    pngs = [
        png
        for index in range(SLIDES)
        for block in range(ROWS // BLOCK_ROWS)
        for png in store.read_block_bytes(f"slide-{index}", block).values()
    ]
    pixels_only = load_config(
        CONFIGS / "cytosyn-40m.yaml",
        [*overrides, "run.device=cpu", "model.sit.conditioning=none", "loss.vae_align=0",
         "loss.sit_align=0"],
    )  # fmt: skip
    without = open_data(pixels_only)

    def read(source: Any) -> None:
        reader = BatchReader(
            inputs.stream, source, range(SLOTS), first_step=0, stop_step=steps, threads=1
        )
        with reader:
            assert sum(len(batch.tiles) for batch in reader) == len(pngs)

    def decode() -> None:
        for png in pngs:
            decode_png(png)

    contenders: dict[str, Callable[[], object]] = {
        "bare decode": decode,
        "reader, tiles alone": lambda: read(without.source),
        "reader, tiles and tokens": lambda: read(inputs.source),
    }
    best = best_seconds(contenders, rounds, warm_up=True)  # that fills the page cache
    return {name: len(pngs) / seconds for name, seconds in best.items()}


@dataclass(frozen=True)
class Version:
    """A way to take the same step: what is set in the configuration, or the plain code."""

    overrides: tuple[str, ...] = ()
    plain: bool = False


GPU_VERSIONS = {
    "plain step": Version(plain=True),
    "ours, eager, float32 (TF32)": Version(("run.precision=fp32",)),
    "ours, eager": Version(),
    "ours, compiled": Version(("run.compile=inductor",)),
    "ours, compiled, recompute": Version(("run.compile=inductor", "run.recompute=true")),
}
CPU_VERSIONS = {
    "plain step": Version(plain=True),
    "ours, eager": Version(),
    "ours, in two parts": Version(("optim.accumulate=2",)),
    "ours, eager, recompute": Version(("run.recompute=true",)),
}


def step_config(device: torch.device, batch: int, overrides: tuple[str, ...]) -> Config:
    """CytoSyn's step on a GPU, the tiny preset's on a CPU."""
    common = [f"data.batch_size={batch}", f"run.device={device.type}", *overrides]
    if device.type == "cuda":
        weights = "loss.perceptual_weights=random:0"
        return load_config(CONFIGS / "cytosyn-40m.yaml", [weights, *common])
    return load_config(CONFIGS / "tiny.yaml", ["loss.generator_start=0", *common])


def make_batch(config: Config, step: int) -> Batch:
    """Random tiles uint8 [n, px, px, 3] with features; pinned on a GPU, as the reader's are."""
    generator = torch.Generator().manual_seed(step)
    n, px, sit = config.data.batch_size, config.data.tile_px, config.model.sit
    tiles = torch.randint(0, 256, (n, px, px, 3), dtype=torch.uint8, generator=generator)
    cls = torch.randn(n, sit.condition_dim, generator=generator)
    tokens = torch.randn(n, sit.num_tokens, sit.token_dim, generator=generator).half()
    batch = Batch(step, range(n), tiles, cls, tokens)
    if config.run.device == "cuda":
        batch.tiles, batch.cls, batch.tokens = (v.pin_memory() for v in (tiles, cls, tokens))
    return batch


def make_step(config: Config, device: torch.device, *, plain: bool) -> Callable[[Batch], object]:
    """The step of a version, with fresh networks; zero initialisations stirred."""
    processes, parts = Processes(device=device), build_parts(config, device)
    for parameter in parts.networks.sit.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.02)
    if plain:
        return PlainStep(config, device, parts)
    return TrainingStep(config, processes, parts)


def measure_step(
    version: Version, device: torch.device, batch: int, seconds: float
) -> dict[str, float] | None:
    """Images/s and GB of a version at a batch, after warm-up; None where it does not fit."""
    on_gpu = device.type == "cuda"
    try:
        config = step_config(device, batch, version.overrides)
        step = make_step(config, device, plain=version.plain)
        batches = [make_batch(config, at) for at in range(2)]
        for at in range(3 if on_gpu else 1):
            step(batches[at % 2])
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(device)
        clock = device_clock(device)
        started, done = clock(), 0
        while (spent := clock() - started) < seconds or done == 0:
            # Several per reading, since the clock makes the host wait for the GPU.
            for at in range(3 if on_gpu else 1):
                step(batches[at % 2])
                done += 1
        return {"images_per_s": done * batch / spent, "memory_gb": peak_memory_gb(device)}
    except torch.cuda.OutOfMemoryError:
        return None
    finally:
        # Freed here, or the next version would find the memory full.
        step = batches = None  # type: ignore[assignment]
        gc.collect()
        torch._dynamo.reset()
        if on_gpu:
            torch.cuda.empty_cache()


def measure_steps(device: torch.device, batches: list[int], seconds: float) -> dict[str, Any]:
    """Every version at every batch that fits, each one's best, and what the goals are about."""
    on_gpu = device.type == "cuda"
    versions = GPU_VERSIONS if on_gpu else CPU_VERSIONS
    perceptual = None
    if on_gpu:
        from model.perceptual import PerceptualLoss

        perceptual = PerceptualLoss("random:0")
    flop = sum(step_flop(step_config(device, batches[0], ()), perceptual).values())
    rate = matrix_rate(device, torch.bfloat16 if on_gpu else torch.float32)
    rows = []
    for name, version in versions.items():
        for batch in batches:
            found = measure_step(version, device, batch, seconds)
            if found is None:
                break
            mfu = found["images_per_s"] * flop / rate
            rows.append({"version": name, "batch": batch, **found, "mfu": mfu})
            print(f"{name}, batch {batch}: {found['images_per_s']:.2f} images/s, MFU {mfu:.3f}")
    best = {name: max((r for r in rows if r["version"] == name), key=_speed, default=None)
            for name in versions}  # fmt: skip
    ours = max((row for row in rows if row["version"] != "plain step"), key=_speed)
    plain = best["plain step"]
    ratios = {"MFU": ours["mfu"]}
    if plain is not None:
        ratios["over the plain step"] = ours["images_per_s"] / plain["images_per_s"]
    return {
        "gflop_a_tile": flop / 1e9, "matrix_tflop_per_s": rate / 1e12, "rows": rows,
        "images_per_s": ours["images_per_s"], "ratios": ratios, "judged": on_gpu,
    }  # fmt: skip


def _speed(row: dict[str, Any]) -> float:
    return float(row["images_per_s"])


def feeding(reading: dict[str, float], steps: dict[str, Any] | None) -> dict[str, float]:
    """Cores that feed one H200: at the measured step rate, or at the rate that the goal states."""
    one_core = reading["reader, tiles and tokens"]
    stated = STEP_GOALS["MFU"] * H200_BF16_TFLOP_S * 1e3 / STEP_GFLOP
    found = {f"at MFU 0.35 of 989 TFLOP/s ({stated:.0f} images/s)": stated / one_core}
    if steps is not None and steps["judged"]:
        rate = steps["images_per_s"]
        found[f"at the measured {rate:.0f} images/s"] = rate / one_core
    return found


def format_tables(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    tables: list[str] = []
    if (reading := result.get("reading")) is not None:
        bare = reading["bare decode"]
        rates = [(name, f"{rate:.0f}", f"{rate / bare:.2f}") for name, rate in reading.items()]
        cores = [(name, f"{count:.2f}") for name, count in result["feeding"].items()]
        tables.append(markdown("images/s of one core | | over bare decode", rates))
        tables.append(markdown("cores that feed one H200 | ", cores))
    if (steps := result.get("steps")) is not None:
        rows = [
            (row["version"], row["batch"], f"{row['images_per_s']:.2f}",
             f"{row['memory_gb']:.1f}", f"{row['mfu']:.3f}")
            for row in steps["rows"]
        ]  # fmt: skip
        goals = STEP_GOALS if steps["judged"] else dict.fromkeys(STEP_GOALS, "one H200")
        tables.append(markdown("step | batch | images/s | GB | MFU", rows))
        tables.append(markdown("ratio | measured | goal", ratio_rows(steps["ratios"], goals)))
    return "\n".join(tables)


def list_missed_goals(result: dict[str, Any]) -> list[str]:
    """Goals that apply here and are not met."""
    missed = []
    if (reading := result.get("reading")) is not None:
        ratio = reading["reader, tiles and tokens"] / reading["bare decode"]
        missed += ["reading over bare decode"] * (ratio < READ_GOAL)
    if (steps := result.get("steps")) is not None and steps["judged"]:
        missed += [n for n, goal in STEP_GOALS.items() if steps["ratios"].get(n, math.inf) < goal]
    return missed


def main() -> int:
    """Measure, print, write; exit status 1 where a goal that applies is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--rounds", type=int, default=3, help="of reading")
    parser.add_argument("--batches", type=int, nargs="+", help="default: 8 to 96 on a GPU, else 4")
    parser.add_argument("--seconds", type=float, help="of a version; default: 10 on a GPU, else 4")
    parser.add_argument("--part", choices=("data", "step"), help="default: both")
    options = parser.parse_args()
    device = choose_device(options.device)
    prepare_device(device)
    on_gpu = device.type == "cuda"
    result: dict[str, Any] = {"device": device_name(device), "torch": torch.__version__}
    if options.part != "step":
        with tempfile.TemporaryDirectory() as folder:
            result["reading"] = measure_reading(Path(folder), options.rounds)
    if options.part != "data":
        batches = options.batches or ([8, 16, 32, 48, 64, 96] if on_gpu else [4])
        result["steps"] = measure_steps(device, batches, options.seconds or (10 if on_gpu else 4))
    if "reading" in result:
        result["feeding"] = feeding(result["reading"], result.get("steps"))
    write_result("training", result, format_tables(result))
    if not on_gpu and options.part != "data":
        print("the goals of the step are for one H200: not judged here")
    return print_verdict(list_missed_goals(result), "all goals that apply are met")


if __name__ == "__main__":
    raise SystemExit(main())
