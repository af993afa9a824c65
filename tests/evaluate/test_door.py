"""`python -m evaluate ...` with a real, tiny, untrained model: as a person or launcher calls it."""

import os
import signal
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from evaluate_data import (
    DOOR_PX,
    DOOR_RECORD,
    RECORD,
    make_real,
    random_features,
    tile_hashes,
    write_features,
)

from common.errors import UserError
from evaluate.__main__ import main
from evaluate.compare.results import read_results
from evaluate.generate.references import Wanted, read_image
from model import CytoSyn
from pipeline.dataset import (
    Dataset,
    TileStore,
    read_candidates,
    read_identity,
    read_journal,
    read_selection,
)
from pipeline.dataset.features import FeatureStore

_PX, _RECORD = DOOR_PX, DOOR_RECORD


def environment(threads: int = 1) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONSAFEPATH": "1"}


def call(
    arguments: list[str], processes: int = 1, threads: int = 1
) -> subprocess.CompletedProcess[str]:
    launcher = ["common.launch", f"{processes}"] if processes > 1 else []
    return subprocess.run(
        [sys.executable, "-m", *launcher, "evaluate", *arguments],
        capture_output=True,
        text=True,
        env=environment(threads),
        check=False,
    )


def files(root: Path) -> dict[str, bytes]:
    """The dataset's bytes, journals and staging left out."""
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in root.rglob("*")
        if path.is_file() and path.relative_to(root).parts[0] not in ("status", ".tmp")
    }


@pytest.mark.full
def test_the_dataset_does_not_depend_on_the_number_of_processes_or_threads(
    command: Callable[..., list[str]], tmp_path: Path
) -> None:
    more = ["--variations", "3"]  # 186 images: units of 128 and 58
    alone = call(command("alone", *more), threads=2)
    assert alone.returncode == 0, alone.stderr
    done = call(command("shared", *more), processes=2)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("generate: made 186 images") == 1
    assert files(tmp_path / "alone") == files(tmp_path / "shared")
    assert len(list((tmp_path / "shared/status/tile").glob("*.jsonl"))) == 2


@pytest.mark.full
def test_kill_9_loses_no_committed_unit_and_makes_none_twice(
    command: Callable[..., list[str]], tmp_path: Path
) -> None:
    arguments = command("killed", "--variations", "4", "--steps", "4")  # 248 images
    python = [sys.executable, "-m", "evaluate", *arguments]
    with subprocess.Popen(python, env=environment(), stdout=subprocess.DEVNULL) as running:
        dataset = Dataset(tmp_path / "killed")
        deadline = time.monotonic() + 120
        while not read_journal(dataset, "tile"):
            assert running.poll() is None, "it ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.01)
        running.send_signal(signal.SIGKILL)
        running.wait()
    stood = sum(entry.counts["tiles"] for entry in read_journal(dataset, "tile"))
    assert stood == 128
    again = call(arguments, threads=2)
    assert again.returncode == 0, again.stderr
    assert "128 of 248 images are done; making the other 120" in again.stdout
    spans = [(entry.start, entry.stop) for entry in read_journal(dataset, "tile")]
    assert spans == [(0, 128), (128, 248)]
    assert call(command("whole", "--variations", "4", "--steps", "4")).returncode == 0
    assert files(tmp_path / "killed") == files(tmp_path / "whole")


@pytest.mark.full
def test_one_failing_process_speaks_for_all(
    command: Callable[..., list[str]], tmp_path: Path
) -> None:
    assert main(command("twice", "--limit", "16")) == 0
    done = call(command("twice", "--limit", "16", "--seed", "1"), processes=2)
    assert done.returncode != 0
    assert done.stderr.count("seed is 0 in this dataset, 1 was asked for") == 1


@pytest.fixture
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
def test_images_are_those_of_the_model_itself(
    command: Callable[..., list[str]], model: Path, real: Dataset, tmp_path: Path
) -> None:
    assert main(command("syn", "--seed", "3")) == 0
    dataset = Dataset(tmp_path / "syn")
    rows = read_candidates(dataset, "gen-00000").to_pylist()
    store = FeatureStore(real, tile_px=_PX, encoder="h0-mini")
    features = np.stack(
        [store.read(row["source_slide_id"], [row["source_rank"]])[0] for row in rows]
    )
    expected = CytoSyn.from_pretrained(model).generate(
        features[:32], num_inference_steps=2, seed=3, batch_size=16
    )
    tiles = np.stack(TileStore(dataset, _PX).read("gen-00000", range(32)))
    assert (tiles == expected).all()
    assert len(np.unique(tiles.reshape(32, -1), axis=0)) == 32


def test_other_batch_shapes_move_hardly_a_grey_level(
    command: Callable[..., list[str]], tmp_path: Path
) -> None:
    tiles = []
    for batch in ("16", "5"):
        assert main(command(f"b{batch}", "--batch", batch)) == 0
        dataset = Dataset(tmp_path / f"b{batch}")
        tiles.append(np.stack(TileStore(dataset, _PX).read("gen-00000", range(62))).astype(int))
    difference = np.abs(tiles[0] - tiles[1])
    assert difference.max() <= 1
    assert (difference > 0).mean() < 1e-3


def test_the_identity_says_how_the_images_were_drawn(
    command: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command("syn", "--limit", "16", "--solver", "heun", "--scale", "1.5")) == 0
    identity = read_identity(Dataset(tmp_path / "syn"))
    expected = {
        "solver": "heun",
        "steps": 2,
        "guidance_scale": 1.5,
        "guidance_low": 0.0,
        "guidance_high": 0.75,
        "compute_dtype": "float32",
        "micro_batch": 16,
        "mpp": 0.5,
        "tile_px": _PX,
        "guidance_encoder_sha256": RECORD["weights_sha256"],
    }
    assert {key: identity[key] for key in expected} == expected
    assert len(identity["model_sha256"]) == 64
    assert "RANDOM weights" in capsys.readouterr().out


def test_unconditional_images(command: Callable[..., list[str]], tmp_path: Path) -> None:
    arguments = command("syn")
    arguments = [arguments[0], *arguments[5:], "--unconditional", "--count", "20"]
    assert main(arguments) == 0
    dataset = Dataset(tmp_path / "syn")
    assert read_selection(dataset, "generated").rows == 20
    assert len(set(tile_hashes(dataset).values())) == 20
    assert read_identity(dataset)["guidance"] == "none"


def test_features_that_the_model_was_not_trained_on_need_force(
    command: Callable[..., list[str]], tmp_path: Path
) -> None:
    record = {**_RECORD, "weights_sha256": "c" * 64, "weights": "hub", "random_weights": False}
    other = make_real(tmp_path / "other", record=record)
    arguments = command("syn", "--limit", "16")
    arguments[2] = str(other.root)
    with pytest.raises(UserError, match="--force"):
        main(arguments)
    assert not (tmp_path / "syn").exists()
    assert main([*arguments, "--force"]) == 0
    assert "trained on" in read_identity(Dataset(tmp_path / "syn"))["forced_guidance"]


def test_generate_measure_report(
    command: Callable[..., list[str]], real: Dataset, tmp_path: Path
) -> None:
    assert main(command("syn")) == 0
    syn, results = tmp_path / "syn", tmp_path / "results.json"
    measure = ["measure", "--real", str(real.root), "--real-selection", "train"]
    measure += ["--generated", str(syn), "--out", str(results)]
    with pytest.raises(UserError, match="python -m pipeline cache --dataset"):
        main(measure)
    write_features(Dataset(syn), {"gen-00000": random_features("x", 62)}, _RECORD)
    assert main(measure) == 0
    assert read_results(results)["sampler"]["steps"] == 2
    report = ["report", "--results", str(results), "--dataset", str(real.root)]
    report += ["--generated", str(syn), "--out", str(tmp_path / "report.html")]
    assert main(report) == 0
    assert "sde, 2 steps" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--steps", "0"], "--steps is 0; expected a whole number of 1 or more"),
        (["--batch", "-1"], "--batch is -1"),
        (["--high", "2"], r"guidance interval is \[0.0, 2.0\]"),
        (["--count", "4"], "--count belongs to --unconditional"),
        (["--unconditional"], "exclude each other"),
        (["--selection", "absent"], "no selection 'absent'"),
        (["--encoder", "uni2-h"], "python -m pipeline cache"),
        (["--model", "/nowhere"], "no such folder"),
        (["--guidance", "/nowhere"], "no dataset at /nowhere"),
    ],
)
def test_mistakes_are_named(
    command: Callable[..., list[str]], tmp_path: Path, more: list[str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        main(command("syn", *more))
    assert not (tmp_path / "syn").exists()


def test_a_seed_out_of_range_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    absent = ["--real", "/absent", "--real-selection", "a", "--generated", "/absent"]
    for seed in ("-1", str(2**32)):
        with pytest.raises(UserError, match=f"seed is {seed}; expected a whole number from 0 to"):
            main(["measure", *absent, "--seed", seed])


@pytest.mark.parametrize("arguments", [
    ["protocol", "table2", "dataset=/absent"],
    ["measure", "--real", "/absent", "--real-selection", "a", "--generated", "/absent"],
])  # fmt: skip
def test_many_processes_do_not_all_measure(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="runs in one process, not in 2"):
        main(arguments)
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit) as left:
        main(arguments)
    assert left.value.code == 2


def test_an_image_as_large_as_a_slide_is_one_line(tmp_path: Path) -> None:
    header = struct.pack(">IIBBBBB", 40_000, 30_000, 8, 2, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n"
    for chunk in (b"IHDR" + header, b"IDAT" + zlib.compress(b"")):
        png += struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    (tmp_path / "slide.png").write_bytes(png)
    with pytest.raises(UserError, match=r"slide.png is far larger than a tile of 32 px"):
        read_image(tmp_path / "slide.png", Wanted(32, 0.5))


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
@pytest.mark.full
def test_a_missing_gpu_is_one_line_and_status_2(command: Callable[..., list[str]]) -> None:
    done = call(command("syn", "--device", "cuda"))
    assert done.returncode == 2
    assert done.stderr.startswith("error: --device cuda: process 0 of this machine needs a GPU")
    assert done.stderr.count("\n") == 1
