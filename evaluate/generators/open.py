"""From the name of a kind of model to generators: loaded once, then set up for any settings."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from typing import Any

from common.errors import UserError
from evaluate.generators.cytosyn import CytoSynGenerator
from evaluate.generators.interface import MakeGenerator, ModelSource
from evaluate.generators.released import UNTESTED
from model import CytoSyn
from model.sampler_settings import SamplerSettings


@dataclass(frozen=True)
class OpenedModel:
    """A loaded model: a generator for any settings, and notices for its users."""

    make: MakeGenerator
    notices: tuple[str, ...] = ()


def settings_for(kind: str, changes: Mapping[str, Any]) -> SamplerSettings:
    """A kind's published settings with changes by field name; None changes nothing.

    Raises `UserError` for a setting that the kind's published call does not take, or one out of
    its range.

    >>> settings_for("pixcell", {"steps": 20, "solver": None}).guidance_scale
    2.0
    """
    given = {key: value for key, value in changes.items() if value is not None}
    fixed = [key for key in given if key in KINDS[kind].fixed]
    if fixed:
        raise UserError(f"generator {kind} takes no {fixed[0]}: its published call has none")
    return replace(KINDS[kind].published, **given)


def open_generator(source: ModelSource) -> OpenedModel:
    """Load a model of any kind. Raises `UserError` where it cannot be loaded."""
    if source.kind == "own":
        return OpenedModel(_open_own(source))
    if source.compiles:
        raise UserError(f"--compile is for this project's models, not for {source.kind}")
    notice = f"generator {source.kind} is {UNTESTED}"
    return OpenedModel(KINDS[source.kind].load(source), (notice,))


def _open_own(source: ModelSource) -> MakeGenerator:
    if source.model is None:
        raise UserError("which model? give --model, an exported model's folder or a hub id")
    return partial(
        CytoSynGenerator,
        CytoSyn.from_pretrained(source.model).to(source.device),
        device=source.device,
        dtype=source.dtype,
        compiles=source.compiles,
    )


def _open_released(module: str, source: ModelSource) -> MakeGenerator:
    """Import the kind's module only now: the released models need diffusers, ours do not."""
    make: MakeGenerator = import_module(f"evaluate.generators.{module}").load_model(source)
    return make


@dataclass(frozen=True)
class GeneratorKind:
    """How models of one kind are loaded and drawn with.

    `published` are the settings of the kind's publication, `fixed` the fields that its published
    call does not take.
    """

    load: Callable[[ModelSource], MakeGenerator]
    published: SamplerSettings
    fixed: tuple[str, ...] = ()


KINDS = {
    "own": GeneratorKind(_open_own, SamplerSettings()),
    "cytosyn": GeneratorKind(
        partial(_open_released, "released_cytosyn"),
        SamplerSettings(),
        fixed=("solver", "legacy_truncate"),
    ),
    "pixcell": GeneratorKind(
        partial(_open_released, "pixcell"),
        SamplerSettings("dpm", 50, 2.0, 0.0, 1.0),  # those of its use in arXiv 2603.18089
        fixed=("solver", "guidance_low", "guidance_high", "legacy_truncate"),
    ),
}
