"""`make setup` upgrades an environment in place and never clears one, nor what a link leads to."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder with the Makefile and the files that `setup` depends on."""
    folder = tmp_path / "project"
    folder.mkdir()
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, folder)
    return folder


def make_environment(folder: Path) -> Path:
    """A real environment whose pip only notes its arguments, with a file of the user's."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    site = next((folder / "lib").glob("python*/site-packages"))
    (site / "pip.py").write_text(
        "import sys, pathlib\n"
        "pathlib.Path(sys.prefix, 'pip.log').open('a').write(' '.join(sys.argv[1:]) + '\\n')\n"
    )
    (folder / "mine.txt").write_text("the user's")
    return folder


def run_setup(project: Path) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MAKE")}
    return subprocess.run(
        ["make", "setup", f"PYTHON={sys.executable}"],
        cwd=project, env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip


def test_an_environment_is_upgraded_in_place(project: Path) -> None:
    environment = make_environment(project / ".venv")
    assert run_setup(project).returncode == 0
    assert "--constraint constraints.txt --editable .[dev]" in (environment / "pip.log").read_text()
    os.utime(project / "pyproject.toml")  # newer than what is installed
    lines = (environment / "pip.log").read_text().count("install")
    os.utime(environment / ".installed", (0, 0))
    assert run_setup(project).returncode == 0
    assert (environment / "pip.log").read_text().count("install") == lines + 1
    assert (environment / "mine.txt").read_text() == "the user's"
    # Up to date: nothing is done.
    assert run_setup(project).returncode == 0
    assert (environment / "pip.log").read_text().count("install") == lines + 1


def test_nothing_is_installed_through_a_link(project: Path) -> None:
    environment = make_environment(project.parent / "shared environment")
    (project / ".venv").symlink_to(environment)
    done = run_setup(project)
    assert done.returncode == 2
    assert f".venv is a link to {environment}" in done.stderr
    assert (environment / "mine.txt").exists()
    assert not (environment / "pip.log").exists()


def test_a_folder_that_is_no_environment_is_left_alone(project: Path) -> None:
    (project / ".venv").mkdir()
    (project / ".venv" / "mine.txt").write_text("the user's")
    done = run_setup(project)
    assert done.returncode == 2
    assert "is no virtual environment" in done.stderr
    assert [path.name for path in (project / ".venv").iterdir()] == ["mine.txt"]


def test_an_environment_whose_python_is_gone_is_named(project: Path) -> None:
    environment = make_environment(project / ".venv")
    for name in ("python", "python3"):
        (environment / "bin" / name).unlink()
        (environment / "bin" / name).symlink_to("/nonexistent/python3")
    done = run_setup(project)
    assert done.returncode == 2
    assert "does not run" in done.stderr
    assert (environment / "mine.txt").exists()
