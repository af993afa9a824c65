"""Results that a later stage found to be lost: taken back, so that their stage makes them again.

A stage that meets a damaged file of an earlier one, or another slide file than `scan` recorded,
fails that slide alone and names the stage to run. The sizes and times of files, by which stages
plan, may say nothing of the damage: this is how the stage that was named comes to know of it.
"""

from collections.abc import Iterable
from dataclasses import replace

from common.errors import UserError
from common.files import hash_file
from pipeline.dataset import Dataset, Entry, Ledger, Run, software_versions

WITHDRAW = "withdraw"
"""In a failed line's values: the stage whose result of the slide is void."""
_BY_FILES = ("tissue",)
_WHOLE = ("scan",)


class LostResultError(UserError):
    """A file that an earlier stage wrote of one slide is damaged; `stage` makes it again."""

    def __init__(self, message: object, stage: str) -> None:
        super().__init__(message)
        self.values = {WITHDRAW: stage}


def withdraw_lost(dataset: Dataset, entries: Iterable[Entry]) -> None:
    """Take back, in its stage's journal, each result that these lines say is lost.

    One that has files is only taken back where they are other ones than were written: the reason
    may have been another. Where the journal cannot be written the failures remain as they are.
    """
    lost: dict[str, set[str]] = {}
    for entry in entries:
        stage = entry.values.get(WITHDRAW) if entry.outcome == "failed" else None
        if stage in (*_BY_FILES, *_WHOLE):
            lost.setdefault(str(stage), set()).add(entry.slide_id)
    for stage, slide_ids in lost.items():
        ledger = Ledger.read(dataset, stage)[""]
        lines = [
            replace(entry, outcome="pruned", files=(), counts={}, seconds=0.0,
                    reason="its file is another one by now, or is damaged")
            for slide_id in sorted(slide_ids)
            for entry in ledger.entries(slide_id)
            if entry.outcome in ("done", "rejected")
            and (stage in _WHOLE or find_damaged(dataset, entry))
        ]  # fmt: skip
        if lines:
            with Run(dataset, stage, software_versions()) as run:
                run.append(lines)


def find_damaged(dataset: Dataset, entry: Entry) -> list[str]:
    """The paths of an entry's files that are there with other bytes than were written."""
    damaged = []
    for record in entry.files:
        try:
            if hash_file(dataset.resolve_inside(record.path)) != record.sha256:
                damaged.append(record.path)
        except OSError:
            # A file that is missing is made again anyway; one that cannot be read may be sound.
            continue
    return damaged
