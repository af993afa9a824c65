"""Whether tiles and features are of what is there now: features of tiles, of candidates, of slides.

A line of `tile` states the fingerprint of the candidates that were cut (`tissue`) and which file
the slide was (`slide`); a line of `cache` has both from the tiles, and their own fingerprint
(`tiles`). A reader compares them with the latest lines of those stages. What a line of an earlier
release does not state is not judged.
"""

import re
import shlex
from collections.abc import Callable, Iterable
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa

from common.errors import UserError
from common.files import open_text, read_lines
from pipeline.dataset.journal import Entry, read_journal, run_order
from pipeline.dataset.layout import Dataset
from pipeline.dataset.ledger import current_entries
from pipeline.dataset.tables.parquet_table import Column, read_table
from pipeline.dataset.tables.slides import Slide

SLIDE, CANDIDATES, TILES = "slide", "tissue", "tiles"
"""Keys of a line's values: the slide's file, and the fingerprints of the stages before."""
FIRST_CRC = "first_crc"
"""Another: a CRC-32 that is in the line's file, of its first tile or block of features.

It tells the file from one of the same name and size that was made later.
"""

_SEVERAL_FILES = frozenset({".mrxs", ".vms", ".vmu"})
_FINGERPRINT = re.compile(
    r'"fingerprint": "([^"\\]*)", "outcome": .*?"scope": "([^"\\]*)", .*?"slide_id": "([^"\\]+)"'
)


class Origin(NamedTuple):
    """What identifies a slide's file: its samples, its path, and the sum of the whole, '' unknown.

    A `Slide` has the same fields and is one, too.
    """

    sampled_sha256: str
    path: str
    sha256: str


def is_other_file(slide: Slide | Origin, state: object) -> bool:
    """Whether a result was made from another file of the slide, as a line's `slide` states it.

    False where either side does not say.
    """
    before = state.get("sampled_sha256") if isinstance(state, dict) else ""
    if not before or not slide.sampled_sha256 or before == slide.sampled_sha256:
        return False
    # An earlier release took other samples of formats of several files, of the very same slide.
    is_one_file = Path(slide.path).suffix.lower() not in _SEVERAL_FILES
    return is_one_file or bool(slide.sha256)


def inherited_values(tiles: Iterable[Entry]) -> dict[str, object]:
    """What a line of features states of a slide's current tiles, whose lines these are."""
    values: dict[str, object] = {}
    for entry in tiles:
        values |= {key: entry.values[key] for key in (SLIDE, CANDIDATES) if key in entry.values}
        values[TILES] = entry.fingerprint
    return values


_Reader = Callable[[Dataset, str, str], dict[str, str]]
"""A dataset, a stage and a scope to the fingerprint of each slide."""


class Lineage:
    """Judges lines of tiles, and of features of them, of one size in px. Safe to share.

    What the stages before say is read when it is first asked for.
    """

    def __init__(self, dataset: Dataset, tile_px: int) -> None:
        self.dataset, self.tile_px = dataset, tile_px
        self._read: dict[tuple[str, _Reader], dict[str, str]] = {}

    def check_tiles(self, slide_id: str, entries: Iterable[Entry]) -> None:
        """Refuse the lines of a slide's tiles where they are of former candidates or a former file.

        Raises `UserError` naming the slide and the commands that make them again.
        """
        if former := self._find_former(slide_id, entries, "tiles"):
            raise UserError(f"slide {slide_id}: its {self.tile_px} px tiles {former}")

    def check_features(self, slide_id: str, entries: Iterable[Entry], what: str) -> None:
        """Refuse the lines of a slide's features where they, or their tiles, are of a former state.

        `what` names the features in the message. Raises `UserError`.
        """
        entries = list(entries)
        if self._is_former(entries, TILES, "tile", slide_id):
            former = f"were made from other tiles than it has now: run {self._command('cache')}"
        else:
            former = self._find_former(slide_id, entries, "cache")
        if former:
            raise UserError(f"slide {slide_id}: its {what} {former}")

    def _find_former(self, slide_id: str, entries: Iterable[Entry], stage: str) -> str:
        """What the lines were made from that is no longer so, and what to run; '' for nothing."""
        entries = list(entries)
        last = " and `cache`" if stage == "cache" else ""
        if self._is_former(entries, CANDIDATES, "tissue", slide_id):
            return (
                f"were cut from other candidates than tissue has now: run {self._command('tile')}"
                f"{last} again (`select` first, if its selections are older than its candidates)"
            )
        states = [entry.values[SLIDE] for entry in entries if SLIDE in entry.values]
        slide = self._slides.get(slide_id) if states else None
        if slide and any(is_other_file(slide, state) for state in states):
            return (
                "were cut from another file than the slide is now: run "
                f"{self._command('tissue')}, `select`, `tile`{last} again"
            )
        return ""

    def _is_former(self, entries: Iterable[Entry], key: str, stage: str, slide_id: str) -> bool:
        stated = {entry.values[key] for entry in entries if isinstance(entry.values.get(key), str)}
        if not stated:
            return False
        now = self._fingerprints(stage, glance_fingerprints).get(slide_id)
        if now is None or stated == {now}:
            return False
        # The lines were looked at, not checked: only the ledger may refuse.
        exact = self._fingerprints(stage, _read_fingerprints).get(slide_id)
        return exact is not None and stated != {exact}

    def _command(self, stage: str) -> str:
        return f"`python -m pipeline {stage} --dataset {shlex.quote(str(self.dataset.root))}`"

    def _fingerprints(self, stage: str, read: _Reader) -> dict[str, str]:
        key = (stage, read)
        if key not in self._read:
            scope = "" if stage == "tissue" else str(self.tile_px)
            self._read[key] = read(self.dataset, stage, scope)
        return self._read[key]

    @cached_property
    def _slides(self) -> dict[str, Origin]:
        return read_origins(self.dataset)


def glance_fingerprints(dataset: Dataset, stage: str, scope: str) -> dict[str, str]:
    """The fingerprint of each slide's latest line in a scope, by a look at the lines.

    Many times as fast as the ledger, which checks them: it can tell that nothing has changed.
    """
    latest: dict[str, str] = {}
    folder = dataset.status_dir(stage)
    try:
        for path in sorted(folder.glob("*.jsonl"), key=lambda path: run_order(path.name)):
            with open_text(path, errors="replace") as file:
                latest |= _look_at(read_lines(file), scope)
    except OSError:
        return {}  # which the ledger reports
    return latest


def _look_at(lines: Iterable[str], scope: str) -> dict[str, str]:
    found = filter(None, map(_FINGERPRINT.search, lines))
    return {match[3]: match[1] for match in found if match[2] == scope}


def _read_fingerprints(dataset: Dataset, stage: str, scope: str) -> dict[str, str]:
    current = current_entries(read_journal(dataset, stage), scope)
    return {slide_id: entries[-1].fingerprint for slide_id, entries in current.items()}


_ORIGIN_COLUMNS = (
    Column("slide_id", pa.string()),
    *(Column(name, pa.string(), required=False, nullable=True) for name in Origin._fields),
)


def read_origins(dataset: Dataset) -> dict[str, Origin]:
    """Which file each slide of slides.parquet is; {} for a dataset without that table."""
    if not dataset.slides_file.exists():
        return {}
    rows = read_table(dataset.slides_file, _ORIGIN_COLUMNS, "run `python -m pipeline scan` first")
    names = rows.column_names
    return {
        row["slide_id"]: Origin(*(row[name] or "" if name in names else "" for name in
                                  Origin._fields))
        for row in rows.to_pylist()
    }  # fmt: skip
