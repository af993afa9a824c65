"""Measures the encoders' forward passes, and from them what caching a cohort takes.

    python bench/encoders.py [--encoders h0-mini,uni | all] [--tiles 8] [--rounds 2] [--device cuda]

Tiles a second of the bare forward pass in float32 and bfloat16 on a GPU, or a second of CPU time
where there is none (of one core, then, and hours are core-hours: wall time on a shared machine is
other people's); the operations of a tile (counted, two a multiply-add); bytes and hours for 40 and
108 million tiles. Random weights: the speed is that of the real networks. Table and numbers go to
bench/out/encoders.md and .json. By default the encoders of up to 100 million parameters.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
import openslide
import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # before bench/, with its model.py

from bench.common import MACHINE, SLIDE, device_clock, markdown, write_result
from common.text import format_bytes
from model.encoders import ENCODERS, Encoder, EncoderSpec, MissingPackageError, load_encoder
from pipeline.features.plan import stored_bytes

COHORTS = {"40M": 40_000_000, "108M": 108_000_000}
COHORT_SLIDES = 11_000
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SMALL = 100_000_000
"""Parameters up to which an encoder is measured where none is named."""


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--encoders", default="", help="names, or all (those with few parameters)")
    parser.add_argument("--tiles", type=int, default=8, help="tiles of a forward pass")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    if options.device == "cpu":
        torch.set_num_threads(1)
    images = slide_tiles(options.tiles)
    rows = []
    for name in chosen(options.encoders):
        try:
            rows.append(measured(ENCODERS[name], images, options.device, options.rounds))
        except MissingPackageError as error:
            print(f"{name}: left out: {error}")
            continue
        print(line(rows[-1]), flush=True)
    machine = {**MACHINE, "device": options.device}
    write_result("encoders", {"machine": machine, "rows": rows}, format_tables(rows))
    return 0


def chosen(names: str) -> list[str]:
    """One entry for each network: variants differ in what is read or resized, not in speed."""
    if names and names != "all":
        return names.split(",")
    whole = [name for name, spec in ENCODERS.items() if spec.weights_name == name]
    return [n for n in whole if names == "all" or ENCODERS[n].parameters <= SMALL]


def slide_tiles(count: int) -> np.ndarray:
    """So many tiles of the committed slide, uint8 [count, 224, 224, 3]."""
    with openslide.OpenSlide(str(SLIDE)) as slide:
        corners = [(224 * (i % 8), 224 * (i // 8 % 12)) for i in range(count)]
        tiles = [slide.read_region(corner, 0, (224, 224)).convert("RGB") for corner in corners]
    return np.stack([np.asarray(tile) for tile in tiles])


def measured(spec: EncoderSpec, images: np.ndarray, device: str, rounds: int) -> dict[str, Any]:
    """An encoder's operations, tiles a second in each dtype, and what a cohort takes."""
    rates = {}
    encoder = load_encoder(spec.name, "random:0", device=device)
    for name, dtype in DTYPES.items():
        encoder.network.to(dtype)
        encoder.dtype = dtype
        encoder.encode(images[:1], tokens=spec.num_tokens > 0)
        best = min(forward_seconds(encoder, images) for _ in range(rounds))
        rates[name] = len(images) / best
    return {
        "encoder": spec.name,
        "parameters": spec.parameters,
        "gflop_a_tile": operations(spec) / 1e9,
        "tiles_per_s": rates,
        "hours": {
            cohort: {name: tiles / rate / 3600 for name, rate in rates.items()}
            for cohort, tiles in COHORTS.items()
        },
        "bytes": {cohort: kinds_bytes(spec, tiles) for cohort, tiles in COHORTS.items()},
    }


def forward_seconds(encoder: Encoder, images: np.ndarray) -> float:
    """Seconds of one forward pass with all that `encode` does to its output; CPU time on a CPU."""
    clock = device_clock(encoder.device)
    began = clock()
    encoder.encode(images, tokens=encoder.spec.num_tokens > 0)
    return clock() - began


def operations(spec: EncoderSpec) -> int:
    """Floating-point operations of one tile's forward pass; nothing is computed for it."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad():
        network = spec.construction.build_network().eval()
        network(torch.empty(1, 3, spec.input_px, spec.input_px))
    return counter.get_total_flops()


def kinds_bytes(spec: EncoderSpec, tiles: int) -> dict[str, int]:
    """Bytes on disk of each kind of features, in one file a slide."""
    kinds = ["cls"] + (["tokens-float16", "tokens-int8"] if spec.num_tokens else [])
    shape = (spec.num_tokens, spec.token_dim)
    return {kind: stored_bytes(kind, tiles, COHORT_SLIDES, spec.dim, shape) for kind in kinds}


def line(row: dict[str, Any]) -> str:
    """A measured encoder in one line."""
    rates = ", ".join(f"{rate:.3g} tiles/s {name}" for name, rate in row["tiles_per_s"].items())
    return f"{row['encoder']}: {row['gflop_a_tile']:.1f} GFLOP a tile, {rates}"


def format_tables(rows: list[dict[str, Any]]) -> str:
    """Two Markdown tables: rates and hours, and bytes."""
    rates, sizes = [], []
    for row in rows:
        hours = (f"{h:,.0f}" for cohort in COHORTS for h in row["hours"][cohort].values())
        speeds = (f"{rate:.3g}" for rate in row["tiles_per_s"].values())
        rates.append((row["encoder"], f"{row['gflop_a_tile']:.1f}", *speeds, *hours))
        sizes += [
            (row["encoder"], kind, *(format_bytes(row["bytes"][c][kind]) for c in COHORTS))
            for kind in row["bytes"]["40M"]
        ]
    head = (
        "encoder | GFLOP a tile | tiles/s float32 | bfloat16 "
        "| hours 40M float32 | bfloat16 | hours 108M float32 | bfloat16"
    )
    return markdown(head, rates) + "\n" + markdown("encoder | kind | 40M tiles | 108M tiles", sizes)


if __name__ == "__main__":
    raise SystemExit(main())
