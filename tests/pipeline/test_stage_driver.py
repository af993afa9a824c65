"""A new stage is one file: here is one, and the driver does the rest."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from common.errors import UserError
from pipeline.dataset import (
    Dataset,
    Entry,
    Ledger,
    Missing,
    claim_identity,
    commit_bytes,
    fingerprint_of,
    read_identity,
    read_journal,
)
from pipeline.dataset.journal import Outcome
from pipeline.run.stage import Stage, run_stage
from pipeline.run.tasks import SlideTask, collect_entries
from pipeline.run.workers import EngineConfig

ONE_WORKER = EngineConfig(1)


@dataclass(frozen=True)
class Note:
    """What the stage works on: a text per slide."""

    slide_id: str
    text: str


def write_note(root: str, run_id: str, note: Note, fingerprint: str) -> list[Entry]:
    dataset = Dataset(Path(root))

    def make_entry() -> Iterator[Entry]:
        if note.text == "damaged":
            raise UserError(f"slide {note.slide_id} is damaged: fetch it again")
        path = dataset.root / "notes" / f"{note.slide_id}.txt"
        record = commit_bytes(dataset, run_id, path, note.text.encode())
        yield Entry(note.slide_id, "done", fingerprint, files=(record,), counts={"notes": 1})

    return collect_entries(make_entry(), note.slide_id, fingerprint)


class NoteStage(Stage[Note]):
    name = label = "notes"
    rate_of = "notes"
    work = staticmethod(write_note)

    def __init__(self, dataset: Dataset, notes: list[Note], language: str = "en") -> None:
        super().__init__(dataset)
        self.notes, self.language = notes, language

    def identity_claims(self) -> dict[str, Any]:
        return {"language": self.language}

    def list_items(self) -> list[Note]:
        return self.notes

    def item_fingerprint(self, item: Note) -> str:
        return fingerprint_of(stage=self.name, text=item.text, language=self.identity["language"])

    def reason_to_refuse(
        self, item: Note, fingerprint: str, ledger: Ledger
    ) -> tuple[Outcome, str] | None:
        return None if item.text else ("rejected", "its text is empty")

    def make_task(self, item: Note, fingerprint: str, missing: Missing, run_id: str) -> SlideTask:
        arguments = (str(self.dataset.root), run_id, item, fingerprint)
        return SlideTask(item.slide_id, fingerprint, arguments)

    @property
    def output_path(self) -> Path:
        return self.dataset.root / "notes"


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    made = Dataset(tmp_path / "dataset")
    claim_identity(made, {"mpp": 0.5}, stage="scan", versions={})
    return made


NOTES = [Note("a", "one"), Note("b", "two"), Note("c", "damaged"), Note("d", "")]


def outcomes(dataset: Dataset) -> list[tuple[str, str]]:
    return sorted((e.slide_id, e.outcome) for e in read_journal(dataset, "notes"))


def test_what_is_done_is_skipped_and_what_failed_is_tried_again(
    dataset: Dataset, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_stage(NoteStage(dataset, NOTES), ONE_WORKER) == 1
    first = [("a", "done"), ("b", "done"), ("c", "failed"), ("d", "rejected")]
    assert outcomes(dataset) == first
    assert "2 done, 1 rejected, 1 failed; 2 notes; wrote 2 files" in capsys.readouterr().out
    assert run_stage(NoteStage(dataset, NOTES), ONE_WORKER) == 1
    assert outcomes(dataset) == sorted([*first, ("c", "failed"), ("d", "rejected")])
    assert "2 already done, nothing to redo, 1 rejected, 1 failed" in capsys.readouterr().out
    assert read_identity(dataset)["language"] == "en"


def test_a_lost_file_or_another_text_is_made_again(dataset: Dataset) -> None:
    notes = NOTES[:2]
    assert run_stage(NoteStage(dataset, notes), ONE_WORKER) == 0
    (dataset.root / "notes" / "a.txt").unlink()
    changed = [notes[0], replace(notes[1], text="three")]
    assert run_stage(NoteStage(dataset, changed), ONE_WORKER) == 0
    assert [name for name, _ in outcomes(dataset)] == ["a", "a", "b", "b"]
    assert (dataset.root / "notes" / "a.txt").read_text() == "one"
    assert (dataset.root / "notes" / "b.txt").read_text() == "three"


def test_another_identity_is_refused_before_any_work(dataset: Dataset) -> None:
    assert run_stage(NoteStage(dataset, NOTES[:1]), ONE_WORKER) == 0
    with pytest.raises(UserError, match="language is 'en' in this dataset, 'de'"):
        run_stage(NoteStage(dataset, NOTES[:2], language="de"), ONE_WORKER)
    assert outcomes(dataset) == [("a", "done")]


def test_an_element_of_a_job_array_does_its_part_alone(dataset: Dataset) -> None:
    notes = [Note(f"s{i}", "text") for i in range(6)]
    parts = []
    for element in range(2):
        before = len(outcomes(dataset))
        assert run_stage(NoteStage(dataset, notes), EngineConfig(1, array=(element, 2))) == 0
        parts.append(len(outcomes(dataset)) - before)
    assert sum(parts) == 6
    assert len({name for name, _ in outcomes(dataset)}) == 6
