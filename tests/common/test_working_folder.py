"""Commands run in the folder of a dataset or model of others, which may have any files in it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOORS = ("common", "pipeline", "train", "evaluate")
MODULES = ("argparse", "json", "multiprocessing", "numpy", "rich", "socket", "tempfile", "yaml")


def run_in(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`python -m ...` in a folder whose modules leave a mark, with the project installed."""
    for name in MODULES:
        (folder / f"{name}.py").write_text(f"open({str(folder / 'mark')!r}, 'w').close()\n")
    unset = {key: value for key, value in os.environ.items() if key != "PYTHONSAFEPATH"}
    return subprocess.run(
        [sys.executable, "-m", *arguments], cwd=folder, env=unset | {"PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip


@pytest.mark.parametrize("door", DOORS)
def test_no_module_of_the_working_folder_runs(door: str, tmp_path: Path) -> None:
    done = run_in(tmp_path, "common.launch" if door == "common" else door, "--help")
    assert ("N processes" in done.stderr) if door == "common" else (done.returncode == 0), done
    assert not (tmp_path / "mark").exists()


@pytest.mark.full
def test_nor_in_a_process_that_a_command_starts(tmp_path: Path) -> None:
    shutil.copy2(ROOT / "tests/data/slides/CMU-1-Small-Region.svs", tmp_path)
    done = run_in(tmp_path, "pipeline", "scan", ".", "--dataset", "d", "--workers", "2")
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "mark").exists()


_DRAW = """
from evaluate.report.plots import draw_svg
print(draw_svg(lambda axes: axes.plot([1, 2], [3, 4])).hex())
"""


@pytest.mark.full
def test_nor_do_figures_look_as_a_matplotlibrc_there_says(tmp_path: Path) -> None:
    pictures = []
    for text in ("", "text.usetex: True\nlines.linewidth: 9\nsavefig.facecolor: red\n"):
        (tmp_path / "matplotlibrc").write_text(text)
        done = subprocess.run(
            [sys.executable, "-P", "-c", _DRAW], cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        pictures.append(done.stdout)
    assert pictures[0] == pictures[1]


def test_each_door_begins_alike() -> None:
    texts = {
        (ROOT / door / "__init__.py").read_text().partition("import os\n")[2].replace(door, "")
        for door in DOORS
    }
    assert len(texts) == 1
    assert "del sys.path[0]" in texts.pop()
