"""A synthetic dataset is covered by `pipeline verify`, and `generate` makes again what it loses."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest
from evaluate_data import ALONE, Stripes

from evaluate.generate.condition_source import SelectionConditions
from evaluate.generate.run import Request, generate
from pipeline.__main__ import main
from pipeline.dataset import Dataset


def verify(dataset: Dataset, capsys: pytest.CaptureFixture[str], *more: str) -> tuple[int, str]:
    capsys.readouterr()
    status = main(["verify", "--dataset", str(dataset.root), "--workers", "1", *more])
    return status, capsys.readouterr().out


def test_every_file_is_covered_and_made_again_when_lost(
    evaluate_real: Callable[..., Dataset], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    guidance = SelectionConditions.open_selection(evaluate_real(), "train", "h0-mini")
    request = Request(out=tmp_path / "syn", mpp=0.5)
    generate(Stripes(), guidance, request, ALONE)
    dataset = Dataset(tmp_path / "syn")
    status, out = verify(dataset, capsys)
    assert status == 0
    assert "not covered" not in out
    rng = random.Random(1)
    # A run's log of events and the card are for people; nothing reads them, so no sum covers them.
    files = sorted(p for p in dataset.root.rglob("*") if p.is_file())
    files = [p for p in files if p.suffix not in (".log", ".md")]
    for path in files:
        sound = path.read_bytes()
        for _ in range(3):
            data = bytearray(sound)
            data[rng.randrange(len(data))] ^= rng.randrange(1, 256)
            path.write_bytes(data)
            status, out = verify(dataset, capsys)
            assert status == 1, path
            assert dataset.relative_path(path) in out
        path.write_bytes(sound)
    kept = {path: path.read_bytes() for path in files}
    (tar,) = dataset.root.rglob("*.tar")
    for path in (tar, dataset.slides_file, dataset.candidates_file("gen-00000")):
        path.write_bytes(path.read_bytes()[:-1] + b"?")
    status, out = verify(dataset, capsys, "--repair")
    assert status == 1
    assert "`evaluate generate`" in out
    generate(Stripes(), guidance, request, ALONE)
    assert verify(dataset, capsys)[0] == 0
    assert all(path.read_bytes() == data for path, data in kept.items())


def test_prune_leaves_a_synthetic_dataset_and_its_uncovered_tables_alone(
    evaluate_real: Callable[..., Dataset], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also one of an older release, whose tables no journal line names."""
    guidance = SelectionConditions.open_selection(evaluate_real(), "train", "h0-mini")
    generate(Stripes(), guidance, Request(out=tmp_path / "syn"), ALONE)
    dataset = Dataset(tmp_path / "syn")
    for journal in dataset.status_dir("generate").iterdir():
        journal.unlink()
    before = sorted(dataset.root.rglob("*"))
    assert main(["prune", "--yes", "--dataset", str(dataset.root)]) == 0
    assert "nothing to remove" in capsys.readouterr().out
    assert sorted(dataset.root.rglob("*")) == before
    status, out = verify(dataset, capsys)
    assert status == 0
    assert "not covered" in out
