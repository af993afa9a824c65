"""The examples in docstrings are true."""

import doctest
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
_FOLDERS = ("evaluate/metrics", "evaluate/compare", "evaluate/report", "pipeline/dataset/features")
MODULES = [
    path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".")
    for folder in _FOLDERS
    for path in sorted((ROOT / folder).glob("*.py"))
    if ">>>" in path.read_text()
]


@pytest.mark.parametrize("name", ["common.record", "common.text", *MODULES])
def test_examples_give_what_they_show(name: str) -> None:
    result = doctest.testmod(import_module(name))
    assert result.attempted
    assert result.failed == 0
