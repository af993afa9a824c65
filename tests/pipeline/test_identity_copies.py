"""dataset.json is there twice: what is damaged or missing comes back, what is sound is left."""

import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from common.errors import UserError
from pipeline.__main__ import main
from pipeline.dataset import Dataset, claim_identity, open_dataset
from pipeline.dataset.identity import copy_file
from pipeline.dataset.lock import hold_lock

SCAN, TILE = {"mpp": 0.5, "tile_px": 224}, {"codec": "png"}


def claim(dataset: Dataset, stage: str, values: dict[str, object]) -> None:
    claim_identity(dataset, values, stage=stage, versions={"numpy": "2"})


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    made = Dataset(tmp_path / "ds")
    claim(made, "scan", SCAN)
    claim(made, "tile", TILE)
    return made


def verify(dataset: Dataset, *options: str) -> int:
    return main(["verify", "--dataset", str(dataset.root), *options])


DAMAGES = {
    "empty": lambda data: b"",
    "zeros": lambda data: bytes(len(data)),
    "cut": lambda data: data[: len(data) // 2],
    "changed": lambda data: data.replace(b"0.5", b"0.6"),
    "no object": lambda data: b"[1]",
    "deep": lambda data: b"[" * 100_000,
    "spaces": lambda data: data + b" ",
    "another key": lambda data: data.replace(b'"crc"', b'"crd"'),
    "missing": None,
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_identity_is_said_in_one_line_and_restored(
    dataset: Dataset, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file, change = dataset.identity_file, DAMAGES[kind]
    sound = file.read_bytes()
    if change is None:
        file.unlink()
    else:
        file.write_bytes(change(sound))
    if kind not in ("spaces", "another key"):  # what readers see is still what was written
        for use in (lambda: open_dataset(dataset.root), lambda: claim(dataset, "scan", SCAN)):
            with pytest.raises(UserError, match=r"verify --dataset .*ds --repair") as caught:
                use()
            assert "\n" not in str(caught.value)
    assert verify(dataset) == 1
    assert "--repair" in capsys.readouterr().out
    assert verify(dataset, "--repair") == 0
    assert "restored dataset.json" in capsys.readouterr().out
    assert file.read_bytes() == sound
    kept = dataset.root / ".damaged" / "dataset.json"
    assert kept.exists() == (kind not in ("empty", "zeros", "missing"))
    assert verify(dataset) == 0


def test_a_damaged_copy_is_found_and_restored(dataset: Dataset) -> None:
    copy = copy_file(dataset, "tile")
    sound = copy.read_bytes()
    copy.write_bytes(sound[:-9])
    assert verify(dataset) == 1
    assert verify(dataset, "--repair") == 0
    assert verify(dataset) == 0
    assert copy.read_bytes() == sound


def test_copies_of_different_stages_make_one_identity(dataset: Dataset) -> None:
    """A stage that claims again leaves the other stages' copies as they were."""
    claim_identity(dataset, SCAN, stage="scan", versions={"numpy": "3"})
    sound = dataset.identity_file.read_bytes()
    dataset.identity_file.unlink()
    assert verify(dataset, "--repair") == 0
    assert dataset.identity_file.read_bytes() == sound


def test_what_may_be_sound_is_left(dataset: Dataset, capsys: pytest.CaptureFixture[str]) -> None:
    """A newer format's file, one that was edited on purpose, and one that cannot be opened."""
    file = dataset.identity_file
    document = json.loads(file.read_text())
    document["identity"]["format_version"] = 2
    file.write_text(json.dumps(document))
    assert verify(dataset, "--repair") == 1
    assert json.loads(file.read_text()) == document
    document["identity"] |= {"format_version": 1, "mpp": 0.25}
    del document["crc"]
    file.write_text(json.dumps(document))
    assert verify(dataset, "--repair") == 0
    assert open_dataset(dataset.root)
    assert json.loads(file.read_text()) == document
    file.unlink()
    file.mkdir()
    assert verify(dataset, "--repair") == 1
    assert "restored" not in capsys.readouterr().out


def test_a_dataset_of_an_earlier_release_gets_its_copies(dataset: Dataset) -> None:
    for stage in ("scan", "tile"):
        copy_file(dataset, stage).unlink()
    claim(dataset, "scan", SCAN)  # it is all there already, but for the copy
    sound = dataset.identity_file.read_bytes()
    assert copy_file(dataset, "scan").read_bytes() == sound


def test_without_a_copy_the_message_says_what_is_left(
    dataset: Dataset, capsys: pytest.CaptureFixture[str]
) -> None:
    for stage in ("scan", "tile"):
        copy_file(dataset, stage).unlink()
    sound = dataset.identity_file.read_bytes()
    dataset.identity_file.write_bytes(b"")
    with pytest.raises(UserError, match=r"is empty.*remove it and run the stages.*same options"):
        claim(dataset, "scan", SCAN)
    assert verify(dataset, "--repair") == 1
    assert "same options" in " ".join(capsys.readouterr().out.split())
    # And that is true.
    dataset.identity_file.unlink()
    claim(dataset, "scan", SCAN)
    claim(dataset, "tile", TILE)
    assert dataset.identity_file.read_bytes() == sound


def test_a_run_waits_for_the_one_that_makes_the_dataset(tmp_path: Path) -> None:
    """The elements of a job array begin at once; the first has its copy before dataset.json."""
    dataset = Dataset(tmp_path / "d")
    claim_identity(dataset, {"mpp": 0.5}, stage="scan", versions={})
    made = dataset.identity_file.read_bytes()
    dataset.identity_file.unlink()
    with ThreadPoolExecutor(1) as pool:
        with hold_lock(dataset.staging_dir("dataset.json.lock")):
            claimed = pool.submit(claim_identity, dataset, {"mpp": 0.5}, stage="scan", versions={})
            time.sleep(0.3)
            assert not claimed.done()
            dataset.identity_file.write_bytes(made)
        assert claimed.result(30)["mpp"] == 0.5


def test_a_first_stage_that_was_stopped_between_copy_and_identity_begins_again(
    tmp_path: Path,
) -> None:
    """By a full disk or a kill. Once there is a journal, what is missing was lost."""
    begun, journal = Dataset(tmp_path / "ds"), tmp_path / "ds" / "status" / "scan" / "1.jsonl"
    claim(begun, "scan", SCAN)
    whole = begun.identity_file.read_bytes()
    begun.identity_file.unlink()
    claim(begun, "scan", SCAN)
    assert begun.identity_file.read_bytes() == whole
    begun.identity_file.unlink()
    journal.touch()
    with pytest.raises(UserError, match="--repair"):
        claim(begun, "scan", SCAN)
