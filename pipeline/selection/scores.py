"""Artifact scores of a slide's cached tiles, computed and kept slide by slide."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from common.errors import UserError
from common.files import require_regular
from common.text import one_line
from pipeline.dataset import (
    Dataset,
    Entry,
    FileRecord,
    HashingFile,
    check_slide_id,
    commit_file,
    parse_shard_name,
)
from pipeline.dataset.features import MOST_FEATURE, find_outside
from pipeline.dataset.tables.expansion import require_bounded
from pipeline.dataset.tables.parquet_table import Column, check_column, read_table
from pipeline.run.tasks import collect_entries
from pipeline.selection.classifier import LinearModel
from pipeline.selection.denied import curation_dir

Ranks = npt.NDArray[np.int32]
Scores = npt.NDArray[np.float32]

SCORES_SCHEMA = pa.schema([("rank", pa.int32()), ("score", pa.float32())])
_COLUMNS = (
    Column("rank", pa.int32(), least=0), Column("score", pa.float32(), least=0, most=1),
)  # fmt: skip
_CACHE = "run `python -m pipeline verify --repair`, then `cache` again"
_HINT = "remove it and run `curate` again"
_GROUPS_AT_ONCE = 256
"""Row groups of 16 tiles read together: 13 MB of H0-mini's features."""


def scores_file(dataset: Dataset, name: str, slide_id: str) -> Path:
    """The file of a slide's scores: rank, and the probability of an artifact from 0 to 1."""
    return curation_dir(dataset, name) / "scores" / f"{check_slide_id(slide_id)}.parquet"


def score_slide(
    root: str,
    run_id: str,
    name: str,
    slide_id: str,
    shards: list[tuple[str, int, int]],
    model: LinearModel,
    fingerprint: str,
) -> list[Entry]:
    """Score the tiles of a slide's CLS files, (path, start, stop) of ranks [start, stop)."""
    dataset, scope = Dataset(Path(root)), scores_scope(name)

    def make_entry() -> Iterator[Entry]:
        ranks, scores = score_shards(dataset.root, shards, model)
        record = write_scores(dataset, run_id, name, slide_id, ranks, scores)
        counts = {"tiles": len(ranks)}
        yield Entry(slide_id, "done", fingerprint, scope=scope, files=(record,), counts=counts)

    return collect_entries(make_entry(), slide_id, fingerprint, scope)


def scores_scope(name: str) -> str:
    """The journal scope of a curation's scores."""
    return f"{name}/scores"


def score_shards(
    root: Path, shards: list[tuple[str, int, int]], model: LinearModel
) -> tuple[Ranks, Scores]:
    """Ranks (ascending) and scores of all tiles in the files; of two files the later counts.

    A few thousand tiles are in memory at a time, however large the files are.
    """
    scores = np.full(max((stop for _, _, stop in shards), default=0), np.nan, np.float32)
    for path, _, _ in shards:
        for ranks, cls in read_cls(root / path):
            scores[ranks] = model.scores(cls)
    ranks = np.flatnonzero(~np.isnan(scores)).astype(np.int32)
    return ranks, scores[ranks]


def read_cls(path: Path) -> Iterator[tuple[Ranks, npt.NDArray[np.float32]]]:
    """Ranks [n] and CLS features [n, d] of a feature file, a few thousand rows at a time."""
    try:
        require_regular(path)
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            for first in range(0, file.num_row_groups, _GROUPS_AT_ONCE):
                groups = range(first, min(first + _GROUPS_AT_ONCE, file.num_row_groups))
                require_bounded(path, file.metadata, ["rank", "cls"], groups)
                table = file.read_row_groups(groups, ["rank", "cls"], use_threads=False)
                cls = table["cls"].combine_chunks()
                size = cls.type.list_size
                ranks = check_column(path, table["rank"], _COLUMNS[0], _CACHE).to_numpy()
                features = cls.flatten().to_numpy().reshape(-1, size)
                _check_block(path, ranks, features)
                yield ranks, features
    except (OSError, KeyError, ValueError, AttributeError, pa.ArrowException) as error:
        raise UserError(f"{path} cannot be read ({one_line(error)}); {_CACHE}") from error


def _check_block(path: Path, ranks: Ranks, features: npt.NDArray[np.float32]) -> None:
    """Refuse ranks that the file's name does not state, and features that are no encoder's."""
    name = parse_shard_name(path.name)
    if len(ranks) != len(features) or ((ranks < name.start) | (ranks >= name.stop)).any():
        raise ValueError(f"it has other ranks than {name.start} to {name.stop - 1}")
    if (found := find_outside(features)) is not None:
        row, value = found
        raise UserError(
            f"{path}: the cls features of rank {ranks[row]} have the value {value:g}, expected "
            f"finite numbers of magnitude up to {MOST_FEATURE:,.0f}; {_CACHE}"
        )


def write_scores(
    dataset: Dataset, run_id: str, name: str, slide_id: str, ranks: Ranks, scores: Scores
) -> FileRecord:
    """Commit a slide's scores: ranks int32 [n], scores float32 [n]."""
    table = pa.table([pa.array(ranks), pa.array(scores)], schema=SCORES_SCHEMA)

    def write(file: HashingFile) -> None:
        pq.write_table(
            table, file, use_dictionary=False, column_encoding={"rank": "DELTA_BINARY_PACKED"},
            compression="zstd", write_page_checksum=True,
        )  # fmt: skip

    return commit_file(dataset, run_id, scores_file(dataset, name, slide_id), write)


def read_scores(dataset: Dataset, name: str, slide_id: str) -> tuple[Ranks, Scores]:
    """A slide's ranks int32 [n] and scores float32 [n]."""
    path = scores_file(dataset, name, slide_id)
    table = read_table(path, _COLUMNS, _HINT)
    ranks = table["rank"].to_numpy()
    if (ranks[1:] <= ranks[:-1]).any():
        raise UserError(f"{path}: column 'rank' is not ascending, or has a rank twice; {_HINT}")
    return ranks, table["score"].to_numpy()
