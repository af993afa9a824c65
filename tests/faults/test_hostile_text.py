"""Attack: records, labels and results of others, written to be read by another language."""

import csv
import json
import os
import pty
import re
import subprocess
import sys
from contextlib import suppress
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from markdown_it import MarkdownIt

from common.console import run_door
from common.errors import UserError
from evaluate.__main__ import main as evaluate
from pipeline.__main__ import main as pipeline
from pipeline.dataset import (
    Dataset,
    Entry,
    FileRecord,
    Run,
    Slide,
    claim_identity,
    write_slides,
)

ROOT = Path(__file__).resolve().parents[2]
HOSTILE = (
    "\x1b]0;owned\x07\x1b[2J\x9b31m\u202e\u2028\ud83d\r\nforged: line [bold red]b[/] :smile: "
    "[link=file:///etc/passwd]x[/link] <script>alert(1)</script> <img src=x onerror=alert(1)> "
    "</script><svg onload=alert(1)> | *a* [b](javascript:c) `d` \\input{/etc/passwd} \\write18{id} "
    "%\n\\end{tabular} ^^5cinput $x^2$\\frac &amp; {{ 7*7 }} ::: os"
)
DRAWN = "_$x^2$\\frac\n\x1b<b>"
LABEL = HOSTILE.replace("\ud83d", "")
STEERS = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u202e\ud800-\udfff]")
COLOUR = re.compile("\x1b\\[[0-9;]*m")


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    """A dataset as one received it: every text of its tables and journals is hostile."""
    dataset = Dataset(tmp_path / "data set")
    claim_identity(
        dataset, {"mpp": 0.5, "mpp_tolerance": 0.05, "tile_px": 224, "grid": LABEL,
                  "codec": LABEL, "detector_parameters": {"name": LABEL}, "detector": LABEL},
        stage="scan", versions={},
    )  # fmt: skip
    slides = [
        Slide("a", "/slides/a.svs", reader=LABEL, mpp=0.5, mpp_source=LABEL, width=9, height=9,
              vendor=LABEL, codec=LABEL, patient=LABEL, site=LABEL, project=LABEL),
        Slide("b", LABEL, status="failed", reason=LABEL, site=LABEL, project="=1+1"),
    ]  # fmt: skip
    gone = FileRecord("tissue/gone [/] \x1b[31m.png", 3, "0" * 64)
    with Run(dataset, "scan", {}) as run:
        write_slides(dataset, run.run_id, slides)
        run.append([Entry("b", "failed", "f", reason=HOSTILE), Entry("a", "done", "f")])
    with Run(dataset, "tissue", {}) as run:
        run.append([Entry("a", "done", "f", files=(gone,), values={"notes": [HOSTILE]})])
    with Run(dataset, "tile", {}) as run:
        run.append([Entry("a", "failed", "f", reason=HOSTILE, scope=LABEL),
                    Entry(LABEL, "failed", "f", reason=HOSTILE, scope="224")])  # fmt: skip
    return dataset


def _assert_plain(text: str, most_lines: int = 200) -> None:
    assert not STEERS.search(text)
    assert not re.search("^forged", text, re.MULTILINE)
    assert len(text.splitlines()) < most_lines


@pytest.mark.parametrize(
    "command", ["status", "verify", "prune", "report", "verify --repair"], ids=str
)
def test_what_commands_print_steers_nothing(
    dataset: Dataset, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with suppress(UserError):  # `prune` wants a selection
        pipeline([*command.split(), "--dataset", str(dataset.root)])
    said = capsys.readouterr()
    _assert_plain(said.out + said.err)
    if command in ("status", "verify"):
        # Shown as it is, brackets and all: no markup was read.
        assert "[bold red]b[/] :smile:" in said.out or "gone [/]" in said.out


def test_status_as_json_is_plain_ascii(
    dataset: Dataset, capsys: pytest.CaptureFixture[str]
) -> None:
    pipeline(["status", "--json", "--dataset", str(dataset.root)])
    said = capsys.readouterr().out
    assert said.isascii()
    assert HOSTILE in [one["reason"] for one in json.loads(said)["failures"]]


def test_a_terminal_gets_no_sequence_but_our_colours(dataset: Dataset) -> None:
    leader, follower = pty.openpty()
    command = [sys.executable, "-m", "pipeline", "status", "--dataset", str(dataset.root)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TERM": "xterm-256color"}
    with subprocess.Popen(command, stdout=follower, stderr=follower, env=environment, cwd=ROOT):
        os.close(follower)
        written = b""
        while True:
            try:
                part = os.read(leader, 65536)
            except OSError:  # the command has ended
                break
            written += part
    os.close(leader)
    text = COLOUR.sub("", written.decode().replace("\r\n", "\n"))
    assert "failed in scan" in text
    _assert_plain(text)


def test_errors_and_tracebacks_of_a_door_are_plain(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    with pytest.raises(SystemExit):
        run_door(lambda: pipeline(["status", f"--{HOSTILE}"]), ("common",))
    with pytest.raises(RuntimeError) as caught:
        run_door(_fail, ("common",))
    sys.excepthook(RuntimeError, caught.value, caught.tb)
    said = capsys.readouterr()
    assert not STEERS.search(said.out + said.err)
    assert "RuntimeError" in said.err


def _fail() -> int:
    raise RuntimeError(HOSTILE)


class _Page(HTMLParser):
    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(tag)
        self.attributes += attrs


def _assert_inert(html: str, scripts: int) -> None:
    page = _Page(html)
    assert page.elements.count("script") == scripts
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    for name, value in page.attributes:
        if name in ("href", "src"):
            assert str(value).startswith(("#", "data:")), value


def test_the_page_of_a_dataset_has_no_element_of_its_records(dataset: Dataset) -> None:
    pipeline(["report", "--dataset", str(dataset.root)])
    html = (dataset.root / "report" / "index.html").read_text("utf-8")
    _assert_inert(html, scripts=2)
    assert "<img" not in html


@pytest.fixture
def results() -> dict[str, Any]:
    """results.json of a protocol, in which every text is hostile."""
    column = {"encoder": HOSTILE, "set": HOSTILE}
    number = {"value": 1.5, "spread": None, "n": {HOSTILE: 3}}
    cells = [
        {"label": DRAWN + label, "kind": "model", "control": "", "encoder": encoder,
         "column": DRAWN, "point": {"steps": steps, "solver": DRAWN}, "note": HOSTILE,
         "results": {"frechet_distance": {"value": 1.5 + steps, "noise_floor": 1.0}}}
        for encoder in (DRAWN, "_a $ b") for label in ("1", "2", "3") for steps in (10, 20)
    ]  # fmt: skip
    row = {"label": f"[2em]{HOSTILE}", "kind": "model", "note": HOSTILE,
           "cells": {f"{HOSTILE}/{HOSTILE}": number}}  # fmt: skip
    return {
        "schema_version": 1, "kind": "protocol", "protocol": HOSTILE, "title": HOSTILE,
        "source": HOSTILE, "config_sha256": HOSTILE, "seconds": 1.0,
        "config": {"top": 0, "tiles": 0, "plots": [],
                   "settings": {HOSTILE: HOSTILE}},
        "warnings": [{"code": "few_tiles", "message": HOSTILE}],
        "sources": {}, "encoders": {}, "hardware": {"gpu": HOSTILE, "cpu_count": 1},
        "versions": {"torch": HOSTILE}, "cells": cells,
        "tables": [{"name": "t", "title": HOSTILE, "better": "lower", "share": False,
                    "columns": [column],
                    "rows": [row, {**row, "kind": "control"}]}],
    }  # fmt: skip


@pytest.mark.parametrize(
    "plots",
    [[], pytest.param(["steps", "scenarios", "concordance"], marks=pytest.mark.full)],
    ids=["without plots", "with plots"],
)
def test_a_protocols_page_and_tables_hold_text_alone(
    results: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    plots: list[str],
) -> None:
    results["config"]["plots"] = plots
    path = tmp_path / "results.json"
    path.write_text(json.dumps(results))
    assert evaluate(["report", "--results", str(path), "--out", str(tmp_path / "page.html")]) == 0
    _assert_plain(capsys.readouterr().out)
    _assert_inert((tmp_path / "page.html").read_text("utf-8"), scripts=0)

    table = (tmp_path / "tables.tex").read_text("utf-8")
    for line in table.splitlines():
        assert not re.search(r"\\(input|write|end\{tabular\} )", line), line
        assert not re.match(r"forged|\s*\[", line)
    assert "^^" not in table
    assert [line for line in table.splitlines() if line.startswith("% warning")]

    shown = _Page(MarkdownIt("gfm-like", {"linkify": False}).render(
        (tmp_path / "tables.md").read_text("utf-8")))  # fmt: skip
    allowed = {"h1", "h2", "p", "blockquote", "strong", "em", "table", "thead", "tbody", "tr",
               "th", "td"}  # fmt: skip
    assert set(shown.elements) <= allowed
    assert shown.elements.count("td") == 2 * 3


def test_a_list_of_left_out_slides_has_no_formula(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A cohort's CSV that another sent: labels reach the console, a CSV, a page and plots."""
    path, out = tmp_path / "cohort.csv", tmp_path / "out"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["slide_id", "patient", "site", "project", "preparation", "candidates"])
        for number in range(40):
            kind = '=HYPERLINK("http://x")' if number % 4 == 0 else "FFPE"
            site = f"{LABEL}{number % 3}"
            writer.writerow([f"s{number}", f"p{number}", site, LABEL, kind, 50_000])
    options = ["--hold-out", "6", "--train", "2000", "--val-tiles", "100", "--guidance", "100"]
    assert pipeline(["plan-cohort", str(path), "--out", str(out), *options]) == 0
    said = capsys.readouterr()
    _assert_plain(said.out + said.err)
    for written in out.rglob("*.csv"):
        for row in csv.reader(written.read_text("utf-8").splitlines()):
            assert not [cell for cell in row if cell[:1] in ("=", "+", "@", "\t", "\r")]
    for page in out.rglob("*.html"):
        _assert_inert(page.read_text("utf-8"), scripts=0)


@pytest.mark.full
def test_a_slide_whose_name_is_no_text_fails_alone(
    tmp_path: Path, cmu_slide: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "slides"
    folder.mkdir()
    (folder / "good.svs").symlink_to(cmu_slide)
    os.symlink(cmu_slide, os.fsencode(folder) + b"/bad\xff\x9b31m.svs")
    root = tmp_path / "dataset"
    assert pipeline(["scan", str(folder), "--dataset", str(root), "--workers", "1"]) == 1
    said = capsys.readouterr().out
    _assert_plain(said)
    assert "1 done, 1 failed" in said
    assert "is not UTF-8; rename the file" in " ".join(said.split())
