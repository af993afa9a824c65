"""Do images that stand answer to what the protocol asks? Read from what they recorded."""

from typing import Any

from common.errors import UserError
from evaluate.generate.guidance import foreign_guidance
from evaluate.protocols.plan import Images
from evaluate.protocols.work import Workshop, sampler_settings
from pipeline.dataset import open_dataset, read_identity

_OF_A_MODEL = ("model_sha256", "compute_dtype")
_LISTS = ("solver", "steps", "seed")


def check_images(workshop: Workshop) -> None:
    """Refuse images in the protocol's own folders that were made otherwise than it asks.

    The folders are named by all that is asked, so that only images of older software, or ones
    that were moved, can differ. Raises `UserError` also where images under one model's name are
    of two models, or of one in two dtypes (`auto` on two machines).
    """
    for images in workshop.images.values():
        if images.spec.dataset:
            continue
        for key, (asked, found) in differences(workshop, images).items():
            raise UserError(
                f"{images.key}: {key} is {found!r} in {workshop.folder(images.key)}, the protocol "
                f"asks for {asked!r}; set it to the former, or use another out"
            )
    _check_models(workshop)


def given_deviations(workshop: Workshop) -> dict[str, tuple[Any, Any]]:
    """The protocol's deviations with those of images that a person made (`generations.*.dataset`).

    Key to (as shipped, as recorded). Raises `UserError` where another dataset guided them than
    the protocol's, since their sources would be other tiles.
    """
    found = dict(workshop.protocol.deviations)
    for images in workshop.images.values():
        if not images.spec.dataset:
            continue
        _check_guide(workshop, images)
        for key, (asked, made) in differences(workshop, images).items():
            name = f"generations.{images.generation}.{key}"
            pair = ([asked], [made]) if key in _LISTS else (asked, made)
            found[name] = (found.get(name, pair)[0], pair[1])
    return {key: pair for key, pair in found.items() if pair[0] != pair[1]}


def _check_guide(workshop: Workshop, images: Images) -> None:
    if images.spec.guidance:
        made = open_dataset(workshop.folder(images.key))
        foreign = foreign_guidance(made, workshop.tiles(images.spec.guidance).dataset)
        if foreign:
            raise UserError(f"generations.{images.generation}.dataset: {foreign}")


def _check_models(workshop: Workshop) -> None:
    first: dict[tuple[str, str], tuple[str, Any]] = {}
    for images in workshop.images.values():
        identity = recorded(workshop, images)
        for key in _OF_A_MODEL:
            mine = (images.key, identity.get(key))
            other = first.setdefault((images.spec.model, key), mine)
            if other[1] != mine[1]:
                raise UserError(
                    f"model {images.spec.model}: {key} is {other[1]!r} in {other[0]} and "
                    f"{mine[1]!r} in {mine[0]}; make both alike, or give them models of two names"
                )


def recorded(workshop: Workshop, images: Images) -> dict[str, Any]:
    """The identity section of the images' dataset."""
    return read_identity(open_dataset(workshop.folder(images.key)))


def differences(workshop: Workshop, images: Images) -> dict[str, tuple[Any, Any]]:
    """Key of the generation to (as asked, as recorded), where the two differ."""
    identity = recorded(workshop, images)
    asked = _asked(workshop, images)
    found = {key: identity.get(name, "") for key, (name, _) in asked.items()}
    return {key: (value, found[key]) for key, (_, value) in asked.items() if found[key] != value}


def _asked(workshop: Workshop, images: Images) -> dict[str, tuple[str, Any]]:
    """Key of the generation to (key of the identity, value that is asked for)."""
    spec, model = images.spec, workshop.protocol.models[images.spec.model]
    settings = sampler_settings(model.generator, spec)
    asked: dict[str, tuple[str, Any]] = {
        "steps": ("steps", settings.steps),
        "seed": ("seed", spec.seed[0]),
        "variations": ("variations", 1),
        "guidance": ("guidance_selection_sha256", ""),
        "guidance_view": ("guidance_view", spec.guidance_view),
        "forced_guidance": ("forced_guidance", ""),
    }
    if model.generator != "cytosyn":  # its call has a solver of its own, which is not named
        asked["solver"] = ("solver", settings.solver)
    if spec.guidance:  # without it no scale is used
        whole = workshop.tiles(spec.guidance).whole
        asked |= {
            "guidance": ("guidance_selection_sha256", whole.content_hash),
            "scale": ("guidance_scale", settings.guidance_scale),
            "low": ("guidance_low", settings.guidance_low),
            "high": ("guidance_high", settings.guidance_high),
        }
    if model.dtype != "auto":
        asked["dtype"] = ("compute_dtype", model.dtype)
    return asked
