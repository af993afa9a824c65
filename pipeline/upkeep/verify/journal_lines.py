"""Damaged lines of journals: readers leave them out, so the stage does their work again."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from common.files import open_regular
from common.json_text import parse_json
from pipeline.dataset.journal import decode_line, foreign_file

LineDamage = Literal["torn", "altered", "respelt", "foreign"]
"""torn: cut short by a crash; altered: no longer what was written; respelt: altered, but in
bytes that do not change what it says; foreign: it names a file that its stage does not write."""


@dataclass(frozen=True)
class Line:
    """A line of a journal, numbered from 1; `damage` is None where it is as it was written.

    `names` is the file that a foreign line names.
    """

    number: int
    data: bytes
    damage: LineDamage | None
    names: str = ""


def journal_lines(path: Path) -> Iterator[Line]:
    """The lines of a journal; raises OSError where it cannot be read."""
    with open_regular(path) as file:
        for number, data in enumerate(file, 1):
            entry = decode_line(data.decode(errors="replace"))
            foreign = foreign_file(path.parent.name, entry) if entry else ""
            yield Line(number, data, "foreign" if foreign else damage_of(data), foreign)


def damage_of(data: bytes) -> LineDamage | None:
    """What is wrong with a line's bytes, newline included."""
    text = data.decode(errors="replace")  # as readers do
    if decode_line(text) is not None:
        return None if data == canonical_line(text) else "respelt"
    if text.endswith("\n"):
        return "altered"
    try:
        # A whole record, and then what does not belong there: a newline was changed.
        json.JSONDecoder().raw_decode(text)
    except (ValueError, RecursionError):
        return "torn"
    return "altered"


def canonical_line(line: str | bytes) -> bytes:
    """A readable line in the only form in which lines are written."""
    text = json.dumps(parse_json(line), sort_keys=True, ensure_ascii=False) + "\n"
    return text.encode(errors="backslashreplace")
