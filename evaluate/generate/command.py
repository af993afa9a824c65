"""The `generate` command: options to a model, guidance and a request, and the run of it."""

import argparse

from evaluate.generate.guidance import (
    Guidance,
    SelectionGuidance,
    Unconditional,
    check_condition_dim,
    check_encoder,
    check_resolution,
    check_tile_px,
)
from evaluate.generate.run import Request, final_line, generate
from evaluate.generators.cytosyn import CytoSynGenerator, SamplerSettings
from evaluate.processes import Processes, choose_device, joined_processes
from model.errors import UserError
from pipeline.console import EXIT_OK, say
from pipeline.dataset import open_dataset


def generate_command(options: argparse.Namespace) -> int:
    """Run `python -m evaluate generate` with parsed options; returns the exit status."""
    guidance = open_guidance(options)
    with joined_processes() as processes:
        generator = _open_generator(options, processes)
        warnings = _misfits(guidance, generator, force=options.force)
        if processes.is_first:
            _say_what_to_beware(warnings, guidance, generator)
        request = Request(
            out=options.out,
            seed=options.seed,
            conditions=options.limit,
            variations=options.variations,
            micro_batch=options.batch,
            mpp=guidance.mpp if generator.mpp is None else generator.mpp,
            forced="; ".join(warnings) or None,
        )
        outcome = generate(generator, guidance, request, processes)
        if processes.is_first:
            say(final_line(outcome, options.out))
    return EXIT_OK


def open_guidance(options: argparse.Namespace) -> Guidance:
    """The guidance that the options ask for; `UserError` where they ask for two or none."""
    if options.unconditional:
        if options.guidance is not None:
            raise UserError("--unconditional and --guidance exclude each other; give one of them")
        if options.count is None:
            raise UserError("--unconditional needs --count N, the number of images")
        return Unconditional(options.count)
    if options.count is not None:
        raise UserError("--count belongs to --unconditional; use --limit and --variations instead")
    if options.guidance is None or options.selection is None:
        raise UserError(
            "nothing guides: give --guidance DATASET --selection NAME, or --unconditional --count N"
        )
    return SelectionGuidance.open(
        open_dataset(options.guidance), options.selection, options.encoder
    )


def _open_generator(options: argparse.Namespace, processes: Processes) -> CytoSynGenerator:
    settings = SamplerSettings(
        solver=options.solver,
        steps=options.steps,
        guidance_scale=1.0 if options.unconditional else options.scale,
        guidance_low=options.low,
        guidance_high=options.high,
    )
    device = choose_device(options.device, processes.local_rank)
    return CytoSynGenerator.open(options.model, settings, device=device, dtype=options.dtype)


def _misfits(guidance: Guidance, generator: CytoSynGenerator, *, force: bool) -> list[str]:
    """What does not fit between guidance and model; refused unless `force` is set."""
    record = guidance.encoder_record
    check_condition_dim(record, generator.condition_dim)
    check_tile_px(guidance.tile_px, generator.tile_px)
    found = [
        check_encoder(record, generator.encoder_record, force=force),
        check_resolution(guidance.mpp, generator.mpp, force=force),
    ]
    return [message for message in found if message]


def _say_what_to_beware(
    warnings: list[str], guidance: Guidance, generator: CytoSynGenerator
) -> None:
    for message in warnings:
        say(f"warning: {message}")
    record = guidance.encoder_record
    if record is not None and generator.encoder_record is None:
        say("warning: the model does not say which encoder it was trained with; not checked")
    if record is not None and record.get("random_weights"):
        say(f"warning: the guidance's encoder has RANDOM weights ({record.get('weights')})")
