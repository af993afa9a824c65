"""Damaged lines of journals: readers leave them out, so the stage does their work again."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pipeline.dataset.journal import decode_line

Damage = Literal["torn", "altered", "respelt"]
"""torn: cut short by a crash; altered: no longer what was written; respelt: altered, but in
bytes that do not change what it says."""


@dataclass(frozen=True)
class Line:
    """A line of a journal, numbered from 1; `damage` is None where it is as it was written."""

    number: int
    data: bytes
    damage: Damage | None


def journal_lines(path: Path) -> Iterator[Line]:
    """The lines of a journal; raises OSError where it cannot be read."""
    with path.open("rb") as file:
        for number, data in enumerate(file, 1):
            yield Line(number, data, damage_of(data))


def damage_of(data: bytes) -> Damage | None:
    """What is wrong with a line's bytes, newline included."""
    text = data.decode(errors="replace")  # as readers do
    if decode_line(text) is None:
        return "torn" if not text.endswith("\n") and not _begins_with_record(text) else "altered"
    return None if data == canonical(text) else "respelt"


def canonical(line: str | bytes) -> bytes:
    """A readable line in the only form in which lines are written."""
    return (json.dumps(json.loads(line), sort_keys=True, ensure_ascii=False) + "\n").encode()


def _begins_with_record(text: str) -> bool:
    """Whether a whole record stands before what does not belong there (a changed newline)."""
    try:
        json.JSONDecoder().raw_decode(text)
    except ValueError:
        return False
    return True
