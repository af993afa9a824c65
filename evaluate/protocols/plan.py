"""From a protocol's configuration to what must be made and measured. Pure: no files."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from evaluate.metrics.registry import METRICS
from evaluate.protocols.config import GenerationSpec, Protocol

Kind = Literal["model", "reference", "control"]
_SWEPT = ("steps", "solver", "seed")
_VAE = "vae:"


@dataclass(frozen=True)
class Images:
    """One synthetic dataset to have: a generation at one point of its grid."""

    key: str
    generation: str
    spec: GenerationSpec
    point: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Seen:
    """Tiles as an encoder sees them: a set, images or a reconstruction, a view, a tile size."""

    source: str
    view: str = ""
    px: int | None = None


@dataclass(frozen=True)
class Cell:
    """One comparison: generated against real tiles by one encoder, by some metrics.

    `control` names what a control compares; real halves have no generated side. `point` holds
    the swept values of the images.
    """

    label: str
    kind: Kind
    encoder: str
    column: str
    metrics: tuple[str, ...]
    real: Seen
    generated: Seen
    train: Seen | None = None
    control: str = ""
    point: dict[str, Any] = field(default_factory=dict)
    note: str = ""


def expand(protocol: Protocol, generation: str) -> list[Images]:
    """The datasets of a generation: one for each point of its grid of steps, solver and seed."""
    spec = protocol.generations[generation]
    swept = [key for key in _SWEPT if len(getattr(spec, key)) > 1]
    found = []
    for values in itertools.product(*(getattr(spec, key) for key in swept)):
        point = dict(zip(swept, values, strict=True))
        name = "_".join([generation, *(f"{key}-{value}" for key, value in point.items())])
        single: dict[str, Any] = {key: (value,) for key, value in point.items()}
        one = replace(spec, **single)
        found.append(Images(name, generation, one, point))
    return found


def all_images(protocol: Protocol) -> list[Images]:
    """The datasets that the rows need, in order of their first use; of models not left out."""
    used = dict.fromkeys(
        row.generated.format(column=column) for row in protocol.rows for column in protocol.columns
    )
    return [
        images
        for name in used
        if name in protocol.generations and _is_in(protocol, name)
        for images in expand(protocol, name)
    ]


def _is_in(protocol: Protocol, generation: str) -> bool:
    return protocol.generations[generation].model not in protocol.leave_out


def vae_key(model: str, set_name: str) -> str:
    """The source name of a set's reconstructions by a model's autoencoder."""
    return f"{_VAE}{model}:{set_name}"


def parse_vae(source: str) -> tuple[str, str] | None:
    """(model, set) of a source that is a reconstruction, else None."""
    if not source.startswith(_VAE):
        return None
    _, model, set_name = source.split(":", 2)
    return model, set_name


def plan_cells(protocol: Protocol) -> list[Cell]:
    """All comparisons: the rows first, then the controls of each column; encoder by encoder."""
    cells = []
    for encoder in protocol.encoders:
        for column in protocol.columns:
            cells += _rows(protocol, encoder, column) + _controls(protocol, encoder, column)
    return cells


def _rows(protocol: Protocol, encoder: str, column: str) -> list[Cell]:
    found = []
    for row in protocol.rows:
        name = row.generated.format(column=column)
        if name in protocol.generations and not _is_in(protocol, name):
            continue
        made = expand(protocol, name) if name in protocol.generations else [None]
        train = any("train" in METRICS[name].needs for name in row.metrics)
        for images in made:
            source = name if images is None else images.key
            found.append(
                Cell(
                    row.label,
                    "reference" if images is None else "model",
                    encoder,
                    column,
                    row.metrics,
                    Seen(column, row.real_view, row.real_px),
                    Seen(source, row.generated_view, row.real_px if images is None else None),
                    train=Seen(protocol.train, row.real_view, row.real_px) if train else None,
                    point={} if images is None else images.point,
                    note=row.note,
                )
            )
    return found


_CONTROLS = {
    "floor-tile": "Real against real, split by tile",
    "floor-patient": "Real against real, split by patient",
    "neighbour": "Another real tile of the same slide",
}


def _controls(protocol: Protocol, encoder: str, column: str) -> list[Cell]:
    real = Seen(column)
    found = [
        Cell(_CONTROLS[one], "control", encoder, column, (one,), real, real, control=one)
        for one in protocol.controls
        if one in _CONTROLS
    ]
    if "vae" in protocol.controls:
        metrics = ("frechet_distance", "precision_recall", "cosine_similarity")
        found += [
            Cell(
                f"Reconstructed by the VAE of {model}", "control", encoder, column, metrics, real,
                Seen(vae_key(model, column)), control="vae",
            )
            for model in reconstructing(protocol)
        ]  # fmt: skip
    return found


def reconstructing(protocol: Protocol) -> list[str]:
    """Models whose autoencoder is at hand: this project's own, that the rows use."""
    used = dict.fromkeys(images.spec.model for images in all_images(protocol))
    return [name for name in used if protocol.models[name].generator == "own"]


def needed_features(protocol: Protocol, cells: list[Cell]) -> list[tuple[Seen, str]]:
    """(tiles as seen, encoder) of all features that measuring reads, each once.

    Cosines also read the features of the tiles that guided.
    """
    found: dict[tuple[Seen, str], None] = {}
    for cell in cells:
        sides = [cell.real, cell.generated, *([cell.train] if cell.train else [])]
        guide = guiding_set(protocol, cell.generated.source)
        if guide and needs_sources(cell.metrics):
            sides.append(Seen(guide, cell.real.view, cell.real.px))
        found.update({(side, cell.encoder): None for side in sides})
    return list(found)


def needs_sources(metrics: Sequence[str]) -> bool:
    """Whether any of a cell's metrics reads the features of the tiles that guided."""
    return any("sources" in METRICS[name].needs for name in metrics if name in METRICS)


def guiding_set(protocol: Protocol, source: str) -> str:
    """The set whose tiles stand behind a source's images; "" where there is none."""
    vae = parse_vae(source)
    if vae:
        return vae[1]
    for images in all_images(protocol):
        if images.key == source:
            return images.spec.guidance
    return ""


def used_sets(protocol: Protocol) -> list[str]:
    """The sets that the protocol reads."""
    names = [*protocol.columns, *([protocol.train] if protocol.train else [])]
    names += [one.spec.guidance for one in all_images(protocol) if one.spec.guidance]
    names += [
        row.generated.format(column=column)
        for row in protocol.rows
        for column in protocol.columns
        if row.generated.format(column=column) in protocol.sets
    ]
    return list(dict.fromkeys(names))


def all_features(protocol: Protocol, cells: list[Cell]) -> list[tuple[Seen, str]]:
    """(tiles as seen, encoder) of all features that will be read."""
    found = needed_features(protocol, cells)
    if protocol.kind == "memorisation" and protocol.train:
        found += [(Seen(protocol.train), encoder) for encoder in protocol.encoders]
    return list(dict.fromkeys(found))


def sources(protocol: Protocol, cells: list[Cell]) -> list[str]:
    """The images and reconstructions that the cells need, in order."""
    made = [one.key for one in all_images(protocol)]
    seen = [cell.generated.source for cell in cells]
    return list(dict.fromkeys([*made, *(one for one in seen if parse_vae(one))]))
