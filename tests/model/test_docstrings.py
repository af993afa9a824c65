"""Every public function of the model says what it takes: shapes where there are tensors, sources.

That there is a docstring at all is ruff's to check (D1).
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

MODEL = Path(__file__).parents[2] / "model"
FILES = sorted(p for p in MODEL.glob("*.py") if p.name not in ("__init__.py", "errors.py"))
NOTHING = ast.Constant(None)
# Weights are tensors of any shape, found by name.
ANY_SHAPE = {"weights.py", "vae_keys.py", "repa_e.py"}


def public_functions(
    body: list[ast.stmt], within: str = ""
) -> Iterator[tuple[ast.FunctionDef, str]]:
    """Functions and methods without a leading underscore, with their class's docstring."""
    for node in body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield from public_functions(node.body, ast.get_docstring(node) or "")
        elif isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            yield node, within


def takes_tensors(function: ast.FunctionDef) -> bool:
    signature = f"{ast.unparse(function.args)} -> {ast.unparse(function.returns or NOTHING)}"
    return re.search(r"\b(Tensor|ndarray)\b", signature) is not None


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_shapes_stand_in_the_docstrings(path: Path) -> None:
    functions = list(public_functions(ast.parse(path.read_text()).body))
    without = [
        function.name
        for function, within in functions
        if path.name not in ANY_SHAPE
        and takes_tensors(function)
        and "[" not in f"{ast.get_docstring(function)}{within}"
    ]
    assert not without


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_a_module_of_mathematics_names_its_source(path: Path) -> None:
    text = ast.get_docstring(ast.parse(path.read_text())) or ""
    if path.name != "weights.py":  # files and sums, no published method
        assert re.search(r"arXiv|SC 2011|AutoencoderKL", text)


def test_the_check_itself_sees_a_function_without_shapes() -> None:
    (function, within), *rest = public_functions(ast.parse("def f(x: Tensor): 'Bare.'").body)
    assert not rest
    assert takes_tensors(function)
    assert "[" not in f"{ast.get_docstring(function)}{within}"
