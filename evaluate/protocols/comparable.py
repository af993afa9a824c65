"""The refusal to put two numbers in one table that do not belong together."""

from collections.abc import Iterable, Mapping

from common.errors import UserError
from pipeline.dataset.features import MADE, FeatureRecord

_ENCODER = ("weights_sha256", "dim", "resize", "mean", "std", "input_px")
"""Keys of a basis that one encoder's numbers share in every table."""

Basis = Mapping[str, object]
"""What a number rests on, by key."""


def number_basis(
    record: Mapping[str, object], generated_record: Mapping[str, object], n: Mapping[str, int]
) -> dict[str, object]:
    """What a number rests on: encoder, kernel, dtype, views, sizes and sample counts.

    `record` and `generated_record` are the two sides' encoder.json; `n` their rows.
    """
    return {
        "encoder": record["encoder"],
        **{key: record.get(key) for key in _ENCODER},
        "compute_dtype": record.get("compute_dtype"),
        "real_view": record.get("view", ""),
        "generated_view": generated_record.get("view", ""),
        "real_px": record.get("tile_px"),
        "generated_px": generated_record.get("tile_px"),
        **n,
    }


def check_sides(
    record: Mapping[str, object], generated_record: Mapping[str, object], where: str
) -> None:
    """Refuse two sides of another encoder, weights, kernel or dtype.

    Views and tile sizes may differ between the sides: the ablations are made of that, and the
    table names them. Raises `UserError` naming the first difference, with both values.
    """
    real, generated = FeatureRecord.parse(record), FeatureRecord.parse(generated_record)
    for field, first, second in real.differs_from(generated, MADE):
        raise UserError(
            f"{where}: {field} is {first!r} on the real side and {second!r} on the generated one; "
            "cache both alike"
        )


def check_table(name: str, rows: Iterable[tuple[str, Basis]], varies: Iterable[str]) -> None:
    """Refuse a table whose numbers differ in more than it is about.

    `rows` are (label, basis). What fixes an encoder must agree among its own numbers; dtype,
    views, sizes and sample counts among all of them, but for the keys that the table `varies`.
    Raises `UserError` naming both rows, the key and both values.
    """
    ignored = {"encoder", *varies}
    first_of: dict[str, tuple[str, object]] = {}
    for label, row_basis in rows:
        for key, value in row_basis.items():
            if key in ignored:
                continue
            # Encoders differ from each other by design; each must agree with itself.
            scope = f"{row_basis['encoder']}/{key}" if key in _ENCODER else key
            other, first = first_of.setdefault(scope, (label, value))
            if first != value:
                raise UserError(
                    f"table {name}: {key} is {first!r} in '{other}' and {value!r} in "
                    f"'{label}'; these numbers do not belong in one table. Make both alike, or "
                    f"declare that it is what is compared: varies=[...,{key}]"
                )
