"""Measures the feature cache: the stage over the bare encoder, reading and writing tokens, int8.

    python bench/features.py [--rounds 2] [--device cpu|cuda] [--slides N --tiles N --batch N]

Everything is a ratio within one run, judged by each contender's best round; wall time, since the
encoder uses all cores, and CPU time beside it. The stage reads PNG shards of the committed slide's
tiles and writes CLS and float16 tokens with their checksums; the bare encoder has its batches in
memory and drops what it computes. H0-mini has random weights (the real ones are gated): its speed
is that of the real network, the int8 figures are not. On a GPU the forward pass is in bf16, over
slides of several thousand tiles, and the decode-bound and write-bound rates stand beside. Table and
numbers go to bench/out/features.md and .json.
"""

import argparse
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # before bench/, with its model.py

from bench.common import (
    CORES,
    MACHINE,
    OUT,
    SLIDES,
    best_seconds,
    candidates_table,
    clock_call,
    commit_tiles,
    markdown,
    missed_goals,
    print_verdict,
    ratio_rows,
    run_stages,
    write_features,
    write_result,
)
from model import alignment_loss
from model.encoders import Encoder, load_encoder
from pipeline.dataset import (
    Dataset,
    Run,
    TileStore,
    commit_file,
    write_candidates,
)
from pipeline.dataset.features import FeatureShard, token_table
from pipeline.dataset.features.quantise import dequantise_tokens, quantise_tokens
from pipeline.features import bundle
from pipeline.features.compute import (
    Features,
    Span,
    SpanWriter,
    TileDecoder,
    decode_threads,
    lanes_for,
    order_batches,
)
from pipeline.features.config import CacheConfig
from pipeline.features.views import view_function

SLIDE = "CMU-1-Small-Region"
GOALS = {
    "cache over bare forward": {"cpu": 0.9, "cuda": 0.85},
    "reading tokens over reading the bytes": {"cpu": 0.8, "cuda": 0.8},
}
WRITE_GOAL_MB_S = 400
TOKEN_ROWS = 1024


def tiled(folder: Path) -> Dataset:
    """The committed slide's 224 px tiles."""
    return run_stages(
        folder / "dataset",
        ["scan", str(SLIDES), "--workers", "1"],
        ["tissue", "--workers", "1"],
        ["select", "--name", "train"],
        ["tile", "--workers", "1"],
    )


def enlarged(dataset: Dataset, slides: int, rows: int) -> list[str]:
    """So many slides of so many 224 px tiles: in shards, the committed slide's PNGs."""
    store = TileStore(dataset, 224)
    pngs = list(chain(*(store.read_block_bytes(SLIDE, block).values() for block in range(3))))
    names = [f"slide-{number:02d}" for number in range(slides)]
    places = np.arange(rows)
    with Run(dataset, "tile", {}) as run:
        for name in names:
            write_candidates(dataset, run.run_id, name, candidates_table(places, places))
            commit_tiles(dataset, run, name, [pngs[i % len(pngs)] for i in range(rows)])
    return names


@contextmanager
def in_this_process(encoder: Encoder) -> Iterator[None]:
    """The stage's worker without Dask: the encoder is given, nobody hears of progress."""
    names = ("load_encoder_once", "worker_device", "report_progress", "report_note")
    stood = {name: getattr(bundle, name) for name in names}
    instead: dict[str, Callable[..., object]] = dict.fromkeys(names, lambda *_: None)
    instead["load_encoder_once"] = lambda *_: encoder
    instead["worker_device"] = lambda _: str(encoder.device)
    try:
        for name in names:
            setattr(bundle, name, instead[name])
        yield
    finally:
        for name in names:
            setattr(bundle, name, stood[name])


def measure_cache(
    dataset: Dataset, encoder: Encoder, slides: list[str], tiles: int, batch: int, rounds: int
) -> tuple[dict[str, float], dict[str, float]]:
    """Tiles a second of the stage's worker, the bare forward pass, decoding and writing alone.

    By wall time, and by this process's CPU time, which other users of the machine do not change.
    """
    threads = CORES
    store, blocks = TileStore(dataset, 224), range(-(-tiles // 16))
    few = min(tiles, max(48, batch))
    images = np.stack([store.read(slides[0], [i])[0] for i in range(few)])
    kinds = ["cls", "tokens-float16"]
    spans = [Span(i, name, blocks, tuple(kinds)) for i, name in enumerate(slides)]
    config = CacheConfig("h0-mini", "random:0", tokens="float16", batch=batch)
    count = len(slides) * tiles

    def bare() -> None:
        for done in range(0, count, batch):
            first = done % len(images) if done % len(images) + batch <= len(images) else 0
            encoder.encode(images[first : first + min(batch, count - done)], tokens=True)
        if encoder.device.type == "cuda":
            torch.cuda.synchronize()

    def stage() -> None:
        work, weights = {blocks: tuple(kinds)}, encoder.weights_sha256
        root = str(dataset.root)
        jobs = [
            (bundle.SlideWork(root, "bench", name, config, 224, work, "f", weights, tiles),)
            for name in slides
        ]
        with in_this_process(encoder):
            for entries in bundle.cache_bundle(jobs):
                assert all(entry.outcome == "done" for entry in entries), entries

    def decode() -> None:
        decoder = TileDecoder(store, view_function(""), decode_threads(threads))
        for part in decoder.run(order_batches(spans, batch)):
            part.tiles.result()
        decoder.close()

    sample = encoder.encode(images[:batch], tokens=True)
    assert sample.tokens is not None
    features = Features(sample.cls.cpu().numpy(), sample.tokens.half().cpu().numpy())

    def write() -> None:
        lanes = lanes_for(encoder.device.type, threads)
        with ThreadPoolExecutor(lanes + 1) as pool:
            writers: dict[str, SpanWriter] = {}
            for span, part, last in order_batches(spans, batch, lanes):
                if span.slide_id not in writers:
                    fill = partial(_write_span, dataset, f"{span.slide_id}.0-{tiles}.parquet")
                    writers[span.slide_id] = SpanWriter(pool, fill)
                rows = min(len(part) * 16, len(features.cls))
                assert features.tokens is not None
                some = Features(features.cls[:rows], features.tokens[:rows])
                writers[span.slide_id].put_item(partial(_same, some))
                if last:
                    writers[span.slide_id].put_item(None)
            for writer in writers.values():
                writer.result.result()

    # The first pass on a device sets it up, which is no contender's work.
    encoder.encode(images[:batch], tokens=True)
    contenders = {
        "bare forward": bare,
        "stage": stage,
        "decode alone": decode,
        "write alone": write,
    }
    # In turns: what else the machine does then slows all contenders alike.
    turns = [{name: clock_call(run) for name, run in contenders.items()} for _ in range(rounds)]
    wall_rates = {name: count / min(turn[name].wall for turn in turns) for name in contenders}
    cpu_rates = {name: count / min(turn[name].cpu for turn in turns) for name in contenders}
    return wall_rates, cpu_rates


def _same(features: Features) -> Features:
    return features


def _write_span(dataset: Dataset, name: str, parts: Iterator[Features]) -> None:
    tables = (token_table(part.tokens) for part in parts if part.tokens is not None)
    path = dataset.features_dir(224, "alone") / name
    commit_file(dataset, "bench", path, partial(write_features, tables=tables))


def files_in_both(folder: Path, rounds: int) -> dict[str, float]:
    """Written into tmpfs; read from a disk's page cache, and from tmpfs, whose small pages cost
    more to map than to copy."""
    OUT.mkdir(exist_ok=True)
    in_memory = measure_files(folder, rounds)
    with tempfile.TemporaryDirectory(prefix="files-", dir=OUT) as disk:
        on_disk = measure_files(Path(disk), rounds)
    on_disk["write"] = in_memory.pop("write")
    return on_disk | {f"{name} in tmpfs": rate for name, rate in in_memory.items()}


def measure_files(folder: Path, rounds: int) -> dict[str, float]:
    """MB/s of CPU time: writing tokens with their checksums, reading them, reading the bytes."""
    rng = np.random.default_rng(0)
    tokens = rng.standard_normal((128, 196, 768)).astype(np.float16)
    dataset = Dataset(folder / "files")
    path = dataset.features_dir(224, "x") / f"s.0-{TOKEN_ROWS}.parquet"

    def write() -> None:
        tables = (token_table(tokens) for _ in range(0, TOKEN_ROWS, len(tokens)))
        commit_file(dataset, "bench", path, partial(write_features, tables=tables))

    def read() -> None:
        shard = FeatureShard(path)
        for block in range(TOKEN_ROWS // 16):
            shard.read_block(block)

    buffer = bytearray(16 * tokens[0].nbytes)

    def read_bytes() -> None:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass

    best = best_seconds({"write": write, "read": read, "read bytes": read_bytes}, rounds)
    size = path.stat().st_size / 1e6
    return {name: size / value for name, value in best.items()}


def measure_int8(encoder: Encoder, images: np.ndarray) -> dict[str, dict[str, float]]:
    """How near int8 tokens are to float16 ones: as they are, and with an outlier channel."""
    parts = [
        encoder.encode(images[i : i + 16], tokens=True).tokens for i in range(0, len(images), 16)
    ]
    tokens = torch.cat([part.float().cpu() for part in parts if part is not None]).numpy()
    gaussian = np.random.default_rng(0).standard_normal(tokens[:16].shape).astype(np.float32)
    cases = {"random-weight H0-mini": tokens, "Gaussian": gaussian}
    for name, values in list(cases.items()):
        outlier = values.copy()
        outlier[..., 7] = 40 * values.std() * np.sign(values[..., 7])
        cases[f"{name}, one channel at 40 σ"] = outlier
    return {name: _compared(values) for name, values in cases.items()}


def _compared(tokens: np.ndarray) -> dict[str, float]:
    """Cosine of a token to its float16 self, and the alignment loss of one guess with both."""
    eight = dequantise_tokens(*quantise_tokens(tokens)).astype(np.float32)
    half = tokens.astype(np.float16).astype(np.float32)
    lengths = np.linalg.norm(half, axis=-1) * np.linalg.norm(eight, axis=-1)
    cosine = (half * eight).sum(-1) / lengths
    target, other = torch.from_numpy(half), torch.from_numpy(eight)
    noise = torch.randn(target.shape, generator=torch.Generator().manual_seed(0))
    guess = target + target.std() * noise
    losses = [float(alignment_loss(guess, one)) for one in (target, other)]
    return {
        "tiles": len(tokens),
        "cosine mean": float(cosine.mean()),
        "cosine worst": float(cosine.min()),
        "alignment loss float16": losses[0],
        "alignment loss int8": losses[1],
    }


def format_tables(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    cpu, device = result["rates_cpu"], result["device"]
    goals = {name: goal[device] for name, goal in GOALS.items()}
    write_rate = f"{result['files']['write']:.0f}"
    ratios = [
        *ratio_rows(result["ratios"], goals),
        ("writing tokens, MB/s of one core", write_rate, WRITE_GOAL_MB_S),
    ]
    if device == "cpu":
        ratio = cpu["stage"] / cpu["bare forward"]
        ratios.append(("cache over bare forward, CPU time", f"{ratio:.2f}", ""))
    rates = [(name, f"{rate:.3g}", f"{cpu[name]:.3g}") for name, rate in result["rates"].items()]
    files = [(name, f"{rate:.0f}") for name, rate in result["files"].items()]
    int8 = []
    for name, row in result["int8"].items():
        loss = row["alignment loss float16"]
        cosines = (f"{row[key]:.6f}" for key in ("cosine mean", "cosine worst"))
        change = f"{row['alignment loss int8'] - loss:+.1e}"
        int8.append((name, row["tiles"], *cosines, f"{loss:.5f}", change))
    return "\n".join(
        (
            markdown("ratio | measured | goal", ratios),
            markdown("loop | tiles/s | tiles/s of CPU time", rates),
            markdown("file work | MB/s of CPU time", files),
            markdown(
                "int8 against float16 | tiles | cosine mean | worst | loss float16 | change", int8
            ),
        )
    )


def main() -> int:
    """Measure, print, write; exit status 1 where a goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--slides", type=int, help="slides of a round (cpu 1, cuda 8)")
    parser.add_argument("--tiles", type=int, help="tiles of a slide (cpu 48, cuda 4096)")
    parser.add_argument("--batch", type=int, help="tiles a forward pass (cpu 16, cuda 128)")
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    on_gpu = options.device == "cuda"
    slides = options.slides or (8 if on_gpu else 1)
    tiles = options.tiles or (4096 if on_gpu else 48)
    batch = options.batch or (128 if on_gpu else 16)
    torch.set_num_threads(CORES)
    dtype = torch.bfloat16 if on_gpu else torch.float32
    encoder = load_encoder("h0-mini", "random:0", device=options.device, dtype=dtype)
    shm = Path("/dev/shm")
    folder = Path(tempfile.mkdtemp(prefix="bench-features-", dir=shm if shm.is_dir() else None))
    try:
        dataset = tiled(folder)
        names = enlarged(dataset, slides, tiles)
        rates, cpu_rates = measure_cache(dataset, encoder, names, tiles, batch, options.rounds)
        files = files_in_both(folder, 3)
        int8 = measure_int8(encoder, np.stack(TileStore(dataset, 224).read(SLIDE, range(48))))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    result = {
        "machine": MACHINE,
        "device": options.device,
        "ratios": {
            "cache over bare forward": rates["stage"] / rates["bare forward"],
            "reading tokens over reading the bytes": files["read"] / files["read bytes"],
        },
        "rates": rates,
        "rates_cpu": cpu_rates,
        "files": files,
        "int8": int8,
    }
    write_result("features", result, format_tables(result))
    goals = {name: goal[options.device] for name, goal in GOALS.items()}
    missed = missed_goals(result["ratios"], goals)
    missed += ["writing tokens"] if files["write"] < WRITE_GOAL_MB_S else []
    return print_verdict(missed)


if __name__ == "__main__":
    raise SystemExit(main())
