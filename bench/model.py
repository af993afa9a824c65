"""Measures the model's parts against a large matrix product, and sampling against a plain loop.

    python bench/model.py [--device cuda] [--dtype bfloat16] [--scale full] [--rounds 5] [--compile]
                           [--only sampling]

A part's time becomes TFLOP/s by its counted operations (one multiply-add is two), and is divided
by the rate of a square matrix product in the same run, on the same device and in the same dtype.
Parts take turns, and each is judged by its best round. Times are wall time on a GPU, and CPU time
of one thread on a CPU, which a busy machine disturbs least. With a GPU the shapes are those of the
goals (SiT-XL/2 at batch 64, VAE at batch 32, 250 guided steps); on a CPU ("small") they are
smaller, compiling is left out unless asked for, and the goals are not judged.
What was measured and what was predicted stands in docs/performance/model.md.
The tables go to the terminal and to bench/out/model.md, the numbers to bench/out/model.json.
"""

import argparse
import math
import platform
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

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
from model.cytosyn import CytoSyn
from model.discriminator import Discriminator
from model.images import to_uint8
from model.perceptual import PerceptualLoss
from model.sampler import time_nodes
from model.sit import SiT, SiTConfig
from model.vae import VAE, VAEConfig

GOALS = {
    "SiT forward over matrix product": 0.5,
    "VAE encode+decode over matrix product": 0.35,
    "guided sampling over plain loop": 2.0,
}
SECTIONS = ("rates", "sampling", "versions")
SCALE, LOW, HIGH = 2.5, 0.0, 0.75  # guidance of the report


@dataclass(frozen=True)
class ModelScale:
    """The shapes of a run; the VAE that is measured is f8d4 in either."""

    sit: str
    latent_size: int  # side of the SiT's latents
    sit_batch: int
    image_px: int
    vae_batch: int
    matrix: int  # side of the matrix product
    steps: int
    images: int  # drawn by each sampler
    decoder: str  # VAE of the drawn images: few steps and a large decoder would measure that
    seconds: float  # least duration of a measurement


SCALES = {
    "full": ModelScale("XL/2", 28, 64, 224, 32, 8192, 250, 64, "f8d4", 1.0),
    "small": ModelScale("S/2", 28, 4, 64, 1, 2048, 12, 4, "tiny", 0.4),
}


@dataclass(frozen=True)
class Setting:
    """Where and how a run computes."""

    device: torch.device
    dtype: torch.dtype
    compiles: bool
    scale: ModelScale

    def normal(self, *shape: int) -> Tensor:
        """Standard normal values on the device, in its dtype."""
        return torch.randn(shape, device=self.device, dtype=self.dtype)

    def compiled(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """The call, compiled where the run compiles."""
        return torch.compile(call, fullgraph=True) if self.compiles else call


@dataclass(frozen=True)
class MeasuredPart:
    """A piece of work: what runs, and its operations."""

    run: Callable[[], object]
    flop: int


def best_call_seconds(
    runs: dict[str, Callable[[], object]], setting: Setting, rounds: int
) -> dict[str, float]:
    """Seconds of a call of each, in turns, averaged in a round over as many as the scale asks.

    The first, compiling calls are not counted.
    """
    clock, best = device_clock(setting.device), dict.fromkeys(runs, math.inf)
    for run in runs.values():
        run()
    for _ in range(rounds):
        for name, run in runs.items():
            calls, spent, start = 0, 0.0, clock()
            while spent < setting.scale.seconds:
                run()
                calls, spent = calls + 1, clock() - start
            best[name] = min(best[name], spent / calls)
    return best


def operations(run: Callable[[], object]) -> int:
    """Operations of a call on modules and tensors of the meta device."""
    with FlopCounterMode(display=False) as counter:
        run()
    return int(counter.get_total_flops())


@dataclass(frozen=True)
class ModelParts:
    """The networks on one device, with inputs; `forward` and `train` by part."""

    sit: SiT
    vae: VAE
    discriminator: Discriminator
    perceptual: PerceptualLoss

    @classmethod
    def on(cls, device: torch.device, dtype: torch.dtype, scale: ModelScale) -> "ModelParts":
        """Fresh networks in `dtype`; zeros are replaced, so that no product is by zeros."""
        with torch.device(device):
            sit = SiT(SiTConfig.preset(scale.sit, latent_size=scale.latent_size))
            vae, discriminator = VAE(VAEConfig.preset("f8d4")), Discriminator()
        perceptual = PerceptualLoss("random:0").to(device)
        for parameter in sit.parameters():
            nn.init.normal_(parameter, std=0.02)
        networks = (sit, vae, discriminator, perceptual)
        sit, vae, discriminator, perceptual = (network.to(dtype) for network in networks)  # type: ignore[assignment]
        for network in (vae, discriminator, perceptual):
            network.to(memory_format=torch.channels_last)
        return cls(sit, vae, discriminator, perceptual)

    def calls(
        self, setting: Setting, compiled: Callable[[Callable[..., Any]], Callable[..., Any]]
    ) -> dict[str, Callable[[], object]]:
        """Each part, forward and with its backward pass; images and latents need gradients."""
        scale, device = setting.scale, self.sit.pos_embed.device

        def draw(*shape: int, grad: bool = False) -> Tensor:
            return torch.randn(shape, device=device, dtype=setting.dtype).requires_grad_(grad)

        n, m, side = scale.sit_batch, scale.vae_batch, scale.latent_size
        x, y = draw(n, 4, side, side, grad=True), draw(n, 768)
        t = torch.rand(n, device=device)
        images = draw(m, 3, scale.image_px, scale.image_px)
        images = images.contiguous(memory_format=torch.channels_last)
        remade = images.clone().requires_grad_()
        latents = draw(m, 4, scale.image_px // 8, scale.image_px // 8, grad=True)
        noise = draw(*latents.shape)
        sit, vae = compiled(self.sit), compiled(self.vae)
        align, encode = compiled(self.sit.align_tokens), compiled(self.vae.encode)
        decode, judge = compiled(self.vae.decode), compiled(self.discriminator)
        perceive = compiled(self.perceptual)

        def total(*values: Tensor) -> None:
            sum(value.float().sum() for value in values).backward()  # type: ignore[union-attr]

        forward: dict[str, Callable[[], object]] = {
            "SiT": lambda: sit(x, t, y),
            "align pass": lambda: align(x, t, y),
            "VAE encode": lambda: encode(images),
            "VAE decode": lambda: decode(latents),
            "VAE encode+decode": lambda: vae(images, noise),
            "LPIPS": lambda: perceive(remade, images),
            "PatchGAN": lambda: judge(remade),
        }
        backward: dict[str, Callable[[], object]] = {
            "SiT": lambda: total(*sit(x, t, y, return_tokens=True)),
            "align pass": lambda: total(align(x, t, y)),
            "VAE encode": lambda: total(*encode(images)),
            "VAE decode": lambda: total(decode(latents)),
            "VAE encode+decode": lambda: total(vae(images, noise).reconstruction),
            "LPIPS": lambda: total(perceive(remade, images)),
            "PatchGAN": lambda: total(judge(remade)),
        }
        return {f"{name} forward": torch.no_grad()(call) for name, call in forward.items()} | {
            f"{name} forward+backward": call for name, call in backward.items()
        }


def parts_of(setting: Setting) -> dict[str, MeasuredPart]:
    """The parts of a run with their operations, counted on shapes alone."""
    work = ModelParts.on(setting.device, setting.dtype, setting.scale)
    shapes = ModelParts.on(torch.device("meta"), setting.dtype, setting.scale)
    counted = shapes.calls(setting, lambda call: call)
    runs = work.calls(setting, setting.compiled)
    parts = {name: MeasuredPart(run, operations(counted[name])) for name, run in runs.items()}
    side = setting.scale.matrix
    a, b = setting.normal(side, side), setting.normal(side, side)
    parts["matrix product"] = MeasuredPart(lambda: a @ b, 2 * side**3)
    return parts


def rates(
    setting: Setting, parts: dict[str, MeasuredPart], rounds: int
) -> dict[str, dict[str, float]]:
    """Best seconds of each part and its TFLOP/s."""
    best = best_call_seconds({name: part.run for name, part in parts.items()}, setting, rounds)
    matrix = parts["matrix product"].flop / best["matrix product"]
    return {
        name: {
            "seconds": best[name],
            "gflop": part.flop / 1e9,
            "tflop_per_s": part.flop / best[name] / 1e12,
            "over_matrix_product": part.flop / best[name] / matrix,
        }
        for name, part in parts.items()
    }


@torch.no_grad()
def plain_loop(sit: SiT, vae: VAE, features: Tensor, steps: int) -> Tensor:
    """The public code's sampler, written plainly: float32, a doubled batch where guided."""
    n, side = len(features), sit.config.latent_size
    x = torch.randn(n, 4, side, side, device=features.device, dtype=torch.float64)
    nodes = time_nodes("sde", steps)
    drop = torch.arange(2 * n, device=features.device) >= n
    for t, t_next in pairwise(nodes):
        times = torch.full((2 * n,), t, device=features.device)
        if LOW <= t <= HIGH:
            doubled, both = torch.cat([x, x]).float(), torch.cat([features, features])
            velocity, null = sit(doubled, times, both, drop=drop).double().chunk(2)
            velocity = null + SCALE * (velocity - null)
        else:
            velocity = sit(x.float(), times[:n], features).double()
        x = x + (t_next - t) * ((2 - t) * velocity + x)
        if t_next > 0:
            x = x + math.sqrt(2 * t * (t - t_next)) * torch.randn_like(x)
    raw = x.float() * sit.bn.running_var.sqrt()[:, None, None] + sit.bn.running_mean[:, None, None]
    return to_uint8(vae.decode(raw)).cpu()


def sampling_forms(setting: Setting) -> dict[str, Callable[[], object]]:
    """Guided sampling as a plain loop in float32, ours in float32, in the run's dtype, compiled."""
    scale = setting.scale
    features = torch.randn(scale.images, 768, device=setting.device)
    exact = CytoSyn(*_stirred(setting, torch.float32))
    low = CytoSyn(*_stirred(setting, setting.dtype))
    low.vae.to(memory_format=torch.channels_last)
    models = {"ours, float32": exact, f"ours, {str(setting.dtype).removeprefix('torch.')}": low}

    def form(model: CytoSyn, network: Callable[..., Tensor] | None) -> Callable[[], object]:
        return lambda: model.generate(
            features, num_inference_steps=scale.steps, batch_size=scale.images, network=network
        )

    forms = {"plain loop": lambda: plain_loop(exact.sit, exact.vae, features, scale.steps)}
    forms |= {name: form(model, None) for name, model in models.items()}
    if setting.compiles:
        forms |= {
            f"{name}, compiled": form(model, setting.compiled(model.sit.forward_from_condition))
            for name, model in models.items()
        }
    return forms


def _stirred(setting: Setting, dtype: torch.dtype) -> tuple[SiT, VAE]:
    """SiT and decoder of the sampling, the same values in every form, none of them zero."""
    torch.manual_seed(0)
    sit = SiT(SiTConfig.preset(setting.scale.sit, latent_size=setting.scale.latent_size))
    for parameter in sit.parameters():
        nn.init.normal_(parameter, std=0.02)
    vae = VAE(VAEConfig.preset(setting.scale.decoder))
    return sit.to(setting.device, dtype), vae.to(setting.device, dtype)


def sampling(setting: Setting, rounds: int) -> dict[str, float]:
    """Images a second of each form; they take turns, after one run that compiles and warms up."""
    clock = device_clock(setting.device)
    seconds = best_seconds(sampling_forms(setting), rounds, clock, warm_up=True)
    return {name: setting.scale.images / best for name, best in seconds.items()}


def vae_forms(setting: Setting) -> dict[str, Callable[[], object]]:
    """The VAE's pass, forward and backward, in its earlier forms and today's."""
    scale = setting.scale
    images = setting.normal(scale.vae_batch, 3, scale.image_px, scale.image_px)
    noise = setting.normal(scale.vae_batch, 4, scale.image_px // 8, scale.image_px // 8)
    runs: dict[str, Callable[[], object]] = {}
    forms: tuple[tuple[str, torch.memory_format, bool, bool], ...] = (
        ("NCHW, eager", torch.contiguous_format, False, False),
        ("channels_last, eager", torch.channels_last, False, False),
        ("channels_last, eager, recompute", torch.channels_last, True, False),
        ("channels_last, compiled", torch.channels_last, False, True),
        ("channels_last, compiled, recompute", torch.channels_last, True, True),
    )
    for name, layout, recompute, compiles in forms:
        if compiles and not setting.compiles:
            continue
        vae = VAE(VAEConfig.preset("f8d4")).to(setting.device, setting.dtype)
        vae.to(memory_format=layout).recompute = recompute
        call = setting.compiled(vae) if compiles else vae
        given = images.contiguous(memory_format=layout)
        runs[f"VAE forward+backward, {name}"] = lambda call=call, given=given: (  # type: ignore[misc]
            call(given, noise).reconstruction.float().mean().backward()
        )
    return runs


def sit_forms(setting: Setting) -> dict[str, Callable[[], object]]:
    """The SiT's forward pass in float32, in the run's dtype, and compiled."""
    scale = setting.scale
    exact = SiT(SiTConfig.preset(scale.sit, latent_size=scale.latent_size)).to(setting.device)
    sit = SiT(exact.config).to(setting.device, setting.dtype)
    x = setting.normal(scale.sit_batch, 4, scale.latent_size, scale.latent_size)
    t, y = torch.rand(scale.sit_batch, device=setting.device), setting.normal(scale.sit_batch, 768)
    forms = {"float32, eager": exact, "eager": sit}
    if setting.compiles:
        forms["compiled"] = setting.compiled(sit)  # type: ignore[assignment]
    return {
        f"SiT forward, {name}": torch.no_grad()(lambda form=form: form(x, t, y))
        for name, form in forms.items()
    }


def versions(setting: Setting, rounds: int) -> dict[str, float]:
    """Best seconds of the forms that SiT and VAE have had."""
    return best_call_seconds(sit_forms(setting), setting, rounds) | best_call_seconds(
        vae_forms(setting), setting, rounds
    )


def judged(result: dict[str, Any]) -> dict[str, float]:
    """What the goals are about."""
    measured, images = result["rates"], result["images_per_s"]
    ratios = {}
    if measured:
        for goal, part in zip(GOALS, ("SiT forward", "VAE encode+decode forward"), strict=False):
            ratios[goal] = measured[part]["over_matrix_product"]
    if images:
        ours = max(rate for name, rate in images.items() if name != "plain loop")
        ratios["guided sampling over plain loop"] = ours / images["plain loop"]
    return ratios


def format_tables(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    goals = GOALS if result["goals_apply"] else dict.fromkeys(GOALS, "one H200")
    parts = [
        (name, f"{1e3 * rate['seconds']:.1f}", f"{rate['gflop']:.1f}",
         f"{rate['tflop_per_s']:.3f}", f"{rate['over_matrix_product']:.2f}")
        for name, rate in result["rates"].items()
    ]  # fmt: skip
    plain = result["images_per_s"].get("plain loop")
    sampling = [
        (name, f"{rate:.3f}", f"{rate / plain:.2f}")
        for name, rate in result["images_per_s"].items()
    ]
    forms = [(name, f"{1e3 * seconds:.1f}") for name, seconds in result["versions"].items()]
    return "\n".join(
        (
            markdown("ratio | measured | goal", ratio_rows(result["ratios"], goals)),
            markdown("part | ms | GFLOP | TFLOP/s | over matrix product", parts),
            markdown("guided sampling | images/s | over plain loop", sampling),
            markdown("version | ms", forms),
        )
    )


def setting_of(options: argparse.Namespace) -> Setting:
    """The run that the command line asks for; what it leaves out follows from the device."""
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.backends.cuda.matmul.allow_tf32 = True  # the plain loop's float32 is TF32
        torch.backends.cudnn.allow_tf32 = True
        torch.backends.cudnn.benchmark = True
    else:
        torch.set_num_threads(1)  # CPU time of several threads counts their waiting too
    scale = SCALES[options.scale or ("full" if on_gpu else "small")]
    return Setting(device, getattr(torch, options.dtype), options.compile or on_gpu, scale)


def main() -> int:
    """Measure, print, write; exit status 1 where a goal that applies is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", help="default: cuda where there is one")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--scale", choices=tuple(SCALES), help="default: full on cuda")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--compile", action="store_true", help="always on with cuda")
    parser.add_argument("--only", choices=SECTIONS, nargs="+", default=SECTIONS)
    setting = setting_of(options := parser.parse_args())
    torch.manual_seed(0)
    on_gpu = setting.device.type == "cuda"
    name = device_name(setting.device)
    result: dict[str, Any] = {
        "machine": {"platform": platform.platform(), "device": name, "torch": torch.__version__},
        "dtype": options.dtype,
        "compiled": setting.compiles,
        "scale": asdict(setting.scale),
        "goals_apply": on_gpu and setting.scale is SCALES["full"],
        "rates": {},
        "images_per_s": {},
        "versions": {},
    }
    if "rates" in options.only:
        result["rates"] = rates(setting, parts_of(setting), options.rounds)
    if "sampling" in options.only:
        result["images_per_s"] = sampling(setting, 1 if on_gpu else options.rounds)
    if "versions" in options.only:
        result["versions"] = versions(setting, options.rounds)
    result["ratios"] = judged(result)
    write_result("model", result, format_tables(result))
    if not result["goals_apply"]:
        print("the goals are for one H200 at full scale: not judged here")
        return 0
    return print_verdict(missed_goals(result["ratios"], GOALS))


if __name__ == "__main__":
    raise SystemExit(main())
