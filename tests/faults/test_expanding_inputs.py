"""Small files that become gigabytes: refused by what they become, before the memory is taken."""

import gzip
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from common.errors import UserError
from pipeline.dataset import Dataset, read_selection_rows
from pipeline.dataset.tables.candidates import read_candidates
from pipeline.dataset.tables.expansion import require_bounded
from pipeline.imports.config import Columns
from pipeline.imports.table import read_positions
from pipeline.imports.tile_folder import find_tile_folders
from pipeline.selection.cohort_table import read_cohort_csv
from pipeline.selection.labels import read_labels
from pipeline.slides.entries import find_slides

ROOT = Path(__file__).resolve().parents[2]
MOST_MB = 700
READ = """
import json, sys
from pathlib import Path
from common.errors import UserError
from pipeline.dataset import Dataset, read_selection_rows, read_slides
from pipeline.dataset.tables.candidates import read_candidates
from pipeline.imports.config import Columns
from pipeline.imports.table import read_positions
root = Path(sys.argv[1])
readers = {
    "slides": lambda: read_slides(Dataset(root)),
    "candidates": lambda: read_candidates(Dataset(root), "s"),
    "selections": lambda: read_selection_rows(Dataset(root), "s"),
    "positions": lambda: read_positions(root / sys.argv[3], Columns()),
}
try:
    readers[sys.argv[2]]()
    said = ""
except UserError as error:
    said = str(error)
status = Path("/proc/self/status").read_text()
print(json.dumps([said, int(status.partition("VmHWM:")[2].split()[0]) // 1024]))
"""


def read_apart(root: Path, kind: str, name: str, clean: dict[str, str]) -> tuple[str, int]:
    """What a process of its own says of a file, and the most memory that it had in MB."""
    done = subprocess.run(
        [sys.executable, "-c", READ, str(root), kind, name],
        env=clean | {"OMP_NUM_THREADS": "1"}, cwd=ROOT, capture_output=True, text=True,
        timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    said, megabytes = json.loads(done.stdout)
    return said, megabytes


def repeated(value: object, kind: pa.DataType, rows: int) -> pa.Array:
    """A column of one value, a few bytes in Parquet."""
    return pa.DictionaryArray.from_arrays(np.zeros(rows, np.int32), pa.array([value], kind))


def slides_of_long_texts(path: Path) -> None:
    rows = 60_000
    table = {"slide_id": repeated("x" * 60_000, pa.string(), rows), "path": ["p"] * rows}
    pq.write_table(pa.table(table), path, compression="zstd")


def slides_of_one_text(path: Path) -> None:
    table = pa.table({"slide_id": ["s"], "path": ["x" * 280_000_000]})
    pq.write_table(table, path, compression="zstd", use_dictionary=False, write_statistics=False)


def slides_by_prefix(path: Path) -> None:
    table = pa.table({"slide_id": ["x" * 1_000_000] * 300, "path": ["p"] * 300})
    encoding = {"slide_id": "DELTA_BYTE_ARRAY", "path": "PLAIN"}
    pq.write_table(table, path, compression="zstd", use_dictionary=False, column_encoding=encoding)


def slides_of_long_lists(path: Path) -> None:
    notes = pa.ListArray.from_arrays([0, 10_000_000], repeated("n", pa.string(), 10_000_000))
    table = pa.table({"slide_id": ["s"], "path": ["p"], "notes": notes})
    pq.write_table(table, path, compression="zstd")


def slides_of_lists_of_long_texts(path: Path) -> None:
    notes = pa.ListArray.from_arrays([0, 100_000], repeated("n" * 9000, pa.string(), 100_000))
    table = pa.table({"slide_id": ["s"], "path": ["p"], "notes": notes})
    pq.write_table(table, path, compression="zstd")


def many_equal_candidates(path: Path) -> None:
    zeros = np.zeros(16_000_000)
    table = pa.table({"rank": zeros.astype(np.int32), "x_level0": zeros, "y_level0": zeros})
    pq.write_table(table, path, compression="zstd", row_group_size=len(zeros))


def candidates_with_another_column(path: Path) -> None:
    ranks, zeros = np.arange(20_000, dtype=np.int32), np.zeros(20_000)
    table = pa.table({
        "rank": ranks, "x_level0": zeros, "y_level0": zeros,
        "mine": repeated("y" * 1_000_000, pa.string(), 20_000),
    })  # fmt: skip
    pq.write_table(table, path, compression="zstd")


def many_equal_rows(path: Path) -> None:
    table = pa.table({"slide_id": repeated("s", pa.string(), 1 << 20),
                      "rank": np.zeros(1 << 20, np.int32)})  # fmt: skip
    with pq.ParquetWriter(path, table.schema, compression="zstd") as writer:
        for _ in range(120):
            writer.write_table(table)


def many_equal_positions(path: Path) -> None:
    zeros = np.zeros(16_000_000)
    table = pa.table({"slide": repeated("s", pa.string(), len(zeros)), "x": zeros, "y": zeros})
    pq.write_table(table, path, compression="zstd", row_group_size=len(zeros))


def endless_gzip(path: Path) -> None:
    member = gzip.compress(b"s,1,1\n" * (1 << 20))
    path.write_bytes(gzip.compress(b"slide,x,y\n") + member * 30)


SLIDES, CANDIDATES, SELECTION = "slides.parquet", "candidates/s.parquet", "selections/s.parquet"
PAGES = r"column [\w.]+ its pages become over [\d,]+ bytes"
FILES = {
    slides_of_long_texts: ("slides", SLIDES, "texts of 3,600,000,000 bytes together"),
    slides_of_one_text: ("slides", SLIDES, PAGES),
    slides_by_prefix: ("slides", SLIDES, PAGES),
    slides_of_lists_of_long_texts: ("slides", SLIDES, PAGES),
    slides_of_long_lists: ("slides", SLIDES, "lists of 10,000,000 entries together"),
    many_equal_candidates: ("candidates", CANDIDATES, PAGES),
    candidates_with_another_column: ("candidates", CANDIDATES, "texts of 20,000,000,000 bytes"),
    many_equal_rows: ("selections", SELECTION, "rank 0 of slide s comes twice"),
    many_equal_positions: ("positions", "p.parquet", PAGES),
    endless_gzip: ("positions", "p.csv.gz", "it swells without end"),
}


@pytest.mark.parametrize("make", [
    slides_of_long_texts,
    *(pytest.param(make, marks=pytest.mark.full) for make in list(FILES)[1:]),
], ids=lambda make: make.__name__)  # fmt: skip
def test_a_small_file_takes_no_gigabytes(tmp_path, clean_environment, make) -> None:
    kind, name, words = FILES[make]
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    make(path)
    assert path.stat().st_size < 1_000_000
    said, megabytes = read_apart(tmp_path, kind, name, clean_environment)
    assert str(path) in said
    with pytest.raises(UserError, match=words):
        raise UserError(said)
    assert "\n" not in said
    assert megabytes < MOST_MB


@pytest.mark.parametrize("options", [
    {}, {"compression": "none"}, {"compression": "gzip", "data_page_version": "2.0"},
    {"use_dictionary": False, "compression": "zstd", "data_page_size": 100},
    {"use_dictionary": False, "column_encoding": {
        "rank": "DELTA_BINARY_PACKED", "x_level0": "BYTE_STREAM_SPLIT", "y_level0": "PLAIN",
        "mine": "DELTA_LENGTH_BYTE_ARRAY", "more.list.element": "PLAIN"}},
    {"dictionary_pagesize_limit": 200, "data_page_size": 100},
    {"row_group_size": 100, "write_page_index": True, "version": "1.0"},
], ids=str)  # fmt: skip
def test_true_tables_are_read_however_they_are_written(tmp_path, options) -> None:
    rows = 1000
    rng = np.random.default_rng(0)
    table = pa.table({
        "rank": np.arange(rows, dtype=np.int32), "x_level0": rng.random(rows) * 9000,
        "y_level0": rng.random(rows) * 9000, "mine": [f"text {row % 70}" for row in range(rows)],
        "more": pa.array([[f"{row}", None] * (row % 3) for row in range(rows)],
                         pa.list_(pa.string())),
    })  # fmt: skip
    path = tmp_path / "candidates" / "s.parquet"
    path.parent.mkdir()
    pq.write_table(table, path, **options)
    back = read_candidates(Dataset(tmp_path), "s")
    assert back.equals(table)
    # Numbers are counted exactly, and texts are no larger than what is counted.
    metadata, numbers = pq.read_metadata(path), ["rank", "x_level0", "y_level0"]
    require_bounded(path, metadata, table.column_names, most_bytes=30 * rows * 20)
    with pytest.raises(ValueError, match="its pages become over"):
        require_bounded(path, metadata, numbers, most_bytes=20 * rows - 1)


def test_a_table_without_rows_is_one(tmp_path) -> None:
    path = tmp_path / "selections" / "s.parquet"
    path.parent.mkdir()
    pq.write_table(
        pa.table({"slide_id": pa.array([], pa.string()), "rank": pa.array([], "i4")}), path
    )
    assert read_selection_rows(Dataset(tmp_path), "s").rows == 0


def test_a_compressed_table_of_positions_is_read(tmp_path) -> None:
    path = tmp_path / "p.csv.gz"
    lines = [f"{'ab'[row > 60_000]},{row},{2 * row}\n" for row in range(100_000)]
    path.write_bytes(gzip.compress("".join(["slide,x,y\n", *lines]).encode()))
    table = read_positions(path, Columns())
    assert (table.slides, len(table.x), table.y[-1]) == (["a", "b"], 100_000, 199_998)
    assert [table.slides[code] for code in table.codes[[0, 60_000, 60_001]]] == ["a", "a", "b"]


CSV_READERS = {
    "slides": lambda path: find_slides([str(path)]),
    "labels": lambda path: read_labels(path, {"s": 9}),
    "cohort": lambda path: read_cohort_csv(path, 9),
    "tiles": find_tile_folders,
}


@pytest.mark.parametrize("reader", CSV_READERS)
def test_rows_without_end_are_refused_where_they_begin(tmp_path, reader) -> None:
    path, read = tmp_path / "t.csv", CSV_READERS[reader]
    header = "path,slide,slide_id,rank,label,size_bytes"
    wrong = {
        f"{header}{',' * 20_000}\n" + "a.svs\n" * 1000: "header has 20,006 columns",
        header + "\n" + '"a\n",' * 400_000: "a row has more than 1,048,576 characters",
        '"a\n",' * 400_000: "a row has more than 1,048,576 characters",
        header + "\n" + "," * 3_000_000: "a row has more than 1,048,576 characters",
        f'{header}\n"{"a" * 200_000}"\n': "field larger than field limit",
    }
    for text, words in wrong.items():
        path.write_text(text)
        with pytest.raises(UserError, match=words) as caught:
            read(path)
        assert str(path) in str(caught.value)
        assert len(str(caught.value)) < 1000


def test_columns_in_great_number_cost_no_more_than_their_text(tmp_path) -> None:
    path = tmp_path / "t.csv"
    names = ",".join(f"c{number}" for number in range(9_000))
    path.write_text(f"path,{names}\n" + "".join(f"{row}.svs\n" for row in range(2_000)))
    began = time.process_time()
    assert len(find_slides([str(path)])) == 2_000
    assert time.process_time() - began < 1.5
