"""Measures generation against the bare network evaluations it needs, and guidance in an interval.

    python bench/generate.py [--device cuda] [--dtype bfloat16] [--rounds 2] [--compile]

`generate` draws, encodes and commits a synthetic dataset; the floor runs the same networks on the
same device, in the same dtype and batch, exactly as often, and does nothing else. The peer of
guided sampling evaluates a doubled batch at every step. Contenders take turns and are judged by
their best round: wall time on a GPU, CPU time on a CPU, which a busy machine disturbs least (what
overlaps counts in full there). On a GPU the networks are SiT-XL/2 and f8d4, with seconds an image
at 50 and 250 steps and the share of a matrix product's rate; on a CPU they are SiT-S/2 and the
tiny VAE, whose share of the work is as small as f8d4's beside an XL/2.
Table and numbers go to bench/out/generate.md and .json.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # before bench/, with its model.py

from bench.common import (
    best_seconds,
    device_clock,
    device_name,
    markdown,
    missed_goals,
    print_verdict,
    ratio_rows,
    write_result,
)
from common.torch_processes import ALONE
from evaluate.generate.conditions import Condition, ConditionList
from evaluate.generate.run import Request, generate
from evaluate.generators.cytosyn import CytoSynGenerator, with_cast_weights
from model import CytoSyn
from model.noise import RandomStream, derive_seeds, normal, seed_tensor
from model.sampler import Guidance, integrate, time_nodes
from model.sampler_settings import SamplerSettings
from model.sit import SiT, SiTConfig
from model.vae import VAE, VAEConfig

GOALS = {
    "generate over bare evaluations": 0.9,
    "guided in [0, 0.75] over always doubled": 1.12,
}
DIM, LATENT = 768, 28


@dataclass(frozen=True)
class GenerationScale:
    """The shapes of a run."""

    sit: str
    vae: str
    batch: int
    images: int
    steps: int
    timed_steps: tuple[int, ...]  # of seconds an image
    matrix: int  # side of the matrix product


SCALES = {
    "cuda": GenerationScale("XL/2", "f8d4", 32, 64, 50, (50, 250), 8192),
    "cpu": GenerationScale("S/2", "tiny", 4, 4, 12, (), 1024),
}


@dataclass(frozen=True)
class GenerationBench:
    """The networks on one device, and how they are evaluated."""

    model: CytoSyn
    scale: GenerationScale
    device: torch.device
    dtype: str
    compiles: bool

    def generator(self, **settings: Any) -> CytoSynGenerator:
        """Ours, with the report's guidance unless told otherwise."""
        chosen = SamplerSettings(**{"steps": self.scale.steps, **settings})
        return CytoSynGenerator(
            self.model, chosen, device=self.device, dtype=self.dtype, compiles=self.compiles
        )

    def network(self) -> Callable[[Tensor, Tensor], Tensor]:
        """The bare network, in the form in which ours evaluates it."""
        sit = self.model.sit
        if self.dtype != "float32":
            sit = with_cast_weights(sit, getattr(torch, self.dtype))
        call = sit.forward_from_condition
        return torch.compile(call, fullgraph=True) if self.compiles else call

    def precision(self) -> AbstractContextManager[object]:
        """Autocast, as the sampler and the decoder run under it."""
        if self.dtype == "float32":
            return nullcontext()
        return torch.autocast(self.device.type, getattr(torch, self.dtype))


def build(
    scale: GenerationScale, device: torch.device, dtype: str, *, compiles: bool
) -> GenerationBench:
    """Fresh networks; zero initialisations stirred, so that no product is by zeros."""
    with torch.device(device):
        sit = SiT(SiTConfig.preset(scale.sit, latent_size=LATENT))
        vae = VAE(VAEConfig.preset(scale.vae)).to(memory_format=torch.channels_last)
    for parameter in sit.parameters():
        nn.init.normal_(parameter, std=0.02)
    return GenerationBench(
        CytoSyn(sit, vae).requires_grad_(False).eval(), scale, device, dtype, compiles
    )


def guidance(images: int) -> ConditionList:
    """A random feature an image."""
    rows = np.random.default_rng(0).normal(size=(images, DIM)).astype(np.float32)
    record = {"encoder": "random", "weights_sha256": None, "dim": DIM}
    conditions = [Condition(str(i), (), row) for i, row in enumerate(rows)]
    return ConditionList(
        "bench", conditions, (), record=record, tile_px=8 * LATENT, mpp=0.5, how={}
    )


def stage(bench: GenerationBench, steps: int) -> None:
    """The whole of `generate`: a dataset on disk."""
    with tempfile.TemporaryDirectory() as folder:
        request = Request(out=Path(folder) / "syn", micro_batch=bench.scale.batch)
        generator = bench.generator(steps=steps)
        generate(generator, guidance(bench.scale.images), request, ALONE)


@torch.no_grad()
def bare(bench: GenerationBench, network: Callable[[Tensor, Tensor], Tensor], steps: int) -> None:
    """As many evaluations of SiT and VAE as `stage` needs, on one batch of noise, and no more."""
    n, width = bench.scale.batch, bench.model.sit.config.hidden_size
    x = torch.randn(n, 4, LATENT, LATENT, device=bench.device)
    embedded, null = (torch.randn(rows, width, device=bench.device) for rows in (n, 1))
    guided = guided_steps(steps)
    with bench.precision():
        for _ in range(bench.scale.images // n):
            for index in range(steps):
                network(x, embedded)
                if index < guided:
                    network(x, null)
            bench.model.vae.decode(x)


def guided_steps(steps: int) -> int:
    """How many of the solver's steps start in the report's interval of guidance."""
    rule = Guidance(2.5, 0.0, 0.75)
    return sum(rule.active(t) for t in time_nodes("sde", steps)[:-1])


@torch.no_grad()
def doubled(bench: GenerationBench, network: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Guided sampling that evaluates a doubled batch at every step, and uses half outside."""
    n, sit = bench.scale.batch, bench.model.sit
    keys = seed_tensor(derive_seeds(0, torch.arange(n)), bench.device)
    shape = (4, LATENT, LATENT)
    rule = Guidance(2.5, 0.0, 0.75)
    features = torch.from_numpy(guidance(n).read_features(np.arange(n))).to(bench.device)
    both = torch.cat([sit.embed_condition(features), sit.embed_condition(None).expand(n, -1)])

    def velocity(x: Tensor, t: float) -> Tensor:
        time_vector = sit.t_embedder(torch.full((1,), t, device=bench.device))
        with bench.precision():
            out = network(torch.cat([x, x]).float(), both + time_vector).double()
        conditional, null = out.chunk(2)
        return torch.lerp(null, conditional, rule.scale) if rule.active(t) else conditional

    def noise(index: int, stream: RandomStream = RandomStream.SAMPLE_STEP) -> Tensor:
        return normal(
            keys, shape, stream=stream, step=index, device=bench.device, dtype=torch.float64
        )

    start = noise(0, RandomStream.SAMPLE_START)
    latents = integrate(velocity, start, steps=bench.scale.steps, solver="sde", noise=noise)
    cast = None if bench.dtype == "float32" else getattr(torch, bench.dtype)
    bench.model.decode(latents.float(), dtype=cast)


def matrix_rate(bench: GenerationBench, rounds: int) -> float:
    """Operations a second of a square matrix product in the run's dtype."""
    side, calls = bench.scale.matrix, 20
    a = torch.randn(side, side, device=bench.device, dtype=getattr(torch, bench.dtype))

    def product() -> None:
        for _ in range(calls):
            a @ a

    clock = device_clock(bench.device)
    seconds = best_seconds({"product": product}, rounds, clock, warm_up=True)["product"]
    return calls * 2 * side**3 / seconds


def operations_per_image(scale: GenerationScale, steps: int) -> int:
    """Operations of an image: its evaluations of the SiT and one decoding, counted on shapes."""
    with torch.device("meta"):
        sit = SiT(SiTConfig.preset(scale.sit, latent_size=LATENT))
        vae = VAE(VAEConfig.preset(scale.vae))
        x, t, y = torch.randn(1, 4, LATENT, LATENT), torch.rand(1), torch.randn(1, DIM)
    counts = []
    for call in (lambda: sit(x, t, y), lambda: vae.decode(x)):
        with FlopCounterMode(display=False) as counter:
            call()
        counts.append(int(counter.get_total_flops()))
    return counts[0] * (steps + guided_steps(steps)) + counts[1]


def speeds(bench: GenerationBench, rate: float) -> list[dict[str, float]]:
    """Seconds an image of `generate`, and its share of the matrix product's rate."""
    found, clock = [], device_clock(bench.device)
    for steps in bench.scale.timed_steps:
        start = clock()
        stage(bench, steps)
        each = (clock() - start) / bench.scale.images
        share = operations_per_image(bench.scale, steps) / each / rate
        found.append({"steps": steps, "seconds_per_image": each, "over_matrix_product": share})
    return found


def measure(bench: GenerationBench, rounds: int) -> dict[str, Any]:
    """All figures of a run."""
    scale, network = bench.scale, bench.network()
    rows = np.arange(scale.batch)
    features, seeds = (
        guidance(scale.batch).read_features(rows),
        derive_seeds(0, rows.tolist()).numpy(),
    )
    ours = bench.generator()
    whole = bench.generator(guidance_high=1.0)
    contenders = {
        "generate": lambda: stage(bench, scale.steps),
        "bare evaluations": lambda: bare(bench, network, scale.steps),
        "sample, guided in [0, 0.75]": lambda: ours.generate_tiles(features, seeds),
        "sample, guided in [0, 1]": lambda: whole.generate_tiles(features, seeds),
        "sample, always doubled": lambda: doubled(bench, network),
    }
    seconds = best_seconds(contenders, rounds, device_clock(bench.device), warm_up=True)
    rate = matrix_rate(bench, rounds)
    guided, every = seconds["sample, guided in [0, 0.75]"], seconds["sample, always doubled"]
    return {
        "evaluations_per_image": scale.steps + guided_steps(scale.steps),
        "seconds": seconds,
        "matrix_tflop_per_s": rate / 1e12,
        "speeds": speeds(bench, rate),
        "ratios": {
            "generate over bare evaluations": seconds["bare evaluations"] / seconds["generate"],
            "guided in [0, 0.75] over always doubled": every / guided,
        },
    }


def format_tables(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    seconds = ((name, f"{value:.2f}") for name, value in result["seconds"].items())
    tables = [
        markdown("ratio | measured | goal", ratio_rows(result["ratios"], GOALS, 3)),
        markdown("contender | seconds", seconds),
    ]
    speeds = [
        (row["steps"], f"{row['seconds_per_image']:.3f}", f"{row['over_matrix_product']:.2f}")
        for row in result["speeds"]
    ]
    if speeds:
        tables.append(markdown("steps | seconds an image | over matrix product", speeds))
    return "\n".join(tables)


def main() -> int:
    """Measure, print, write; exit status 1 where a goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="bfloat16 on a GPU")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--compile", action="store_true")
    options = parser.parse_args()
    kind = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = options.dtype or ("bfloat16" if kind == "cuda" else "float32")
    torch.manual_seed(0)
    bench = build(SCALES[kind], torch.device(kind), dtype, compiles=options.compile)
    name, threads = device_name(bench.device), torch.get_num_threads()
    result = {
        "machine": {"device": name, "torch": torch.__version__, "threads": threads},
        "dtype": dtype,
        "compiled": options.compile,
        "scale": vars(bench.scale),
        **measure(bench, options.rounds),
    }
    write_result("generate", result, format_tables(result))
    return print_verdict(missed_goals(result["ratios"], GOALS))


if __name__ == "__main__":
    raise SystemExit(main())
