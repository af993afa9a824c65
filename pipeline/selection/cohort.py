"""A cohort as columns, and which of its slides may be selected from: pure functions of arrays."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from common.errors import UserError
from common.text import first_forms, joined_names, same_identity_key
from pipeline.selection.config import Rules

Text = npt.NDArray[np.str_]

DUPLICATE, FROZEN = "duplicate file", "frozen section"
SAMPLE_TYPE, FEW_CANDIDATES, HELD_OUT = "sample type", "few candidates", "held out"


@dataclass(frozen=True)
class Cohort:
    """Slides sorted by slide_id, one array [slides] per column; build with `make_cohort`.

    `patient` is the slide_id where none is known, so that such a slide is its own patient.
    `family` is the lowest patient of those connected by a shared file, or by a name that differs
    only in form (see `same_identity_key`): they must stay on one side of any split. Sites, projects
    and the like that differ only in form are one, in the form that sorts first. `content` names
    the file, equal on slides with an equal md5 or an equal sha256,
    '' where both are unknown; `candidates` is int64.
    """

    slide_id: Text
    patient: Text
    family: Text
    site: Text
    project: Text
    sample_type: Text
    preparation: Text
    content: Text
    candidates: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.slide_id)

    def take(self, chosen: npt.NDArray[np.bool_] | npt.NDArray[np.int64]) -> "Cohort":
        """The rows of a mask (bool) or of ascending indices (int64); families stay the whole's."""
        columns = {name: getattr(self, name)[chosen] for name in self.__dataclass_fields__}
        return replace(self, **columns)

    def strata(self, stratify: str) -> Text:
        """The stratum of each slide [n]: `site`, `project`, `project+site` or `none`."""
        if stratify == "none":
            return np.full(len(self), "all")
        if stratify == "project+site":
            pairs = zip(self.project, self.site, strict=True)
            return np.array([f"{project}/{site}" for project, site in pairs])
        return self.site if stratify == "site" else self.project


@dataclass(frozen=True)
class Exclusion:
    """A slide that was left out: the rule, what it found, and how many candidates went with it."""

    slide_id: str
    reason: str
    detail: str = ""
    candidates: int = 0


def make_cohort(
    *,
    slide_id: Sequence[str],
    patient: Sequence[str],
    site: Sequence[str],
    project: Sequence[str],
    sample_type: Sequence[str],
    preparation: Sequence[str],
    md5: Sequence[str],
    sha256: Sequence[str],
    candidates: Sequence[int] | npt.NDArray[np.int64],
    sampled: Sequence[str] = (),
) -> Cohort:
    """A cohort from columns in any order; sums are '' where unknown.

    Slides whose `sampled` is equal are one file for what it shows, and stay on one side of a split.
    Raises `UserError` where a slide_id comes twice.
    """
    # By slide_id: nothing that is drawn later may depend on the order of the table.
    names = np.array(slide_id, dtype=np.str_)
    order = np.argsort(names, kind="stable")
    names = names[order]
    twice = np.flatnonzero(names[1:] == names[:-1])
    if len(twice):
        raise UserError(f"slide_id {names[twice[0]]} comes twice; expected each slide once")

    def column(values: Sequence[str]) -> Text:
        return np.array(values, dtype=np.str_)[order] if len(values) else np.zeros(0, np.str_)

    known = column(patient)
    patients = np.where(identity_keys(known) == "", names, known)
    contents = _name_contents(identity_keys(column(md5)), identity_keys(column(sha256)))
    samples = column(sampled or [""] * len(names))
    return Cohort(
        slide_id=names, patient=patients, family=_connect_families(patients, contents, samples),
        site=one_form(column(site)), project=one_form(column(project)),
        sample_type=one_form(column(sample_type)),
        preparation=identity_keys(column(preparation)), content=contents,
        candidates=np.asarray(candidates, np.int64)[order],
    )  # fmt: skip


def identity_keys(names: Text) -> Text:
    """What names [n] share that are one identity, however they are written."""
    distinct, member = np.unique(names, return_inverse=True)
    keys = [same_identity_key(name) for name in distinct.tolist()]
    return np.array(keys, np.str_)[member] if keys else np.zeros(0, np.str_)


def one_form(names: Text) -> Text:
    """Names [n], those that differ only in form in the form that sorts first."""
    distinct, member = np.unique(names, return_inverse=True)
    first = first_forms(distinct.tolist())
    forms = [first[same_identity_key(name)] for name in distinct.tolist()]
    return np.array(forms, np.str_)[member] if forms else np.zeros(0, np.str_)


def _name_contents(md5: Text, sha256: Text) -> Text:
    """One name per file: the md5 (else sha256) of the first slide that is known to have it.

    A manifest gives one slide's md5 and a scan another's sha256: a third that has both connects
    them, and one with a sum in common is enough.
    """
    first = np.arange(len(md5))
    groups = []
    for sums in (md5, sha256):
        known = np.flatnonzero(sums != "")
        groups.append((known, np.unique(sums[known], return_inverse=True)[1]))
    while True:
        before = first.copy()
        # Each slide takes over the lowest index among those with which it shares a sum.
        for known, group in groups:
            lowest = np.full(len(known), len(md5))
            np.minimum.at(lowest, group, first[known])
            first[known] = lowest[group]
        first = first[first]
        if np.array_equal(first, before):
            return np.where(md5 != "", md5, sha256)[first]


def _connect_families(patients: Text, *contents: Text) -> Text:
    """The lowest patient of each connected group; `contents` are columns of names of files.

    Patients with a file in common connect, and those whose names differ only in form.
    """
    parent = {str(patient): str(patient) for patient in np.unique(patients)}

    def root(name: str) -> str:
        while parent[name] != name:
            parent[name] = name = parent[parent[name]]
        return name

    def connect(one: str, other: str) -> None:
        low, high = sorted((root(one), root(other)))
        parent[high] = low

    for forms in joined_names(parent).values():
        for form in forms[1:]:
            connect(forms[0], form)
    for column in contents:
        first: dict[str, str] = {}
        for patient, content in zip(patients.tolist(), column.tolist(), strict=True):
            if content:
                connect(first.setdefault(content, patient), patient)
    return np.array([root(patient) for patient in patients.tolist()], dtype=patients.dtype)


def keep_eligible(cohort: Cohort, rules: Rules) -> tuple[Cohort, list[Exclusion]]:
    """The slides that the rules leave, and every other one with the first rule that excludes it.

    The rules in order: a file that a slide with a lower slide_id has as well (also where the two
    claim different patients), frozen sections, other sample types, too few candidates.
    """
    # The copy with the lowest slide_id stays, in whichever order the files were listed.
    first: dict[str, int] = {}
    is_kept = np.ones(len(cohort), bool)
    excluded = []
    for index, content in enumerate(cohort.content.tolist()):
        original = first.setdefault(content, index) if content else index
        reason: tuple[str, str] | tuple[()]
        if original != index:
            same = same_identity_key(str(cohort.patient[index])) == same_identity_key(
                str(cohort.patient[original])
            )
            whose = "" if same else f" of another patient, {cohort.patient[original]}"
            reason = (DUPLICATE, f"the file of {cohort.slide_id[original]}{whose}")
        else:
            reason = _broken_rule(cohort, index, rules)
        if reason:
            is_kept[index] = False
            candidates = int(cohort.candidates[index])
            excluded.append(Exclusion(str(cohort.slide_id[index]), *reason, candidates))
    return cohort.take(is_kept), excluded


def _broken_rule(cohort: Cohort, index: int, rules: Rules) -> tuple[str, str] | tuple[()]:
    """The first rule that excludes the slide, and what was found; () where none does."""
    sample_type, count = str(cohort.sample_type[index]), int(cohort.candidates[index])
    if cohort.preparation[index] == "frozen" and not rules.frozen:
        return FROZEN, "taken with --frozen only"
    allowed = {same_identity_key(one) for one in rules.sample_types}
    if allowed and same_identity_key(sample_type) not in allowed:
        return SAMPLE_TYPE, f"{sample_type or 'not stated'}, not {', '.join(rules.sample_types)}"
    if count < rules.min_candidates:
        return FEW_CANDIDATES, f"{count}, fewer than {rules.min_candidates}"
    return ()


def without_patients(
    cohort: Cohort, held_out: dict[str, frozenset[str]]
) -> tuple[Cohort, list[Exclusion]]:
    """The cohort without the families of held-out patients, and the slides that went with them.

    `held_out` maps a hold-out's name to its patients.
    """
    # Whole families: a patient who shares a file with a held-out one is seen with it.
    holder: dict[str, str] = {}
    keys = identity_keys(cohort.patient)
    for name in sorted(held_out):
        # By key: a patient may be written otherwise now than when the hold-out was made.
        held = [same_identity_key(patient) for patient in held_out[name]]
        members = np.isin(keys, np.array(sorted(held), np.str_))
        for family in np.unique(cohort.family[members]).tolist():
            holder.setdefault(family, name)
    names = [holder.get(family, "") for family in cohort.family.tolist()]
    excluded = [
        Exclusion(str(cohort.slide_id[i]), HELD_OUT, name, int(cohort.candidates[i]))
        for i, name in enumerate(names)
        if name
    ]
    return cohort.take(np.array([not name for name in names], bool)), excluded
