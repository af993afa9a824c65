"""Whether a hold-out still is one: by the patients of slides.parquet as it is now.

A selection is made by the patients that the table stated then. Where a table of slides says
otherwise later, a patient may be on both sides, although every selection is as it was made.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import pyarrow as pa

from common.errors import UserError
from common.text import same_identity_key
from pipeline.dataset.layout import Dataset
from pipeline.dataset.tables.parquet_table import Column, read_table
from pipeline.dataset.tables.selections import read_plan, read_selection_rows

_SHOWN = 3
_COLUMNS = (
    Column("slide_id", pa.string()),
    Column("patient", pa.string(), required=False, nullable=True),
)


def shared_patients(
    left: Iterable[str], right: Iterable[str], patient_of: Mapping[str, str]
) -> dict[str, tuple[str, str]]:
    """Patients with slides in both, each with one slide of either; sorted by patient.

    A patient is one however the name is written (see `same_identity_key`), and is called as on the
    left. A slide without a patient ('' or not in the mapping) is its own patient.

    >>> shared_patients(["a", "b"], ["b", "c"], {"a": "P", "c": "P"})
    {'P': ('a', 'c'), 'b': ('b', 'b')}
    """
    sides: list[dict[tuple[str, str], str]] = [{}, {}]
    names: dict[tuple[str, str], str] = {}
    for slides, by_patient in zip((left, right), sides, strict=True):
        for slide_id in sorted(slides):
            patient = patient_of.get(slide_id, "")
            known = same_identity_key(patient)
            # Marked, so that a slide's name never equals a patient's.
            key = ("patient", known) if known else ("slide", same_identity_key(slide_id))
            names.setdefault(key, patient if known else slide_id)
            by_patient.setdefault(key, slide_id)
    first, second = sides
    return {names[key]: (first[key], second[key]) for key in sorted(first.keys() & second.keys())}


def read_patients(dataset: Dataset) -> dict[str, str]:
    """The patient of each slide of slides.parquet, '' where it states none; {} without a table."""
    if not dataset.slides_file.exists():
        return {}
    table = read_table(dataset.slides_file, _COLUMNS, "run `python -m pipeline scan` first")
    slide_ids = table["slide_id"].to_pylist()
    if "patient" not in table.column_names:
        return dict.fromkeys(slide_ids, "")
    return dict(zip(slide_ids, (one or "" for one in table["patient"].to_pylist()), strict=True))


def check_held_out(
    dataset: Dataset, name: str, slide_ids: Collection[str], hold_outs: Iterable[str]
) -> None:
    """Refuse a selection that has slides of patients of one of these hold-outs.

    `slide_ids` are those of the selection. Raises `UserError` naming patients and slides.
    """
    patient_of = read_patients(dataset)
    for held in sorted({*hold_outs} & {*dataset.selection_names()} - {name}):
        if shared := _shared(dataset, slide_ids, held, patient_of):
            raise UserError(
                f"{describe_leak(dataset, name, held, shared)}: make both again, the hold-out "
                f"first (`python -m pipeline select --remove {name} --remove {held}` removes them)"
            )


def find_leaks(dataset: Dataset, name: str) -> Iterator[str]:
    """What selections share with the hold-outs whose patients they leave alone, in words.

    Of the named selection with its hold-outs; where it is one, of those that leave it alone.
    """
    patient_of = read_patients(dataset)
    names = dataset.selection_names()
    for one in names:
        for held in sorted(honoured(dataset, one) & {*names}):
            if name in (one, held):
                slide_ids = read_selection_rows(dataset, one).slide_ids
                if shared := _shared(dataset, slide_ids, held, patient_of):
                    yield describe_leak(dataset, one, held, shared)


def honoured(dataset: Dataset, name: str) -> set[str]:
    """The hold-outs whose patients a selection leaves alone, by its plan."""
    ties = _read_ties(dataset, name)
    honours = ties.get("honours")
    wholes = ancestors(dataset, str(ties.get("parent") or ""))
    return set(honours) - wholes if isinstance(honours, dict) else set()


def ancestors(dataset: Dataset, parent: str) -> set[str]:
    """A selection and those that it was drawn from: a part of a hold-out binds it, and is of it."""
    found: set[str] = set()
    while parent not in ("", *found):
        found.add(parent)
        is_there = parent in dataset.selection_names()
        parent = str(_read_ties(dataset, parent).get("parent") or "") if is_there else ""
    return found


def is_hold_out(dataset: Dataset, name: str) -> bool:
    """Whether a selection holds out patients, by its plan."""
    return bool(_read_ties(dataset, name).get("patients"))


def _read_ties(dataset: Dataset, name: str) -> dict[str, Any]:
    """What binds a selection to others, as its plan has it; {} for nothing."""
    ties = read_plan(dataset, name).get("ties")
    return ties if isinstance(ties, dict) else {}


def describe_leak(
    dataset: Dataset, name: str, held: str, shared: Mapping[str, tuple[str, str]]
) -> str:
    """Which patients of a hold-out a selection has, with a slide of each on either side."""
    some = [
        f"{patient} (slide {left}; held out: {right or 'by name'})"
        for patient, (left, right) in list(shared.items())[:_SHOWN]
    ]
    more = f" and {len(shared) - _SHOWN:,} more" if len(shared) > _SHOWN else ""
    return (
        f"selection '{name}' has slides of patients that '{held}' holds out, by "
        f"{dataset.slides_file} as it is now: {', '.join(some)}{more}"
    )


def _shared(
    dataset: Dataset, slide_ids: Collection[str], held: str, patient_of: Mapping[str, str]
) -> dict[str, tuple[str, str]]:
    """Patients of slides of both, and of slides whose patient is held out by name."""
    shared = shared_patients(slide_ids, read_selection_rows(dataset, held).slide_ids, patient_of)
    named = _read_ties(dataset, held).get("patients") or ()
    keys = {same_identity_key(one) for one in named if isinstance(one, str)} - {""}
    for slide_id in sorted(slide_ids):
        patient = patient_of.get(slide_id, "")
        if same_identity_key(patient) in keys:
            shared.setdefault(patient, (slide_id, ""))
    return shared
