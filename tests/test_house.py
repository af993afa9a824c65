"""The rules of the house: imports run one way, and light rooms import without heavy libraries."""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from bench.house import survey_tree

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("common", "pipeline", "model", "train", "evaluate")
ALLOWED = {
    "common": (),
    "model": ("common",),
    "pipeline": ("common", "model"),
    "train": ("common", "model", "pipeline.dataset"),
    "evaluate": ("common", "model", "pipeline.dataset"),
}
SLIDE_READING_FILE = "evaluate/generate/slide_tiles.py"
"""The one exception: `generate --slide` cuts tiles from a slide, within one function."""
HEAVY = ("dask", "distributed", "openslide", "tiffslide", "zarr", "tifffile", "imagecodecs")


def _imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports name their room, not '.'"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _is_within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


@pytest.mark.parametrize("room", ROOMS)
def test_imports_run_one_way(room: str) -> None:
    wrong = []
    for path in sorted((ROOT / room).rglob("*.py")):
        for name in _imports(path):
            others = [other for other in ROOMS if other != room and _is_within(name, other)]
            fits = any(_is_within(name, allowed) for allowed in ALLOWED[room])
            if path.relative_to(ROOT).as_posix() == SLIDE_READING_FILE:
                fits = fits or _is_within(name, "pipeline.slides")
            # `from pipeline import dataset` names the allowed module in its second part.
            if others and not fits and name not in ROOMS:
                wrong.append(f"{path.relative_to(ROOT)}: {name}")
    assert not wrong


def test_the_rule_itself_sees_a_wrong_import(tmp_path: Path) -> None:
    source = tmp_path / "stray.py"
    source.write_text("from train.loop import run\nimport pipeline.run.engine\n")
    assert set(_imports(source)) == {"train.loop", "train.loop.run", "pipeline.run.engine"}


LIGHT_IMPORTS = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {heavy!r}:
            raise ModuleNotFoundError(f"{{name}} is blocked by the test")
sys.meta_path.insert(0, Block())
import importlib, pkgutil
for room in ("common", "train", "evaluate", "model", "pipeline.dataset"):
    package = importlib.import_module(room)
    for module in pkgutil.walk_packages(getattr(package, "__path__", []), room + "."):
        importlib.import_module(module.name)
print("ok")
"""


def test_training_and_generation_import_without_the_slide_libraries() -> None:
    code = LIGHT_IMPORTS.format(heavy=HEAVY)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=900
    )
    assert done.stdout.strip().endswith("ok"), done.stderr[-2000:]


@pytest.mark.parametrize("room", ["pipeline", "train", "evaluate"])
def test_every_door_explains_itself(room: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", room, "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    assert f"python -m {room}" in done.stdout


def test_no_function_unpickles() -> None:
    """Weights and checkpoints never run code from data."""
    wrong = []
    for room in ROOMS:
        for path in (ROOT / room).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                    only = [k for k in node.keywords if k.arg == "weights_only"]
                    if not only or ast.unparse(only[0].value) != "True":
                        wrong.append(f"{path.name}:{node.lineno}")
                if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("pickle.load"):
                    wrong.append(f"{path.name}:{node.lineno}")
    assert not wrong


NOT_FROM_AN_INDEX = {"conch"}
"""Imported where it is installed; docs/encoders.md names the repository it comes from."""


def _project() -> dict[str, list[str]]:
    """Declared requirements by extra; those of everybody under ''."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return {"": project["dependencies"], **project["optional-dependencies"]}


def _distribution(requirement: str) -> str:
    return re.split(r"[\[<>=~! ]", requirement)[0].lower().replace("_", "-")


def _imported_distributions() -> dict[str, str]:
    """Distributions that product code imports from, and a file that does."""
    own = {*ROOMS, *sys.stdlib_module_names}
    providers = packages_distributions()
    importers = {}
    for room in ROOMS:
        for path in sorted((ROOT / room).rglob("*.py")):
            for name in {module.partition(".")[0] for module in _imports(path)} - own:
                distribution = _distribution(providers.get(name, [name])[0])
                importers[distribution] = str(path.relative_to(ROOT))
    return importers


def test_what_is_imported_is_declared() -> None:
    offered = {extra: texts for extra, texts in _project().items() if extra not in ("dev", "test")}
    declared = {_distribution(text) for texts in offered.values() for text in texts}
    # `dask[distributed]` declares the scheduler with it.
    declared |= {"distributed", *NOT_FROM_AN_INDEX}
    undeclared = {
        name: path for name, path in _imported_distributions().items() if name not in declared
    }
    assert not undeclared


def test_a_dependency_that_is_not_imported_says_what_it_is_for() -> None:
    imported = _imported_distributions()
    needed = {
        extra: texts for extra, texts in _project().items() if extra not in ("dev", "test", "docs")
    }
    lines = (ROOT / "pyproject.toml").read_text().splitlines()
    for requirement in (text for texts in needed.values() for text in texts):
        if _distribution(requirement) not in imported:
            (line,) = [line for line in lines if f'"{requirement}"' in line]
            assert "# not imported: " in line, requirement


def test_constraints_pin_what_is_declared() -> None:
    pins = dict(
        line.lower().replace("_", "-").split("==")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if line and not line.startswith("#")
    )
    # What `make setup` does not install is not pinned.
    tested = {
        extra: texts for extra, texts in _project().items() if extra not in ("wandb", "diffusers")
    }
    declared = {_distribution(text) for texts in tested.values() for text in texts}
    assert declared - {"histogen"} <= set(pins)


def test_a_class_name_means_one_thing() -> None:
    """Names without their leading underscores; `make house ARGS='--list duplicates'` lists them."""
    repeated = survey_tree(ROOT).repeated_classes()
    assert {name: [str(place) for place in places] for name, places in repeated.items()} == {}
