"""Text leaves the project at a few borders only: nothing else prints, writes CSV or makes HTML."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("common", "model", "pipeline", "train", "evaluate")
RULES = {
    # JSON, whose control characters are escapes, and a script of our own.
    "print": {"pipeline/upkeep/status.py", "pipeline/upkeep/doctor/check.py",
              "pipeline/commands/batch.py"},
    "print_exc": set(), "print_exception": set(),
    "Console": set(), "_PlainConsole": {"common/console.py"}, "from_markup": set(),
    "writer": {"common/escape.py"}, "DictWriter": set(), "to_csv": set(), "write_csv": set(),
    "Environment": {"common/templates.py"},
    "markdown": set(), "sanitize": set(),
}  # fmt: skip
"""What may be called only in these files, by its last name."""
MARKUP_OF_CODE = {"pipeline/report/svg.py"}
"""Where markup is put together from pieces; each piece is escaped there."""


def _calls(source: str) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else ""
            yield node.func.id if isinstance(node.func, ast.Name) else name, node


def stray_calls(path: str, source: str) -> list[str]:
    """The calls of a file that belong to another one, with their lines."""
    stray = []
    for name, call in _calls(source):
        is_print = isinstance(call.func, ast.Attribute) and name == "print"
        if name in RULES and path not in RULES[name] and not is_print:
            stray.append(f"{path}:{call.lineno}: {name}")
        # Markup of a text that was put together is markup of whatever was put in.
        made = call.args and isinstance(call.args[0], ast.JoinedStr | ast.BinOp)
        if name == "Markup" and made and path not in MARKUP_OF_CODE:
            stray.append(f"{path}:{call.lineno}: Markup of a composed text")
        keys = {key.arg for key in call.keywords if not _is_false(key.value)}
        if name in ("print", "render_str", "TextColumn") and "markup" in keys:
            stray.append(f"{path}:{call.lineno}: markup")
        if name == "TextColumn" and "markup" not in {key.arg for key in call.keywords}:
            stray.append(f"{path}:{call.lineno}: TextColumn reads markup")
    return stray


def _is_false(value: ast.expr) -> bool:
    return isinstance(value, ast.Constant) and value.value is False


def test_text_leaves_at_the_borders_alone() -> None:
    paths = [path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))]
    names = [path.relative_to(ROOT).as_posix() for path in paths]
    stray = [stray_calls(n, p.read_text()) for n, p in zip(names, paths, strict=True)]
    assert not [call for calls in stray for call in calls]


@pytest.mark.parametrize(
    "source",
    ["print(reason)", "csv.writer(file)", "Markup(f'<b>{name}</b>')", "Markup('<b>' + name)",
     "Console()", "Text.from_markup(name)", "stdout.print(name, markup=True)",
     "TextColumn('{task.description}')", "jinja2.Environment()"],
)  # fmt: skip
def test_the_rules_see_what_they_forbid(source: str) -> None:
    assert stray_calls("pipeline/stray.py", source)


TEMPLATES = sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.j2"))


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.name)
def test_templates_escape_all_values_and_link_to_no_address_of_a_record(path: Path) -> None:
    text = path.read_text()
    assert not re.search(r"\|\s*safe\b|autoescape|\|\s*urlize|\|\s*xmlattr|<script[^>]*\{\{", text)
    # A value as a whole address could be `javascript:`; these functions make addresses.
    for value in re.findall(r"""(?:href|src|action)=["']?\{\{\s*(\w+)""", text):
        assert value in ("link", "svg_uri", "tile_uri", "jpeg_uri", "plot_uri"), value
    # Without quotes an attribute ends at the first blank; in `on...` and `style` it is code.
    assert not re.search(r"""\s[\w-]+=\{\{|\son\w+=""", text)


def test_scripts_of_pages_set_text_alone() -> None:
    scripts = sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.js"))
    assert scripts
    for path in scripts:
        forbidden = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function"
        assert not re.search(forbidden, path.read_text()), path
