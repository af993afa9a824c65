"""From a protocol's configuration to what must be made and measured. Pure: no files.

A source is a name for tiles: a set of real ones, images of a generation, or the reconstructions
of a set by a model's autoencoder (`vae:MODEL:SET`).
"""

import itertools
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from common.errors import UserError
from evaluate.metrics.registry import needed_features
from evaluate.protocols.config import SWEPT_KEYS, GenerationSpec, Protocol

Kind = Literal["model", "reference", "control"]
Point = dict[str, int | str]
"""The swept values of images, by key."""


@dataclass(frozen=True)
class Images:
    """One synthetic dataset to have: a generation at one point of its grid."""

    key: str
    generation: str
    spec: GenerationSpec
    point: Point = field(default_factory=dict)


@dataclass(frozen=True)
class Seen:
    """Tiles as an encoder sees them: a source, a view, a tile size in pixels."""

    source: str
    view: str = ""
    px: int | None = None


Features = tuple[Seen, str]
"""The features of tiles as seen, by the encoder of that name."""


@dataclass(frozen=True)
class Cell:
    """One comparison: generated with real tiles by one encoder, by some metrics.

    `control` names what a control compares; real halves have no generated side. `point` has the
    swept values of the images; `published` is what the report calls the row.
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
    point: Point = field(default_factory=dict)
    note: str = ""
    published: str = ""

    @property
    def place(self) -> str:
        """What messages call it: row, encoder, column."""
        return f"{self.label}, {self.encoder}, {self.column}"

    def compared_sides(self) -> dict[str, Seen]:
        """The tiles that are compared, by side: real, generated and, where there is one, train."""
        train = {} if self.train is None else {"train": self.train}
        return {"real": self.real, "generated": self.generated} | train


def expand_generation(protocol: Protocol, generation: str) -> list[Images]:
    """The datasets of a generation: one for each point of its grid of steps, solver and seed."""
    spec = protocol.generations[generation]
    swept = [key for key in SWEPT_KEYS if len(getattr(spec, key)) > 1]
    expanded = []
    for values in itertools.product(*(getattr(spec, key) for key in swept)):
        point = dict(zip(swept, values, strict=True))
        key = "_".join([generation, *(f"{name}-{value}" for name, value in point.items())])
        single: dict[str, Any] = {name: (value,) for name, value in point.items()}
        expanded.append(Images(key, generation, replace(spec, **single), point))
    return expanded


def all_images(protocol: Protocol) -> list[Images]:
    """The datasets that the rows need, in order of their first use; of models not left out."""
    return [
        images
        for name in protocol.row_sources()
        if name in protocol.generations and not _is_left_out(protocol, name)
        for images in expand_generation(protocol, name)
    ]


def _is_left_out(protocol: Protocol, source: str) -> bool:
    spec = protocol.generations.get(source)
    return spec is not None and spec.model in protocol.leave_out


def vae_key(model: str, set_name: str) -> str:
    """The source name of a set's reconstructions by a model's autoencoder."""
    return f"vae:{model}:{set_name}"


def parse_vae(source: str) -> tuple[str, str] | None:
    """(model, set) of a source that is a reconstruction, else None.

    >>> parse_vae("vae:model:val-in")
    ('model', 'val-in')
    """
    kind, *names = source.split(":", 2)
    return (names[0], names[1]) if kind == "vae" and len(names) == 2 else None


def plan_cells(protocol: Protocol) -> list[Cell]:
    """All comparisons: the rows first, then the controls of each column; encoder by encoder."""
    return [
        cell
        for encoder in protocol.encoders
        for column in protocol.columns
        for cell in _row_cells(protocol, encoder, column)
        + _control_cells(protocol, encoder, column)
    ]


def _row_cells(protocol: Protocol, encoder: str, column: str) -> list[Cell]:
    cells: list[Cell] = []
    for row in protocol.rows:
        source = row.source_in(column)
        is_absent = column not in protocol.columns_of(row)
        is_absent |= bool(row.encoders) and encoder not in row.encoders
        if is_absent or _is_left_out(protocol, source):
            continue
        is_generated = source in protocol.generations
        # A real set in a row is compared like images, but has no generation behind it.
        reference = Images(source, "", GenerationSpec())
        train = Seen(protocol.train, row.real_view, row.real_px)
        cells += [
            Cell(
                row.label,
                "model" if is_generated else "reference",
                encoder,
                column,
                row.metrics,
                Seen(column, row.real_view, row.real_px),
                Seen(images.key, row.generated_view, None if is_generated else row.real_px),
                train=train if "train" in needed_features(row.metrics) else None,
                point=images.point,
                note=row.note,
                published=_with_steps(row.published, images.spec),
            )
            for images in (expand_generation(protocol, source) if is_generated else [reference])
        ]
    return cells


def _with_steps(published: str, spec: GenerationSpec) -> str:
    """The report's name of a row: `{steps}` in it are those of the images, swept or not."""
    return published.replace("{steps}", ",".join(map(str, spec.steps)))


_REAL_CONTROLS = {
    "floor-tile": "Real against real, split by tile",
    "floor-patient": "Real against real, split by patient",
    "neighbour": "Another real tile of the same slide",
}
_VAE_METRICS = ("frechet_distance", "precision_recall", "cosine_similarity")


def _control_cells(protocol: Protocol, encoder: str, column: str) -> list[Cell]:
    real = Seen(column)
    cells = [
        Cell(_REAL_CONTROLS[name], "control", encoder, column, (name,), real, real, control=name)
        for name in protocol.controls
        if name in _REAL_CONTROLS
    ]
    for model in reconstructing_models(protocol) if "vae" in protocol.controls else ():
        label, source = f"Reconstructed by the VAE of {model}", Seen(vae_key(model, column))
        cells.append(
            Cell(label, "control", encoder, column, _VAE_METRICS, real, source, control="vae")
        )
    return cells


def reconstructing_models(protocol: Protocol) -> list[str]:
    """Models whose autoencoder is available: this project's own, that the rows use."""
    used = dict.fromkeys(images.spec.model for images in all_images(protocol))
    return [name for name in used if protocol.models[name].generator == "own"]


def all_features(protocol: Protocol, cells: list[Cell]) -> list[Features]:
    """All features that measuring reads, each once.

    Cosines also read the features of the tiles that guided, and a search for copies those of
    the training tiles.
    """
    features: dict[Features, None] = {}
    # A dict as an ordered set: the order is that in which features are cached and read.
    for cell in cells:
        features.update(
            dict.fromkeys((seen, cell.encoder) for seen in cell.compared_sides().values())
        )
        guide = guiding_set(protocol, cell.generated.source)
        if guide and "sources" in needed_features(cell.metrics):
            features[Seen(guide, cell.real.view, cell.real.px), cell.encoder] = None
    if protocol.kind == "memorisation" and protocol.train:
        features.update(dict.fromkeys((Seen(protocol.train), e) for e in protocol.encoders))
    return list(features)


def guiding_set(protocol: Protocol, source: str) -> str:
    """The set whose tiles guided a source's images; "" where there is none."""
    vae = parse_vae(source)
    if vae:
        return vae[1]
    guides = (images.spec.guidance for images in all_images(protocol) if images.key == source)
    return next(guides, "")


def used_sets(protocol: Protocol) -> list[str]:
    """The sets that the protocol reads."""
    names = [*protocol.columns, protocol.train]
    names += [images.spec.guidance for images in all_images(protocol)]
    names += [source for source in protocol.row_sources() if source in protocol.sets]
    return list(dict.fromkeys(name for name in names if name))


def made_sources(protocol: Protocol, cells: list[Cell]) -> list[str]:
    """The images and reconstructions that the cells need, in order."""
    made = [images.key for images in all_images(protocol)]
    compared = [cell.generated.source for cell in cells]
    return list(dict.fromkeys([*made, *(source for source in compared if parse_vae(source))]))


def expand_names(protocol: Protocol, name: str) -> list[str]:
    """The sources that a name of `--generate` means: one, a whole generation, or `all`."""
    keys = [images.key for images in all_images(protocol)]
    if name == "all":
        return keys
    if name in keys or parse_vae(name):
        return [name]
    if name in protocol.generations:
        return [images.key for images in expand_generation(protocol, name)]
    raise UserError(f"--generate {name}: no such images; there are {', '.join(keys)} and all")
