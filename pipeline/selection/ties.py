"""Which selections a dataset has, and what may not change while others depend on it."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from common.console import print_line
from common.errors import UserError
from common.text import same_identity_key
from pipeline.dataset import Dataset, Entry, Run, Selection, read_journal, read_selection_rows
from pipeline.dataset.claim import SELECTIONS, hold_claim
from pipeline.dataset.tables.selections import read_plan
from pipeline.run.stage import stage_versions
from pipeline.selection.plan import IMPORTED, VAL_OUT, Ties, ties_from_json

STAGE = "select"
_REMOVED = "removed"
"""Fingerprint of the line that `select --remove` writes; `prune` writes others."""


def read_ties(dataset: Dataset, whole: bool = True) -> dict[str, Ties]:
    """Every selection of the dataset, from the journal and from the files' own plans.

    From both, so that a hold-out is honoured although its file or the journal is gone. With
    `whole`, a hold-out that others honour and that is nowhere to be found is refused.
    """
    known: dict[str, Ties] = {}
    for name in dataset.selection_names():
        plan = read_plan(dataset, name)
        # Selections of an earlier release or of another tool are taken for training.
        known[name] = ties_from_json(plan.get("ties")) or Ties(str(plan.get("role", "train")))
    journalled: dict[str, Ties] = {}
    for entry in read_journal(dataset, STAGE):
        if entry.fingerprint == _REMOVED:
            journalled.pop(entry.slide_id, None)
        elif entry.outcome == "done":
            journalled[entry.slide_id] = ties_from_json(entry.values.get("ties")) or Ties("train")
    for name, ties in journalled.items():
        if ties.patients:
            known.setdefault(name, ties)
    for name, ties in sorted(known.items()):
        missing = sorted(set(ties.honours) - set(known))
        if whole and missing:
            raise UserError(
                f"selection '{name}' leaves the patients of hold-out '{missing[0]}' alone, which "
                f"is gone from {dataset.root}: restore {dataset.selection_file(missing[0])}, or "
                f"remove '{name}' (`select --remove {name}`)"
            )
    return known


def held_out(known: Mapping[str, Ties]) -> dict[str, frozenset[str]]:
    """The patients of every hold-out."""
    return {name: frozenset(ties.patients) for name, ties in known.items() if ties.patients}


def check_new_hold_out(
    dataset: Dataset, name: str, patients: tuple[str, ...], slides: Iterable[str]
) -> None:
    """Refuse a hold-out that others contradict.

    `name` is to hold out `patients` (() for a selection that holds out none), all of whose slides
    in the dataset are `slides`, also those of which it takes no tile: a patient in training
    through another slide is no less in training. Selections that honour another choice under that
    name, and selections with tiles of these slides, are listed.
    """
    known = read_ties(dataset)
    # Also for a selection that holds out none: it may have been a hold-out before.
    check_honoured(known, name, patients)
    if not patients:
        return
    wanted = np.array(sorted(slides))
    inside = [
        other
        for other, ties in sorted(known.items())
        if other != name and not _descends_from(known, other, name) and name not in ties.honours
        and ties.role != VAL_OUT and dataset.selection_file(other).exists()
        and np.isin(wanted, read_selection_rows(dataset, other).slide_ids).any()
    ]  # fmt: skip
    if inside:
        raise UserError(
            f"'{name}' would hold out patients of {_quote_all(inside)}: a hold-out comes before "
            f"the selections that are to leave it alone; {_remove_first(inside)} and make them "
            "again"
        )


def check_honoured(known: Mapping[str, Ties], name: str, patients: tuple[str, ...]) -> None:
    """Refuse `name` with other patients than those that selections leave alone on its account."""
    before = known.get(name)
    if before is None or not before.patients:
        return
    # By key: the same patients may be written otherwise since.
    former, present = (set(map(same_identity_key, some)) for some in (before.patients, patients))
    if former != present:
        bound = sorted(other for other, ties in known.items() if name in ties.honours)
        if bound:
            raise UserError(
                f"'{name}' holds out {len(before.patients):,} patients that {_quote_all(bound)} "
                f"leave{'s' if len(bound) == 1 else ''} alone; another choice would put them into "
                f"training: {_remove_first(bound)}, or give this hold-out another name"
            )


def check_not_imported(dataset: Dataset, doing: str) -> None:
    """Refuse to draw from all slides where selections were imported, which are the split itself.

    Their rows keep no reserve, and only their names may say that they are not for training: what
    is drawn anew could have tiles of any of them.
    """
    names = dataset.selection_names()
    imported = [name for name in names if read_plan(dataset, name).get("rule") == IMPORTED]
    if imported:
        raise UserError(
            f"{doing} would take tiles of the imported selections {_quote_all(imported)}, which "
            "are the split: draw from one of them (--from NAME), or remove them first, one by one "
            "(`select --remove NAME`)"
        )


def check_may_change(known: Mapping[str, Ties], name: str, doing: str) -> None:
    """Refuse to replace or remove a selection that others were drawn from."""
    children = sorted(other for other, ties in known.items() if ties.parent == name)
    if children:
        raise UserError(
            f"{doing} '{name}': {_quote_all(children)} {'was' if len(children) == 1 else 'were'} "
            f"drawn from it; {_remove_first(children)}, or use another --name"
        )


def describe_replacement(dataset: Dataset, selection: Selection) -> str:
    """What of the file of that name a new selection would replace; "" for the same rows, or none.

    Raises `UserError` where the file cannot be read.
    """
    if selection.name not in dataset.selection_names():
        return ""
    old = read_selection_rows(dataset, selection.name)
    if old.content_hash == selection.content_hash:
        return ""
    new, former = (
        f"{one.rows:,} tiles of {len(one.slide_ids):,} slide{'s' * (len(one.slide_ids) != 1)}"
        for one in (selection, old)
    )
    return f"{new} in place of {former}" + (" (others)" if new == former else "")


def check_replaced(dataset: Dataset, selection: Selection, *, is_same: bool, replace: bool) -> None:
    """Refuse to replace a selection that was made with other options, unless `replace`.

    `is_same` says that the options are those it was made with: then the dataset has changed, and
    the selection follows it, which is said.
    """
    change = describe_replacement(dataset, selection)
    if not change:
        return
    if not (is_same or replace):
        raise UserError(
            f"selection '{selection.name}' is there already and was made otherwise; this one "
            f"would have {change}: give --replace to replace it, or another --name"
        )
    why = "made again, as the dataset has changed" if is_same else "replaced"
    print_line(f"select: selection '{selection.name}' is {why}: {change}")


def remove_selection(dataset: Dataset, name: str) -> None:
    """Remove a selection that nothing depends on; its journal line is superseded."""
    with hold_claim(dataset, SELECTIONS, STAGE):
        _remove_claimed(dataset, name)


def _remove_claimed(dataset: Dataset, name: str) -> None:
    known = read_ties(dataset, whole=False)
    if name not in known:
        raise UserError(
            f"no selection '{name}' in {dataset.root}; there: {_quote_all(sorted(known))}"
        )
    check_may_change(known, name, "--remove")
    bound = sorted(other for other, ties in known.items() if name in ties.honours)
    if bound:
        raise UserError(
            f"--remove '{name}': {_quote_all(bound)} leave its patients alone; "
            f"{_remove_first(bound)}"
        )
    path = dataset.selection_file(name)
    dataset.refuse_linked_folders(path)
    with Run(dataset, STAGE, stage_versions()) as run:
        # The line first: a crash in between leaves a file that no line names.
        run.append([Entry(name, "pruned", _REMOVED, "removed by the user")])
        path.unlink(missing_ok=True)
        excluded_file(dataset, name).unlink(missing_ok=True)
    print_line(f"select: removed selection '{name}'; tiles and features stay")


def excluded_file(dataset: Dataset, name: str) -> Path:
    """The list of slides that a selection left out, with reasons."""
    return dataset.selection_file(name).with_suffix(".excluded.csv")


def _descends_from(known: Mapping[str, Ties], name: str, ancestor: str) -> bool:
    while name in known and known[name].parent:
        name = known[name].parent
        if name == ancestor:
            return True
    return False


def _quote_all(names: list[str]) -> str:
    return ", ".join(f"'{name}'" for name in names) or "none"


def _remove_first(names: list[str]) -> str:
    commands = " ".join(f"--remove {name}" for name in names)
    return f"remove {'it' if len(names) == 1 else 'them'} first (`select {commands}`)"
