"""The `generate` command: options to a model, guidance and a request, and the run of it."""

import argparse
from pathlib import Path
from typing import Any

from common.console import EXIT_OK, say
from common.errors import UserError
from common.torch_processes import Processes, joined_processes, make_sums_independent_of_threads
from evaluate.generate.guidance import (
    Guidance,
    check_condition_dim,
    check_encoder,
    check_resolution,
    check_tile_px,
)
from evaluate.generate.open import (
    check_dataset,
    check_guidance_options,
    open_guidance,
)
from evaluate.generate.run import Request, final_line, generate
from evaluate.generate.sweep import SETTINGS, Point, parse_sweep, write_table
from evaluate.generators import Generator
from evaluate.generators.cytosyn import SamplerSettings
from evaluate.generators.open import Opened, Source, open_generator, settings_for


def generate_command(options: argparse.Namespace) -> int:
    """Run `python -m evaluate generate` with parsed options; returns the exit status."""
    check_guidance_options(options)
    points = _points(options)
    check_dataset(options)
    make_sums_independent_of_threads()
    with joined_processes(options.device) as processes:
        device = processes.device
        opened = open_generator(
            Source(
                options.generator,
                options.model,
                device,
                dtype=options.dtype,
                compiles=options.compile,
                trust_remote_code=options.trust_remote_code,
                pipeline_code=options.pipeline_code,
                vae=options.vae,
            )
        )
        first = opened.make(points[0][1])
        guidance, warnings = open_guidance(options, first, device)
        warnings += _misfits(guidance, first, force=options.force)
        if processes.is_main:
            _say_what_to_beware([*opened.notices, *warnings], guidance, first)
        forced = "; ".join(warnings) or None
        for point, settings in points:
            _run_point(options, opened, guidance, point, settings, forced, processes)
        if options.sweep and processes.is_main:
            _finish_sweep(options.out, points, opened)
    return EXIT_OK


def _points(options: argparse.Namespace) -> list[tuple[Point | None, SamplerSettings]]:
    """The settings to run: one, or those of a sweep; all are checked before anything is loaded."""
    asked: dict[str, Any] = {
        "steps": options.steps,
        "solver": options.solver,
        "guidance_scale": options.scale,
        "guidance_low": options.low,
        "guidance_high": options.high,
    }
    if options.unconditional:
        asked |= {"guidance_scale": 1.0}  # there is nothing to guide by
    if not options.sweep:
        return [(None, settings_for(options.generator, asked))]
    points = parse_sweep(options.sweep)
    if options.unconditional and any({"scale", "low", "high"} & set(p.options) for p in points):
        raise UserError("--sweep of scale, low or high needs guidance, --unconditional has none")
    return [
        (point, settings_for(options.generator, {**asked, **point.settings()})) for point in points
    ]


def _run_point(
    options: argparse.Namespace,
    opened: Opened,
    guidance: Guidance,
    point: Point | None,
    settings: SamplerSettings,
    forced: str | None,
    processes: Processes,
) -> None:
    generator = opened.make(settings)
    out: Path = options.out if point is None else options.out / point.name
    request = Request(
        out=out,
        seed=options.seed,
        conditions=options.limit,
        variations=options.variations,
        micro_batch=options.batch,
        mpp=guidance.mpp if generator.mpp is None else generator.mpp,
        forced=forced,
    )
    outcome = generate(generator, guidance, request, processes)
    if processes.is_main:
        say(final_line(outcome, out))


def _finish_sweep(
    out: Path, points: list[tuple[Point | None, SamplerSettings]], opened: Opened
) -> None:
    rows = []
    for point, settings in points:
        if point is not None:
            identity = opened.make(settings).identity()
            rows.append((point.name, {key: identity[name] for key, name in SETTINGS.items()}))
    path = write_table(out, rows)
    say(path.read_text().rstrip())
    say(f"generate: {len(rows)} datasets of one sweep; wrote {path}")


def _misfits(guidance: Guidance, generator: Generator, *, force: bool) -> list[str]:
    """What does not fit between guidance and model; refused unless `force` is set."""
    record = guidance.encoder_record
    check_condition_dim(record, generator.condition_dim)
    found = [
        check_tile_px(guidance.tile_px, generator.tile_px, force=force),
        check_encoder(record, generator.encoder_record, force=force),
        check_resolution(guidance.mpp, generator.mpp, force=force),
    ]
    return [message for message in found if message]


def _say_what_to_beware(warnings: list[str], guidance: Guidance, generator: Generator) -> None:
    for message in warnings:
        say(f"warning: {message}")
    record = guidance.encoder_record
    if record is not None and generator.encoder_record is None:
        say("warning: the model does not say which encoder it was trained with; not checked")
    if record is not None and record.get("random_weights"):
        say(f"warning: the guidance's encoder has RANDOM weights ({record.get('weights')})")
