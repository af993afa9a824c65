"""candidates/<slide_id>.parquet: the tile grid of a slide, in rank order."""

import pyarrow as pa
import pyarrow.parquet as pq

from common.errors import UserError
from common.files import require_regular
from pipeline.dataset.commit import FileRecord
from pipeline.dataset.layout import Dataset
from pipeline.dataset.tables.parquet_table import read_table, write_table

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


def write_candidates(dataset: Dataset, run_id: str, slide_id: str, table: pa.Table) -> FileRecord:
    """Write a slide's candidates (rank order, rank 0 first; x_level0, y_level0 in level-0 px)."""
    return write_table(dataset, run_id, dataset.candidates_file(slide_id), table)


def read_candidates(dataset: Dataset, slide_id: str) -> pa.Table:
    """A slide's candidates in rank order: positions in level-0 px, fractions from 0 to 1."""
    path = dataset.candidates_file(slide_id)
    return read_table(path, hint="run `python -m pipeline tissue` first")


def candidate_count(dataset: Dataset, slide_id: str) -> int:
    """How many candidates a slide has, from the file's footer alone."""
    path = dataset.candidates_file(slide_id)
    try:
        require_regular(path)
        return int(pq.read_metadata(path).num_rows)
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path} cannot be read ({error}): run `tissue` again") from error
