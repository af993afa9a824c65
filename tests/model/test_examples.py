"""The examples in the docstrings of `model` and `train` give what they show."""

import doctest
import importlib
from pathlib import Path

import pytest

HOME = Path(__file__).parents[2]
MODULES = [
    ".".join(path.relative_to(HOME).with_suffix("").parts)
    for room in ("model", "train")
    for path in sorted((HOME / room).rglob("*.py"))
    if ">>> " in path.read_text()
]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name: str) -> None:
    outcome = doctest.testmod(importlib.import_module(name))
    assert outcome.attempted > 0
    assert outcome.failed == 0
