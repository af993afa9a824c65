"""Measures the house itself: the table of its design, filled in from the code.

    python bench/house.py [--root DIR] [--list NAME]

Everything is read with `ast` and `tokenize`; no module is imported. Lines and class names are
those of packages and bench together, the other figures those of the packages. `--list` prints the
places behind a figure, as `file:line  name`, so that they can be worked through.
"""

import argparse
import ast
import io
import re
import statistics
import subprocess
import tokenize
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

PACKAGES = ("common", "pipeline", "model", "train", "evaluate")
FOLDERS = (*PACKAGES, "bench")
ENDINGS = (".py", ".js", ".css", ".j2", ".sbatch", ".yaml")
LONG_FUNCTION = 30
SHORT_LOCAL = 3
SILENCING = re.compile(r"#\s*(noqa|fmt:|type:|ruff:|mypy:|pragma)")
UNTYPED = re.compile(r"\b(?:dict|Mapping)\[str, Any\]")
QUANTITY = re.compile(
    r"""
    \[[\w*/+ ]+(?:,[\w*/+. ]+)+\] | ``?\[\w+\]``? | \d\s*[x×]\s*\d                    # shapes
    | \b(?:b?float(?:16|32|64)?|u?int(?:8|16|32|64)|bool|complex64)\b                 # dtypes
    | \b(?:px|mpp|µm|um|mm|Mpx|megapixels?|seconds?|bytes?|[KMGT]i?B)\b | \d\s?(?:ms|s|%)(?!\w)
    | \bin\ (?:level-0\ |tile\ |mask\ )?pixels\b | \d\ pixels\b | \bper\ cent\b       # units
    | \bfrom\ -?[\d.]+\ (?:to|up)\b | \bbetween\ -?[\d.]+\ and\b                      # ranges
    | (?<![\w.])-?\d[\d.]*\ to\ -?\d | \bat\ (?:most|least)\ (?:\d|one|two|three)
    | [\[(]-?[\d.]+,\ ?-?[\d.]+[\])] | [<>≤≥]=?\ ?-?\d
    """,
    re.VERBOSE,
)
"""What a docstring that gives a shape, dtype, unit or range has somewhere."""

AnyFunction = ast.FunctionDef | ast.AsyncFunctionDef
Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


@dataclass(frozen=True, order=True)
class Place:
    """Where something is in the code, and its name or text."""

    path: str
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}  {self.text}"


@dataclass(frozen=True)
class Function:
    """A function or method: its length from `def` to its end, and the variables it binds."""

    place: Place
    lines: int
    local_names: frozenset[str]
    has_comment: bool
    uses: int

    @property
    def name(self) -> str:
        """The name alone."""
        return self.place.text

    @property
    def is_dunder(self) -> bool:
        """Whether Python chose the name."""
        return self.name.startswith("__") and self.name.endswith("__")

    @property
    def is_single_use_helper(self) -> bool:
        """Whether it is private and its module uses it once."""
        return self.name.startswith("_") and not self.is_dunder and self.uses == 1


@dataclass
class Survey:
    """What one walk over the product's modules collects."""

    lines: Counter[str] = field(default_factory=Counter)
    classes: dict[str, list[Place]] = field(default_factory=dict)
    functions: list[Function] = field(default_factory=list)
    docstrings: list[tuple[Place, bool]] = field(default_factory=list)
    untyped: list[Place] = field(default_factory=list)
    comments: list[Place] = field(default_factory=list)
    code_lines: int = 0

    def repeated_classes(self) -> dict[str, list[Place]]:
        """Class names, without leading underscores, that two or more modules define."""
        return {
            name: places
            for name, places in sorted(self.classes.items())
            if len({place.path for place in places}) > 1
        }

    def named_functions(self) -> list[Function]:
        """All but dunder methods, whose names Python chose."""
        return [function for function in self.functions if not function.is_dunder]


def source_files(root: Path) -> list[Path]:
    """The product's source files under `root`: those that git tracks, or all outside of git."""
    listing = subprocess.run(
        ["git", "-C", str(root), "ls-files"], capture_output=True, text=True, check=False
    )
    # `git archive` unpacked in a folder of another repository lists nothing.
    names = listing.stdout.splitlines() or [str(p.relative_to(root)) for p in root.rglob("*")]
    return sorted(
        root / name
        for name in names
        if name.split("/")[0] in FOLDERS
        and Path(name).suffix in ENDINGS
        and (root / name).is_file()
    )


def survey_tree(root: Path) -> Survey:
    """Everything the figures need."""
    survey = Survey()
    modules: dict[str, ast.Module] = {}
    for path in source_files(root):
        name, text = path.relative_to(root).as_posix(), path.read_text()
        survey.lines[name.split("/")[0]] += len(text.splitlines())
        if path.suffix == ".py":
            modules[name] = ast.parse(text)
            survey_classes(survey, name, modules[name])
            if name.split("/")[0] in PACKAGES:
                survey_module(survey, name, modules[name], text)
    return survey


def survey_classes(survey: Survey, path: str, tree: ast.Module) -> None:
    """Add the classes that a module defines."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            place = Place(path, node.lineno, node.name)
            survey.classes.setdefault(node.name.lstrip("_"), []).append(place)


def survey_module(survey: Survey, path: str, tree: ast.Module, text: str) -> None:
    """Add a module's functions, docstrings, comments and untyped mappings."""
    comments = read_comments(text)
    survey.comments += [Place(path, line, comment) for line, comment in comments.items()]
    survey.code_lines += count_code_lines(text)
    uses = count_uses(tree)
    for node in ast.walk(tree):
        if isinstance(node, AnyFunction):
            end = node.end_lineno or node.lineno
            has_comment = any(line in comments for line in range(node.lineno, end + 1))
            survey.functions.append(
                Function(
                    Place(path, node.lineno, node.name),
                    end - node.lineno + 1,
                    frozenset(local_names(node)),
                    has_comment,
                    uses[node.name],
                )
            )
    for definition in public_definitions(tree.body):
        documentation = ast.get_docstring(definition) or ""
        place = Place(path, definition.lineno, definition.name)
        survey.docstrings.append((place, bool(QUANTITY.search(documentation))))
    for number, line in enumerate(text.splitlines(), 1):
        survey.untyped += [Place(path, number, line.strip())] * len(UNTYPED.findall(line))


def count_uses(tree: ast.Module) -> Counter[str]:
    """How often a module reads each name, as a variable or an attribute: calls and references."""
    uses: Counter[str] = Counter()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
            uses[node.id] += 1
        elif isinstance(node, ast.Attribute):
            uses[node.attr] += 1
    return uses


def local_names(function: AnyFunction) -> set[str]:
    """Variables that a function binds, parameters apart."""
    parameters = {node.arg for node in ast.walk(function.args) if isinstance(node, ast.arg)}
    bound = set()
    for node in ast.walk(function):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            bound.add(node.id)
        elif isinstance(node, ast.ExceptHandler) and node.name:
            bound.add(node.name)
    return {name for name in bound if name.strip("_")} - parameters


def public_definitions(body: list[ast.stmt]) -> list[Definition]:
    """Public functions and classes of a module's or class's body, with their public methods."""
    found: list[Definition] = []
    for node in body:
        if isinstance(node, Definition) and not node.name.startswith("_"):
            found.append(node)
            if isinstance(node, ast.ClassDef):
                found += public_definitions(node.body)
    return found


def read_comments(text: str) -> dict[int, str]:
    """A module's comments by line, but for those that only silence a tool."""
    return {
        token.start[0]: token.string
        for token in tokenize.generate_tokens(io.StringIO(text).readline)
        if token.type == tokenize.COMMENT
        and not SILENCING.match(token.string)
        and token.string.strip("#! -=")
    }


def count_code_lines(text: str) -> int:
    """Lines with code on them: blank lines, comments and docstrings are none."""
    layout = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        is_docstring = token.type == tokenize.STRING and token.line.lstrip().startswith('"""')
        if token.type not in (*layout, tokenize.ENDMARKER) and not is_docstring:
            lines.update(range(token.start[0], token.end[0] + 1))
    return len(lines)


def count_words(name: str) -> int:
    """Words of a name, split at underscores."""
    return len([word for word in name.split("_") if word])


FIGURES = (
    # title, format, at commit 321909e, target, and whether the target is the most
    ("class names of several modules", "{:,}", "22", 0, True),
    ("private helpers used once, of all functions", "{:.1f} %", "29 %", 15, True),
    ("comments per 100 code lines", "{:.2f}", "0.8", 3, False),
    ("words per function name", "{:.2f}", "1.56", 2.0, False),
    ("letters per local name", "{:.2f}", "5.0", 6.5, False),
    ("public docstrings with shape, dtype, unit or range", "{:.1f} %", "18 %", 40, False),
    ("`dict[str, Any]` and `Mapping[str, Any]`", "{:,}", "400", 80, True),
    ("product lines", "{:,}", "46,300", 37_000, True),
    (f"functions over {LONG_FUNCTION} lines", "{:.1f} %", "2.5 %", 2.5, True),
    ("lines of the median function", "{:g}", "8", 8, True),
)


def measure_figures(survey: Survey) -> list[float]:
    """The values of `FIGURES`, shares in per cent."""
    functions, named = survey.functions, survey.named_functions()
    return [
        len(survey.repeated_classes()),
        100 * statistics.mean(function.is_single_use_helper for function in functions),
        100 * len(survey.comments) / survey.code_lines,
        statistics.mean(count_words(function.name) for function in named),
        statistics.mean(len(name) for function in functions for name in function.local_names),
        100 * statistics.mean(has_quantity for _, has_quantity in survey.docstrings),
        len(survey.untyped),
        sum(survey.lines.values()),
        100 * statistics.mean(function.lines > LONG_FUNCTION for function in functions),
        statistics.median(function.lines for function in functions),
    ]


LISTS: dict[str, Callable[[Survey], list[Place]]] = {
    "duplicates": lambda survey: [
        place for places in survey.repeated_classes().values() for place in places
    ],
    "single-use": lambda survey: sorted(
        function.place for function in survey.functions if function.is_single_use_helper
    ),
    "one-word": lambda survey: sorted(
        function.place for function in survey.named_functions() if count_words(function.name) == 1
    ),
    "short-locals": lambda survey: sorted(
        Place(function.place.path, function.place.line, f"{function.name}: {' '.join(short)}")
        for function in survey.functions
        if (short := sorted(n for n in function.local_names if len(n) <= SHORT_LOCAL))
    ),
    "docstrings": lambda survey: sorted(
        place for place, has_quantity in survey.docstrings if not has_quantity
    ),
    "untyped": lambda survey: sorted(set(survey.untyped)),
    "long": lambda survey: sorted(f.place for f in survey.functions if f.lines > LONG_FUNCTION),
    "uncommented": lambda survey: sorted(
        f.place for f in survey.functions if f.lines > LONG_FUNCTION // 2 and not f.has_comment
    ),
}


def main() -> None:
    """Print the table, or a list."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--root", type=Path, default=Path(), help="the tree (the current folder)")
    parser.add_argument("--list", choices=LISTS, help="print the places behind a figure")
    arguments = parser.parse_args()
    survey = survey_tree(arguments.root.resolve())
    if arguments.list:
        print(*LISTS[arguments.list](survey), sep="\n")
        return
    print("| | at 321909e | today | target | met |\n|---|---|---|---|---|")
    values = measure_figures(survey)
    for value, (title, form, before, target, at_most) in zip(values, FIGURES, strict=True):
        met = value <= target if at_most else value >= target
        goal = f"at {'most' if at_most else 'least'} {target:,}"
        print(f"| {title} | {before} | {form.format(value)} | {goal} | {'yes' if met else 'no'} |")
    print("\nlines:", ", ".join(f"{name} {survey.lines[name]:,}" for name in FOLDERS))
    for package in PACKAGES:
        shares = [has for place, has in survey.docstrings if place.path.startswith(package + "/")]
        if shares:
            print(f"docstrings of {package}: {100 * statistics.mean(shares):.0f} %", end="; ")
    print(f"functions: {len(survey.functions):,}; code lines: {survey.code_lines:,}")


if __name__ == "__main__":
    main()
