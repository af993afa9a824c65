"""From the options of `generate` to its guidance."""

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from common.errors import UserError
from evaluate.generate.conditions import (
    Condition,
    ConditionGuidance,
    Reference,
    between,
    each,
    mean_of,
)
from evaluate.generate.guidance import (
    Guidance,
    SelectionGuidance,
    Unconditional,
    check_condition_dim,
)
from evaluate.generate.means import mean_guidance
from evaluate.generate.options import parse_factors
from evaluate.generate.references import (
    Wanted,
    cached_references,
    check_image_mpp,
    encode_tiles,
    encoder_record,
    read_image,
    tile_references,
)
from evaluate.generate.slide_tiles import parse_place, read_slide_tiles
from evaluate.generators import Generator
from model.encoders import load_encoder
from pipeline.dataset import identity_value, open_dataset, read_identity, read_selection
from pipeline.dataset.features import FeatureStore

_SOURCES = ("guidance", "slide", "images", "unconditional")
DEFAULT_ENCODER = "h0-mini"


def check_guidance_options(options: argparse.Namespace) -> None:
    """Refuse options that ask for two kinds of guidance, or none, or do not belong together."""
    given = [f"--{name}" for name in _SOURCES if getattr(options, name)]
    if len(given) > 1:
        raise UserError(f"{' and '.join(given)} exclude each other; give one of them")
    if options.count is not None and not options.unconditional:
        raise UserError("--count belongs to --unconditional; use --limit and --variations instead")
    if options.unconditional:
        if options.count is None:
            raise UserError("--unconditional needs --count N, the number of images")
        if options.mean or options.interpolate:
            raise UserError("--mean and --interpolate need guidance, --unconditional has none")
    elif options.mean and options.interpolate:
        raise UserError("--mean and --interpolate exclude each other; give one of them")
    elif options.slide and not (options.at or options.interpolate):
        raise UserError(
            "--slide needs --at x,y (or --interpolate x,y x,y); for the mean over a whole slide "
            "give --guidance DATASET --selection NAME --mean slide"
        )
    elif options.at and not options.slide:
        raise UserError("--at belongs to --slide FILE")
    elif options.mean == "slide" and not options.guidance:
        raise UserError("--mean slide needs --guidance DATASET --selection NAME")
    elif options.guidance and not (options.selection or options.interpolate):
        raise UserError("--guidance needs --selection NAME, or --interpolate SLIDE:RANK SLIDE:RANK")
    elif not (given or options.interpolate):
        raise UserError(
            "nothing guides: give --guidance DATASET --selection NAME, --slide FILE --at x,y, "
            "--images FILES, --interpolate A B, or --unconditional --count N"
        )


def check_dataset(options: argparse.Namespace) -> None:
    """Refuse a dataset or selection that is not there, before a model is loaded for it."""
    if options.guidance is not None:
        dataset = open_dataset(options.guidance)
        if options.selection:
            read_selection(dataset, options.selection)


def open_guidance(
    options: argparse.Namespace,
    generator: Generator,
    device: torch.device,
) -> tuple[Guidance, list[str]]:
    """The guidance that the options ask for, and what a person must know of it.

    Raises `UserError` for tiles that cannot be read or do not fit the model.
    """
    if options.unconditional:
        return Unconditional(options.count), []
    if options.guidance is not None:
        return _open_cached(options, generator), []
    return _open_tiles(options, generator, device)


def _open_cached(options: argparse.Namespace, generator: Generator) -> Guidance:
    """Guidance by the cached features of a dataset."""
    dataset = open_dataset(options.guidance)
    encoder = options.encoder or _trained_encoder(generator)
    if options.interpolate:
        names = _names(options, [])
        tile_px, mpp = int(identity_value(dataset, "tile_px")), read_identity(dataset).get("mpp")
        store = FeatureStore(dataset, tile_px=tile_px, encoder=encoder)
        references = cached_references(dataset, names, store)
        return _joined(options, names, references, dict(store.record), tile_px, mpp)
    selection = SelectionGuidance.open(dataset, options.selection, encoder)
    # Before any feature is read for a mean.
    check_condition_dim(selection.encoder_record, generator.condition_dim)
    selection.require_features(None if options.mean else options.limit)
    return mean_guidance(selection, options.mean) if options.mean else selection


def _trained_encoder(generator: Generator) -> str:
    record = generator.encoder_record or {}
    return str(record.get("encoder") or DEFAULT_ENCODER)


def _open_tiles(
    options: argparse.Namespace, generator: Generator, device: torch.device
) -> tuple[Guidance, list[str]]:
    """Guidance by tiles of a slide file or of image files, encoded here and now."""
    wanted = Wanted(generator.tile_px, generator.mpp)
    if options.slide:
        places = _names(options, options.at or [])
        if wanted.mpp is None:
            raise UserError(
                "--slide: the model does not say at which resolution it was trained, so no tile "
                "can be cut for it; cut tiles yourself and give --images"
            )
        tiles = read_slide_tiles(
            options.slide,
            [parse_place(text) for text in places],
            tile_px=wanted.tile_px,
            mpp=wanted.mpp,
            slide_mpp=options.slide_mpp,
        )
        keys, names, mpp = places, [f"{options.slide.stem} {text}" for text in places], wanted.mpp
        warnings: list[str] = []
    else:
        keys = _names(options, options.images or [])
        warning = check_image_mpp(options.images_mpp, wanted, force=options.force)
        tiles = [read_image(Path(path), wanted) for path in keys]
        names, mpp = [Path(path).name for path in keys], options.images_mpp
        warnings = [warning] if warning else []
    encoder = load_encoder(
        options.encoder or _trained_encoder(generator),
        _weights(options, generator),
        device=device,
    )
    encode = partial(encode_tiles, encoder, resize=options.generator == "pixcell")
    references = tile_references(names, tiles, encode)
    record = encoder_record(encoder, wanted.tile_px)
    return _joined(options, keys, references, record, wanted.tile_px, mpp), warnings


def _weights(options: argparse.Namespace, generator: Generator) -> str:
    """The weights for features on the way: as asked, or as the model was trained with."""
    record = generator.encoder_record or {}
    weights = options.weights or record.get("weights")
    if not weights:
        raise UserError(
            "the model does not say which encoder weights it was trained with; give --weights "
            "hub, a file or random:SEED"
        )
    return str(weights)


def _names(options: argparse.Namespace, alone: Sequence[str]) -> list[str]:
    """The tiles that are named, each once, in order of their first mention."""
    if not options.interpolate:
        return list(dict.fromkeys(alone))
    if alone:
        raise UserError("--interpolate names its tiles itself; leave --at and --images out")
    return list(dict.fromkeys(name for pair in options.interpolate for name in pair))


def _joined(
    options: argparse.Namespace,
    keys: Sequence[str],
    references: Sequence[Reference],
    record: dict[str, Any],
    tile_px: int,
    mpp: float | None,
) -> ConditionGuidance:
    conditions: list[Condition]
    if options.interpolate:
        pairs = [(keys.index(a), keys.index(b)) for a, b in options.interpolate]
        conditions = between(references, pairs, parse_factors(options.factors), options.kind)
        what = {"guidance": "interpolation", "guidance_interpolation": options.kind}
    elif options.mean:
        conditions, what = mean_of(references), {"guidance": "mean of tiles"}
    else:
        conditions, what = each(references), {"guidance": "tiles"}
    return ConditionGuidance(
        what["guidance"], conditions, references, record=record, tile_px=tile_px, mpp=mpp, what=what
    )
