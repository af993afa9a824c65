"""From the options of `generate` to its condition source."""

from collections.abc import Sequence
from pathlib import Path
from typing import cast

import torch

from common.errors import UserError
from common.terms import Terms
from evaluate.generate.condition_source import (
    ConditionSource,
    SelectionConditions,
    Unconditional,
    check_condition_dim,
)
from evaluate.generate.conditions import (
    ConditionList,
    Reference,
    conditions_between,
    each_alone,
    mean_of,
)
from evaluate.generate.means import mean_conditions
from evaluate.generate.options import GenerateOptions, parse_factors
from evaluate.generate.references import (
    Wanted,
    cached_references,
    check_image_mpp,
    describe_encoder,
    encode_tiles,
    read_image,
)
from evaluate.generate.slide_tiles import parse_place, read_slide_tiles
from evaluate.generators import EncoderRecord, Generator
from model.encoders import load_encoder
from pipeline.dataset import (
    Dataset,
    identity_value,
    open_dataset,
    read_identity,
    read_selection,
    read_terms,
)
from pipeline.dataset.features import FeatureStore

_SOURCES = ("guidance", "slide", "images", "unconditional")
DEFAULT_ENCODER = "h0-mini"


def check_guidance_options(options: GenerateOptions) -> None:
    """Refuse options for two kinds of guidance, for none, or that do not belong together."""
    given = [f"--{name}" for name in _SOURCES if getattr(options, name)]
    counted, combined = options.count is not None, options.mean or options.interpolate
    # In this order: the first refusal that applies is the most basic mistake.
    refusals = (
        (len(given) > 1, f"{' and '.join(given)} exclude each other; give one of them"),
        (counted and not options.unconditional,
         "--count belongs to --unconditional; use --limit and --variations instead"),
        (options.unconditional and not counted,
         "--unconditional needs --count N, the number of images"),
        (options.unconditional and combined,
         "--mean and --interpolate need guidance, --unconditional has none"),
        (options.mean and options.interpolate,
         "--mean and --interpolate exclude each other; give one of them"),
        (options.slide and not (options.at or options.interpolate),
         "--slide needs --at x,y (or --interpolate x,y x,y); for the mean over a whole slide "
         "give --guidance DATASET --selection NAME --mean slide"),
        (options.at and not options.slide, "--at belongs to --slide FILE"),
        (options.mean == "slide" and not options.guidance,
         "--mean slide needs --guidance DATASET --selection NAME"),
        (options.guidance and not (options.selection or options.interpolate),
         "--guidance needs --selection NAME, or --interpolate SLIDE:RANK SLIDE:RANK"),
        (not (given or options.interpolate),
         "nothing guides: give --guidance DATASET --selection NAME, --slide FILE --at x,y, "
         "--images FILES, --interpolate A B, or --unconditional --count N"),
    )  # fmt: skip
    for refused, message in refusals:
        if refused:
            raise UserError(message)


def check_dataset(options: GenerateOptions) -> None:
    """Refuse a dataset or selection that does not exist, before a model is loaded for it."""
    if options.guidance is not None:
        dataset = open_dataset(options.guidance)
        if options.selection:
            read_selection(dataset, options.selection)


def open_conditions(
    options: GenerateOptions, generator: Generator, device: torch.device
) -> tuple[ConditionSource, list[str]]:
    """The conditions that the options request, and warnings about them.

    Raises `UserError` for tiles that cannot be read or do not fit the model.
    """
    if options.unconditional:
        return Unconditional(options.count or 0), []
    if options.guidance is not None:
        return _open_cached(options, open_dataset(options.guidance), generator), []
    return _open_tiles(options, generator, device)


def _open_cached(
    options: GenerateOptions, dataset: Dataset, generator: Generator
) -> ConditionSource:
    """Conditions by the cached features of a dataset."""
    encoder = options.encoder or _trained_encoder(generator)
    if options.interpolate:
        names = _tile_names(options, [])
        # Only the named tiles are read: the dataset needs no selection here.
        tile_px, mpp = int(identity_value(dataset, "tile_px")), read_identity(dataset).get("mpp")
        store = FeatureStore(dataset, tile_px=tile_px, encoder=encoder)
        references = cached_references(dataset, names, store)
        record = cast(EncoderRecord, dict(store.record))
        return _combine_references(
            options, names, references, record, tile_px, mpp, read_terms(dataset)
        )
    selection = SelectionConditions.open_selection(dataset, options.selection or "", encoder)
    # Before any feature is read for a mean.
    check_condition_dim(selection.encoder_record, generator.condition_dim)
    selection.require_features(None if options.mean else options.limit)
    return mean_conditions(selection, options.mean) if options.mean else selection


def _trained_encoder(generator: Generator) -> str:
    record = generator.encoder_record or {}
    return str(record.get("encoder") or DEFAULT_ENCODER)


def _open_tiles(
    options: GenerateOptions, generator: Generator, device: torch.device
) -> tuple[ConditionSource, list[str]]:
    """Conditions by tiles of a slide file or of image files, encoded here and now."""
    wanted = Wanted(generator.tile_px, generator.mpp)
    warnings: list[str] = []
    if options.slide:
        keys, mpp = _tile_names(options, options.at), wanted.mpp
        names = [f"{options.slide.stem} {text}" for text in keys]
        if mpp is None:
            raise UserError(
                "--slide: the model does not record at which resolution it was trained, so no "
                "tile can be cut for it; cut tiles yourself and give --images"
            )
        tiles = read_slide_tiles(
            options.slide,
            [parse_place(text) for text in keys],
            tile_px=wanted.tile_px,
            mpp=mpp,
            slide_mpp=options.slide_mpp,
        )
    else:
        keys, mpp = _tile_names(options, options.images), options.images_mpp
        names = [Path(path).name for path in keys]
        warning = check_image_mpp(mpp, wanted, force=options.force)
        warnings += [warning] if warning else []
        tiles = [read_image(Path(path), wanted) for path in keys]
    # Tiles are read before the encoder is loaded: a wrong path fails in a second.
    weights = options.weights or (generator.encoder_record or {}).get("weights")
    if not weights:
        raise UserError(
            "the model does not record which encoder weights it was trained with; give --weights "
            "hub, a file or random:SEED"
        )
    name = options.encoder or _trained_encoder(generator)
    encoder = load_encoder(name, str(weights), device=device)
    features = encode_tiles(encoder, tiles, resize=options.generator == "pixcell")
    references = [Reference(*each) for each in zip(names, tiles, features, strict=True)]
    record = describe_encoder(encoder, wanted.tile_px)
    return _combine_references(options, keys, references, record, wanted.tile_px, mpp), warnings


def _tile_names(options: GenerateOptions, single: Sequence[str]) -> list[str]:
    """The tiles that are named, each once, in order of their first mention."""
    if not options.interpolate:
        return list(dict.fromkeys(single))
    if single:
        raise UserError("--interpolate names its tiles itself; leave --at and --images out")
    return list(dict.fromkeys(name for pair in options.interpolate for name in pair))


def _combine_references(
    options: GenerateOptions,
    keys: Sequence[str],
    references: Sequence[Reference],
    record: EncoderRecord,
    tile_px: int,
    mpp: float | None,
    terms: tuple[Terms, ...] = (),
) -> ConditionList:
    """The references as they are, their mean, or points between pairs of them."""
    # `how` becomes part of the identity: other points between the tiles are other images.
    how: dict[str, object]
    if options.interpolate:
        pairs = [(keys.index(a), keys.index(b)) for a, b in options.interpolate]
        conditions = conditions_between(
            references, pairs, parse_factors(options.factors), options.kind
        )
        how = {"guidance": "interpolation", "guidance_interpolation": options.kind}
    elif options.mean:
        conditions, how = mean_of(references), {"guidance": "mean of tiles"}
    else:
        conditions, how = each_alone(references), {"guidance": "tiles"}
    name = str(how["guidance"])
    return ConditionList(
        name, conditions, references, record=record, tile_px=tile_px, mpp=mpp, how=how, terms=terms
    )
