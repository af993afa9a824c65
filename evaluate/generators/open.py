"""From the name of a kind of model to generators of it: loaded once, set up as often as asked."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from common.errors import UserError
from evaluate.generators.cytosyn import CytoSynGenerator, SamplerSettings
from evaluate.generators.interface import Generator
from evaluate.generators.released import UNTESTED
from model import CytoSyn

KINDS = ("own", "cytosyn", "pixcell")
_DEFAULTS = {
    "own": SamplerSettings(),
    "cytosyn": SamplerSettings(),
    "pixcell": SamplerSettings("dpm", 50, 2.0, 0.0, 1.0),
}
"""CytoSyn's are those of arXiv 2603.18089, PixCell's those of its use there."""
_FIXED = {
    "own": (),
    "cytosyn": ("solver",),
    "pixcell": ("solver", "guidance_low", "guidance_high"),
}
"""Settings that a kind's published call does not take."""


@dataclass(frozen=True)
class Source:
    """Which model, where it runs, and what its loading may do.

    `pipeline_code` and `vae` say where PixCell's parts are, if not where they are published.
    """

    kind: str
    model: str | None
    device: torch.device
    dtype: str = "auto"
    compiles: bool = False
    trust_remote_code: bool = False
    pipeline_code: str | None = None
    vae: str | None = None


@dataclass(frozen=True)
class Opened:
    """A loaded model: a generator for any settings, and what a person must know of it."""

    make: Callable[[SamplerSettings], Generator]
    notices: tuple[str, ...] = ()


def settings_for(kind: str, changes: dict[str, Any]) -> SamplerSettings:
    """A kind's published settings with changes; a value of None changes nothing.

    Raises `UserError` for a setting that the kind's published call does not take, or one out of
    its range.
    """
    given = {key: value for key, value in changes.items() if value is not None}
    fixed = [key for key in given if key in _FIXED[kind]]
    if fixed:
        raise UserError(f"generator {kind} takes no {fixed[0]}: its published call has none")
    published = _DEFAULTS[kind]
    return SamplerSettings(**{**vars(published), **given})


def open_generator(source: Source) -> Opened:
    """Load a model of any kind. Raises `UserError` where it cannot be had."""
    if source.kind == "own":
        return _open_own(source)
    if source.compiles:
        raise UserError(f"--compile is for this project's models, not for {source.kind}")
    # Imported where used: the released models need diffusers, ours do not.
    opened = _open_released_cytosyn(source) if source.kind == "cytosyn" else _open_pixcell(source)
    return Opened(opened, (f"generator {source.kind} is {UNTESTED}",))


def _open_own(source: Source) -> Opened:
    if source.model is None:
        raise UserError("which model? give --model, an exported model's folder or a hub id")
    model = CytoSyn.from_pretrained(source.model).to(source.device)
    make = partial(
        CytoSynGenerator,
        model,
        device=source.device,
        dtype=source.dtype,
        compiles=source.compiles,
    )
    return Opened(make)


def _open_released_cytosyn(source: Source) -> Callable[[SamplerSettings], Generator]:
    from evaluate.generators.released_cytosyn import HUB_ID, LoadedCytoSyn, ReleasedCytoSyn

    loaded = LoadedCytoSyn.open(
        source.model or HUB_ID,
        device=source.device,
        dtype=source.dtype,
        trust_remote_code=source.trust_remote_code,
    )
    return partial(ReleasedCytoSyn, loaded)


def _open_pixcell(source: Source) -> Callable[[SamplerSettings], Generator]:
    from evaluate.generators.pixcell import CODE_ID, HUB_ID, VAE_ID, LoadedPixCell, PixCell

    loaded = LoadedPixCell.open(
        source.model or HUB_ID,
        device=source.device,
        dtype=source.dtype,
        trust_remote_code=source.trust_remote_code,
        custom_pipeline=source.pipeline_code or CODE_ID,
        vae=None if source.vae == "none" else source.vae or VAE_ID,
    )
    return partial(PixCell, loaded)
