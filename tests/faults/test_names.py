"""A patient is one, however the name is written: never on both sides of a hold-out."""

import unicodedata

import numpy as np
import pytest
from door_data import candidates_of
from hypothesis import given, settings
from hypothesis import strategies as st

from common.text import same_identity_key
from evaluate.compare.sides import slide_attribute
from pipeline.__main__ import main
from pipeline.dataset import (
    Dataset,
    Entry,
    Run,
    Slide,
    claim_identity,
    make_selection,
    read_identity,
    read_selection,
    software_versions,
    write_candidates,
    write_selection,
    write_slides,
)
from pipeline.dataset.hold_outs import shared_patients
from pipeline.run.summary import Summary
from pipeline.selection.cohort import Cohort, make_cohort, without_patients
from pipeline.selection.hold_out import Cover, choose_hold_out
from pipeline.selection.leakage import equal_files
from pipeline.selection.select import family_patients
from pipeline.slides.scan import _list_joined, record_slides, slide_values
from pipeline.tissue.stage import tissue_fingerprint

WRITINGS = {
    "case": str.swapcase,
    "NFD": lambda name: unicodedata.normalize("NFD", name),
    "NFC": lambda name: unicodedata.normalize("NFC", name),
    "full width": lambda name: "".join(
        chr(ord(one) + 0xFEE0) if "!" <= one <= "~" else one for one in name
    ),
    "blanks": lambda name: f" \t{name}\u00a0\u3000\n",
    "inner blanks": lambda name: name.replace(" ", " \u2009\u00a0 "),
    "zero width": lambda name: "\u200b".join(name),
    "soft hyphen": lambda name: name[:2] + "\u00ad" + name[2:],
    "direction": lambda name: f"\u202a{name}\u202c\ufeff",
    "dash": lambda name: name.replace("-", "\u2011"),
    "minus": lambda name: name.replace("-", "\u2212"),
    "variation": lambda name: name + "\ufe0f",
}
NAMES = ["ABC-9", "Ärzte 12", "ßtraße-3", "Å-77", "patient 01", "ﬁ-2", "ΑΣ-1", "İz-4"]


@pytest.mark.parametrize("writing", WRITINGS)
@pytest.mark.parametrize("name", NAMES)
def test_writings_of_a_name_have_one_key(name, writing):
    assert same_identity_key(WRITINGS[writing](name)) == same_identity_key(name)


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=12))
def test_a_key_is_its_own_key_and_that_of_all_normal_forms(name):
    key = same_identity_key(name)
    assert same_identity_key(key) == key
    for form in ("NFC", "NFD", "NFKC", "NFKD"):
        if not name.startswith("exact:"):
            assert same_identity_key(unicodedata.normalize(form, name)) == key
    assert same_identity_key(f" {name}\u200b ") == key or name.startswith("exact:")


@settings(max_examples=100, deadline=None)
@given(st.text(st.characters(max_codepoint=127), max_size=12))
def test_the_short_cut_for_ascii_is_the_long_way(name):
    # A letter that is folded away makes it take the long way.
    long_way = same_identity_key(name + "\u200b")
    assert same_identity_key(name) == long_way or name.startswith("exact:")


def test_different_names_stay_different():
    names = [
        "ABC-9",
        "ABC9",
        "ABC 9",
        "ABC_9",
        "ABC-09",
        "\u0410BC-9",
        "exact:ABC-9",
        "abc-9x",
        "9",
    ]
    assert len({same_identity_key(name) for name in names}) == len(names)


def _cohort(patients: list[str], md5: list[str] | None = None) -> Cohort:
    count = len(patients)
    return make_cohort(
        slide_id=[f"s{i:03d}" for i in range(count)], patient=patients,
        site=[f"site{i % 3}" for i in range(count)], project=["P"] * count,
        sample_type=["01"] * count, preparation=["ffpe"] * count,
        md5=md5 or [""] * count, sha256=[""] * count, candidates=[10] * count,
    )  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 11), st.sampled_from([*WRITINGS, ""])), min_size=6,
             max_size=40).filter(lambda some: len({number for number, _ in some}) > 3),
    st.integers(0, 5),
)  # fmt: skip
def test_no_writing_of_a_patient_is_on_both_sides(some, seed):
    plain = [f"ABC-{number} é" for number, _ in some]
    written = [
        WRITINGS[how](name) if how else name for name, (_, how) in zip(plain, some, strict=True)
    ]
    cohort = _cohort(written)
    mask = choose_hold_out(cohort, max(1, len(some) // 4), Cover(), seed)
    truth = np.array(plain)
    assert not set(truth[mask]) & set(truth[~mask])
    # A later selection, in a cohort where the names are written as they were at first.
    held = family_patients(cohort, cohort.take(mask))
    free, _ = without_patients(_cohort(plain), {"val-out": frozenset(held)})
    assert not set(free.patient.tolist()) & set(truth[mask])
    sides = [cohort.slide_id[side].tolist() for side in (mask, ~mask)]
    assert not shared_patients(*sides, dict(zip(cohort.slide_id.tolist(), written, strict=True)))


def test_the_cohort_of_names_in_one_form_is_what_it_was():
    """Fingerprints of selections hash its columns: what was made must not be made again."""
    cohort = _cohort(["B", "A", "", "B"], ["m1", "", "m1", ""])
    assert cohort.patient.tolist() == ["B", "A", "s002", "B"]
    assert cohort.family.tolist() == ["B", "A", "B", "B"]
    assert cohort.site.tolist() == ["site0", "site1", "site2", "site0"]
    assert cohort.preparation.tolist() == ["ffpe"] * 4


def test_sites_and_preparations_are_one_however_they_are_written():
    cohort = make_cohort(
        slide_id=["a", "b"], patient=["1", "2"], site=["MSK", " msk\u200b"], project=["X", "Ｘ"],
        sample_type=["01", "０１"], preparation=["Frozen ", "ｆｒｏｚｅｎ"], md5=["AB", "ａｂ"],
        sha256=["", ""], candidates=[1, 1],
    )  # fmt: skip
    for column in (cohort.site, cohort.project, cohort.sample_type, cohort.preparation):
        assert len(set(column.tolist())) == 1
    assert cohort.preparation[0] == "frozen"
    assert len(set(cohort.family.tolist())) == 1, "one file"


def test_the_table_overrules_with_exact():
    cohort = _cohort(["ABC-9", "exact:abc-9", "abc-9", "X", "Y"])
    assert len(set(cohort.family[[0, 2]].tolist())) == 1
    assert cohort.family[1] != cohort.family[0]
    left, right = ["s000"], ["s001"]
    patients = {"s000": "ABC-9", "s001": "exact:abc-9"}
    assert not shared_patients(left, right, patients)
    assert shared_patients(left, right, patients | {"s001": "abc-9 "}) == {
        "ABC-9": ("s000", "s001")
    }


def test_a_patient_of_invisible_letters_is_none():
    assert shared_patients(["a"], ["b"], {"a": "\u200b", "b": "\ufeff "}) == {}
    assert _cohort(["\u200b", "\u200b", "A"]).patient.tolist() == ["s000", "s001", "A"]


def test_sums_are_compared_as_identities():
    assert equal_files(["a"], ["b"], {"a": ("0F",), "b": (" 0f",)}) == [("a", "b")]


@pytest.fixture(scope="module")
def cohort_dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Twelve slides of six patients, each of whom is written in two ways."""
    dataset = Dataset(tmp_path_factory.mktemp("names") / "d")
    versions = software_versions()
    config = {"mpp": 0.5, "mpp_tolerance": 0.02, "tile_px": 224, "seed": 0, "min_tissue": 0.5}
    claim_identity(dataset, config, stage="scan", versions=versions)
    hows = [*WRITINGS.values()]
    slides = [
        Slide(f"S{n:02d}", f"/s/{n}.svs", reader="tiff", mpp=0.5, width=99_999, height=4096,
              levels=((99_999, 4096, 1.0),), bytes=1, mtime_ns=1,
              patient=f"ABC {n // 2}-é" if n % 2 else hows[n](f"ABC {n // 2}-é"))
        for n in range(12)
    ]  # fmt: skip
    with Run(dataset, "scan", versions) as run:
        entries = [Entry(s.slide_id, "done", "f", values=slide_values(s)) for s in slides]
        run.append(entries)
        record_slides(dataset, run, Summary("scan"))
    identity = read_identity(dataset)
    with Run(dataset, "tissue", versions) as run:
        for slide in slides:
            record = write_candidates(dataset, run.run_id, slide.slide_id, candidates_of(20))
            run.append(
                [Entry(slide.slide_id, "done", tissue_fingerprint(slide, identity),
                       files=(record,), counts={"candidate tiles": 20})]
            )  # fmt: skip
    return dataset


def test_select_and_the_proof_of_leakage_by_command(cohort_dataset, capsys):
    root = str(cohort_dataset.root)

    def select(*options: str) -> int:
        return main(["select", "--dataset", root, *options])

    assert select("--name", "val-out", "--hold-out", "4") == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "patients that differ only in form count as one:" in out
    assert select("--name", "train") == 0
    sides = [set(read_selection(cohort_dataset, name).slide_ids) for name in ("val-out", "train")]
    patients = [{int(slide[1:]) // 2 for slide in side} for side in sides]
    assert not patients[0] & patients[1]
    assert len(patients[0]) == 2
    assert main(["verify", "--dataset", root, "--leakage"]) == 0
    assert "differ only in form" in " ".join(capsys.readouterr().out.split())


def test_a_hold_out_of_an_earlier_release_is_found_out(cohort_dataset, capsys):
    """It took one writing of a patient and left the other in training."""
    names = cohort_dataset.selection_names()
    write_selection(cohort_dataset, "x", make_selection("val-out-old", {"S00": np.arange(3)}, {}))
    write_selection(cohort_dataset, "x", make_selection("train-old", {"S01": np.arange(3)}, {}))
    try:
        sides = ["--train", "train-old", "--val-out", "val-out-old"]
        assert main(["verify", "--dataset", str(cohort_dataset.root), "--leakage", *sides]) == 1
        assert "1 leaks" in capsys.readouterr().out
    finally:
        for name in set(cohort_dataset.selection_names()) - set(names):
            cohort_dataset.selection_file(name).unlink()


def test_resampling_by_patient_draws_all_writings_together(cohort_dataset):
    slides = np.array([f"S{n:02d}" for n in range(12)])
    patients = slide_attribute(cohort_dataset, slides, "patient")
    assert len(set(patients.tolist())) == 6
    assert (patients[::2] == patients[1::2]).all()


def test_ids_that_differ_only_in_case_are_named_by_scan(tmp_path):
    dataset = Dataset(tmp_path / "d")
    claim_identity(dataset, {"tile_px": 224}, stage="scan", versions={})
    lines = _list_joined([Slide("S1", "a"), Slide("s1", "b")])
    assert any("differ only in case: S1 and s1" in line for line in lines)
    write_slides(dataset, "x", [Slide("S1", "a"), Slide("s1", "b")])
