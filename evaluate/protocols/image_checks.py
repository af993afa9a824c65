"""Whether images on disk are what the protocol asks for, by what they recorded."""

from common.errors import UserError
from evaluate.generate.condition_source import foreign_guidance
from evaluate.protocols.config import Deviation
from evaluate.protocols.plan import Images
from evaluate.protocols.sources import ProtocolSources, sampler_settings
from model.sampler_settings import FIELD_OF_OPTION
from pipeline.dataset import open_dataset, read_identity

_OF_A_MODEL = ("model_sha256", "compute_dtype")
_LISTS = ("solver", "steps", "seed")


def check_images(sources: ProtocolSources) -> None:
    """Refuse images in the protocol's own folders that were made otherwise than it asks.

    The folders are named by all that is configured, so that only images of older software, or
    ones that were moved, can differ. Raises `UserError` also where images under one model's name
    are of two models, or of one in two dtypes (`auto` on two machines).
    """
    for images in sources.images.values():
        if images.spec.dataset:
            continue
        for key, (configured, recorded) in find_differences(sources, images).items():
            raise UserError(
                f"{images.key}: {key} is {recorded!r} in {sources.image_folder(images.key)}, the "
                f"protocol asks for {configured!r}; set it to the former, or use another out"
            )
    # Images of one model at several points must be of the very same weights and arithmetic.
    first_of: dict[tuple[str, str], tuple[str, object]] = {}
    for images in sources.images.values():
        identity = recorded_identity(sources, images)
        for key in _OF_A_MODEL:
            value = identity.get(key)
            first = first_of.setdefault((images.spec.model, key), (images.key, value))
            if first[1] != value:
                raise UserError(
                    f"model {images.spec.model}: {key} is {first[1]!r} in {first[0]} and "
                    f"{value!r} in {images.key}; make both alike, or give them models of two names"
                )


def given_deviations(sources: ProtocolSources) -> dict[str, Deviation]:
    """The protocol's deviations with those of images that the user made (`generations.*.dataset`).

    Key to (as shipped, as recorded). Raises `UserError` where another dataset guided them than
    the protocol's, since their sources would be other tiles.
    """
    deviations = dict(sources.protocol.deviations)
    for images in sources.images.values():
        spec, where = images.spec, f"generations.{images.generation}"
        if not spec.dataset:
            continue
        if spec.guidance:
            made = open_dataset(sources.image_folder(images.key))
            foreign = foreign_guidance(made, sources.select_tiles(spec.guidance).dataset)
            if foreign:
                raise UserError(f"{where}.dataset: {foreign}")
        for key, (configured, recorded) in find_differences(sources, images).items():
            name = f"{where}.{key}"
            pair: Deviation = (configured, recorded)
            # The configuration has lists where the identity has a single value.
            if key in _LISTS:
                pair = ([configured], [recorded])
            deviations[name] = (deviations.get(name, pair)[0], pair[1])
    return {key: pair for key, pair in deviations.items() if pair[0] != pair[1]}


def random_models(sources: ProtocolSources) -> dict[str, Deviation]:
    """Models that learned from an encoder with random weights, as deviations: once they drew."""
    return {
        f"models.{images.spec.model}.encoder_weights": ("published", "random")
        for images in sources.images.values()
        if recorded_identity(sources, images).get("model_encoder_random")
    }


def recorded_identity(sources: ProtocolSources, images: Images) -> dict[str, object]:
    """The identity section of the images' dataset."""
    return dict(read_identity(open_dataset(sources.image_folder(images.key))))


def find_differences(sources: ProtocolSources, images: Images) -> dict[str, Deviation]:
    """Key of the generation to (as configured, as recorded), where the two differ."""
    spec, model = images.spec, sources.protocol.models[images.spec.model]
    settings = sampler_settings(model.generator, spec).arguments()
    whole = sources.select_tiles(spec.guidance).whole.content_hash if spec.guidance else ""
    configured = {
        "steps": ("steps", settings["steps"]),
        "seed": ("seed", spec.seed[0]),
        "variations": ("variations", 1),
        "guidance": ("guidance_selection_sha256", whole),
        "guidance_view": ("guidance_view", spec.guidance_view),
        "forced_guidance": ("forced_guidance", ""),
    }
    # CytoSyn's published call names no solver, and without guidance no scale is used.
    named = [] if model.generator == "cytosyn" else ["solver"]
    named += ["scale", "low", "high"] if spec.guidance else []
    configured |= {key: (FIELD_OF_OPTION[key], settings[FIELD_OF_OPTION[key]]) for key in named}
    if model.dtype != "auto":
        configured["dtype"] = ("compute_dtype", model.dtype)
    identity = recorded_identity(sources, images)
    return {
        key: (value, identity.get(name, ""))
        for key, (name, value) in configured.items()
        if identity.get(name, "") != value
    }
