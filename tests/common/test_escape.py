"""Text of others in each target language: what a parser of that language makes of it."""

import csv
import io
import json
import re
import shutil
import subprocess
import unicodedata
from collections.abc import Callable
from html.parser import HTMLParser
from typing import Any

import markdown
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from matplotlib.figure import Figure

from common import console
from common.escape import (
    csv_text,
    escape_csv,
    escape_latex,
    escape_markdown,
    escape_plot,
    escape_terminal,
    script_safe_json,
)
from common.redact import redact_secrets
from common.templates import escape_html, load_template

# Pieces that mean something somewhere, next to any character at all.
_PIECES = st.sampled_from([
    "\n", "\r\n", "\x1b]0;title\x07", "\x1b[2J", "\x9b31m", "\u202e", "\u2028", "\ud83d", "\0",
    "^^M", "\\input{x}", "\\write18{id}", "^^5cinput", "%", "$x^2$", "--", "\\\\[9em]",
    "\\end{tabular}", "<script>alert(1)</script>", "<img src=x onerror=alert(1)>", "</script>",
    "<!--", "]]>", "&lt;", "&#x3c;", "&amp", "|", "\\|", "`", "``", "*a*", "__b__", "~~c~~",
    "[a](javascript:x)", "![a](b)", "<http://a.b>", "http://a.b/c", "www.a.b", "a@b.c", "# ", "- ",
    "1. ", "> ", "```", "    ", "---", "===", "::: os", "!!! note", "{: #a}", "{{ 7*7 }}", "[^1]",
    "[a]: b", "=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "-0.5", '"', "'", ",", ";", "[bold]", "[/]",
    ":smile:", "[link=file:///x]", "0.5 mpp (train-val)",
])  # fmt: skip
TEXTS = st.one_of(
    st.text(max_size=40),
    st.lists(st.one_of(_PIECES, st.text(max_size=3)), max_size=6).map("".join),
)
_STEERS = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029\u061c\u200e\u200f\u202a-\u202e"
                     "\u2066-\u2069\ud800-\udfff]")  # fmt: skip


def as_read(text: str) -> str:
    """What a reader of one line sees: blanks are alike."""
    return " ".join(escape_terminal(text).split())


@given(TEXTS)
def test_no_character_steers_a_terminal(text: str) -> None:
    shown = escape_terminal(text)
    assert not _STEERS.search(shown)
    assert "\n" not in shown
    assert escape_terminal(shown) == shown
    for letter in text:
        if letter.isprintable() and letter not in "\u00ad":
            assert letter in shown


@given(TEXTS)
def test_consoles_print_text_and_lines_and_nothing_else(text: str) -> None:
    from rich.progress import Progress, TextColumn
    from rich.table import Table
    from rich.text import Text

    written = io.StringIO()
    console.stdout.file = written
    try:
        console.print_line(text)
        line = written.getvalue()
        table = Table(text, "b", title=text)
        table.add_row(text, Text(text))
        console.stdout.print(table)
        console.stdout.print(Text(text), text)
        bar = Progress(TextColumn("{task.fields[note]}", markup=False), console=console.stdout)
        bar.add_task("a", note=text)
        console.stdout.print(bar)
    finally:
        console.stdout._file = None
    assert not _STEERS.search(written.getvalue())
    # One line, word for word: no markup was read, no emoji put in.
    assert line.count("\n") == 1
    assert as_read(line) == as_read(redact_secrets(text))


class _Elements(HTMLParser):
    """The text of a page, and the elements and attributes that it has."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.text += data

    def handle_comment(self, data: str) -> None:
        self.elements.append("comment")

    def handle_decl(self, decl: str) -> None:
        self.elements.append("declaration")

    def handle_pi(self, data: str) -> None:
        self.elements.append("instruction")

    def unknown_decl(self, data: str) -> None:
        self.elements.append("declaration")


@given(TEXTS)
def test_html_is_one_text_and_one_attribute(text: str) -> None:
    safe = escape_html(text)
    page = _Elements(f'<p title="{safe}">{safe}</p>')
    assert (page.elements, page.text) == (["p"], escape_terminal(text))
    assert page.attributes == [("title", escape_terminal(text))]


@given(text=TEXTS)
@settings(max_examples=30)
def test_templates_show_text_alone(text: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "page.html.j2"
    path.write_text('<p title="{{ text }}">{{ text }}</p>')
    page = _Elements(load_template(path).render(text=text))
    assert (page.elements, page.text) == (["p"], escape_terminal(text))
    assert page.attributes == [("title", escape_terminal(text))]


@given(TEXTS)
def test_a_script_element_holds_its_json_whole(text: str) -> None:
    page = _Elements(f'<script id="data">{script_safe_json({"a": text})}</script>')
    assert page.elements == ["script"]
    assert json.loads(page.text) == {"a": text}


def _python_markdown(text: str) -> str:
    return markdown.markdown(
        text, extensions=["tables", "admonition", "attr_list", "footnotes", "def_list", "toc",
                          "pymdownx.superfences", "pymdownx.highlight"],
        extension_configs={"toc": {"toc_depth": 0}},
    )  # fmt: skip


_RENDERERS: dict[str, Callable[[str], str]] = {
    "commonmark": MarkdownIt("commonmark").render,
    "github": MarkdownIt("gfm-like", {"linkify": False}).render,
    "mkdocs": _python_markdown,
}


@pytest.mark.parametrize("renderer", _RENDERERS)
@given(text=TEXTS)
def test_markdown_shows_the_text_and_has_no_other_element(renderer: str, text: str) -> None:
    page = _Elements(_RENDERERS[renderer](f"{escape_markdown(text)}\n"))
    assert set(page.elements) <= {"p"}
    assert as_read(page.text) == as_read(text)


@pytest.mark.parametrize("renderer", ["github", "mkdocs"])
@given(text=TEXTS)
def test_a_markdown_cell_is_one_cell(renderer: str, text: str) -> None:
    cell = escape_markdown(text)
    page = _Elements(_RENDERERS[renderer](f"| a | b |\n|---|---|\n| {cell} | end |\n"))
    assert set(page.elements) == {"table", "thead", "tbody", "tr", "th", "td"}
    assert page.elements.count("td") == 2
    assert as_read(page.text) == as_read(f"a b {text} end")


@pytest.mark.parametrize(
    "plain",
    ["0.5 mpp (train-val)", "H0-mini, val-out", "12.3 ± 0.4", "slide_12.svs", "-0.5", "d₁/d₂ 100%",
     "C_T", "A & B; 1.5 µm!", "12 of 300 tiles: none", "3.0"],
)  # fmt: skip
def test_plain_text_is_plain_in_markdown_too(plain: str) -> None:
    assert escape_markdown(plain) == plain


_CONTROL_WORDS = {
    "textbackslash", "textasciitilde", "textasciicircum", "textless", "textgreater", "textbar",
    "textasciigrave", "pm", "times", "leq", "geq", "downarrow", "uparrow", "to", "mu", "circ",
    "ldots", "ss", "ae", "AE", "oe", "OE", "o", "O", "l", "L", *"uHrvdcb",
}  # fmt: skip
_CONTROL_SYMBOLS = set("&%$#_{}`'^~=.\"")


def latex_tokens(source: str) -> list[str]:
    """TeX's tokens of a line: control sequences with their backslash, else single characters."""
    # ^^ notation would be read before anything else.
    assert "^^" not in source
    return re.findall(r"\\(?:[a-zA-Z]+|.)|.", source, re.DOTALL)


@given(TEXTS)
def test_latex_has_no_control_sequence_but_those_for_characters(text: str) -> None:
    source = escape_latex(text)
    assert source.isascii()
    assert not _STEERS.search(source)
    assert "\n" not in source
    depth = math = 0
    for token in latex_tokens(source):
        if token.startswith("\\"):
            assert token[1:] in _CONTROL_WORDS or token[1:] in _CONTROL_SYMBOLS, token
            continue
        # Bare, each of these is a command to TeX.
        assert token not in "%&#~`" or token == "`"
        assert token not in "^_" or math
        math ^= token == "$"
        depth += {"{": 1, "}": -1}.get(token, 0)
        assert depth >= 0
        assert token not in "[]*" or depth
    assert (depth, math) == (0, 0)


@pytest.mark.full
@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="pdflatex is not installed")
@given(texts=st.lists(TEXTS, min_size=20, max_size=20))
@settings(max_examples=5, deadline=None)
def test_pdflatex_sets_it(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("tex")
    rows = "\\\\\n".join(f"{escape_latex(text)} & 1" for text in texts)
    notes = "\n".join(f"% {escape_latex(text)}" for text in texts)
    (folder / "a.tex").write_text(
        "\\documentclass{article}\n\\begin{document}\n" + notes
        + "\n\\begin{tabular}{ll}\n" + rows + "\\\\\n\\end{tabular}\n\\end{document}\n"
    )  # fmt: skip
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "a.tex"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:]


@given(TEXTS)
def test_a_csv_cell_is_one_cell_and_no_formula(text: str) -> None:
    ((cell, number), after) = list(csv.reader(io.StringIO(csv_text([[text, -0.5], ["b", 1]]))))
    assert (number, after) == ("-0.5", ["b", "1"])
    assert cell == escape_csv(text)
    assert escape_terminal(text) in (cell, cell.removeprefix("'"))
    starts = unicodedata.normalize("NFKC", cell).lstrip()[:1]
    assert starts not in ("=", "+", "-", "@") or re.fullmatch(r"[-+][\d.eE+-]+", cell)


@pytest.mark.parametrize("number", ["-0.5", "+3", "-1e-3", "-.5", "7"])
def test_numbers_in_a_csv_stay_numbers(number: str) -> None:
    assert escape_csv(number) == number
    assert escape_csv(f"{number}+cmd").startswith("'") == (number[0] in "+-")


@given(TEXTS)
@settings(max_examples=40, deadline=None)
def test_matplotlib_draws_it_as_it_reads(text: str) -> None:
    shown = escape_plot(text)
    figure = Figure(figsize=(1, 1))
    label = figure.text(0, 0, shown)
    drawn: Any = label._preprocess_math(shown)
    assert drawn == (escape_terminal(text) if drawn[0] == escape_terminal(text) else
                     f" {escape_terminal(text)}", False)  # fmt: skip
    assert not shown.startswith("_")
