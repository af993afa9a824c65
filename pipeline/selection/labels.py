"""Labelled tiles from a CSV: slide_id, rank, label (usable or artifact)."""

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from common.csv_rows import CsvRows, describe_columns
from common.errors import UserError
from common.files import open_text
from common.text import is_whole_number

_COLUMNS = ("slide_id", "rank", "label")
_IS_ARTIFACT = {"artifact": True, "1": True, "usable": False, "0": False}


@dataclass(frozen=True)
class Labels:
    """Labelled tiles sorted by (slide_id, rank): `is_artifact` bool [n], `ranks` int32 [n]."""

    slide_ids: npt.NDArray[np.str_]
    ranks: npt.NDArray[np.int32]
    is_artifact: npt.NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.ranks)


def read_labels(path: Path, candidates: Mapping[str, int]) -> Labels:
    """The labels of a CSV; `candidates` are the tiles of each slide that may be labelled.

    Raises `UserError` naming the line for a tile that is not there or comes twice, and for a
    label that is not one of usable, artifact, 0 and 1.
    """
    labels: dict[tuple[str, int], bool] = {}
    try:
        with open_text(path, newline="", encoding="utf-8-sig") as file:
            rows = CsvRows(path, file)
            columns = rows.columns
            if missing := [name for name in _COLUMNS if name not in columns]:
                raise UserError(
                    f"{path}: no column {', '.join(missing)}; expected {', '.join(_COLUMNS)}, "
                    f"there: {describe_columns(columns)}"
                )
            # Twice is refused even with equal labels: one of the rows was meant for another tile.
            for number, row in rows:
                tile, label = _parse_row(f"{path}, line {number}", row, candidates)
                if tile in labels:
                    raise UserError(
                        f"{path}, line {number}: tile {tile[1]} of {tile[0]} is labelled twice"
                    )
                labels[tile] = label
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} cannot be read as a CSV table: {error}") from error
    if not labels:
        raise UserError(f"{path} has no label: expected rows of {', '.join(_COLUMNS)}")
    tiles = sorted(labels)
    return Labels(
        np.array([slide_id for slide_id, _ in tiles]),
        np.array([rank for _, rank in tiles], np.int32),
        np.array([labels[tile] for tile in tiles], bool),
    )


def _parse_row(
    where: str, row: Mapping[str, str], candidates: Mapping[str, int]
) -> tuple[tuple[str, int], bool]:
    slide_id, rank, label = (row.get(name, "").strip() for name in _COLUMNS)
    if slide_id not in candidates:
        raise UserError(f"{where}: slide '{slide_id[:80]}' has no candidate tiles in this dataset")
    if not is_whole_number(rank, 10) or int(rank) >= candidates[slide_id]:
        raise UserError(
            f"{where}: no tile of rank '{rank[:40]}' on {slide_id}, which has "
            f"{candidates[slide_id]:,} (ranks from 0)"
        )
    if label.lower() not in _IS_ARTIFACT:
        raise UserError(f"{where}: label '{label[:40]}', expected usable or artifact (or 0, 1)")
    return (slide_id, int(rank)), _IS_ARTIFACT[label.lower()]
