"""The `generate` command: options to a model, conditions and a request, and the run of it."""

import argparse
from pathlib import Path

from common.console import EXIT_OK, print_line
from common.errors import UserError
from common.torch_processes import Processes, joined_processes
from evaluate.generate.condition_source import ConditionSource, check_fit
from evaluate.generate.open import check_dataset, check_guidance_options, open_conditions
from evaluate.generate.options import GenerateOptions, read_generate_options
from evaluate.generate.run import Request, final_line, generate
from evaluate.generate.sweep import SweepPoint, parse_sweep, write_table
from evaluate.generators import Generator
from evaluate.generators.interface import ModelSource
from evaluate.generators.open import OpenedModel, open_generator, settings_for
from model.sampler_settings import SamplerSettings


def generate_command(parsed: argparse.Namespace) -> int:
    """Run `python -m evaluate generate` with parsed options; returns the exit status."""
    options = read_generate_options(parsed)
    # What costs nothing to check is checked before a model is loaded for minutes.
    check_guidance_options(options)
    points = _requested_points(options)
    check_dataset(options)
    with joined_processes(options.device) as processes:
        opened = open_generator(
            ModelSource(
                options.generator,
                options.model,
                processes.device,
                dtype=options.dtype,
                compiles=options.compiles,
                trust_remote_code=options.trust_remote_code,
                pipeline_code=options.pipeline_code,
                vae=options.vae,
                vae_dtype=options.vae_dtype,
                revision=options.revision,
                subfolder=options.subfolder,
            )
        )
        # All points share the conditions, and whether they fit is not a matter of the settings.
        first = opened.make(points[0][1])
        source, warnings = open_conditions(options, first, processes.device)
        warnings += check_fit(source, first, force=options.force)
        if processes.is_main:
            for message in [*opened.notices, *warnings, *_encoder_warnings(source, first)]:
                print_line(f"warning: {message}")
        forced = "; ".join(warnings) or None
        for point, settings in points:
            out = options.out if point is None else options.out / point.name
            generator = opened.make(settings)
            _generate_point(options, generator, source, out, forced, processes)
        if options.sweep and processes.is_main:
            _finish_sweep(options.out, points, opened)
    return EXIT_OK


def _requested_points(
    options: GenerateOptions,
) -> list[tuple[SweepPoint | None, SamplerSettings]]:
    """The settings to run, one or those of a sweep, all checked."""
    # All points are checked before the first is made: a sweep runs for hours.
    given = dict(options.sampler)
    if options.unconditional:
        given["guidance_scale"] = 1.0  # there is nothing to guide by
    if not options.sweep:
        return [(None, settings_for(options.generator, given))]
    points = parse_sweep(options.sweep)
    if options.unconditional and any({"scale", "low", "high"} & set(p.options) for p in points):
        raise UserError("--sweep of scale, low or high needs guidance, --unconditional has none")
    return [
        (point, settings_for(options.generator, {**given, **point.sampler_settings()}))
        for point in points
    ]


def _encoder_warnings(source: ConditionSource, generator: Generator) -> list[str]:
    """What the encoder records do not say, or say against the images."""
    record = source.encoder_record
    if record is None:
        return []
    unknown = "the model does not record which encoder it was trained with; not checked"
    random = f"the guidance's encoder has RANDOM weights ({record.get('weights')})"
    return ([unknown] if generator.encoder_record is None else []) + (
        [random] if record.get("random_weights") else []
    )


def _generate_point(
    options: GenerateOptions,
    generator: Generator,
    source: ConditionSource,
    out: Path,
    forced: str | None,
    processes: Processes,
) -> None:
    request = Request(
        out=out,
        seed=options.seed,
        conditions=options.limit,
        variations=options.variations,
        micro_batch=options.batch,
        mpp=source.mpp if generator.mpp is None else generator.mpp,
        forced=forced,
    )
    outcome = generate(generator, source, request, processes)
    if processes.is_main:
        print_line(final_line(outcome, out))


def _finish_sweep(
    out: Path, points: list[tuple[SweepPoint | None, SamplerSettings]], opened: OpenedModel
) -> None:
    rows = [
        (point.name, opened.make(settings).identity())
        for point, settings in points
        if point is not None
    ]
    path = write_table(out, rows)
    for line in path.read_text().splitlines():
        print_line(line)
    print_line(f"generate: {len(rows)} datasets of one sweep; wrote {path}")
