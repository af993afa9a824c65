"""candidates/<slide_id>.parquet: the tile grid of a slide, in rank order."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from common.errors import UserError
from common.files import open_regular
from common.text import one_line
from pipeline.dataset.commit import FileRecord
from pipeline.dataset.layout import Dataset
from pipeline.dataset.tables.parquet_table import Column, read_table, write_table

Positions = npt.NDArray[np.float64]

CANDIDATES_SCHEMA = pa.schema(
    [
        ("rank", pa.int32()),
        ("x_level0", pa.float64()),
        ("y_level0", pa.float64()),
        ("tissue_fraction", pa.float32()),
        ("artifact_fraction", pa.float32()),
    ]
)

GENERATED_SCHEMA = (
    CANDIDATES_SCHEMA.append(pa.field("source_slide_id", pa.string()))
    .append(pa.field("source_rank", pa.int32()))
    .with_metadata(None)
)

_FARTHEST_PX = 1e9
_HINT = "run `python -m pipeline tissue` first"
_COLUMNS = (
    Column("rank", pa.int32(), least=0),
    # Imported pictures without a known place have none.
    Column("x_level0", pa.float64(), nullable=True, least=-_FARTHEST_PX, most=_FARTHEST_PX),
    Column("y_level0", pa.float64(), nullable=True, least=-_FARTHEST_PX, most=_FARTHEST_PX),
    Column("tissue_fraction", pa.float32(), required=False, nullable=True, least=0, most=1),
    Column("artifact_fraction", pa.float32(), required=False, nullable=True, least=0, most=1),
    Column("source_slide_id", pa.string(), required=False, nullable=True),
    Column("source_rank", pa.int32(), required=False, nullable=True, least=-1),
)


def write_candidates(dataset: Dataset, run_id: str, slide_id: str, table: pa.Table) -> FileRecord:
    """Write a slide's candidates (rank order, rank 0 first; x_level0, y_level0 in level-0 px)."""
    return write_table(dataset, run_id, dataset.candidates_file(slide_id), table)


def read_candidates(
    dataset: Dataset, slide_id: str, columns: Sequence[str] | None = None
) -> pa.Table:
    """A slide's candidates in rank order: positions in level-0 px, fractions from 0 to 1.

    `columns` are those wanted besides `rank`, by default all. Raises `UserError` naming file,
    column and row where the table is not one of candidates: row i must be rank i.
    """
    path = dataset.candidates_file(slide_id)
    wanted = [one for one in _COLUMNS if columns is None or one.name in ("rank", *columns)]
    table = read_table(path, wanted, _HINT, others=columns is None)
    ranks = table["rank"].to_numpy()
    if len(misplaced := np.flatnonzero(ranks != np.arange(len(ranks)))):
        row = int(misplaced[0])
        raise UserError(
            f"{path}: column 'rank', row {row:,}: {ranks[row]}, expected {row}: the rows are not "
            f"the ranks 0, 1, 2, ... in their order; {_HINT}"
        )
    return table


def read_positions(dataset: Dataset, slide_id: str) -> tuple[Positions, Positions]:
    """x and y of a slide's candidates, float64 [n] each, in level-0 px, by rank.

    Raises `UserError` also where a candidate has no place.
    """
    table = read_candidates(dataset, slide_id, ("x_level0", "y_level0"))
    for name in ("x_level0", "y_level0"):
        if table[name].null_count:
            row = int(np.argmax(table[name].is_null().to_numpy()))
            raise UserError(
                f"{dataset.candidates_file(slide_id)}: column '{name}', row {row:,}: no value, "
                f"expected a place in the slide; {_HINT}"
            )
    return table["x_level0"].to_numpy(), table["y_level0"].to_numpy()


def candidate_count(dataset: Dataset, slide_id: str) -> int:
    """How many candidates a slide has, from the file's footer alone."""
    path = dataset.candidates_file(slide_id)
    try:
        with open_regular(path) as file:
            return int(pq.read_metadata(file).num_rows)
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path} cannot be read ({one_line(error)}): run `tissue` again") from error
