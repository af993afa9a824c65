"""The documentation builds as a site without a warning, with API pages from the docstrings."""

import os
import re
import subprocess
import sys
from pathlib import Path

import yaml

from tests.docs.doc_commands import ROOT


def test_the_site_builds(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    api = (tmp_path / "api" / "model" / "index.html").read_text()
    assert "PatchEmbed" in api or "SiTConfig" in api
    for page in tmp_path.rglob("*.html"):
        text = page.read_text()
        assert 'src="http' not in text, f"{page.name} loads from afar"
        assert "fonts.googleapis" not in text, f"{page.name} loads from afar"


def test_the_attacks_of_the_reliability_page_are_tests() -> None:
    text = (ROOT / "docs" / "reliability.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("| ") and "tests/" in line]
    folders = ("common", "evaluate", "faults", "pipeline", "train")
    named = set()
    for folder in folders:
        listed = subprocess.run(
            [sys.executable, "tests/faults/attacks.py", folder],
            cwd=ROOT, capture_output=True, text=True, check=True,
        )  # fmt: skip
        for test in listed.stdout.split():
            file, _, function = test.partition("::")
            assert f"def {function or 'test_'}" in (ROOT / file).read_text(), test
            named |= {file, function}
    assert len(rows) > 120
    # `make test-faults` passes over no row.
    for row in rows:
        assert set(re.findall(r"`(tests/[^`]+|test_\w+)`", row)) <= named, row


def test_citation_and_containers_are_whole() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    version = citation["version"]
    assert f'version = "{version}"' in (ROOT / "pyproject.toml").read_text()
    for name in ("Dockerfile", "apptainer.def"):
        text = (ROOT / name).read_text()
        for room in ("pipeline", "model", "train", "evaluate", "constraints.txt"):
            assert room in text, f"{name} lacks {room}"
    recipe = (ROOT / "apptainer.def").read_text()
    post = recipe.partition("%post\n")[2].partition("\n%")[0].replace("{{ torch_index }}", "")
    checked = subprocess.run(["bash", "-n"], input=post, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr


def test_the_dockerfile_is_linted() -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([hadolint, str(ROOT / "Dockerfile")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
