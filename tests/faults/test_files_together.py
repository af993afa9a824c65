"""Files that belong together, such as results and their tables, are replaced together."""

from collections.abc import Callable
from pathlib import Path

import pytest

from common.errors import UserError
from common.files import write_files


def test_where_one_does_not_fit_none_is_replaced(make_small_disk: Callable[[int], Path]) -> None:
    disk = make_small_disk(64)
    results, tables = disk / "results.json", disk / "tables.md"
    write_files({results: b"old", tables: b"old"})
    with pytest.raises(UserError, match=r"cannot write \S+/tables\.md: No space left"):
        write_files({results: b"new", tables: bytes(10**6)})
    assert results.read_bytes() == tables.read_bytes() == b"old"
    assert sorted(disk.iterdir()) == [results, tables]
    write_files({results: b"new", tables: b"new"})
    assert results.read_bytes() == tables.read_bytes() == b"new"
