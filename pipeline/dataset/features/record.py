"""What a feature set was made with, and whether two sets may be compared."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import NamedTuple, Self

NETWORK = ("encoder", "weights_sha256")
"""What decides which network made the features."""
SEEN = ("view", "tile_px")
"""What decides how the network saw a tile: its view, and the tile's side in pixels."""
MADE = (*NETWORK, "dim", "tokens_shape", "input_px", "resize", "mean", "std", "compute_dtype")
"""What decides a tile's feature vector, however the tile was seen."""
DECIDING = (*MADE, *SEEN)
"""All that two sets must share before a distance between them means anything."""


class Difference(NamedTuple):
    """A field that two feature sets do not share."""

    field: str
    first: object
    second: object


@dataclass(frozen=True)
class FeatureRecord:
    """The fields of encoder.json that say what features were made with; None where unknown.

    Hub ids and software versions are left out: they may differ between sets that are alike.

    Attributes:
        dim: values per tile of the CLS feature.
        tokens_shape: patch tokens per tile and values of each.
        input_px: side of the encoder's input in pixels.
        mean: of each colour channel, in [0, 1], which the encoder subtracts.
        std: of each channel, by which it divides.
        view: how tiles were changed before they were encoded, "" for not at all.
        tile_px: side of the tiles in pixels.
    """

    encoder: str | None = None
    weights_sha256: str | None = None
    random_weights: bool | None = None
    dim: int | None = None
    tokens_shape: list[int] | None = None
    input_px: int | None = None
    resize: str | None = None
    mean: list[float] | None = None
    std: list[float] | None = None
    view: str | None = None
    tile_px: int | None = None
    compute_dtype: str | None = None

    @classmethod
    def parse(cls, values: Mapping[str, object]) -> Self:
        """The record of a parsed encoder.json; other keys are passed over.

        A network without a name or a sum (models of other software) is an unknown one.
        """
        known = {field.name: values.get(field.name) for field in fields(cls)}
        known |= {name: known[name] or None for name in NETWORK}
        return cls(**known)  # type: ignore[arg-type]

    def differs_from(self, other: Self, deciding: Iterable[str] = DECIDING) -> list[Difference]:
        """The deciding fields that both records know and do not share, in their order.

        >>> jpeg = FeatureRecord(encoder="h0-mini", view="jpeg70")
        >>> jpeg.differs_from(FeatureRecord(encoder="h0-mini", view="", dim=768))
        [Difference(field='view', first='jpeg70', second='')]
        >>> jpeg.differs_from(FeatureRecord(encoder="h0-mini", view=""), MADE)
        []
        """
        pairs = ((name, getattr(self, name), getattr(other, name)) for name in deciding)
        return [
            Difference(name, first, second)
            for name, first, second in pairs
            if first is not None and second is not None and first != second
        ]
