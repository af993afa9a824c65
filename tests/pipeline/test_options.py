"""The commands' options: refused values, defaults, help texts.

Values without a meaning are refused before they become a dataset's identity.
"""

import argparse
import re
import subprocess
import sys
from pathlib import Path

import pytest

from common.errors import UserError
from common.options import config_from_options
from pipeline.__main__ import main, make_parser
from pipeline.features.config import CacheConfig
from pipeline.imports.config import (
    CoordinatesConfig,
    CoordinatesExport,
    H5Config,
    MasksConfig,
    TilesConfig,
)
from pipeline.selection.config import CurateConfig, PlanConfig, SelectConfig
from pipeline.slides.config import ScanConfig
from pipeline.tiles.config import TileConfig
from pipeline.tissue.config import TissueConfig
from pipeline.upkeep.doctor.config import DoctorConfig


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["scan", "x", "--mpp", "0"], "from 0.01 to 100, got '0'"),
        (["scan", "x", "--mpp", "nan"], "from 0.01 to 100, got 'nan'"),
        (["scan", "x", "--mpp", "-0.5"], "from 0.01 to 100, got '-0.5'"),
        (["scan", "x", "--assume-mpp", "half"], "--assume-mpp: expected micrometres per pixel"),
        (["scan", "x", "--mpp-tolerance", "3"], "from 0 to 0.3, got '3'"),
        (["scan", "x", "--tile-px", "0"], "--tile-px: expected a positive whole number"),
        (["scan", "x", "--workers", "0"], "--workers: expected a positive whole number"),
        (["tissue", "--min-tissue", "2"], "--min-tissue: expected a fraction from 0 to 1"),
        (["tissue", "--max-artifact", "-1"], "--max-artifact: expected a fraction"),
        (["tile", "--tile-px", "224.5"], "--tile-px: expected a positive whole number"),
        (["tile", "--stage-in-retries", "-2"], "--stage-in-retries: expected"),
        (["tile", "--stage-in-timeout", "0"], "a number of seconds above 0"),
    ],
)
def test_a_value_without_a_meaning_is_one_line(
    arguments: list[str], words: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as error:
        main([*arguments, "--dataset", str(tmp_path / "d")])
    assert words in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "d").exists()


def test_zero_retries_and_zero_tolerance_have_one(tmp_path: Path) -> None:
    for more in (["--stage-in-retries", "0"], ["--mpp-tolerance", "0"]):
        with pytest.raises(UserError, match="no such file, folder or match"):
            main(["scan", str(tmp_path / "none"), "--dataset", str(tmp_path / "d"), *more])


def command_parsers() -> dict[str, argparse.ArgumentParser]:
    """Each command's parser by its words."""

    def below(words: str, parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
        groups = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
        if not groups:
            return {words: parser}
        return {
            name: leaf
            for word, child in groups[0].choices.items()
            for name, leaf in below(f"{words} {word}".strip(), child).items()
        }

    return below("", make_parser())


@pytest.mark.parametrize("command", command_parsers())
def test_every_help_text_says_something(command: str) -> None:
    for action in command_parsers()[command]._actions:
        text = (action.help or "").split("(default:")[0]
        assert re.search(r"[A-Za-z]{3}", text), f"{command} {action.option_strings}: {text!r}"


@pytest.mark.parametrize(
    ("command", "config"),
    [
        ("scan", ScanConfig(("x",))),
        ("tissue", TissueConfig()),
        ("tile", TileConfig()),
        ("cache", CacheConfig()),
        ("select", SelectConfig("x")),
        ("plan-cohort", PlanConfig()),
        ("curate", CurateConfig(Path("x"), "x")),
        ("geojson", CoordinatesExport()),
        ("doctor", DoctorConfig()),
        ("import coordinates", CoordinatesConfig((("x", Path("x")),))),
        ("import h5", H5Config(Path("x"), "x")),
        ("import tiles", TilesConfig(Path("x"), 0.5)),
        ("import masks", MasksConfig(Path("x"))),
    ],
)
def test_defaults_are_the_configuration_own(command: str, config: object) -> None:
    arguments: list[str] = []
    for action in command_parsers()[command]._actions:
        if action.required and not action.option_strings:
            arguments = ["x=x" if action.metavar == "NAME=FILE" else "x", *arguments]
        elif action.required or (action.dest == "name" and command == "select"):
            value = "0.5" if action.dest == "mpp" else "x"
            arguments += [action.option_strings[0], value]
    options = make_parser().parse_args([*command.split(), *arguments])
    assert config_from_options(type(config), options) == config


def test_help_imports_nothing_heavy() -> None:
    code = "import sys, pipeline.__main__ as m; m.make_parser(); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy = {"dask", "torch", "numpy", "pyarrow", "cv2", "tifffile", "PIL"}
    assert not heavy & set(done.stdout.split())
