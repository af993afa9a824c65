"""Measures the metrics against the ways in which they are usually computed.

    python bench/metrics.py [--only NAME] [--rounds 2] [--small]

Every ratio is of CPU time within one run, which a busy machine disturbs least; that of wall time
stands beside. A metric and its peers take turns, each in a process of its own, and each is judged
by its best round. Memory is what a process's peak exceeds its
inputs by. Features are made: correlated, with a falling spectrum, alike within slides. The
numbers agree with the peers' before any time is told. Table and numbers go to
bench/out/metrics.md and .json.
"""

import argparse
import math
import multiprocessing
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import scipy
import scipy.linalg
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # before bench/, with its model.py

from bench.common import CORES, MACHINE, markdown, missed_goals, print_verdict, write_result
from evaluate.metrics import (
    Moments,
    bootstrap,
    frechet_distance_of_moments,
    precision_recall,
)
from evaluate.metrics.mixture import Mixture

Features = np.ndarray
Contender = Callable[[dict[str, Any]], dict[str, float]]

K, BLOCK = 3, 2048
SLIDES, DRAWS = 400, 50
SIZES = ("frechet dim", "drawn rows", "rows", "dim", "train", "centres")
FULL = dict(zip(SIZES, (2048, 50_000, 20_000, 1536, 10_000, 4_000), strict=True))
SMALL = dict(zip(SIZES, (512, 8_000, 4_000, 384, 2_000, 800), strict=True))
COLUMNS = (("seconds", 2), ("cpu seconds", 2), ("mib", 0))
GOALS = {
    "frechet distance over scipy's sqrtm": 8.0,
    "cluster bootstrap over recomputing with sqrtm": 8.0,
    "precision and recall over torch.cdist": 1.5,
    "memory of torch.cdist over that of precision and recall": 2.0,
    "likelihood fit over autograd, float64": 2.0,
    "likelihood fit over autograd, float32": 2.0,
}


def features(n: int, dim: int, seed: int, slides: int = SLIDES) -> tuple[Features, np.ndarray]:
    """Float32 rows ``[n, dim]`` and each row's slide."""
    spectrum = np.arange(1, dim + 1) ** -0.5
    axes = np.random.default_rng(0).standard_normal((dim, dim)) * spectrum[:, None]
    random = np.random.default_rng(seed)
    slide = random.integers(0, slides, n)
    latent = random.standard_normal((n, dim)) + 0.7 * random.standard_normal((slides, dim))[slide]
    return (latent.astype(np.float32) @ axes.astype(np.float32) + 0.5), slide


# Fréchet distance from the moments on, which streaming leaves.


def frechet_data(sizes: dict[str, int]) -> dict[str, Any]:
    """The moments of two sets."""
    dim = sizes["frechet dim"]
    return {
        name: Moments.from_rows(features(2 * dim, dim, seed)[0])
        for name, seed in (("real", 1), ("generated", 2))
    }


def frechet_ours(data: dict[str, Any]) -> dict[str, float]:
    """With the noise floor, as it is always given."""
    return {"value": frechet_distance_of_moments(data["real"], data["generated"]).value}


def frechet_sqrtm(data: dict[str, Any]) -> dict[str, float]:
    """As the definition says it."""
    return {"value": sqrtm_distance(data["real"], data["generated"])}


def sqrtm_distance(real: Moments, generated: Moments) -> float:
    """By scipy's matrix square root of the covariances' product."""
    first, second = real.covariance, generated.covariance
    difference = real.mean - generated.mean
    root = scipy.linalg.sqrtm(first @ second)
    return float(difference @ difference + np.trace(first + second) - 2 * np.trace(root).real)


# The cluster bootstrap.


def bootstrap_data(sizes: dict[str, int]) -> dict[str, Any]:
    """Two sets and the slides of the generated one."""
    generated, slides = features(sizes["drawn rows"], sizes["dim"], 2)
    return {
        "real": features(sizes["rows"], sizes["dim"], 1)[0],
        "generated": generated,
        "slides": slides,
    }


def bootstrap_ours(data: dict[str, Any]) -> dict[str, float]:
    """All draws."""
    found = bootstrap(data["real"], data["generated"], clusters=data["slides"], draws=DRAWS)
    return {"first": float(found.values[0]), "second": float(found.values[1])}


def bootstrap_sqrtm(data: dict[str, Any]) -> dict[str, float]:
    """Two of the draws, each from its rows."""
    real = Moments.from_rows(data["real"])
    values = [sqrtm_distance(real, numpys_moments(rows)) for rows in drawn_rows(data)]
    return {"first": values[0], "second": values[1], "draws": 2}


def bootstrap_recomputed(data: dict[str, Any]) -> dict[str, float]:
    """The same with this project's own distance, real moments kept."""
    real = Moments.from_rows(data["real"])
    values = [
        frechet_distance_of_moments(real, Moments.from_rows(rows)).value
        for rows in drawn_rows(data)
    ]
    return {"first": values[0], "second": values[1], "draws": 2}


def drawn_rows(data: dict[str, Any]) -> list[Features]:
    """The rows of the first two draws."""
    present, member = np.unique(data["slides"], return_inverse=True)
    count = len(present)
    random = np.random.RandomState(0)
    weights = random.multinomial(count, np.full(count, 1 / count), size=DRAWS)[:2]
    return [np.repeat(data["generated"], weight[member], axis=0) for weight in weights]


def numpys_moments(rows: Features) -> Moments:
    """Mean and `np.cov`, as most implementations take them."""
    moments = Moments(rows.shape[1])
    moments.n, moments.mean = len(rows), rows.mean(axis=0, dtype=np.float64)
    moments.scatter = np.cov(rows, rowvar=False) * (len(rows) - 1)
    return moments


# Precision and recall.


def pair_data(sizes: dict[str, int]) -> dict[str, Any]:
    """Two sets."""
    generated = features(sizes["rows"], sizes["dim"], 2)[0]
    return {"real": features(sizes["rows"], sizes["dim"], 1)[0], "generated": 0.97 * generated}


def manifold_ours(data: dict[str, Any]) -> dict[str, float]:
    """With density, coverage, realism, authenticity and nearest neighbours."""
    found = precision_recall(data["real"], data["generated"], k=K)
    return {"precision": found.precision, "recall": found.recall}


def manifold_cdist(data: dict[str, Any]) -> dict[str, float]:
    """Precision and recall alone, by `torch.cdist` of blocks of rows with whole sets."""
    real, generated = (torch.from_numpy(data[name]) for name in ("real", "generated"))
    real_radii, generated_radii = (
        torch.cat([kth_distances(block, rows) for block in rows.split(BLOCK)])
        for rows in (real, generated)
    )
    precision, recalled = 0, torch.zeros(len(real), dtype=torch.bool)
    for block, radii in zip(generated.split(BLOCK), generated_radii.split(BLOCK), strict=True):
        distances = torch.cdist(block, real)
        precision += int((distances < real_radii).any(dim=1).sum())
        recalled |= (distances < radii[:, None]).any(dim=0)
    return {
        "precision": precision / len(generated),
        "recall": float(recalled.double().mean()),
    }


def kth_distances(block: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Of each row of the block to its k-th neighbour, itself being one more."""
    return torch.cdist(block, rows).topk(K + 1, dim=1, largest=False).values[:, -1]


# The likelihood's fit, in float64 and float32.


def likelihood_data(sizes: dict[str, int], dtype: torch.dtype) -> dict[str, Any]:
    """Normalised rows to fit to, to sit on and to score."""
    counts = (("train", sizes["train"]), ("centres", sizes["centres"]), ("test", 2000))
    rows = {name: features(n, sizes["dim"], i)[0] for i, (name, n) in enumerate(counts)}
    mean, std = rows["test"].mean(axis=0), rows["test"].std(axis=0)
    return {name: torch.from_numpy((x - mean) / std).to(dtype) for name, x in rows.items()}


def likelihood_ours(data: dict[str, Any]) -> dict[str, float]:
    """The fit, and the score of the test rows."""
    return {"nll": Mixture(data["centres"], data["train"]).mean_nll(data["test"])}


def likelihood_autograd(data: dict[str, Any]) -> dict[str, float]:
    """The same fit by autograd and torch's Adam, distances kept, whole batches."""
    train, centres = data["train"], data["centres"]
    dim, count = train.shape[1], len(centres)
    squared = torch.cdist(train, centres) ** 2
    origin = 0.81 * (train - train.mean(dim=0)).square().sum(dim=1)
    s = ((squared.amin(dim=0) + 1e-3) / dim).log().requires_grad_()
    s0 = torch.zeros(1, dtype=s.dtype, requires_grad=True)
    adam = torch.optim.Adam([s, s0], lr=0.5)
    history: list[float] = []
    for epoch in range(50):
        losses = []
        for start in range(0, len(train), 10_000):
            batch = slice(start, start + 10_000)
            scores = log_density(squared[batch], s, dim) - math.log(count)
            both = torch.cat([scores, log_density(origin[batch, None], s0, dim)], dim=1)
            loss = -both.logsumexp(dim=1).mean() / dim
            adam.zero_grad()
            loss.backward()
            adam.step()
            s.data.clamp_(-40, 40)
            losses.append(loss.item())
        history.append(float(np.mean(losses)))
        if epoch > 5 and max(abs(history[-1] - one) for one in history[-5:]) < 5e-4:
            break
    with torch.no_grad():
        scores = log_density(torch.cdist(data["test"], centres) ** 2, s, dim) - math.log(count)
        return {"nll": float(-scores.logsumexp(dim=1).mean() / dim)}


def log_density(squared: torch.Tensor, s: torch.Tensor, dim: int) -> torch.Tensor:
    """Of isotropic Gaussians with log-variances s."""
    return -squared / (2 * s.exp()) - dim / 2 * s - dim / 2 * math.log(2 * math.pi)


LIKELIHOOD = {"ours": likelihood_ours, "autograd": likelihood_autograd}
CASES: dict[str, tuple[Callable[[dict[str, int]], dict[str, Any]], dict[str, Contender], float]] = {
    # inputs, contenders (ours first), and how far their numbers may differ, relatively
    "frechet": (frechet_data, {"ours": frechet_ours, "sqrtm": frechet_sqrtm}, 1e-8),
    "bootstrap": (
        bootstrap_data,
        {"ours": bootstrap_ours, "recomputed": bootstrap_recomputed, "sqrtm": bootstrap_sqrtm},
        1e-7,
    ),
    # cdist is float32 here: a few rows at a ball's surface may fall to the other side.
    "manifold": (pair_data, {"ours": manifold_ours, "cdist": manifold_cdist}, 1e-3),
    "float64": (partial(likelihood_data, dtype=torch.float64), LIKELIHOOD, 1e-8),
    "float32": (partial(likelihood_data, dtype=torch.float32), LIKELIHOOD, 1e-3),
}


def run(case: str, contender: str, sizes: dict[str, int]) -> dict[str, Any]:
    """Seconds, MiB beyond the inputs, and the numbers of one contender in this process."""
    make, contenders, _ = CASES[case]
    torch.set_num_threads(CORES)
    data = make(sizes)
    before = _reset_peak()
    began, cpu = time.perf_counter(), time.process_time()
    values = contenders[contender](data)
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    scale = DRAWS / values.pop("draws", DRAWS)
    return {
        "seconds": seconds * scale,
        "cpu seconds": cpu * scale,
        "mib": _peak_kib() / 1024 - before / 1024,
        "values": values,
    }


def _reset_peak() -> int:
    """The resident KiB now, from which the kernel's high-water mark counts on."""
    Path("/proc/self/clear_refs").write_text("5")
    return _peak_kib()


def _peak_kib() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def measure(case: str, sizes: dict[str, int], rounds: int) -> dict[str, dict[str, Any]]:
    """The best round of each contender; raises SystemExit where their numbers differ."""
    names = list(CASES[case][1])
    best: dict[str, dict[str, Any]] = {}
    for _ in range(rounds):
        for name in names:
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                found = pool.apply(run, (case, name, sizes))
            if name not in best or found["cpu seconds"] < best[name]["cpu seconds"]:
                best[name] = found
            print(f"{case:10} {name:11} {found['seconds']:8.2f} s {found['mib']:8.0f} MiB")
    for name in names[1:]:
        for key, value in best[names[0]]["values"].items():
            other = best[name]["values"][key]
            if abs(value - other) > CASES[case][2] * abs(other):
                raise SystemExit(f"bench: {case}: {key} is {value} here, {other} by {name}")
    return best


RATIOS = {
    # case, peer, and what of it is divided by ours: None for the seconds of either kind
    "frechet distance over scipy's sqrtm": ("frechet", "sqrtm", None),
    "cluster bootstrap over recomputing with sqrtm": ("bootstrap", "sqrtm", None),
    "cluster bootstrap over recomputing with our own": ("bootstrap", "recomputed", None),
    "precision and recall over torch.cdist": ("manifold", "cdist", None),
    "memory of torch.cdist over that of precision and recall": ("manifold", "cdist", "mib"),
    "likelihood fit over autograd, float64": ("float64", "autograd", None),
    "likelihood fit over autograd, float32": ("float32", "autograd", None),
}


def compute_ratios(results: dict[str, dict[str, dict[str, Any]]], kind: str) -> dict[str, float]:
    """What the goals are about, of the cases measured, by "seconds" or "cpu seconds"."""
    return {
        name: float(results[case][peer][what or kind] / results[case]["ours"][what or kind])
        for name, (case, peer, what) in RATIOS.items()
        if case in results
    }


def format_tables(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    ratios = [
        (name, f"{value:.2f}", f"{result['wall ratios'][name]:.2f}", GOALS.get(name, ""))
        for name, value in result["ratios"].items()
    ]
    cases = [
        (case, name, *(f"{run[key]:.{digits}f}" for key, digits in COLUMNS))
        for case, contenders in result["cases"].items()
        for name, run in contenders.items()
    ]
    head = "case | contender | seconds | CPU seconds | MiB beyond the inputs"
    return markdown("ratio | CPU time | wall time | goal", ratios) + "\n" + markdown(head, cases)


def main() -> int:
    """Measure, print, write; exit status 1 where a goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=CASES, action="append", help="may be repeated")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--small", action="store_true", help="sizes that take seconds")
    options = parser.parse_args()
    sizes = SMALL if options.small else FULL
    cases = {case: measure(case, sizes, options.rounds) for case in options.only or CASES}
    result = {
        "machine": MACHINE,
        "versions": {module.__name__: module.__version__ for module in (np, scipy, torch)},
        "amx": bool(getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()),
        "sizes": sizes,
        "rounds": options.rounds,
        "ratios": (ratios := compute_ratios(cases, "cpu seconds")),
        "wall ratios": compute_ratios(cases, "seconds"),
        "cases": cases,
    }
    write_result("metrics", result, format_tables(result))
    return print_verdict(missed_goals(ratios, GOALS))


if __name__ == "__main__":
    raise SystemExit(main())
