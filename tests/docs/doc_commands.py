"""The commands and snippets that the documentation shows, taken from its Markdown."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md")))
_FENCE = re.compile(
    r"^(?:<!-- not run: (?P<why>[^\n]+?) -->\n)?```(?P<language>\w*)\n(?P<body>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
_SHELL = ("", "sh", "bash")
_PROGRAM = re.compile(
    r"^(?:\w+=\S+ )*(?:\w+=\$\()?(?:python|torchrun|make|srun|sbatch|STAGE=|CONFIG=)"
)
_ROOMS = ("pipeline", "train", "evaluate")


@dataclass(frozen=True)
class Block:
    """A fenced block: where it stands, and why it is not run ('' if it is)."""

    page: str
    line: int
    language: str
    body: str
    not_run: str

    @property
    def is_shell(self) -> bool:
        return self.language in _SHELL and any(self.commands())

    def commands(self) -> Iterator[str]:
        """Command lines, continued lines joined, without comments and empty lines."""
        for line in self.body.replace("\\\n", " ").splitlines():
            if _PROGRAM.match(line.strip()):
                yield line.strip()


def blocks() -> Iterator[Block]:
    """All fenced blocks of README, CONTRIBUTING and docs."""
    for page in PAGES:
        text = page.read_text()
        for found in _FENCE.finditer(text):
            line = text.count("\n", 0, found.start()) + 1
            yield Block(
                str(page.relative_to(ROOT)), line, found["language"], found["body"],
                found["why"] or "",
            )  # fmt: skip


def words(command: str) -> list[str]:
    """The command's words; a comment after it is dropped."""
    return shlex.split(command, comments=True)


def call_of(command: str) -> tuple[str, list[str]] | None:
    """The room (`pipeline`, `train`, `evaluate`) that is called, and its arguments."""
    split = words(command)
    for at, word in enumerate(split):
        if (
            word == "-m"
            and at + 1 < len(split)
            and split[at + 1] in ("pipeline", "train", "evaluate")
        ):
            rest = split[at + 2 :]
            cut = next((n for n, w in enumerate(rest) if w in (">", "|", "&&")), len(rest))
            return split[at + 1], rest[:cut]
    return None
