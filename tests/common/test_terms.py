"""Terms: read from what others wrote, merged, and kept by a dataset."""

from pathlib import Path
from shutil import copyfile

import pytest
from PIL import Image

from common.errors import UserError
from common.terms import Terms, merge_terms, parse_terms, plain_terms
from pipeline.__main__ import main
from pipeline.dataset import Dataset, claim_identity, read_terms
from pipeline.slides.slide_terms import read_slide_terms

ONE = Terms("slides", "CC0-1.0", "an archive", False, "https://example.org/terms")
OTHER = Terms("encoder x", "CC BY-NC-ND 4.0", non_commercial=True)


def test_records_survive_json_and_are_kept_once_in_their_order() -> None:
    assert parse_terms(plain_terms([ONE, OTHER])) == (ONE, OTHER)
    assert merge_terms([OTHER], [ONE, OTHER]) == (OTHER, ONE)
    assert parse_terms(None) == ()  # of an older release


@pytest.mark.parametrize(
    "wrong",
    ["MIT", [1], [{"covers": 3}], [{"covers": "x", "non_commercial": "perhaps"}], [{}] * 10_001],
)
def test_what_is_no_list_of_terms_is_refused_in_one_line(wrong: object) -> None:
    with pytest.raises(UserError, match=r"^terms: expected") as caught:
        parse_terms(wrong)
    assert "\n" not in str(caught.value)


def test_texts_of_others_are_one_short_line() -> None:
    (found,) = parse_terms([{"covers": "a\nb" * 500, "licence": "MIT"}])
    assert "\n" not in found.describe()
    assert len(found.covers) <= 300


def test_a_dataset_has_the_terms_of_its_stages_and_a_stage_that_states_none_leaves_them(
    tmp_path: Path,
) -> None:
    dataset = Dataset(tmp_path)
    for stage, terms in (("scan", [ONE]), ("generate", [OTHER, ONE]), ("scan", None)):
        claim_identity(dataset, {"mpp": 0.5}, stage=stage, versions={}, terms=terms)
    assert set(read_terms(dataset)) == {ONE, OTHER}
    claim_identity(dataset, {"mpp": 0.5}, stage="scan", versions={}, terms=[OTHER])
    claim_identity(dataset, {"mpp": 0.5}, stage="generate", versions={}, terms=[])
    assert read_terms(dataset) == (OTHER,)


def test_scan_takes_a_licence_a_file_or_columns(tmp_path: Path) -> None:
    slide = Path(__file__).parents[1] / "data" / "slides" / "CMU-1-Small-Region.svs"
    listed = tmp_path / "terms.yaml"
    listed.write_text("- {covers: slides, licence: CC0-1.0, source: OpenSlide test data}\n")
    table = tmp_path / "slides.csv"
    table.write_text(
        f"path,project,licence,non_commercial,licence_link\n{slide},P,Own licence,yes,https://x\n"
    )
    for inputs, given, expected in (
        (slide, ["--terms", "CC0-1.0"], (Terms("slides", "CC0-1.0"),)),
        (slide, ["--terms", str(listed)], (Terms("slides", "CC0-1.0", "OpenSlide test data"),)),
        (table, [], (Terms("slides of P", "Own licence", "", True, "https://x"),)),
        (slide, [], ()),
    ):
        root = tmp_path / str(len(list(tmp_path.iterdir())))
        scan = ["scan", str(inputs), "--dataset", str(root), "--workers", "1"]
        assert main([*scan, *given]) == 0
        assert read_terms(Dataset(root)) == expected
        assert main(scan) == 0  # once more without the option
        assert read_terms(Dataset(root)) == expected
    table.write_text(f"path,non_commercial\n{slide},perhaps\n")
    with pytest.raises(UserError, match=r"line 2.*non_commercial 'perhaps', expected yes or no"):
        main(["scan", str(table), "--dataset", str(tmp_path / "x")])
    rows = "".join(f"{number}.svs,P{number},MIT\n" for number in range(201))
    table.write_text(f"path,project,licence\n{rows}")
    with pytest.raises(UserError, match=r"201 different records .*expected at most 200"):
        main(["scan", str(table), "--dataset", str(tmp_path / "x")])
    with pytest.raises(UserError, match=r"--terms .*absent\.yaml"):
        read_slide_terms(str(tmp_path / "absent.yaml"))


def test_what_was_stated_of_slides_that_stay_is_kept(tmp_path: Path) -> None:
    """Of slides by `scan`, of folders of pictures by `import tiles`."""
    slide = Path(__file__).parents[1] / "data" / "slides" / "CMU-1-Small-Region.svs"
    pictures = tmp_path / "pictures"
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        copyfile(slide, tmp_path / name / f"{name}.svs")
        (pictures / name / name).mkdir(parents=True)
        Image.new("RGB", (32, 32), (200, 120, 180)).save(pictures / name / name / "0.png")
    for dataset, command in (
        ("scanned", lambda name: ["scan", str(tmp_path / name)]),
        ("imported", lambda name: ["import", "tiles", str(pictures / name), "--mpp", "0.5",
                                   "--tile-px", "32"]),
    ):  # fmt: skip
        root = tmp_path / dataset
        end = ["--dataset", str(root), "--workers", "1", "--terms"]
        for name, licence, expected in (
            ("one", "MIT", {"MIT"}),
            ("two", "CC0-1.0", {"MIT", "CC0-1.0"}),
        ):
            assert main([*command(name), *end, licence]) == 0
            assert {one.licence for one in read_terms(Dataset(root))} == expected
    # A scan of all of them states all of them anew.
    both = [str(tmp_path / "one"), str(tmp_path / "two")]
    assert main(["scan", *both, "--dataset", str(tmp_path / "scanned"), "--terms", "BSD"]) == 0
    assert {one.licence for one in read_terms(Dataset(tmp_path / "scanned"))} == {"BSD"}
