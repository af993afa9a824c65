"""The laws of the ledger, on journals that hypothesis makes up."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.dataset import BLOCK_ROWS, Entry, Ledger, Missing
from pipeline.dataset.ledger import contiguous_spans, covered_blocks, current_entries

SCOPES = ("224", "224/h0-mini/cls")
BLOCKS = st.frozensets(st.integers(0, 12), max_size=8)


@st.composite
def journal_lines(draw: st.DrawFn) -> Entry:
    start, blocks = draw(st.integers(0, 10)), draw(st.integers(1, 4))
    outcome = draw(st.sampled_from(["done", "done", "done", "pruned", "failed", "rejected"]))
    line = Entry(
        draw(st.sampled_from(["a", "b"])), outcome, draw(st.sampled_from(["f", "f", "g"])),
        scope=draw(st.sampled_from(SCOPES)),
    )  # fmt: skip
    if outcome in ("failed", "rejected"):
        return line
    return replace(line, start=BLOCK_ROWS * start, stop=BLOCK_ROWS * (start + blocks))


JOURNALS = st.lists(journal_lines(), max_size=14)
LOST = st.sets(st.integers(0, 13))


def ledger_of(journal: list[Entry], lost: set[int]) -> Ledger:
    """The ledger of lines of which some, by position, name files that are gone."""
    gone = [id(journal[place]) for place in lost if place < len(journal)]
    return Ledger(journal, lambda entry: id(entry) not in gone)


def write_missing(journal: list[Entry], missing: Missing) -> list[Entry]:
    """The journal after the withdrawn lines, and a file for every missing span."""
    written = [
        Entry("a", "done", "f", scope=scope, start=span.start * BLOCK_ROWS,
              stop=span.stop * BLOCK_ROWS)
        for span, scopes in missing.spans.items()
        for scope in scopes
    ]  # fmt: skip
    return [*journal, *missing.withdrawn, *written]


@given(BLOCKS)
def test_spans_are_the_blocks_in_maximal_runs(blocks: frozenset[int]) -> None:
    spans = contiguous_spans(blocks)
    assert sorted(blocks) == [block for span in spans for block in span]
    assert all(after.start > before.stop for before, after in pairwise(spans))


@given(JOURNALS, LOST, BLOCKS)
def test_missing_is_what_is_wanted_and_not_on_disk(
    journal: list[Entry], lost: set[int], wanted: frozenset[int]
) -> None:
    ledger = ledger_of(journal, lost)
    missing = ledger.missing("a", wanted, "f", SCOPES)
    for scope in SCOPES:
        lacking = {b for span, scopes in missing.spans.items() if scope in scopes for b in span}
        assert lacking == wanted - ledger[scope].blocks("a", "f")
    assert set(missing.scopes) <= set(SCOPES)
    assert bool(missing) == any(wanted - ledger[scope].blocks("a", "f") for scope in SCOPES)


@settings(max_examples=300)
@given(JOURNALS, LOST, BLOCKS)
def test_once_written_nothing_is_missing_and_readers_find_every_block(
    journal: list[Entry], lost: set[int], wanted: frozenset[int]
) -> None:
    """What is withdrawn and what is written leaves no lost file between readers and a block."""
    before = ledger_of(journal, lost)
    after_journal = write_missing(journal, before.missing("a", wanted, "f", SCOPES))
    # Lost lines keep their place, and with it their identity.
    after = ledger_of(after_journal, {place for place in lost if place < len(journal)})
    again = after.missing("a", wanted, "f", SCOPES)
    assert not again.spans
    for scope in SCOPES:
        ledger = after[scope]
        current = ledger.latest("a")
        if current is None or current.fingerprint != "f":
            continue
        for block in wanted:
            line = ledger.file_of("a", block * BLOCK_ROWS)
            assert line is not None
            assert line in ledger.on_disk("a", "f")


@given(JOURNALS, LOST, BLOCKS)
def test_a_second_run_withdraws_nothing(
    journal: list[Entry], lost: set[int], wanted: frozenset[int]
) -> None:
    lost = {place for place in lost if place < len(journal)}
    before = ledger_of(journal, lost)
    journal = write_missing(journal, before.missing("a", wanted, "f", SCOPES))
    after = ledger_of(journal, lost)
    assert after.missing("a", wanted, "f", SCOPES) == Missing()


@given(JOURNALS)
def test_slides_and_scopes_do_not_affect_each_other(journal: list[Entry]) -> None:
    whole = Ledger(journal, lambda entry: True)
    for scope in SCOPES:
        mine = [line for line in journal if line.slide_id == "a" and line.scope == scope]
        assert whole[scope].entries("a") == Ledger(mine, lambda entry: True)[scope].entries("a")


@given(JOURNALS)
def test_only_the_latest_fingerprint_is_current(journal: list[Entry]) -> None:
    for scope in SCOPES:
        for slide_id, entries in current_entries(journal, scope).items():
            lines = [e for e in journal if e.slide_id == slide_id and e.scope == scope]
            assert {entry.fingerprint for entry in entries} == {lines[-1].fingerprint}
            assert len({(e.start, e.stop) for e in entries}) == len(entries)
            assert [e.start for e in entries] == sorted(e.start for e in entries)


@given(JOURNALS, LOST)
def test_done_needs_outcome_fingerprint_and_files(journal: list[Entry], lost: set[int]) -> None:
    ledger = ledger_of(journal, lost)
    gone = [id(journal[place]) for place in lost if place < len(journal)]
    for scope in SCOPES:
        line = ledger[scope].done("a", "f")
        if line is not None:
            assert (line.fingerprint, line.scope) == ("f", scope)
            assert line.outcome in ("done", "rejected")
            assert id(line) not in gone


@given(JOURNALS)
def test_settled_failures_leave_no_failure(journal: list[Entry]) -> None:
    ledger = Ledger(journal, lambda entry: True)
    after = Ledger([*journal, *ledger["224"].settled_failures("a")], lambda entry: True)
    assert not [e for e in after["224"].entries("a") if e.outcome == "failed"]
    assert after["224"].blocks("a") == ledger["224"].blocks("a")


@given(JOURNALS, LOST, st.lists(st.integers(0, 255), min_size=1, unique=True))
def test_uncovered_rows_counts_ranks_one_by_one(
    journal: list[Entry], lost: set[int], ranks: list[int]
) -> None:
    ledger = ledger_of(journal, lost)["224"]
    there = covered_blocks(ledger.on_disk("a"))
    slow = sum(rank // BLOCK_ROWS not in there for rank in ranks)
    assert ledger.uncovered_rows([("a", np.array(ranks, np.int32))]) == slow
