"""The ledger: what a stage's journals say is done, what is missing, what must be withdrawn.

It depends only on journal entries and on `is_present`, which says whether the files of an entry
are on disk, so that the rules below can be tested without a dataset.

- The latest line of a slide in a scope decides which fingerprint is *current*; lines with another
  fingerprint are superseded.
- Of two lines for exactly the same ranks the later one counts. A failure has no ranks: a later
  `done` of the slide in the same scope supersedes it.
- A block is *on disk* where a current `done` line covers it and all files of that line are there.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import compress

import numpy as np
import numpy.typing as npt

from pipeline.dataset.journal import Entry, files_present, read_journal
from pipeline.dataset.layout import BLOCK_ROWS, Dataset, covering_blocks

_NO_RANKS = (-1, -1)


def current_entries(entries: Iterable[Entry], scope: str = "") -> dict[str, list[Entry]]:
    """The current lines of each slide in a scope, by first rank; `entries` come oldest first.

    Slides of which no line is left are left out.
    """
    latest: dict[str, dict[tuple[int, int], Entry]] = {}
    fingerprints: dict[str, str] = {}
    for entry in entries:
        lines = latest.get(entry.slide_id, {})
        if _NO_RANKS in lines and supersedes_failure(entry, lines[_NO_RANKS]):
            del lines[_NO_RANKS]
        if entry.scope != scope:
            continue
        if fingerprints.get(entry.slide_id) != entry.fingerprint:
            fingerprints[entry.slide_id] = entry.fingerprint
            latest[entry.slide_id] = {}
        # The later of two lines for the same ranks takes the earlier one's place.
        latest[entry.slide_id][entry.start, entry.stop] = entry
    return {
        slide_id: sorted(lines.values(), key=lambda entry: entry.start)
        for slide_id, lines in latest.items()
        if lines
    }


def supersedes_failure(later: Entry, failure: Entry) -> bool:
    """Whether a later line of the same slide and stage says that what failed has succeeded.

    Older releases wrote some failures without their scope: a `done` of any scope supersedes those.
    """
    if later.outcome != "done" or failure.outcome != "failed":
        return False
    return failure.scope in ("", later.scope)


def covered_blocks(entries: Iterable[Entry]) -> set[int]:
    """The blocks that the entries' rank ranges [start, stop) cover."""
    return {block for entry in entries for block in covering_blocks(entry.start, entry.stop)}


def contiguous_spans(blocks: Iterable[int]) -> list[range]:
    """Blocks as ascending spans without gaps, each as long as possible.

    >>> contiguous_spans({7, 2, 1, 3})
    [range(1, 4), range(7, 8)]
    """
    spans: list[range] = []
    for block in sorted(blocks):
        if spans and spans[-1].stop == block:
            spans[-1] = range(spans[-1].start, block + 1)
        else:
            spans.append(range(block, block + 1))
    return spans


@dataclass(frozen=True)
class Missing:
    """What a slide lacks of a stage's output; false where it lacks nothing.

    `spans` are ranges [start, stop) of blocks, each with the scopes in which it is missing, to
    become one file per scope. Where a stage makes all of a slide or nothing, `whole` says that,
    and `done` is the line that says it is not. `withdrawn` are lines to journal first, which take
    back lost files.
    """

    spans: Mapping[range, tuple[str, ...]] = field(default_factory=dict)
    whole: bool = False
    done: Entry | None = None
    withdrawn: tuple[Entry, ...] = ()

    @classmethod
    def of_slide(cls, done: Entry | None) -> "Missing":
        """All of a slide, unless a line says that it is done."""
        return cls(whole=done is None, done=done)

    def __bool__(self) -> bool:
        return self.whole or bool(self.spans)

    @property
    def scopes(self) -> tuple[str, ...]:
        """The scopes in which a span is missing, in the order in which they were requested."""
        return tuple(dict.fromkeys(scope for scopes in self.spans.values() for scope in scopes))


class ScopeLedger:
    """The current lines of one scope of a stage; `by_slide` are those of each slide."""

    def __init__(
        self, by_slide: dict[str, list[Entry]], is_present: Callable[[Entry], bool]
    ) -> None:
        self.by_slide, self._is_present = by_slide, is_present

    def __iter__(self) -> Iterator[str]:
        return iter(self.by_slide)

    def __len__(self) -> int:
        return len(self.by_slide)

    def entries(self, slide_id: str) -> list[Entry]:
        """The current lines of a slide by first rank, each of the ranks [start, stop)."""
        return self.by_slide.get(slide_id, [])

    def latest(self, slide_id: str) -> Entry | None:
        """A slide's current line with the highest ranks, None without any."""
        return self.by_slide[slide_id][-1] if slide_id in self.by_slide else None

    @cached_property
    def written(self) -> dict[str, list[Entry]]:
        """Per slide, the current lines that name written files (outcome `done`), by first rank."""
        done = {
            slide_id: [entry for entry in entries if entry.outcome == "done"]
            for slide_id, entries in self.by_slide.items()
        }
        return {slide_id: entries for slide_id, entries in done.items() if entries}

    def done(self, slide_id: str, fingerprint: str) -> Entry | None:
        """The line that makes further work on a whole slide needless.

        It is `done` or `rejected`, has this fingerprint, and the files that it names are on disk.
        """
        for entry in self.entries(slide_id):
            is_final = entry.outcome in ("done", "rejected") and entry.fingerprint == fingerprint
            if is_final and self._is_present(entry):
                return entry
        return None

    def on_disk(self, slide_id: str, fingerprint: str | None = None) -> list[Entry]:
        """The written lines whose files are there; of one fingerprint, or of any."""
        return [entry for entry in self._written(slide_id, fingerprint) if self._is_present(entry)]

    def blocks(self, slide_id: str, fingerprint: str | None = None) -> set[int]:
        """The blocks of a slide that are on disk; of one fingerprint, or of any."""
        return covered_blocks(self.on_disk(slide_id, fingerprint))

    def file_of(self, slide_id: str, rank: int) -> Entry | None:
        """The written line [start, stop) whose file readers take for a rank: the last by start."""
        for entry in reversed(self.written.get(slide_id, ())):
            if entry.start <= rank < entry.stop:
                return entry
        return None

    def recorded_blocks(self, slide_id: str) -> set[int]:
        """The blocks that the journal says were written; the disk is not looked at."""
        return covered_blocks(self.written.get(slide_id, ()))

    def lacking(
        self, slide_id: str, wanted: Collection[int], fingerprint: str
    ) -> tuple[list[range], list[Entry]]:
        """The wanted blocks that are not on disk as contiguous spans, and the lines to withdraw.

        Withdrawn (by a `pruned` line each) are lost files whose blocks others have, or will once
        the spans are written: readers take the last file by first rank, so that the line of a
        lost one would hide the file that has its blocks now. No line is due where the very same
        file is to be written again, nor where nothing else has a block: that loss is `verify`'s
        to report.
        """
        written = self._written(slide_id, fingerprint)
        presence = [self._is_present(entry) for entry in written]
        there = covered_blocks(compress(written, presence))
        spans = contiguous_spans(set(wanted) - there)
        lines = []
        for entry, is_present in zip(written, presence, strict=True):
            blocks = covering_blocks(entry.start, entry.stop)
            is_shared = not (there | set(wanted)).isdisjoint(blocks)
            if not is_present and is_shared and blocks not in spans:
                lines.append(
                    Entry(slide_id, "pruned", entry.fingerprint, "its files are lost",
                          scope=entry.scope, start=entry.start, stop=entry.stop)
                )  # fmt: skip
        return spans, lines

    def settled_failures(self, slide_id: str) -> list[Entry]:
        """The lines that take back a slide's failures, for where nothing is missing any more."""
        return [
            replace(entry, outcome="pruned", reason="nothing is missing")
            for entry in self.entries(slide_id)
            if entry.outcome == "failed"
        ]

    def uncovered_rows(self, ranks_by_slide: Iterable[tuple[str, npt.NDArray[np.integer]]]) -> int:
        """How many rows of a selection, as (slide_id, int32 [n] ranks) pairs, are not on disk."""
        return sum(
            int(np.isin(ranks // BLOCK_ROWS, list(self.blocks(slide_id)), invert=True).sum())
            for slide_id, ranks in ranks_by_slide
        )

    def _written(self, slide_id: str, fingerprint: str | None) -> list[Entry]:
        return [
            entry
            for entry in self.written.get(slide_id, ())
            if fingerprint is None or entry.fingerprint == fingerprint
        ]


class Ledger:
    """All scopes of one stage; `ledger[scope]` answers for one of them.

    `entries` are journal lines, oldest first; `is_present` says whether all files of a line are on
    disk.
    """

    def __init__(self, entries: Iterable[Entry], is_present: Callable[[Entry], bool]) -> None:
        self.lines = list(entries)
        self._is_present = is_present
        self._scopes: dict[str, ScopeLedger] = {}

    @classmethod
    def read(cls, dataset: Dataset, stage: str, *, outside: bool = False) -> "Ledger":
        """The ledger of a stage of a dataset; see `read_journal` for `outside`.

        Raises `UserError` where a journal cannot be read.
        """
        journal = read_journal(dataset, stage, outside=outside)
        return cls(journal, partial(files_present, dataset))

    def __getitem__(self, scope: str) -> ScopeLedger:
        if scope not in self._scopes:
            current = current_entries(self.lines, scope)
            self._scopes[scope] = ScopeLedger(current, self._is_present)
        return self._scopes[scope]

    @cached_property
    def scopes(self) -> list[str]:
        """The scopes that occur, sorted."""
        return sorted({entry.scope for entry in self.lines})

    def missing(
        self, slide_id: str, wanted: Collection[int], fingerprint: str, scopes: Iterable[str]
    ) -> Missing:
        """What a slide lacks of the wanted blocks in each of the scopes."""
        # A span that several scopes lack is one pass over the slide.
        missing: dict[range, tuple[str, ...]] = {}
        withdrawn: list[Entry] = []
        for scope in scopes:
            spans, lines = self[scope].lacking(slide_id, wanted, fingerprint)
            for span in spans:
                missing[span] = (*missing.get(span, ()), scope)
            withdrawn += lines
        return Missing(missing, withdrawn=tuple(withdrawn))
