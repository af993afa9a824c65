"""What the previous version has made, this version reads, resumes and extends, byte for byte.

The state is made by the code of commit 321909e: two datasets of the committed slide, with PNG and
Zarr shards, a training run that goes on, an exported model, generated images and their results.
Copies of it are then continued by that code and by this code, at the same path one after the
other, since files hold paths. Afterwards every file is the same, and so is what the journals say.
"""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

pytestmark = [
    pytest.mark.full,  # about 200 seconds of CPU time, most of it the encoder's
    pytest.mark.timeout(3600),
]

ROOT = Path(__file__).resolve().parents[2]
PREVIOUS = "321909ea6ea6232b8009d4cef0b607f27006697d"
RUNNER = Path(__file__).with_name("run_commands.py")
SLIDE = ROOT / "tests" / "data" / "slides" / "CMU-1-Small-Region.svs"

SMALL_MODEL = """
run: {device: cpu}
data: {tile_px: 224, encoder: h0-mini, selection: train, batch_size: 2, cursors: 2, threads: 1}
model:
  sit:
    {latent_size: 28, hidden_size: 32, depth: 2, num_heads: 2, encoder_depth: 1, projector_dim: 24}
  vae: {base_channels: 4, channel_multipliers: [1, 1, 2, 2], num_res_blocks: 1, norm_groups: 2}
  discriminator: {base_channels: 4}
loss: {perceptual_weights: none}
ema: {sit: 0.9, vae: 0.8}
log: {every: 1, tensorboard: false, samples_every: 2, samples: 2, sample_steps: 2, fixed_tiles: 2}
checkpoint: {every: 1, keep: 2}
export: {sit: ema, vae: ema}
"""

Command = list[str]


def stage(name: str, dataset: str, *arguments: str) -> Command:
    return ["pipeline", name, "--dataset", dataset, *arguments]


def first_stages(dataset: str, *tile: str) -> list[Command]:
    return [
        stage("scan", dataset, "slides", "--workers", "1"),
        stage("tissue", dataset, "--workers", "1"),
        stage("select", dataset, "--name", "train", "--tiles", "12"),
        stage("tile", dataset, "--selection", "train", "--workers", "1", *tile),
    ]


def features(dataset: str, *arguments: str) -> Command:
    encoder = ("--encoder", "h0-mini", "--weights", "random:0", "--workers", "1")
    return stage("cache", dataset, *encoder, "--device", "cpu", *arguments)


def model_commands(steps: int, images: int, selection: str) -> list[Command]:
    """Train to a step, export, generate so many images, measure and report."""
    model, synthetic, results = f"model-{steps}", "synthetic", f"results-{images}.json"
    return [
        ["train", "--config", "small.yaml", "data.dataset=dataset", "run.dir=run",
         f"run.steps={steps}"],
        ["train", "export", "run", model],
        ["evaluate", "generate", "--model", "model-2", "--guidance", "dataset",
         "--selection", "train", "--limit", str(images // 2), "--variations", "2",
         "--steps", "2", "--batch", "2", "--out", synthetic, "--device", "cpu"],
        features(synthetic, "--tokens", "none"),
        ["evaluate", "measure", "--real", "dataset", "--real-selection", selection,
         "--generated", synthetic, "--encoder", "h0-mini", "--out", results],
        ["evaluate", "report", "--results", results, "--run", "run", "--dataset", "dataset",
         "--generated", synthetic, "--out", f"report-{images}.html"],
    ]  # fmt: skip


BUILD = [
    *first_stages("dataset"),
    features("dataset", "--selection", "train"),
    *first_stages("zarr", "--format", "zarr"),
    *model_commands(steps=2, images=16, selection="train"),
]
# This version scans more of a slide and detects tissue otherwise: what comes after goes on.
RERUN = [command for command in BUILD if command[1] not in ("scan", "tissue")]
EXTEND = [
    *(
        command
        for dataset, form in (("dataset", "png"), ("zarr", "zarr"))
        for command in (
            stage("select", dataset, "--name", "more", "--tiles", "30"),
            stage("tile", dataset, "--workers", "1", "--format", form),
        )
    ),
    features("dataset"),
    *model_commands(steps=4, images=24, selection="more"),
    stage("prune", "zarr", "--keep-selection", "train", "--yes"),
    stage("verify", "zarr"),
    stage("verify", "dataset"),
    stage("report", "dataset"),
]


@dataclass(frozen=True)
class Result:
    """What one command line did."""

    command: Command
    status: int
    output: str


def run_commands(tree: Path, folder: Path, commands: Sequence[Command]) -> list[Result]:
    """Run command lines with the code of `tree` in `folder`; all must succeed."""
    listing, report = folder.parent / "commands.json", folder.parent / "report.json"
    listing.write_text(json.dumps(commands))
    environment = {
        **os.environ, "PYTHONPATH": str(tree), "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
    }  # fmt: skip
    arguments = [sys.executable, str(RUNNER), str(tree), str(listing), str(report)]
    done = subprocess.run(
        arguments, cwd=folder, env=environment, capture_output=True, text=True, timeout=1500
    )
    assert done.returncode == 0, done.stderr[-3000:]
    results = [Result(**result) for result in json.loads(report.read_text())]
    assert results[-1].status == 0, f"{results[-1].command}\n{results[-1].output[-3000:]}"
    assert len(results) == len(commands)
    return results


def previous_tree(folder: Path) -> Path:
    """The previous version's files, or a skip where the history does not hold them."""
    archive = subprocess.run(
        ["git", "-C", str(ROOT), "archive", "--format=tar", PREVIOUS], capture_output=True
    )
    if archive.returncode:
        pytest.skip(f"the git history here has no commit {PREVIOUS[:8]}")
    folder.mkdir()
    subprocess.run(["tar", "x", "-C", str(folder)], input=archive.stdout, check=True)
    return folder


def digests(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@dataclass(frozen=True)
class Continued:
    """The previous version's state as it was, run again, and extended by one code."""

    folder: Path
    start: dict[str, str]
    rerun: dict[str, str]
    end: dict[str, str]
    rerun_results: list[Result]


def continue_state(tree: Path, start: Path, state: Path, folder: Path) -> Continued:
    """Run every command again, then extend, in a copy at `state` that ends up in `folder`."""
    shutil.copytree(start, state)  # keeps the slide's modification time, which fingerprints have
    rerun_results = run_commands(tree, state, RERUN)
    rerun = digests(state)
    run_commands(tree, state, EXTEND)
    state.rename(folder)
    return Continued(folder, digests(start), rerun, digests(folder), rerun_results)


@pytest.fixture(scope="module")
def continued(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Continued]:
    work = tmp_path_factory.mktemp("compatibility")
    previous = previous_tree(work / "previous-tree")
    state, start = work / "state", work / "start"
    (state / "slides").mkdir(parents=True)
    shutil.copy(SLIDE, state / "slides")
    (state / "small.yaml").write_text(SMALL_MODEL)
    run_commands(previous, state, BUILD)
    state.rename(start)
    results = {
        name: continue_state(tree, start, state, work / name)
        for name, tree in (("previous", previous), ("current", ROOT))
    }
    shutil.copytree(start, state)
    return results


TIMES = {
    "seconds", "images_per_s", "data_wait_s", "tflop_per_s", "mfu", "memory_gb", "time", "crc",
    "config_sha256",
}  # fmt: skip
"""Keys of records that no two executions share; the configuration has more keys than before."""
TIMED_FILES = re.compile(
    r"run/(metrics\.jsonl|summary\.json|\.lock|checkpoints/step-\d+/state\.json)|results-\d+\.json"
)


def without_times(value: Any) -> Any:
    """A record without what times it, at any depth, and without the wording of warnings."""
    if isinstance(value, dict):
        dropped = TIMES | ({"message"} if "code" in value else set())
        return {key: without_times(item) for key, item in value.items() if key not in dropped}
    return [without_times(item) for item in value] if isinstance(value, list) else value


GROWN = {
    "synthetic/slides.parquet": lambda path: pq.read_table(path).to_pylist(),
    "run/config.yaml": lambda path: yaml.safe_load(path.read_text()),
    "run/records.json": lambda path: without_times(json.loads(path.read_text())),
    # A comment in it says what it was made from.
    "dataset/report/thumbs/CMU-1-Small-Region.jpg": lambda path: np.asarray(
        Image.open(path)
    ).tolist(),
}
"""Files with more columns, keys or comments than before, and how they are read."""


def known_before(value: Any, previous: Any) -> Any:
    """A record without the keys that the previous version does not write, at any depth.

    `noise_floor` is float32's, and was another in the fifth digit with other numbers of threads.
    """
    if isinstance(value, dict) and isinstance(previous, dict):
        known = {key: known_before(value[key], previous[key]) for key in value if key in previous}
        if "noise_floor" in known and known["noise_floor"] == pytest.approx(
            previous["noise_floor"], rel=1e-4
        ):
            known["noise_floor"] = previous["noise_floor"]
        return known
    if isinstance(value, list) and isinstance(previous, list) and len(value) == len(previous):
        return [known_before(*pair) for pair in zip(value, previous, strict=True)]
    return value


def read_records(path: Path) -> list[Any]:
    """The records of a JSON file, or of each line of a journal."""
    lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
    return [without_times(json.loads(line)) for line in lines]


def read_journals(folder: Path) -> dict[str, list[list[Any]]]:
    """The records of each journal by stage of each dataset, oldest first."""
    journals: dict[str, list[list[Any]]] = {}
    for path in sorted(folder.glob("*/status/*/*.jsonl")):
        stage = path.parent.relative_to(folder).as_posix()
        journals.setdefault(stage, []).append(read_records(path))
    return journals


def product_files(files: dict[str, str]) -> dict[str, str]:
    """Files that hold neither times nor a page's wording, with their sums."""
    return {
        name: digest
        for name, digest in files.items()
        if "/status/" not in name and not name.endswith(".html") and not TIMED_FILES.match(name)
    }


def test_what_is_done_is_left_alone(continued: dict[str, Continued]) -> None:
    current = continued["current"]
    changed = {name for name in current.start if current.rerun.get(name) != current.start[name]}
    new = current.rerun.keys() - current.start.keys()
    # The results of `measure` say how long it took, and pages are worded anew; journals and logs
    # are not even begun. Each stage keeps a copy of dataset.json, and a small picture says what it
    # was made from. The former code wrote no cards.
    again = re.compile(
        r"results-.*|.*\.html|.*/status/\w+/dataset\.json|.*/thumbs/.*\.jpg|.*/README\.md"
    )
    assert {name for name in changed | new if not again.fullmatch(name)} == set()
    for result in current.rerun_results:
        if result.command[0] == "pipeline":
            assert "already done, nothing to redo" in result.output, result


def test_the_extension_is_the_same_in_every_byte(continued: dict[str, Continued]) -> None:
    previous, current = (product_files(continued[name].end) for name in ("previous", "current"))
    current = {name: sum_ for name, sum_ in current.items() if not name.endswith("/README.md")}
    assert current.keys() == previous.keys()
    changed = {name for name in previous if current[name] != previous[name]}
    assert changed == set(GROWN)
    extended = previous.keys() - continued["current"].start.keys()
    for part in ("dataset/tiles", "zarr/selections", "dataset/features", "run/checkpoints",
                 "model-4", "synthetic/tiles", "synthetic/features"):  # fmt: skip
        assert any(name.startswith(part) for name in extended), part


def test_files_that_grew_say_what_they_said(continued: dict[str, Continued]) -> None:
    for name, read in GROWN.items():
        previous, current = (read(continued[code].folder / name) for code in continued)
        assert known_before(current, previous) == previous, name


def test_slides_that_are_scanned_again_keep_what_was_cut_from_them(
    continued: dict[str, Continued],
) -> None:
    work = continued["current"].folder.parent
    state, start = work / "state", continued["current"].start  # a copy that is not continued yet
    scans = [command for command in BUILD if command[1] == "scan"]
    later = [command for command in RERUN if command[0] == "pipeline"]
    for result in run_commands(ROOT, state, [*scans, *later])[len(scans) :]:
        assert "already done, nothing to redo" in result.output, result
    again = digests(state)
    made = [name for name in start if re.match(r"[^/]+/(tiles|features|candidates|tissue)/", name)]
    assert len(made) > 15
    assert [name for name in made if again.get(name) != start[name]] == []


def test_tissue_of_the_former_detector_is_refused_and_kept(
    continued: dict[str, Continued],
) -> None:
    state = continued["current"].folder.parent / "state"
    before = digests(state)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONSAFEPATH": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "pipeline", "tissue", "--dataset", "dataset", "--workers", "1"],
        cwd=state, env=environment, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 2, done.stdout + done.stderr
    assert "detector" in done.stderr
    assert digests(state) == before


def test_timed_files_differ_in_times_alone(continued: dict[str, Continued]) -> None:
    names = [
        name
        for name in continued["previous"].end
        if TIMED_FILES.match(name) and not name.endswith(".lock")
    ]
    assert len(names) >= 6
    for name in names:
        previous, current = (read_records(continued[code].folder / name) for code in continued)
        assert known_before(current, previous) == previous, name


def test_journals_say_the_same(continued: dict[str, Continued]) -> None:
    previous, current = (read_journals(continued[name].folder) for name in ("previous", "current"))
    assert {"dataset/status/cache", "zarr/status/tile", "synthetic/status/generate"} <= set(
        previous
    )
    for journals in (previous, current):
        for record in chain.from_iterable(journals["synthetic/status/generate"]):
            for file in record.get("files", ()):
                if file["path"] == "slides.parquet":  # which has more columns, see `GROWN`
                    del file["bytes"], file["sha256"]
    assert current.keys() == previous.keys()
    assert known_before(current, previous) == previous


def test_pages_show_the_same_pictures(continued: dict[str, Continued]) -> None:
    for page in ("report-16.html", "report-24.html", "dataset/report/index.html"):
        previous, current = (
            re.findall(r"data:[^\"')]+", (continued[code].folder / page).read_text())
            for code in continued
        )
        assert previous, page
        assert current == previous, page
