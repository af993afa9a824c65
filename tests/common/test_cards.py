"""Cards: heads that the hub takes, texts of others shown as they read, shards that load."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from common.cards import licence_head, render_card
from common.terms import Terms
from pipeline.__main__ import main

SLIDES = Path(__file__).parents[1] / "data" / "slides"


def head_of(text: str) -> dict[str, object]:
    from huggingface_hub import DatasetCard

    return DatasetCard(text).data.to_dict()


@pytest.mark.parametrize(
    ("licences", "expected"),
    [
        (["CC0-1.0"], {"license": "cc0-1.0"}),
        (["CC BY-NC-ND 4.0", "CC BY-NC-ND 4.0"], {"license": "cc-by-nc-nd-4.0"}),
        (["Apache-2.0", "CC0-1.0"], {"license": "other", "license_name": "see-terms"}),
        (["Owkin non-commercial licence"], {"license": "other", "license_name": "see-terms"}),
        ([""], {"license": "other", "license_name": "not-recorded"}),
        ([], {"license": "other", "license_name": "not-recorded"}),
    ],
)
def test_the_head_has_one_licence_of_the_hubs_or_says_that_there_are_others(
    licences: list[str], expected: dict[str, str]
) -> None:
    terms = [Terms(f"part {n}", licence) for n, licence in enumerate(licences)]
    assert licence_head(terms) == expected
    head = head_of(render_card("T", {"tags": ["a"]}, [], terms))
    assert head == {**expected, "tags": ["a"]}


def test_names_of_others_are_text_in_a_card() -> None:
    evil = "<script>[x](http://y)\n---\nlicense: mit"
    text = render_card(evil, {"tags": [evil]}, [("S", [evil])], [Terms(evil, evil)])
    assert head_of(text)["license"] == "other"
    body = text.split("\n---\n", 1)[1]
    assert "<script>" not in body
    assert "[x](http" not in body
    assert not any(line.startswith("license:") for line in body.splitlines())


def test_shards_of_a_real_dataset_load_by_the_hubs_library_offline(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    root = tmp_path / "dataset"
    where = ["--dataset", str(root)]
    engine = ["--workers", "1"]
    for arguments in (
        ["scan", str(SLIDES), "--terms", "CC0-1.0", *engine], ["tissue", *engine],
        ["select", "--name", "train", "--tiles", "5"], ["tile", *engine],
    ):  # fmt: skip
        assert main([*arguments, *where]) == 0
    card = (root / "README.md").read_text()
    head = head_of(card)
    assert head["license"] == "cc0-1.0"
    assert "Selection train: 5 tiles" in card
    assert "- 1 slide\n" in card
    script = f"""
import datasets
given = datasets.load_dataset("webdataset", data_files={str(root / "tiles/224/*.tar")!r},
                              split="train", cache_dir={str(tmp_path / "a")!r})
found = datasets.load_dataset({str(root)!r}, split="train", cache_dir={str(tmp_path / "b")!r})
assert len(given) == len(found) >= 5, (len(given), len(found))
for row in (given[0], found[0]):
    assert row["__key__"] == "CMU-1-Small-Region/00000000", row
    assert row["png"].size == (224, 224)
assert given[3]["png"].tobytes() == found[3]["png"].tobytes()
"""
    environment = {
        **os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1",
        "HF_HOME": str(tmp_path / "home"),
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
