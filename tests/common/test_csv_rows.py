"""A row of a table that people wrote is what its header says, or is refused by its line."""

import ast
import csv
from pathlib import Path

import pytest

from common.csv_rows import CsvRows
from common.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
OWN_TABLES = {"common/csv_rows.py", "pipeline/slides/barcode.py", "pipeline/imports/table.py"}

WRONG = {
    "two columns of one name": "{a},{b},{a}\n1,2,3\n",
    "line 3: 3 values, expected 2": "{a},{b}\n1,2\n1,2,3\n",
    "line 4: 1 values, expected 2": "{a},{b}\n1,2\n\n1\n",
    "line 2: 3 values, expected 2": "{a},{b}\n1,2,\n",
    "line 3: a byte order mark": "\ufeff{a},{b}\n1,2\n\ufeff{a},{b}\n",
    "line 1: a byte order mark": "\ufeff\ufeff{a},{b}\n1,2\n",
}


def read(path: Path) -> list[tuple[int, dict[str, str]]]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        return list(CsvRows(path, file))


@pytest.mark.parametrize("message", WRONG)
def test_a_row_that_does_not_fit_its_header_is_refused(tmp_path: Path, message: str) -> None:
    path = tmp_path / "table.csv"
    path.write_text(WRONG[message].format(a="slide", b="site"))
    with pytest.raises(UserError, match=f"table.csv, line .*{message.partition(': ')[2]}") as error:
        read(path)
    assert message in str(error.value)


def test_what_fits_is_read(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_text('\ufeffslide,site,,\r\na,"b, c",,\r\n\r\n"d\r\ne",,,\r\n')
    rows = read(path)
    assert [(line, row["slide"], row["site"]) for line, row in rows] == [
        (2, "a", "b, c"),
        (4, "d\r\ne", ""),
    ]


def test_a_quote_that_is_not_closed_does_not_swallow_the_rest(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_text('slide,site\na,"b\nc,d\n')
    with pytest.raises(csv.Error):
        read(path)


def test_tables_that_people_write_are_read_by_nothing_else() -> None:
    others = set()
    for room in ("common", "pipeline", "train", "evaluate"):
        for path in (ROOT / room).rglob("*.py"):
            calls = [node for node in ast.walk(ast.parse(path.read_text()))
                     if isinstance(node, ast.Call)]  # fmt: skip
            if any(ast.unparse(c.func) in ("csv.reader", "csv.DictReader") for c in calls):
                others.add(path.relative_to(ROOT).as_posix())
    assert others == OWN_TABLES
